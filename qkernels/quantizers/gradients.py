"""What methods that run a model backwards share: its loss, and batches cut into steps."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from qkernels.calibration.batches import Tokens, tensors_of
from qkernels.calibration.blocks import find_blocks
from qkernels.calibration.calls import replace_forward
from qkernels.errors import LayerError, QuantizationError

_SLICE = 128
"""Tokens whose log-probabilities are held in fp32 at a time: 25 MiB over a vocabulary of 49,152."""


def pieces(batch: Any, size: int) -> list[Any]:
    """A calibration batch cut into pieces of at most `size` sequences.

    A batch whose first tensor has no rows stays whole.

    Raises:
        LayerError: where it holds tensors that do not have a row for each sequence, as images may,
            so that nobody knows what belongs to which.
    """
    count = next((len(tensor) for tensor in tensors_of(batch) if tensor.dim()), 0)
    if count <= size:
        return [batch]
    other = next((len(t) for t in tensors_of(batch) if t.dim() and len(t) not in (1, count)), None)
    if other is not None:
        raise LayerError(
            f"a calibration batch of {count} sequences holds a tensor of {other} rows, so it is "
            f"not known which belong to which: give batches of {size} or fewer"
        )
    return [_cut(batch, count, start, start + size) for start in range(0, count, size)]


def _cut(value: Any, count: int, start: int, stop: int) -> Any:
    if isinstance(value, Tensor):
        return value[start:stop] if value.dim() and len(value) == count else value
    if isinstance(value, Mapping):
        return {key: _cut(item, count, start, stop) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_cut(item, count, start, stop) for item in value)
    return value


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Gradients on, and none of them for the model's own parameters."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


class Recomputed:
    """A context in which blocks keep their inputs alone for the backward pass, and run again there.

    So one block's activations are held at a time, for a third more time. A model without blocks
    keeps everything.

    Attributes:
        again: whether what runs now runs for the second time.

    Args:
        layers: names of those that gradients are wanted of or through; their blocks are meant.
    """

    def __init__(self, model: nn.Module, layers: Iterable[str]) -> None:
        self.again = False
        self._stack = contextlib.ExitStack()
        names = [block.name for block in find_blocks(model, layers)]
        self._blocks = [model.get_submodule(name) for name in names] if len(names) > 1 else []

    def __enter__(self) -> Recomputed:
        with contextlib.ExitStack() as stack:
            for block in {id(block): block for block in self._blocks}.values():
                forward = functools.partial(self._forward, block.forward)
                stack.callback(replace_forward(block, forward))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _forward(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or self.again:
            return inner(*args, **kwargs)
        first = [(args, kwargs)]

        def run(*args: Any, **kwargs: Any) -> Any:
            # The first time on the tensors that came, the second on copies: a block may write to
            # what it is given.
            if first:
                args, kwargs = first.pop()
            else:
                args, kwargs = tree_map_only(Tensor, Tensor.clone, (args, kwargs))
            return inner(*args, **kwargs)

        kept_args, kept_kwargs = tree_map_only(Tensor, _kept, (args, kwargs))
        return checkpoint(
            run,
            *kept_args,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (contextlib.nullcontext(), self._running_again()),
            **kept_kwargs,
        )

    @contextlib.contextmanager
    def _running_again(self) -> Iterator[None]:
        self.again = True
        try:
            yield
        finally:
            self.again = False


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def output_of(result: Any) -> Tensor:
    """What a model gives: logits, or else the first floating tensor.

    Raises:
        QuantizationError: where there is none.
    """
    logits = getattr(result, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    values: Sequence[Any] = list(result.values()) if isinstance(result, Mapping) else [result]
    found = next((t for t in tensors_of(values) if t.is_floating_point()), None)
    if found is None:
        raise QuantizationError(f"the model gives a {type(result).__name__} without any numbers")
    return found


def gives_logits(result: Any) -> bool:
    """Whether `output_of` is logits of next tokens."""
    return isinstance(getattr(result, "logits", None), Tensor)


def counted(batch: Any, logits: Tensor) -> Tensor | None:
    """Which tokens of logits [..., V] that a batch gave are no padding, bool [R]; None for all."""
    return Tokens.of(batch).of_rows(logits.shape[:-1])


def counted_rows(x: Tensor, kept: Tensor | None) -> Tensor:
    """x [..., K], and of its rows those that count, [R, K], where some do not."""
    return x if kept is None else x.flatten(0, -2)[kept.to(x.device)]


def divergence(logits: Tensor, target: Tensor, kept: Tensor | None = None) -> Tensor:
    """The mean over tokens of KL(target || logits), in nats, fp32 [].

    Args:
        logits, target: [..., V]; the gradient reaches `logits` alone.
        kept: bool [R], the tokens that count; None for all.
    """
    made: Tensor = _Divergence.apply(logits, target, kept)
    return made


class _Divergence(torch.autograd.Function):
    """Makes the gradient beside the loss, so that no slice is kept."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, kept: Tensor | None) -> Tensor:
        rows = logits.reshape(-1, logits.shape[-1])
        targets = target.reshape(-1, target.shape[-1])
        gradient = torch.empty_like(rows)
        total = torch.zeros((), dtype=torch.float64, device=rows.device)
        for part, own in _slices(rows, kept):
            found = rows[part].float().log_softmax(dim=-1)
            wanted = targets[part].float().log_softmax(dim=-1)
            chances = wanted.exp()
            lost = (chances * (wanted - found)).sum(dim=-1, keepdim=True, dtype=torch.float64)
            total += torch.where(own, lost, 0).sum()
            gradient[part] = torch.where(own, found.exp_().sub_(chances), 0)
        ctx.save_for_backward(gradient.view_as(logits))
        # The gradient is divided where it is multiplied: fp16 does not hold that of each token.
        ctx.count = len(rows) if kept is None else max(1, int(kept.sum()))
        return (total / ctx.count).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * (gradients[0] / ctx.count), None, None


def drawn_loss(logits: Tensor, generator: torch.Generator, kept: Tensor | None = None) -> Tensor:
    """-log p of tokens that are drawn from p itself, summed, fp32 [].

    Args:
        logits: [..., V].
        kept: bool [R], the tokens that count; None for all.
    """
    made: Tensor = _DrawnLoss.apply(logits, generator, kept)
    return made


class _DrawnLoss(torch.autograd.Function):
    """Makes the gradient beside the loss, so that no slice is kept."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, generator: torch.Generator, kept: Tensor | None
    ) -> Tensor:
        rows = logits.reshape(-1, logits.shape[-1])
        gradient = torch.empty_like(rows)
        total = torch.zeros((), dtype=torch.float64, device=rows.device)
        for part, own in _slices(rows, kept):
            chances = rows[part].float().softmax(dim=-1)
            # Where a number from 0 to 1 falls among the sums of chances.
            sums = chances.cumsum(dim=-1)
            places = torch.rand(len(sums), 1, generator=generator).to(sums.device) * sums[:, -1:]
            drawn = torch.searchsorted(sums, places).clamp_(max=sums.shape[-1] - 1)
            likely = chances.gather(1, drawn).log()
            total -= torch.where(own, likely, 0).sum(dtype=torch.float64)
            ones = torch.ones_like(places)
            gradient[part] = torch.where(own, chances.scatter_add_(1, drawn, -ones), 0)
        ctx.save_for_backward(gradient.view_as(logits))
        return total.float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None


def _slices(rows: Tensor, kept: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows, and which of their rows count, bool [S, 1]: padding may hold anything."""
    for start in range(0, len(rows), _SLICE):
        part = slice(start, start + _SLICE)
        own = torch.ones(1, dtype=torch.bool) if kept is None else kept[part, None]
        yield part, own.to(rows.device)
