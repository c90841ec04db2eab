"""Which modules of a model may quantize what they give: found by trial in one run of it.

No table of classes: a norm is one that gives, bit for bit, what one of the known formulas gives,
and a gated MLP one whose children's outputs say so. Where that need not be exact, a layer norm and
the activation of a gate are those that give the same but for a rounding. All of it in evaluation
mode, and without gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from qkernels import compiled, ops
from qkernels.backends.cpu import best_isa, layer_norm_rows, norm_rows, product_rows
from qkernels.layouts import VNNI
from qkernels.modules import WQLinear
from qkernels.modules.fused import FusedPart
from qkernels.modules.producers import (
    AnyNorm,
    Gate,
    GateForm,
    LayerNorm,
    Norm,
    NormForm,
    Producer,
    Reader,
    version_of,
)


@dataclass(frozen=True)
class Call:
    """A call of a module in the run.

    Attributes:
        version: of the output when it was given.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    version: int


class Calls:
    """The calls of some modules, in the order in which they ended.

    Attributes:
        of: by the module's id.
        readers: the layers that each tensor was given to, by its id, with its version then.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.of: dict[int, list[Call]] = {}
        self.readers: dict[int, list[tuple[WQLinear, int]]] = {}
        self._hooks = [
            module.register_forward_hook(self._note, with_kwargs=True) for module in modules
        ]

    def _note(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        # The tensors are held, so that no two of them are one by chance.
        version = version_of(output) if isinstance(output, Tensor) else 0
        self.of.setdefault(id(module), []).append(Call(module, args, kwargs, output, version))
        if isinstance(module, WQLinear) and args and isinstance(args[0], Tensor):
            readers = self.readers.setdefault(id(args[0]), [])
            readers.append((module, version_of(args[0])))

    def end(self) -> None:
        """Notes no more."""
        for hook in self._hooks:
            hook.remove()

    def once(self, module: nn.Module | None) -> Call | None:
        """The one call of a module, or None."""
        calls = self.of.get(id(module), [])
        return calls[0] if len(calls) == 1 else None


def is_producer(module: nn.Module) -> bool:
    """Whether a module quantizes what it gives already."""
    return isinstance(getattr(vars(module).get("forward"), "__self__", None), Producer)


def may_be_norm(module: nn.Module) -> bool:
    """Whether a module has a weight [K], and nothing in it."""
    weight = module._parameters.get("weight")
    fits = weight is not None and weight.dim() == 1 and not module._modules
    return fits and not is_producer(module)


def gate_children(module: nn.Module) -> tuple[list[str], list[str]]:
    """The names of a module's quantized layers, and of those that may be its activation."""
    layers = [name for name, child in module._modules.items() if isinstance(child, WQLinear)]
    acts = [
        name
        for name, child in module._modules.items()
        if child is not None
        and not child._modules
        and not child._parameters
        and not isinstance(child, WQLinear)
    ]
    return layers, acts


def may_be_gate(module: nn.Module) -> bool:
    """Whether a module has the children of a gated MLP."""
    layers, acts = gate_children(module)
    return len(layers) in (2, 3) and bool(acts) and not is_producer(module)


def quantizes_to_int8(layer: WQLinear) -> bool:
    """Whether a layer's x becomes int8."""
    return layer.scheme.activation.dtype == "int8"


def why_not_read(layer: WQLinear, calls: Calls) -> str | None:
    """Why a layer cannot take rows that were quantized before it, or None."""
    problem = compiled.problem()
    if problem is not None:
        return problem
    if type(layer) not in (WQLinear, FusedPart):
        return f"a {type(layer).__name__} reads it"
    if layer.packed.layout is not VNNI:
        return f"only weights in the {VNNI.name} layout, that of the CPU, read such rows"
    if calls.once(layer) is None:
        return "a layer that reads it runs more than once"
    return ops.why_not_per_token(ops.PackedSpec.parse(layer._spec))


def _why_not_replaced(call: Call, calls: Calls) -> str | None:
    """Why a module cannot be given another forward, or None."""
    if calls.once(call.module) is None:
        return "it runs more than once"
    if "forward" in vars(call.module):
        return "its forward has been replaced"
    if len(call.args) != 1 or call.kwargs:
        return "it takes more than x"
    return None


def make_norm(
    name: str,
    call: Call,
    readers: Callable[[Sequence[WQLinear]], list[Reader]],
    calls: Calls,
    exact: bool,
) -> AnyNorm | str | None:
    """A norm that quantizes what it gives; why it does not; or None where no int8 layer reads it.

    Args:
        readers: what stands for some layers: groups, or themselves.
        exact: whether it must give the same bits.
    """
    if not isinstance(call.output, Tensor):
        return None
    read = calls.readers.get(id(call.output), [])
    if not any(quantizes_to_int8(layer) for layer, _ in read):
        return None
    if any(version != call.version for _, version in read):
        return "its output is written to before it is read"
    reasons = {layer: why_not_read(layer, calls) for layer, _ in read if quantizes_to_int8(layer)}
    takes = [layer for layer, reason in reasons.items() if reason is None]
    if not takes:
        return next(reason for reason in reasons.values() if reason is not None)
    form = _form_of_norm(call, calls, exact)
    if isinstance(form, str):
        return form
    if isinstance(form, NormForm):
        return Norm(name, call.module, readers(takes), form)
    return LayerNorm(name, call.module, readers(takes), form.epsilon)


@dataclass(frozen=True)
class _LayerNormForm:
    epsilon: str


def _form_of_norm(call: Call, calls: Calls, exact: bool) -> NormForm | _LayerNormForm | str:
    module = call.module
    reason = _why_not_replaced(call, calls)
    if reason is not None:
        return reason
    x, weight = call.args[0], module._parameters["weight"]
    assert weight is not None
    held = {**module._parameters, **module._buffers}
    parts = {name: tensor for name, tensor in held.items() if tensor is not None}
    names = set(parts)
    if exact and names != {"weight"}:
        return "it has more than a weight"
    if not names <= {"weight", "bias"}:
        return "it has more than a weight and a bias"
    if x.device.type != "cpu":
        return "it is not on the CPU"
    types = {x.dtype, call.output.dtype, *(part.dtype for part in parts.values())}
    if len(types) > 1:
        return "its weight, what it is given and what it gives are not of one type"
    trial = copy.copy(module)
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(x.dtype)

    k = weight.shape[0]
    # A weight of ones, as new models have, would not tell one formula from another.
    trial._parameters = {
        name: nn.Parameter(drawn(k), requires_grad=False) if name in names else None
        for name in module._parameters
    }
    inputs = [x.detach(), drawn(1, k), drawn(7, k) * 30, drawn(3, 5, k) * 1e-3, drawn(130, k)]
    try:
        wanted = [type(trial).forward(trial, each) for each in inputs]
    except Exception as error:  # any code of a model
        return f"it fails on other inputs: {error}"
    epsilons = [key for key, value in vars(module).items() if type(value) is float]
    for epsilon, (rounds_first, adds_one) in product(epsilons, product((True, False), repeat=2)):
        form = NormForm(epsilon, rounds_first, adds_one, x.dtype)
        if "bias" not in names and all(map(lambda a, b: _gives(form, trial, a, b), inputs, wanted)):
            return form
    if exact:
        return "it computes none of the known formulas, bit for bit"
    for epsilon in epsilons:
        if all(map(lambda a, b: _gives_layer_norm(epsilon, trial, a, b), inputs, wanted)):
            return _LayerNormForm(epsilon)
    return "it computes none of the known formulas"


def _gives(form: NormForm, module: nn.Module, x: Tensor, wanted: Tensor) -> bool:
    weight, epsilon = module._parameters["weight"], getattr(module, form.epsilon)
    assert weight is not None
    made = norm_rows(x, weight, epsilon, form.rounds_first, form.adds_one, best_isa())
    # No rows at all are made of x that does not lie as they need it.
    return made is not None and torch.equal(made[0], wanted)


def _gives_layer_norm(epsilon: str, module: nn.Module, x: Tensor, wanted: Tensor) -> bool:
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None
    made = layer_norm_rows(x, weight, bias, getattr(module, epsilon), best_isa())
    return made is not None and _rounds_otherwise(made[0], wanted)


def _rounds_otherwise(a: Tensor, b: Tensor) -> bool:
    """Whether numbers of one type differ by a rounding to it, and some of fp32."""
    slack = torch.finfo(b.dtype).eps * b.double().abs() + 2**-18 * b.double().abs().amax()
    return a.shape == b.shape and bool(((a.double() - b.double()).abs() <= slack).all())


def make_gate(
    name: str,
    call: Call,
    readers: Callable[[Sequence[WQLinear]], list[Reader]],
    calls: Calls,
    exact: bool,
) -> Gate | str | None:
    """A gated MLP that quantizes what its last layer reads; why it does not; or None where that
    layer does not quantize it, or is none of its own. Arguments as of `make_norm`.
    """
    module = call.module
    layers, acts = gate_children(module)
    down = next((n for n in layers if _once(module, n, calls, gives=call.output)), None)
    if down is None:
        return None
    layer = module._modules[down]
    assert isinstance(layer, WQLinear)
    others = [n for n in layers if n != down]
    if not quantizes_to_int8(layer) or not _are_gates(module, others, layer.in_features):
        return None
    reason = why_not_read(layer, calls) or _why_not_replaced(call, calls)
    if reason is not None:
        return reason
    for act in acts:
        form = _form_of_gate(call, calls, others, act, down)
        if form is None:
            continue
        gate = Gate(name, module, readers([layer]), form)
        if _same_on_other_inputs(gate, call.args[0]):
            if not exact:
                gate.kind = _kind_of_act(module._modules[act], call.output.dtype)
            return gate
        gate.dissolve()
    return "it does not compute down(act(gate(x)) * up(x)), bit for bit"


def _kind_of_act(act: nn.Module | None, dtype: torch.dtype) -> str:
    """The gate that an activation is, but for a rounding, or "product" for one of another kind."""
    assert act is not None
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.linspace(-12, 12, 960), torch.randn(320, generator=generator)])
    x = x.view(2, -1).to(dtype)
    wanted = act(x)
    # That of the error function takes longer than torch's and a product: docs/cpu.md.
    for kind in ("silu_mul", "gelu_tanh_mul"):
        made = product_rows(x, torch.ones_like(x), best_isa(), kind)
        if made is not None and wanted.dtype is dtype and _rounds_otherwise(made[0], wanted):
            return kind
    return "product"


def _once(
    module: nn.Module, name: str, calls: Calls, gives: Any = None, given: Any = None
) -> Call | None:
    """The one call of a child, if it was given or gave this very tensor."""
    call = calls.once(module._modules[name])
    if call is None or len(call.args) != 1 or call.kwargs:
        return None
    fits = (gives is None or call.output is gives) and (given is None or call.args[0] is given)
    return call if fits else None


def _are_gates(module: nn.Module, names: list[str], width: int) -> bool:
    """Whether layers give a gate and what it gates, `width` each: two, or one that gives both."""
    widths = [getattr(module._modules[name], "out_features", None) for name in names]
    return widths in ([width, width], [2 * width])


def _form_of_gate(
    call: Call, calls: Calls, others: list[str], act: str, down: str
) -> GateForm | None:
    module, x = call.module, call.args[0]
    opened, last = _once(module, act, calls), _once(module, down, calls)
    first = [_once(module, name, calls, given=x) for name in others]
    if opened is None or last is None or None in first:
        return None
    outputs = [each.output for each in first if each is not None]
    gated, given = opened.args[0], last.args[0]
    width = given.shape[-1]
    if len(others) == 2:
        forms = [
            (GateForm(gate, up, act, down, width), outputs[1 - place])
            for place, (gate, up) in enumerate((others, others[::-1]))
            if gated is outputs[place]
        ]
    else:
        halves = outputs[0].chunk(2, dim=-1)
        forms = [
            (GateForm(others[0], None, act, down, width, place == 0), halves[1 - place])
            for place in (0, 1)
            if _same_memory(gated, halves[place])
        ]
    for form, upper in forms:
        if upper.dtype is given.dtype and torch.equal(opened.output * upper, given):
            return form
    return None


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())


def _same_on_other_inputs(gate: Gate, x: Tensor) -> bool:
    """Whether a module gives what it did, also for other x than that of the run, and larger; and
    leaves x as it is.
    """
    module, generator = gate.module, torch.Generator().manual_seed(0)
    rows = torch.randn(9, x.shape[-1], generator=generator).to(x.dtype)
    for each in (x.detach(), *(rows * factor for factor in (0.1, 1, 30))):
        given = each.clone()
        try:
            wanted = type(module).forward(module, given)
        except Exception:  # any code of a model
            return False
        if not torch.equal(given, each) or not torch.equal(gate.gated(each), wanted):
            return False
    return True
