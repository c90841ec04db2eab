"""Recipes: methods put together, written as `smoothquant(alpha=0.8)+gptq(act_order=static)`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qkernels.errors import RecipeError
from qkernels.quantizers.method import Method
from qkernels.quantizers.methods import LAST, METHODS
from qkernels.spelling import CHOICE, parse_parameters, spell_choice


@dataclass(frozen=True)
class Part:
    """A method with its parameters, an instance of `method.parameters`."""

    method: Method
    parameters: Any

    def __str__(self) -> str:
        return spell_choice(self.method.name, self.parameters)


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
        found = CHOICE.match(text, position)
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
    where = f"recipe {text!r}"
    return Part(method, parse_parameters(f"method {name}", method.parameters, arguments, where))
