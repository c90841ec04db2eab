"""Collects statistics of the inputs of layers while a walk runs their block."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.calibration.batches import Tokens
from qkernels.calibration.blocks import kind_of
from qkernels.calibration.calls import replace_forward
from qkernels.calibration.distributed import ALONE, Processes
from qkernels.calibration.forwards import without_autocast
from qkernels.calibration.statistics import LayerInputs, Needs, PositionRanges, SumOfProducts
from qkernels.calibration.walks import DENSE, QUANTIZED, Walk
from qkernels.modules.producers import version_of


def observe(
    walk: Walk,
    layers: Mapping[str, nn.Linear],
    needs: Mapping[str, Needs],
    until: Sequence[nn.Module] = (),
    once: bool = False,
    row_weights: Mapping[str, Mapping[int, Tensor]] = MappingProxyType({}),
    processes: Processes = ALONE,
    first_batch: int = 0,
    tokens: Sequence[Tokens] = (),
) -> dict[str, LayerInputs]:
    """What reaches each layer of the walk's present block, over all batches of all processes.

    A layer that has several names has one result, of all its calls.

    Args:
        until: layers before which all `layers` have run; a run ends where one of them is called.
        once: whether a run also ends where each of `layers` was called once.
        row_weights: layer -> batch -> fp32 [T]: what each of its inputs counts in `x^T x`; 1 for
            what is not in it. Layers in it are given all tokens of a batch in their order.
        first_batch: the number of the walk's first batch among those of all processes.
        tokens: those of each batch of the walk, so that padding is left out.
    """
    products, rows = _Products(), _Rows()
    empty = {
        id(layer): partial(LayerInputs.empty, needs[name], layer.in_features)
        for name, layer in layers.items()
    }
    observers = {
        id(layer): _Observer(
            empty[id(layer)](), row_weights.get(name, {}), products, rows, first_batch
        )
        for name, layer in layers.items()
    }
    both = any(each.dense or each.paired for each in needs.values())
    dense = set(walk.batches(DENSE)) if both else set()
    left: set[int] = set()

    def note(x: Tensor, key: int) -> None:
        observers[key].add(x)
        left.discard(key)
        if once and not left:
            raise _RunEnded

    with contextlib.ExitStack() as stack:
        for layer in {id(layer): layer for layer in layers.values()}.values():
            stack.callback(_watch(layer, partial(note, key=id(layer))))
        for end in {id(end): end for end in until}.values():
            stack.callback(_watch(end, _end_run))
        for batch in walk.batches(QUANTIZED):
            for chain in (DENSE, QUANTIZED) if batch in dense else (QUANTIZED,):
                left |= observers.keys()
                rows.begin(tokens[batch] if tokens else None)
                products.forget()
                for observer in observers.values():
                    observer.begin(batch, chain)
                with contextlib.suppress(_RunEnded):
                    walk.run(batch, chain)
    merged = {
        key: processes.merge(observers[key].inputs, empty[key], layer.weight.device)
        for key, layer in {id(layer): layer for layer in layers.values()}.items()
    }
    return {name: merged[id(layer)] for name, layer in layers.items()}


class _RunEnded(BaseException):
    """Ends a run of a block whose rest nobody needs. Models catch `Exception` at most."""


def _end_run(x: Tensor) -> None:
    raise _RunEnded


@dataclass(frozen=True)
class Stage:
    """Layers of a block that are calibrated together.

    Attributes:
        until: layers that run when all of these have; none where that is not sure.
        once: whether each of these runs once.
    """

    names: list[str]
    until: list[str]
    once: bool = False


def stages(walk: Walk, layers: Mapping[str, nn.Linear]) -> list[Stage]:
    """Layers in the order in which the present block runs them, grouped.

    Layers that read the same tensor, such as the projections to q, k and v, go together; so do
    layers whose names differ in numbers alone, such as the experts'. Those that the first batch
    does not reach come last.
    """
    grouped: dict[str, list[str]] = {}
    for name in layers:
        grouped.setdefault(kind_of(name), []).append(name)
    # The inputs are held until the end, so that no two of them are in the same memory.
    first: dict[str, Tensor] = {}
    calls: list[str] = []
    with contextlib.ExitStack() as stack:
        for kind, names in grouped.items():
            for name in names:

                def note(x: Tensor, kind: str = kind) -> None:
                    first.setdefault(kind, x)
                    calls.append(kind)

                stack.callback(_watch(layers[name], note))
        for batch in walk.batches()[:1]:
            walk.run(batch)
    found: list[list[str]] = []
    previous: Tensor | None = None
    for kind, x in first.items():
        if previous is not None and x.data_ptr() == previous.data_ptr():
            found[-1].append(kind)
        else:
            found.append([kind])
        previous = x

    def names_of(kinds: Iterable[str]) -> list[str]:
        return [name for kind in kinds for name in grouped[kind]]

    rest = [kind for kind in grouped if kind not in first]
    made = []
    for number, kinds in enumerate(found):
        later = [kind for group in found[number + 1 :] for kind in group]
        # Experts run one after the other, each all of its layers.
        last = max(at for at, kind in enumerate(calls) if kind in kinds)
        apart = all(at > last for at, kind in enumerate(calls) if kind in later)
        names = names_of(kinds)
        # Experts may run in one batch and not in the next.
        once = len(names) == len(kinds) == sum(kind in kinds for kind in calls)
        made.append(Stage(names, names_of(later) if apart else [], once))
    return [*made, Stage(names_of(rest), [])] if rest else made


class _Products:
    """What rows add to sums of products, made once where several layers read one tensor."""

    def __init__(self) -> None:
        self._made: dict[type[SumOfProducts], tuple[Tensor, Tensor | None, int, Tensor]] = {}

    def forget(self) -> None:
        """Lets go of the tensors of a run, before those of the next one come."""
        self._made.clear()

    def of(self, kind: type[SumOfProducts], x: Tensor, dense: Tensor | None) -> Tensor:
        """`kind.product`."""
        if kind in self._made:
            # They are held, so that no other tensor has their memory.
            other, others_dense, version, product = self._made[kind]
            if (
                _is_same(x, other)
                and version == version_of(x)
                and (dense is None or (others_dense is not None and _is_same(dense, others_dense)))
            ):
                return product
        product = kind.product(x, dense)
        self._made[kind] = x, dense, version_of(x), product
        return product


class _Rows:
    """Inputs as rows [R, K], without padding: made once where several layers read one tensor."""

    def __init__(self) -> None:
        self._tokens: Tokens | None = None
        self._made: tuple[Tensor, int, Tensor] | None = None

    def begin(self, tokens: Tokens | None) -> None:
        """Args: tokens: of the batch that comes, where they are known."""
        self._tokens, self._made = tokens, None

    def are_all(self, rows: int) -> bool:
        """Whether that many rows, padding among them, are all tokens of the batch, as far as it is
        known."""
        return self._tokens is None or rows == self._tokens.count

    def of(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The rows of x [..., K], and which of all its rows they are, bool; None for all."""
        x = x.detach()
        kept = None if self._tokens is None else self._tokens.of_rows(x.shape[:-1])
        flat = x.reshape(-1, x.shape[-1])
        if kept is None:
            return flat, None
        kept = kept.to(x.device)
        if self._made is not None:
            # It is held, so that no other tensor has its memory.
            other, version, rows = self._made
            if _is_same(flat, other) and version == version_of(flat):
                return rows, kept
        rows = flat[kept]
        self._made = flat, version_of(flat), rows
        return rows, kept


def _is_same(x: Tensor, y: Tensor) -> bool:
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()


_DOUBTFUL = 32
"""Pairs of rows that are looked at closely: those that are least alike."""


def of_one_token(x: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of x [R, K] and `dense` [S, K] that are of the same token, pair by pair.

    Experts are given some of the tokens, others in the dense model than in the quantized one, so
    neither numbers nor places say whose a row is. But its twin is nearer to it than all other rows.
    Where that holds for the pairs that are least alike, rows stand in the same order; else those
    are taken that are each other's nearest.
    """
    if x.shape == dense.shape and _are_nearest(x.float(), dense.float()):
        return x, dense
    distances = torch.cdist(x.float(), dense.float())
    nearest = distances.argmin(dim=1)
    places = torch.arange(len(x), device=x.device)
    mutual = distances.argmin(dim=0)[nearest] == places
    return x[mutual], dense[nearest[mutual]]


def _are_nearest(x: Tensor, dense: Tensor) -> bool:
    likeness = torch.cosine_similarity(x, dense, dim=1)
    doubtful = likeness.argsort()[:_DOUBTFUL]
    distances = torch.cdist(x[doubtful], dense)
    own = distances.gather(1, doubtful[:, None])
    # A token that comes twice has two twins.
    return bool((own <= distances.amin(dim=1, keepdim=True) * (1 + 1e-4)).all())


class _Observer:
    """Adds the inputs of one layer to its statistics."""

    def __init__(
        self,
        inputs: LayerInputs,
        row_weights: Mapping[int, Tensor],
        products: _Products,
        rows: _Rows,
        first_batch: int,
    ) -> None:
        self.inputs, self._first_batch = inputs, first_batch
        self._row_weights, self._products, self._rows = row_weights, products, rows
        self._batch, self._chain, self._seen = -1, QUANTIZED, 0
        # Inputs of the dense chain that still wait for their twins; of one batch at a time.
        self._dense: deque[Tensor] = deque()

    def begin(self, batch: int, chain: str) -> None:
        if chain == DENSE or batch != self._batch:
            self._dense.clear()
        self._batch, self._chain, self._seen = batch, chain, 0

    def add(self, x: Tensor) -> None:
        """Takes in x [..., K]."""
        # The model may run under autocast.
        with without_autocast():
            self._take(x)

    def _take(self, x: Tensor) -> None:
        given, shape = x[..., 0].numel(), x.shape[:-1]
        x, kept = self._rows.of(x)
        weights = self._weights(given, kept)
        self._seen += given
        if self._chain == DENSE:
            if self.inputs.paired:
                self._dense.append(x)
            if len(x):
                self._add(self.inputs.dense, x, None, weights)
            return
        dense = self._dense.popleft() if self._dense else None
        if not len(x):
            return
        self.inputs.rows += len(x)
        self._add(self.inputs.quantized, x, None, weights)
        for statistic in self.inputs.quantized.values():
            if isinstance(statistic, PositionRanges):
                positions = _positions(shape, kept).to(x.device)
                statistic.add_at(positions, x, batch=self._first_batch + self._batch)
        if dense is None:
            return
        if not self._rows.are_all(given) or x.shape != dense.shape:
            assert weights is None, "of a layer that is given some of the tokens"
            x, dense = of_one_token(x, dense)
        if len(x):
            self._add(self.inputs.paired, x, dense, weights)

    def _weights(self, given: int, kept: Tensor | None) -> Tensor | None:
        """What the next rows count, fp32 [R, 1]."""
        weights = self._row_weights.get(self._batch)
        if weights is None:
            return None
        own = weights[self._seen : self._seen + given, None]
        return own if kept is None else own[kept.to(own.device)]

    def _add(
        self,
        statistics: Mapping[str, Any],
        x: Tensor,
        dense: Tensor | None,
        weights: Tensor | None,
    ) -> None:
        summed = False
        for statistic in statistics.values():
            if isinstance(statistic, PositionRanges):
                continue
            if not isinstance(statistic, SumOfProducts):
                statistic.add(x, batch=self._first_batch + self._batch, dense=dense)
                continue
            summed = True
            if weights is None:
                product = self._products.of(type(statistic), x, dense)
            else:
                product = statistic.product(x, dense, weights.sqrt().to(x.device))
            statistic.take(product, len(x))
        if not summed and not x.isfinite().all():
            # Sums show it themselves.
            self.inputs.broken = True


def _positions(shape: torch.Size, kept: Tensor | None) -> Tensor:
    """Of the rows of x [*shape, K] that are kept, int64 [R]: their numbers in a sequence without
    its padding. Rows of x [R, K], as experts and heads behind a pooling have them, are of no
    sequence, and all at position 0."""
    if len(shape) < 2:
        rows = shape.numel() if kept is None else int(kept.sum())
        return torch.zeros(rows, dtype=torch.int64)
    own = torch.ones(shape, dtype=torch.bool) if kept is None else kept.view(shape).cpu()
    return (own.cumsum(dim=-1) - 1)[own]


def _watch(layer: nn.Module, note: Callable[[Tensor], None]) -> Callable[[], None]:
    """Makes the layer's forward tell what it is given; the result undoes that."""
    inner = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        note(args[0] if args else kwargs["input"])
        return inner(*args, **kwargs)

    return replace_forward(layer, forward)


@contextlib.contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; and no caches, which would grow with each run of a block.

    Caches are those of Transformers: `use_cache` of each configuration that a module has.
    """
    training = [module for module in model.modules() if module.training]
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            found[id(config)] = config
    try:
        for module in training:
            module.training = False
        for config in found.values():
            config.use_cache = False
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        for config in found.values():
            config.use_cache = True
