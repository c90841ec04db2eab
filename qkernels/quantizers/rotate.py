"""Rotations fused into the weights, after which columns have no outliers and rounding costs less.

    x W^T = (x Q) (W Q)^T,    Q Q^T = I

R1 turns the residual stream: embeddings and whatever writes to the stream give x Q, and what reads
it has W Q for W. A norm commutes with Q where its weight is 1, so that weight goes into the linear
layers behind it. A norm that takes means away commutes with a Q that leaves the ones as they are.
R2 turns the values of each head, which the output projection turns back. Q is a randomized Hadamard
matrix (`hadamard.py`), which spreads an outlier over all columns (Ashkboos et al. 2024, QuaRot;
R1 and R2 are named as by Liu et al. 2024, SpinQuant). The model is a plain one, and computes the
same.

Who writes and reads is found by running the model (`calibration/residual.py`), and each part of it
is run in fp32 with what came of it: a model that these rotations do not fit is refused before
anything is quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qkernels.calibration.blocks import find_blocks
from qkernels.calibration.neighbours import with_parameters
from qkernels.calibration.parts import Outputs, Part, modules_not_run, row_error, take_apart
from qkernels.calibration.residual import (
    Heads,
    Roles,
    heads_of,
    neighbours_of,
    stream_roles,
    turned_heads,
)
from qkernels.errors import LayerError
from qkernels.modules.experts import expert_name, fused_experts
from qkernels.modules.kinds import is_conv1d
from qkernels.quantizers.hadamard import Rotation
from qkernels.quantizers.linear_forms import LinearForms
from qkernels.quantizers.method import Method, ModelTask, check_seed
from qkernels.quantizers.probe import few_tokens

_SAME = 2**-10
"""|difference| / |row| between a part before and after, in fp32. What is found to be wrong is wrong
by far more, and a row of large cancellation by this much at most."""

Change = Callable[[Tensor], Tensor]
"""Of a parameter in fp64."""


@dataclass(frozen=True)
class RotateParameters:
    """Attributes:
    r1: turn the residual stream.
    r2: turn the values of each head.
    seed: of the signs.
    """

    r1: bool = True
    r2: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.r1 or self.r2):
            raise ValueError("r1 and r2 are both false: nothing is left to rotate")
        check_seed(self.seed)


def _prepare_model(task: ModelTask, parameters: RotateParameters) -> None:
    model = task.model
    # Every layer is rotated, those that stay in 16 bits too.
    forms = LinearForms(model, _in_other_forms(model))
    try:
        rotated = _Rotating(task, parameters).values()
    finally:
        forms.undo()
    for name, values in _as_held(model, rotated):
        task.rewrite(name, values)


def _in_other_forms(model: nn.Module) -> list[str]:
    """Linear layers that are no nn.Linear."""
    names = [name for name, module in model.named_modules() if is_conv1d(module)]
    for stack, fused in fused_experts(model).items():
        if fused.why_not() is None:
            names += [f"{stack}.{expert_name(n)}" for n in range(len(fused.parameter))]
    return names


def _as_held(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Weights of linear layers as the model has them where those are in other forms."""
    fused = fused_experts(model)
    stacks: dict[str, dict[str, Tensor]] = {}
    for name, own in values.items():
        layer = name.removesuffix(".weight")
        stack = layer.rpartition(".")[0]
        if stack in fused:
            entry = own.t() if fused[stack].transposed else own
            stacks.setdefault(stack, {})[layer] = entry
        elif layer != name and is_conv1d(model.get_submodule(layer)):
            yield name, own.t()
        else:
            yield name, own
    for stack, entries in stacks.items():
        numbers = range(len(fused[stack].parameter))
        yield stack, torch.stack([entries[f"{stack}.{expert_name(n)}"] for n in numbers])


class _Rotating:
    """What becomes of a model's parameters."""

    def __init__(self, task: ModelTask, parameters: RotateParameters) -> None:
        self._task, self._model, self._parameters = task, task.model, parameters
        self._generator = torch.Generator().manual_seed(parameters.seed)
        layers = [n for n, m in self._model.named_modules() if isinstance(m, nn.Linear)]
        self._blocks = [b.name for b in find_blocks(self._model, layers) if b.name not in layers]
        self._traced: dict[frozenset[tuple[str, torch.Size]], _Traced] = {}
        self._residual: Rotation | None = None

    def values(self) -> dict[str, Tensor]:
        """The new values of each parameter that changes, by name, rounded to its type."""
        if not self._blocks or "" in self._blocks:
            raise self._refusal("", "it has no repeated blocks")
        batch = few_tokens(self._task, "rotate")
        try:
            blocks, outside = take_apart(self._model, self._blocks, batch)
        except LayerError as error:
            raise self._refusal("", str(error)) from None
        traced: list[tuple[Part, _Traced]] = [(part, self._trace(part)) for part in blocks]
        if self._parameters.r2 and not any(found.heads for _, found in traced):
            raise LayerError(
                f"rotate finds no values in {type(self._model).__name__} whose heads could be "
                "turned: use rotate(r2=false)"
            )
        if self._parameters.r1:
            idle = modules_not_run(self._model, batch)
            if idle:
                raise self._refusal(
                    idle[0], "it does not run, so what it does to the residual stream is not known"
                )
            traced.append((outside, self._trace(outside)))
            norms = (norm for _, found in traced for norm in found.roles.norms)
            self._residual = Rotation.random(
                blocks[0].stream[0].shape[-1],
                self._generator,
                keep_ones=any(norm.subtracts_mean for norm in norms),
            )
        changes = [(part, found, self._changes(part, found)) for part, found in traced]
        self._untie([(part.module, name) for part, _, own in changes for name in own])
        rotated: dict[str, Tensor] = {}
        for part, found, own in changes:
            rotated |= self._apply(part, found, own)
        return rotated

    def _refusal(self, place: str, reason: str) -> LayerError:
        where = f" at {place}" if place else ""
        hint = "; rotate(r1=false) turns the values of heads alone" if self._parameters.r1 else ""
        return LayerError(
            f"rotate does not fit {type(self._model).__name__}{where}: {reason}{hint}"
        )

    def _trace(self, part: Part) -> _Traced:
        structure = frozenset((name, p.shape) for name, p in part.module.named_parameters())
        if structure in self._traced:
            return self._traced[structure]
        with part.alone():
            neighbours = neighbours_of(part)
            found = _Traced()
            if self._parameters.r1:
                try:
                    found.roles = stream_roles(part, neighbours)
                except LayerError as error:
                    raise self._refusal(part.name, str(error)) from None
            if self._parameters.r2 and part.name:
                found.heads = heads_of(part, neighbours, _some_turn)
        self._traced[structure] = found
        return found

    def _changes(self, part: Part, found: _Traced) -> dict[str, list[Change]]:
        """What is done to parameters of a part, by their names in it."""
        changes: dict[str, list[Change]] = {}
        if self._residual is not None:
            try:
                changes = _of_stream(part.module, found.roles, self._residual.apply)
            except LayerError as error:
                raise self._refusal(part.name, str(error)) from None
        for heads in found.heads:
            rotation = Rotation.random(heads.length, self._generator)
            for name, change in turned_heads(part.module, heads, rotation.apply).items():
                changes.setdefault(name, []).append(change)
        return changes

    def _untie(self, changed: Sequence[tuple[nn.Module, str]]) -> None:
        """Gives embeddings and heads of one weight each their own, as they become two."""
        own = {(id(_owner(module, name)), name.rpartition(".")[2]) for module, name in changed}
        users: dict[int, list[tuple[str, bool]]] = {}
        for name, module in self._model.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    use = f"{name}.{key}".lstrip("."), (id(module), key) in own
                    users.setdefault(id(parameter), []).append(use)
        for sharing in users.values():
            if len(sharing) == 1 or not any(turned for _, turned in sharing):
                continue
            names = [name for name, _ in sharing]
            in_blocks = any(n.startswith(f"{block}.") for n in names for block in self._blocks)
            if in_blocks or not all(turned for _, turned in sharing):
                raise self._refusal(
                    names[0], f"{' and '.join(names)} are one tensor, and not turned alike"
                )
            for name in names[1:]:
                self._task.changes.untie(name)

    def _apply(
        self, part: Part, found: _Traced, changes: Mapping[str, Sequence[Change]]
    ) -> dict[str, Tensor]:
        """The parameters of a part, rounded, after a run with the exact ones.

        Raises:
            LayerError: where the part does not compute what it did.
        """
        exact, rounded = {}, {}
        for name, own in changes.items():
            parameter = part.module.get_parameter(name)
            values = parameter.detach().double()
            for change in own:
                values = change(values)
            exact[name] = values.float()
            full = f"{part.name}.{name}".lstrip(".")
            rounded[full] = values.to(parameter.dtype)
            if not rounded[full].isfinite().all():
                raise LayerError(f"{full} has numbers beyond {parameter.dtype} when it is rotated")
        with part.alone():
            wanted = part.run()
            with with_parameters(part.module, exact):
                got = part.run(self._turn)
        error = _largest_error(got, wanted, self._turn)
        if not error <= _SAME:
            suspects = "".join(f"; {reason}" for reason in found.roles.suspects)
            raise self._refusal(
                part.name or "its embeddings, last norm and head",
                f"rotated, it would not compute the same (off by {error:.1e}){suspects}",
            )
        return rounded

    def _turn(self, x: Tensor) -> Tensor:
        return x if self._residual is None else self._residual.apply(x).float()


@dataclass
class _Traced:
    """What is known of a part, and of all that are built like it."""

    roles: Roles = field(default_factory=lambda: Roles((), (), ()))
    heads: Sequence[Heads] = ()


def _of_stream(module: nn.Module, roles: Roles, turn: Change) -> dict[str, list[Change]]:
    """What turns the stream of a part."""
    changes: dict[str, list[Change]] = {}

    def rows(w: Tensor) -> Tensor:
        return turn(w.t()).t()

    for norm in roles.norms:
        own = module.get_submodule(norm.name)._parameters
        weight, bias = own["weight"], own.get("bias")
        assert weight is not None
        gain = weight.detach().double() + norm.plus_one
        changes[f"{norm.name}.weight"] = [_fill(0.0 if norm.plus_one else 1.0)]
        if bias is not None:
            if bool((gain.abs() < 1e-6 * gain.abs().max()).logical_and(bias != 0).any()):
                raise LayerError(f"{norm.name} has a bias where its weight is zero")
            changes[f"{norm.name}.bias"] = [_divided(gain), turn]
        for consumer in norm.consumers:
            changes.setdefault(f"{consumer}.weight", []).extend((_times(gain), turn))
    for reader in roles.readers:
        changes.setdefault(f"{reader}.weight", []).append(turn)
    for writer in roles.writers:
        layer = module.get_submodule(writer)
        of_weight = turn if isinstance(layer, nn.Embedding) else rows
        changes.setdefault(f"{writer}.weight", []).append(of_weight)
        if layer._parameters.get("bias") is not None:
            changes.setdefault(f"{writer}.bias", []).append(turn)
    return changes


def _times(gain: Tensor) -> Change:
    return lambda weight: weight * gain


def _divided(gain: Tensor) -> Change:
    return lambda bias: torch.where(bias == 0, 0.0, bias / gain)


def _fill(value: float) -> Change:
    return lambda weight: torch.full_like(weight, value)


def _some_turn(x: Tensor) -> Tensor:
    """A rotation to find heads by."""
    generator = torch.Generator().manual_seed(0)
    return Rotation.random(x.shape[-1], generator).apply(x)


def _owner(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])


def _largest_error(got: Outputs, wanted: Outputs, turn: Change) -> float:
    pairs = [*zip(got.stream, map(turn, wanted.stream), strict=True)]
    pairs += zip(got.others, wanted.others, strict=True)
    return max(row_error(a, b) for a, b in pairs)


ROTATE = Method(
    name="rotate",
    title="outliers spread over all columns by rotations",
    parameters=RotateParameters,
    prepare_model=_prepare_model,
    rewrites_embeddings=lambda parameters: bool(parameters.r1),
)
