"""What of a model is quantized, and why the rest is not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedParameter

from qkernels.errors import LayerError
from qkernels.modules.awq import _AwqLinear
from qkernels.modules.experts import (
    FusedExperts,
    WQExperts,
    expert_name,
    fused_experts,
    outward,
)
from qkernels.modules.foreign import is_foreign, why_foreign
from qkernels.modules.heads import output_heads
from qkernels.modules.kinds import (
    is_embedding_kind,
    is_linear_kind,
    linear_parts,
    why_not_plain,
    why_not_plain_embedding,
)
from qkernels.modules.packed import PackedModule
from qkernels.quantizers.embeddings import SharedWeight, shared_weights
from qkernels.scheme import QuantScheme

OUTPUT_HEADS = ("lm_head", "*.lm_head", "embed_out", "*.embed_out", "output_projection")
"""Names of output heads in models that do not say which layer theirs is. Heads stay in 16 bits
unless they are included by name: they are the most sensitive layer, and their weight often is that
of the embedding."""

MENTIONED_SHARE = 0.01
"""What is no linear layer is mentioned from this part of all parameters on."""

_EMBEDDING = "an embedding, which stays in 16 bits unless it is included by name"

_HEAD = "the output head, which stays in 16 bits unless it is included by name"


@dataclass(frozen=True)
class Candidate:
    """A linear layer, or an embedding.

    Attributes:
        size: numbers in its own parameters.
        weight: the identity of its weight, which others may have too; of an entry of a stack, -1.
        embedding: it is one.
        stack: the name of the fused parameter that it is an entry of, or None.
        why_not: why it can not be quantized, or None.
        hint: why it is not quantized unless it is included by name, or None.
    """

    size: int
    weight: int = -1
    embedding: bool = False
    stack: str | None = None
    why_not: str | None = None
    hint: str | None = None


@dataclass
class LayerPlan:
    """Attributes:
    schemes: of each linear layer to quantize, by name, in the model's order.
    embeddings: the weights of embeddings to quantize.
    skipped: what is left alone -> the reason.
    shares: name in `skipped` -> its part of the model's parameters.
    """

    schemes: dict[str, QuantScheme] = field(default_factory=dict)
    embeddings: list[SharedWeight] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)


def parsed_overrides(
    overrides: Mapping[str, QuantScheme | str | None] | None,
) -> dict[str, QuantScheme | None]:
    """Overrides as of `quantize_model`, with their schemes parsed."""
    return {
        pattern: None if value is None else QuantScheme.parse(value)
        for pattern, value in (overrides or {}).items()
    }


def plan_layers(
    model: nn.Module,
    default: QuantScheme,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    overrides: Mapping[str, QuantScheme | None],
) -> LayerPlan:
    """Arguments as for `quantize_model`, with their schemes parsed.

    Raises:
        LayerError: where nothing is left to quantize, a pattern matches no layer, a layer is
            quantized already, or a head and an embedding of one weight are to have two schemes.
        SchemeError: for an embedding whose scheme has quantized activations.
    """
    candidates = find_candidates(model)
    linears = {name: c for name, c in candidates.items() if not c.embedding}
    for pattern in (*(include or ()), *(exclude or ()), *overrides):
        if not any(_matches(name, c, (pattern,)) for name, c in candidates.items()):
            raise LayerError(
                f"pattern {pattern!r} matches none of the {len(linears)} linear layers, "
                f"for example {list(linears)[:3]}, nor an embedding"
            )
    plan = LayerPlan()
    chosen_embeddings: dict[str, QuantScheme] = {}
    reasons: dict[str, str] = {}
    for name, candidate in candidates.items():
        override = next((p for p in overrides if _names(name, candidate, (p,))), None)
        chosen = default if override is None else overrides[override]
        if candidate.why_not is not None:
            reasons[name] = candidate.why_not
        elif _matches(name, candidate, exclude or ()):
            reasons[name] = "excluded"
        elif override is None and include is not None and not _names(name, candidate, include):
            reasons[name] = _EMBEDDING if candidate.embedding else "not included"
        elif override is None and include is None and candidate.hint is not None:
            reasons[name] = candidate.hint
        elif chosen is None:
            reasons[name] = f"left alone by the override {override!r}"
        elif candidate.embedding:
            chosen_embeddings[name] = chosen
        else:
            plan.schemes[name] = chosen
    able = {n: c.weight for n, c in candidates.items() if c.embedding and c.why_not is None}
    weights = {name: candidates[name].weight for name in plan.schemes}
    plan.embeddings = shared_weights(chosen_embeddings, able, plan.schemes, weights)
    if not plan.schemes and not plan.embeddings:
        raise LayerError(_nothing_left(model, linears, reasons))
    planned = {name for shared in plan.embeddings for name in shared.names}
    _tell(plan, model, candidates, {n: r for n, r in reasons.items() if n not in planned})
    return plan


def _names(name: str, candidate: Candidate, patterns: Iterable[str]) -> bool:
    """Whether one of `patterns` includes it: an embedding only by its own name, not by that of a
    module around it or by a pattern for everything."""
    if candidate.embedding:
        own = (p.rpartition(".")[2] for p in patterns if fnmatchcase(name, p))
        return any(any(letter.isalnum() for letter in part) for part in own)
    return _matches(name, candidate, patterns)


def _matches(name: str, candidate: Candidate, patterns: Iterable[str]) -> bool:
    names = (name,) if candidate.stack is None else (name, candidate.stack)
    return any(fnmatchcase(n, pattern) for pattern in patterns for n in names)


def _nothing_left(
    model: nn.Module, candidates: Mapping[str, Candidate], reasons: Mapping[str, str]
) -> str:
    if candidates:
        name = next(iter(candidates))
        return (
            f"no linear layer is left to quantize out of {len(candidates)}: {name}, for example, "
            f"is left alone ({reasons[name]})"
        )
    kinds = sorted({type(m).__name__ for m in model.modules() if m._parameters})
    return f"the model has no linear layer; its parameters are in {', '.join(kinds) or 'nothing'}"


def find_candidates(model: nn.Module) -> dict[str, Candidate]:
    """Every linear layer and embedding by name, in the model's order; experts of a fused parameter
    one by one.

    Raises:
        LayerError: where a layer is quantized already, by whatever package.
    """
    hints, fused = _hints(model), _by_owner(fused_experts(model))
    candidates: dict[str, Candidate] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PackedModule | WQExperts | _AwqLinear):
            raise LayerError(f"{name} is quantized already: start from the original model")
        if is_foreign(module):
            raise LayerError(why_foreign(name, module))
        if is_linear_kind(module):
            candidates[name] = Candidate(
                size=_size(module._parameters.values()),
                weight=id(module._parameters.get("weight")),
                why_not=why_not_plain(module) or _why_not_empty(module),
                hint=hints.get(id(module)) or _hint_by_name(name),
            )
        if is_embedding_kind(module) and name:
            candidates[name] = Candidate(
                size=_size(module._parameters.values()),
                weight=id(module._parameters.get("weight")),
                embedding=True,
                why_not=why_not_plain_embedding(module)
                or (None if _size(module._parameters.values()) else "it has no weights"),
                hint=_EMBEDDING,
            )
        for stack in fused.get(id(module), ()):
            candidates |= _experts(f"{name}.{stack.name}".lstrip("."), stack)
    return candidates


def _by_owner(fused: Mapping[str, FusedExperts]) -> dict[int, list[FusedExperts]]:
    """By the id of the module that has them, each once."""
    owners: dict[int, list[FusedExperts]] = {}
    for stack in fused.values():
        mine = owners.setdefault(id(stack.owner), [])
        if stack.name not in {other.name for other in mine}:
            mine.append(stack)
    return owners


def _experts(stack: str, fused: FusedExperts) -> dict[str, Candidate]:
    experts = len(fused.parameter)
    size = fused.parameter.numel() // max(1, experts)
    candidate = Candidate(size, stack=stack, why_not=fused.why_not())
    return {f"{stack}.{expert_name(number)}": candidate for number in range(experts)}


def _size(parameters: Iterable[nn.Parameter | None]) -> int:
    """How many numbers they hold. Those of a layer that has not run yet may have no size."""
    none = (type(None), UninitializedParameter)
    return sum(p.numel() for p in parameters if not isinstance(p, none))


def _why_not_empty(module: nn.Module) -> str | None:
    return None if linear_parts(module).weight.numel() else "it has no weights"


def _hint_by_name(name: str) -> str | None:
    return _HEAD if any(fnmatchcase(name, pattern) for pattern in OUTPUT_HEADS) else None


def _hints(model: nn.Module) -> dict[int, str]:
    """Why layers are not quantized unless they are included by name, by their id."""
    embeddings = {
        id(module._parameters["weight"]): name
        for name, module in model.named_modules()
        # A quantized one has no parameter, and one that computes its weight has others.
        if isinstance(module, nn.Embedding) and "weight" in module._parameters
    }
    hints: dict[int, str] = {}
    for module in model.modules():
        for head in output_heads(module):
            hints[id(head)] = _HEAD
        weight = module._parameters.get("weight")
        if is_linear_kind(module) and id(weight) in embeddings:
            hints[id(module)] = (
                f"its weight is that of the embedding {embeddings[id(weight)]}, which stays in 16 "
                "bits unless it is included by name"
            )
        for layer in _adapters(module):
            hints[id(layer)] = (
                f"part of an adapter of a {type(module).__name__}, which stays in 16 bits unless "
                "it is included by name"
            )
        if isinstance(module, nn.MultiheadAttention):
            hints[id(module.out_proj)] = (
                "nn.MultiheadAttention multiplies by its weight without calling it: included by "
                "name, it is dequantized for each call"
            )
    return hints


def _adapters(module: Any) -> Iterator[nn.Module]:
    """The layers that PEFT has added to one, and trains."""
    names = getattr(module, "adapter_layer_names", ())
    for name in names if isinstance(names, tuple | list) else ():
        added = getattr(module, name, None)
        if isinstance(added, nn.Module):
            yield from added.modules()


def _tell(
    plan: LayerPlan,
    model: nn.Module,
    candidates: Mapping[str, Candidate],
    reasons: Mapping[str, str],
) -> None:
    """Fills `skipped` and `shares`, in the model's order."""
    total = max(1, _size({id(p): p for p in model.parameters()}.values()))
    whole = _by_stack(candidates)
    told: dict[str, tuple[str, int]] = {}
    for name, reason in reasons.items():
        stack = candidates[name].stack
        if candidates[name].embedding and candidates[name].size < MENTIONED_SHARE * total:
            continue
        entries = () if stack is None else whole[stack]
        if stack is not None and all(reasons.get(entry) == reason for entry in entries):
            told[stack] = reason, candidates[name].size * len(entries)
        else:
            told[name] = reason, candidates[name].size
    for name, module, size in _others(model):
        if size >= MENTIONED_SHARE * total and name not in candidates:
            told[name] = _why_no_linear(module), size
    order = {name: i for i, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}

    def place(name: str) -> int:
        # Of fused experts, that of the module that has them.
        return order[next(n for n in outward(name) if n in order)]

    for name in sorted(told, key=place):
        reason, size = told[name]
        plan.skipped[name] = reason
        plan.shares[name] = size / total


def _by_stack(candidates: Mapping[str, Candidate]) -> dict[str, list[str]]:
    stacks: dict[str, list[str]] = {}
    for name, candidate in candidates.items():
        if candidate.stack is not None:
            stacks.setdefault(candidate.stack, []).append(name)
    return stacks


def _others(model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """Modules with parameters that are no weights of linear layers, and how many numbers these
    have."""
    fused = _by_owner(fused_experts(model))
    for name, module in model.named_modules():
        if not is_linear_kind(module):
            stacks = {stack.name for stack in fused.get(id(module), ())}
            own = (p for key, p in module._parameters.items() if key not in stacks)
            yield name, module, _size(own)


def _why_no_linear(module: nn.Module) -> str:
    kind = type(module).__name__
    if "Conv" in kind:
        return f"a {kind}: convolutions are not quantized"
    if isinstance(module, nn.MultiheadAttention):
        return "the fused projections of nn.MultiheadAttention, which are no linear layers"
    return f"parameters of a {kind}, which is no linear layer"
