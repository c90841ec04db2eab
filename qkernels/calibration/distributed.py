"""Several processes calibrate one model: each has all of it, and batches of its own.

They go the same way, block by block, and tell each other what they need at fixed steps: statistics,
which each merges in the order of the processes, and whatever a process can only know of its own
batches. What fails in one, all of them raise, at the next step that they come to.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor

from qkernels import errors
from qkernels.calibration.forwards import CannotFollow
from qkernels.calibration.statistics import LayerInputs
from qkernels.errors import LayerError, QuantizationError

_T = TypeVar("_T")


@dataclass(frozen=True)
class _Value:
    """What a process tells at a step."""

    step: str
    value: Any


@dataclass(frozen=True)
class _Failure:
    """An error in one process, as others can raise it."""

    kind: str
    text: str

    @staticmethod
    def of(error: BaseException) -> _Failure:
        known = isinstance(error, QuantizationError | CannotFollow)
        name, text = type(error).__name__, str(error)
        return _Failure(name, text if known else f"{name}: {text}" if text else name)

    def error(self, process: int) -> Exception:
        if self.kind == CannotFollow.__name__:
            return CannotFollow(self.text)
        kind = vars(errors).get(self.kind, LayerError)
        assert issubclass(kind, QuantizationError)
        return kind(f"in process {process}: {self.text}")


class Processes:
    """The processes of a group of `torch.distributed`, or this one alone.

    Attributes:
        rank, size: the number of this one, and how many there are.
    """

    def __init__(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank, self.size = 0, 1
        if group is not None:
            if not isinstance(group, torch.distributed.ProcessGroup):
                raise LayerError(
                    f"process_group is {group!r}: give a group of torch.distributed, such as "
                    "torch.distributed.group.WORLD once init_process_group was called"
                )
            self.rank = torch.distributed.get_rank(group)
            self.size = torch.distributed.get_world_size(group)
            if self.rank < 0:
                raise LayerError("this process is not in the process_group it was given")
        # What all have raised last; it need not be told again.
        self._agreed: BaseException | None = None

    def gather(self, step: str, value: _T) -> list[_T]:
        """What each process gives, in their order.

        Args:
            step: a name for it; all must have come to the same.
            value: anything that can be pickled.

        Raises:
            QuantizationError: what another process raises.
            CannotFollow: where another process cannot take the model block by block.
        """
        if self.size == 1:
            return [value]
        told = self._exchange(_Value(step, value))
        if any(isinstance(one, _Failure) for one in told):
            raise self._settle(told, None)
        assert all(one.step == step for one in told), [one.step for one in told]
        return [one.value for one in told]

    def union(self, step: str, names: set[str]) -> set[str]:
        """The names that any process gives."""
        return set().union(*self.gather(step, names))

    def first(self, step: str, value: _T | None) -> _T | None:
        """That of the first process that has one."""
        return next((one for one in self.gather(step, value) if one is not None), None)

    def made_by_first(self, step: str, able: bool, make: Callable[[], _T]) -> _T | None:
        """What the first process makes that is able to; None where none is."""
        owner = next((i for i, one in enumerate(self.gather(step, able)) if one), None)
        if owner is None:
            return None
        return self.gather(f"{step} made", make() if owner == self.rank else None)[owner]

    def first_batch(self, batches: int) -> int:
        """The number of this process' first batch among those of all."""
        return sum(self.gather("batches", batches)[: self.rank])

    def merge(
        self, own: LayerInputs, empty: Callable[[], LayerInputs], device: torch.device
    ) -> LayerInputs:
        """What all processes have collected for one layer: the same bits in each.

        Args:
            own: of this one.
            empty: makes one for the same layer that has seen nothing.
            device: where the result is.
        """
        if self.size == 1:
            return own
        state = _state_of(own)
        kinds = {key: (value.shape, value.dtype) for key, value in state.items()}
        told = self.gather("statistics", (own.rows, own.broken, kinds))
        merged = empty()
        for process, (rows, broken, theirs) in enumerate(told):
            sent = {
                key: self._broadcast(process, state.get(key), *kind, device)
                for key, kind in theirs.items()
            }
            held = _loaded(empty() if process else merged, rows, sent)
            held.broken = broken
            if process:
                merged.merge(held)
        return merged

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Within, what one process raises, all do."""
        try:
            yield
        except BaseException as error:
            agreed = self.agree(error)
            if agreed is error:
                raise
            raise agreed from None

    def agree(self, error: BaseException) -> BaseException:
        """What all processes raise where this one has raised `error`: it, or an error of another
        process; CannotFollow where nothing else was raised."""
        if self.size == 1 or error is self._agreed:
            return error
        try:
            told = self._exchange(_Failure.of(error))
        except LayerError:
            # Nobody is there to be told.
            return error
        return self._settle(told, error)

    def _exchange(self, told: Any) -> list[Any]:
        """What all tell."""
        everyone: list[Any] = [None] * self.size
        with self._connected():
            torch.distributed.all_gather_object(everyone, told, group=self._group)
        return everyone

    def _settle(self, told: list[Any], own: BaseException | None) -> BaseException:
        """The one error of those that were told; `own` was that of this process."""
        failures = {i: one for i, one in enumerate(told) if isinstance(one, _Failure)}
        lasting = [i for i, one in failures.items() if one.kind != CannotFollow.__name__]
        first = next(iter(lasting or failures))
        alike = len(failures) == self.size and len(set(failures.values())) == 1
        if own is not None and (alike or first == self.rank):
            self._agreed = own
        else:
            self._agreed = failures[first].error(first)
        return self._agreed

    def _broadcast(
        self,
        process: int,
        value: Tensor | None,
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        """`value` of that process, in all."""
        if process == self.rank:
            assert value is not None
            sent = value.contiguous()
        else:
            sent = torch.empty(shape, dtype=dtype, device=device)
        if sent.numel():
            assert self._group is not None
            held = sent.to(self._device())
            # As bytes: not every backend knows every type.
            source = torch.distributed.get_global_rank(self._group, process)
            with self._connected():
                torch.distributed.broadcast(held.view(-1).view(torch.uint8), source, self._group)
            sent = held
        return sent.to(device)

    def _device(self) -> torch.device:
        """Where what is sent must be."""
        if torch.distributed.get_backend(self._group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self._agreed = LayerError(
                f"process {self.rank} has lost another one of its process_group: {error}"
            )
            raise self._agreed from None


ALONE = Processes()
"""One process."""


def _state_of(inputs: LayerInputs) -> dict[tuple[str, str, str], Tensor]:
    """All tensors of its statistics."""
    return {
        (chain, name, part): tensor
        for chain in ("quantized", "dense", "paired")
        for name, statistic in getattr(inputs, chain).items()
        for part, tensor in statistic.state_dict().items()
    }


def _loaded(
    inputs: LayerInputs, rows: int, state: Mapping[tuple[str, str, str], Tensor]
) -> LayerInputs:
    """`inputs` with the statistics whose tensors `state` holds."""
    inputs.rows = rows
    for chain in ("quantized", "dense", "paired"):
        for name, statistic in getattr(inputs, chain).items():
            own = {part: t for (c, n, part), t in state.items() if (c, n) == (chain, name)}
            statistic.load_state_dict(own)
    return inputs
