"""How something is chosen by name: `name`, or `name(parameter=value, ...)`.

Its parameters are a frozen dataclass whose fields are bool, int, float, str or a Literal of str,
with defaults. Its `__post_init__` may raise a ValueError for values out of range.
"""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from qkernels.errors import RecipeError

CHOICE = re.compile(r"\s*([A-Za-z_][\w-]*)\s*(?:\(([^()]*)\))?\s*")
"""A name, and what is in its brackets or None."""


def parse_parameters(name: str, kind: type[Any], arguments: str | None, where: str) -> Any:
    """The `kind` that "a=1, b=2" spells, or None for its defaults.

    Args:
        name: what is chosen, as errors call it: "method gptq".
        where: what all of the text is, as errors call it: "recipe 'gptq(a)'".

    Raises:
        RecipeError: naming the argument that is wrong, with what is accepted.
    """
    types = parameter_types(kind)
    values: dict[str, Any] = {}
    for argument in (arguments or "").split(",") if (arguments or "").strip() else ():
        key, equals, value = (piece.strip() for piece in argument.partition("="))
        if not (key and equals and value):
            raise RecipeError(f"{where}: {argument.strip()!r} is not parameter=value")
        if key not in types:
            accepted = f"it takes {', '.join(types)}" if types else "it takes none"
            raise RecipeError(f"{name} has no parameter {key!r}: {accepted}")
        if key in values:
            raise RecipeError(f"{name}: parameter {key} is given twice")
        try:
            values[key] = _convert(value, types[key])
        except ValueError:
            raise RecipeError(
                f"{name}: parameter {key} is {describe(types[key])}, got {value!r}"
            ) from None
    try:
        return kind(**values)
    except ValueError as error:
        raise RecipeError(f"{name}: {error}") from None


def spell_choice(name: str, parameters: Any) -> str:
    """The canonical spelling: parameters in the order of their declaration, those with their
    default left out."""
    default = type(parameters)()
    changed = [
        f"{part}={spell(value)}"
        for part in parameter_types(type(parameters))
        if (value := getattr(parameters, part)) != getattr(default, part)
    ]
    return f"{name}({', '.join(changed)})" if changed else name


def parameter_types(kind: type[Any]) -> dict[str, Any]:
    """The type of each parameter, in the order of their declaration."""
    hints = get_type_hints(kind)
    return {part.name: hints[part.name] for part in fields(kind)}


def describe(kind: Any) -> str:
    """A parameter's type in a user's words."""
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(str(value) for value in get_args(kind))
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}[kind]


def describe_parameters(kind: type[Any]) -> str:
    """All parameters with their defaults and types, for listings."""
    default = kind()
    return "; ".join(
        f"{name}={spell(getattr(default, name))}, {describe(type_)}"
        for name, type_ in parameter_types(kind).items()
    )


def spell(value: Any) -> str:
    """A parameter's value as a user writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _convert(value: str, kind: Any) -> Any:
    """Raises ValueError where `value` spells nothing of `kind`."""
    words: dict[str, Any] = {}
    if kind is bool:
        words = {"true": True, "false": False}
    elif get_origin(kind) is Literal:
        words = {word: word for word in get_args(kind)}
    if words and value not in words:
        raise ValueError(value)
    return words[value] if words else kind(value)
