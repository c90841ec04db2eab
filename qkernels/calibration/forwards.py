"""A forward of a model that stops wherever it calls a block, until the block's output is given.

So the model itself says what a block gets: masks, positions, what earlier blocks gave beyond hidden
states, and whatever is computed between blocks. Python can only suspend a function in a thread of
its own; exactly one of all threads runs at a time, handed on by semaphores.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

THREAD_NAME = "qkernels suspended forward"


class CannotFollow(Exception):
    """The model calls its blocks in a way that cannot be taken one block at a time."""


class _Cancelled(BaseException):
    """Unwinds a forward that nobody waits for. Models catch `Exception` at most."""


@dataclass
class Call:
    """A block about to be called in a suspended forward."""

    block: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class SuspendedForward:
    """`run()`, suspended at each `stop`; `call` is what it waits for, None once it has ended."""

    def __init__(self, run: Callable[[], object]) -> None:
        self.call: Call | None = None
        self._run: Callable[[], object] | None = run
        self._output: Any = None
        self._error: BaseException | None = None
        self._ended = self._running = self._cancelled = False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._ambient = _ambient()
        self._thread = threading.Thread(
            target=contextvars.copy_context().run,
            args=(self._body,),
            name=THREAD_NAME,
            daemon=True,
        )

    def start(self) -> None:
        """Runs up to the first stop, or the end.

        Raises whatever the forward raises, as `resume` does, and CannotFollow where the system has
        no thread for it.
        """
        # A thread gets workers of its own for each operator it splits; beside hundreds of suspended
        # forwards they would be too many. What matters, the blocks, does not run there.
        threads = torch.get_num_threads()
        try:
            self._thread.start()
        except RuntimeError as error:
            raise CannotFollow(
                f"{error}, and each batch needs one: use fewer, larger ones"
            ) from None
        try:
            self.resume(None)
        finally:
            torch.set_num_threads(threads)

    def resume(self, output: Any) -> None:
        """Goes on, with `output` as that of the block it waits for, up to the next stop."""
        self.call, self._output, self._running = None, output, True
        self._go.release()
        self._wait()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def cancel(self) -> None:
        """Ends the forward where it stands; one that runs, at its next stop."""
        self._cancelled = True
        if self._running:
            self._wait()
        if not self._ended:
            self._go.release()
        if self._thread.ident is not None:
            self._thread.join()
        self.call = None

    def stop(self, call: Call) -> Any:
        """Called by the forward: waits for the output of a block."""
        self.call = call
        del call
        self._stopped.release()
        self._go.acquire()
        if self._cancelled:
            raise _Cancelled
        output, self._output = self._output, None
        return output

    def end(self) -> None:
        """Called by the forward: nobody wants what follows."""
        raise _Cancelled

    def _wait(self) -> None:
        self._stopped.acquire()
        self._running = False

    def _body(self) -> None:
        torch.set_num_threads(1)
        self._go.acquire()
        run, self._run = self._run, None
        _here.forward = self
        try:
            if not self._cancelled:
                with self._ambient():
                    assert run is not None
                    run()
        except _Cancelled:
            pass
        except BaseException as error:
            self._error = error
        finally:
            del run
            self._ended = True
            self._stopped.release()


_here = threading.local()


def current_forward() -> SuspendedForward | None:
    """The forward that the calling code is part of, or None outside of any."""
    return getattr(_here, "forward", None)


Around = Callable[[], contextlib.AbstractContextManager[None]]

_AUTOCAST = ("cpu", "cuda")


def autocast_here() -> Around:
    """Gives a context in which autocast is as it is now, wherever that is entered."""
    types = {
        device: torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        for device in _AUTOCAST
    }

    @contextlib.contextmanager
    def entered() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for device, dtype in types.items():
                if dtype is not None:
                    stack.enter_context(torch.autocast(device, dtype))
            yield

    return entered


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """A context for arithmetic of our own, whose types are what it says."""
    with contextlib.ExitStack() as stack:
        for device in _AUTOCAST:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _ambient() -> Around:
    """What torch keeps for each thread, as it is in this one, to be entered in another."""
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    autocast, default = autocast_here(), torch.get_default_device()
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    @contextlib.contextmanager
    def entered() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.set_grad_enabled(gradients))
            stack.enter_context(autocast())
            if default.type != "cpu":
                stack.enter_context(default)
            if gpu is not None:
                stack.enter_context(torch.cuda.device(gpu))
            yield

    return entered


def run_batch(model: nn.Module, batch: Any) -> Any:
    """The model's forward of a calibration batch: a dict or tuple of its arguments, or one."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)
