"""Recipes: methods put together, written as `smoothquant(alpha=0.8)+gptq(act_order=static)`."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from qkernels.errors import RecipeError
from qkernels.quantizers.method import Method
from qkernels.quantizers.methods import LAST, METHODS

_PART = re.compile(r"\s*([A-Za-z_][\w-]*)\s*(?:\(([^()]*)\))?\s*")


@dataclass(frozen=True)
class Part:
    """A method with its parameters, an instance of `method.parameters`."""

    method: Method
    parameters: Any

    def __str__(self) -> str:
        default = self.method.parameters()
        changed = [
            f"{name}={spell(value)}"
            for name in (f.name for f in fields(default))
            if (value := getattr(self.parameters, name)) != getattr(default, name)
        ]
        return f"{self.method.name}({', '.join(changed)})" if changed else self.method.name


@dataclass(frozen=True)
class Recipe:
    """What is done to each block, in order; the last part quantizes, those before prepare.

    `str` gives the canonical spelling: parameters in the order of their declaration, those with
    their default left out.
    """

    parts: tuple[Part, ...]

    @staticmethod
    def parse(text: str | Recipe) -> Recipe:
        """The recipe that `text` spells; a recipe is returned as it is.

        Methods that only prepare are followed by rounding to nearest.

        Raises:
            RecipeError: naming the part that is wrong, with what is accepted.
        """
        if isinstance(text, Recipe):
            return text
        parts = _parse(text)
        quantizing = [part.method.name for part in parts if part.method.quantize is not None]
        if len(quantizing) > 1:
            raise RecipeError(
                f"recipe {text!r}: {' and '.join(quantizing)} quantize the layers: choose one"
            )
        if parts[-1].method.quantize is None:
            if quantizing:
                raise RecipeError(
                    f"recipe {text!r}: {quantizing[0]} quantizes the layers, so it must come last"
                )
            parts.append(Part(METHODS[LAST], METHODS[LAST].parameters()))
        names = [part.method.name for part in parts]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise RecipeError(f"recipe {text!r} names {twice} twice")
        return Recipe(tuple(parts))

    def __str__(self) -> str:
        return "+".join(str(part) for part in self.parts)


def _parse(text: str) -> list[Part]:
    if not isinstance(text, str):
        raise RecipeError(f"a recipe is a text such as 'rtn', got {text!r}")
    parts, position = [], 0
    while True:
        found = _PART.match(text, position)
        if found is None:
            raise RecipeError(
                f"recipe {text!r} does not parse at {text[position:]!r}: write methods as "
                "name or name(parameter=value, ...), joined by +"
            )
        parts.append(_part(text, found[1], found[2]))
        position = found.end()
        if position == len(text):
            return parts
        if text[position] != "+":
            raise RecipeError(
                f"recipe {text!r} does not parse at {text[position:]!r}: methods are joined by +"
            )
        position += 1


def _part(text: str, name: str, arguments: str | None) -> Part:
    method = METHODS.get(name)
    if method is None:
        raise RecipeError(f"method {name!r} is not one of {', '.join(METHODS)}")
    types = parameter_types(method)
    values: dict[str, Any] = {}
    for argument in (arguments or "").split(",") if (arguments or "").strip() else ():
        key, equals, value = (piece.strip() for piece in argument.partition("="))
        if not (key and equals and value):
            raise RecipeError(f"recipe {text!r}: {argument.strip()!r} is not parameter=value")
        if key not in types:
            accepted = f"it takes {', '.join(types)}" if types else "it takes none"
            raise RecipeError(f"method {name} has no parameter {key!r}: {accepted}")
        if key in values:
            raise RecipeError(f"method {name}: parameter {key} is given twice")
        try:
            values[key] = _convert(value, types[key])
        except ValueError:
            raise RecipeError(
                f"method {name}: parameter {key} is {describe(types[key])}, got {value!r}"
            ) from None
    try:
        return Part(method, method.parameters(**values))
    except ValueError as error:
        raise RecipeError(f"method {name}: {error}") from None


def parameter_types(method: Method) -> dict[str, Any]:
    """The type of each parameter, in the order of their declaration."""
    hints = get_type_hints(method.parameters)
    return {part.name: hints[part.name] for part in fields(method.parameters)}


def describe(kind: Any) -> str:
    """A parameter's type in a user's words."""
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(str(value) for value in get_args(kind))
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}[kind]


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


def spell(value: Any) -> str:
    """A parameter's value as a recipe has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
