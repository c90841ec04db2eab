"""What a module runs, and copies of what it is given or gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Makes `forward` what the module runs; the result undoes that."""
    before = vars(module).get("forward")
    vars(module)["forward"] = forward

    def undo() -> None:
        if before is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = before

    return undo


def copied(
    value: Any,
    cast: Callable[[Tensor], Tensor] | None = None,
    seen: dict[int, Any] | None = None,
) -> Any:
    """What a module was given or gives, without the memory of the original, so that writing to it
    is safe; what was there twice still is one.

    Args:
        cast: makes each tensor another before it is copied.
        seen: by id, what has been copied.
    """
    seen = {} if seen is None else seen
    if id(value) in seen:
        return seen[id(value)]
    made: Any
    if isinstance(value, Tensor):
        made = value.detach()
        made = (made if cast is None else cast(made)).clone()
    elif isinstance(value, nn.Module):
        made = value
    elif type(value) in (list, tuple):
        made = type(value)(copied(item, cast, seen) for item in value)
    elif type(value) is dict:
        made = {key: copied(item, cast, seen) for key, item in value.items()}
    else:
        made = copy.deepcopy(value, seen)
    seen[id(value)] = made
    return made
