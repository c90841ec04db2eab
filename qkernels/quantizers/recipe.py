"""Recipes: methods put together, written as `smoothquant(alpha=0.8)+gptq(act_order=static)`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qkernels.errors import RecipeError
from qkernels.quantizers.method import Method
from qkernels.quantizers.methods import LAST, METHODS, RECIPES
from qkernels.scheme import QuantScheme
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
    """What is done to a model: parts that prepare, one that quantizes, parts that finish.

    `str` gives the canonical spelling: parameters in the order of their declaration, those with
    their default left out.
    """

    parts: tuple[Part, ...]

    @staticmethod
    def parse(text: str | Recipe, scheme: QuantScheme | None = None) -> Recipe:
        """The recipe that `text` spells; a recipe is returned as it is.

        Where no method quantizes, rounding to nearest does. A name of `methods.RECIPES` alone
        stands for what that spells.

        Args:
            scheme: that most layers will have, which such a name depends on.

        Raises:
            RecipeError: naming the part that is wrong, with what is accepted.
        """
        if isinstance(text, Recipe):
            return text
        named = RECIPES.get(text.strip()) if isinstance(text, str) else None
        parts = _parse(text if named is None else named.spelled(scheme))
        quantizing = [part.method.name for part in parts if part.method.quantizes]
        if len(quantizing) > 1:
            raise RecipeError(
                f"recipe {text!r}: {' and '.join(quantizing)} quantize the layers: choose one"
            )
        if not quantizing:
            first = next((i for i, p in enumerate(parts) if p.method.finishes), len(parts))
            parts.insert(first, Part(METHODS[LAST], METHODS[LAST].parameters()))
        places = [_place(part) for part in parts]
        if places != sorted(places):
            part = next(p for p, q in zip(parts, places[1:], strict=False) if _place(p) > q)
            raise RecipeError(f"recipe {text!r}: {part.method.name} {_WHEN[_place(part)]}")
        names = [part.method.name for part in parts]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise RecipeError(f"recipe {text!r} names {twice} twice")
        return Recipe(tuple(parts))

    @property
    def quantizing(self) -> Part:
        """The part that quantizes."""
        return next(part for part in self.parts if part.method.quantizes)

    def __str__(self) -> str:
        return "+".join(str(part) for part in self.parts)


_WHEN = {
    1: "quantizes the layers, so what prepares them must come before it",
    2: "works on the quantized model, so it must come last",
}


def _place(part: Part) -> int:
    """Where a part stands in a recipe."""
    return 1 if part.method.quantizes else 2 if part.method.finishes else 0


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
        if name in RECIPES:
            raise RecipeError(f"recipe {text!r}: {name} is a whole recipe, so it stands alone")
        known = ", ".join((*METHODS, *RECIPES))
        raise RecipeError(f"method {name!r} is not one of {known}")
    where = f"recipe {text!r}"
    return Part(method, parse_parameters(f"method {name}", method.parameters, arguments, where))
