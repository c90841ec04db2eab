"""Recipes: what parses, how it is spelled, and what each mistake is called."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from qkernels import rounding
from qkernels.errors import RecipeError
from qkernels.quantizers.method import Method
from qkernels.quantizers.methods import METHODS, RECIPES, NamedRecipe
from qkernels.quantizers.recipe import Recipe
from qkernels.scheme import QuantScheme

OWN = set(METHODS)
"""Those of the package, before tests add theirs."""


@dataclass(frozen=True)
class Parameters:
    alpha: float = 0.5
    order: Literal["off", "full", "static"] = "off"
    steps: int = 20
    fold: bool = True
    text: str = "novel"

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be in 0 to 1, got {self.alpha}")


def prepare(task, parameters):
    pass


def quantize(task, parameters):
    return rounding.fit(task.weight, task.scheme)


@pytest.fixture(autouse=True)
def methods(monkeypatch):
    smooth = Method(name="smooth", title="", parameters=Parameters, prepare_block=prepare)
    other = Method(name="other", title="", prepare_block=prepare)
    learned = Method(name="learned", title="", parameters=Parameters, quantize=quantize)
    both = Method(name="both", title="", prepare_block=prepare, quantize=quantize)
    finished = Method(name="finished", title="", finish=lambda task, parameters: {})
    for row in (smooth, other, learned, both, finished):
        monkeypatch.setitem(METHODS, row.name, row)
    named = NamedRecipe("smooth(alpha=0.25)+learned", "other+learned")
    monkeypatch.setitem(RECIPES, "named", named)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("rtn", "rtn"),
        (" rtn ( ) ", "rtn"),
        ("finished", "rtn+finished"),
        ("smooth+finished", "smooth+rtn+finished"),
        ("other+learned+finished", "other+learned+finished"),
        (" named ", "smooth(alpha=0.25)+learned"),
        ("learned(alpha=0.5)", "learned"),
        ("learned(order=static,alpha=.25)", "learned(alpha=0.25, order=static)"),
        ("learned( steps = 3 , fold=false, text=a b)", "learned(steps=3, fold=false, text=a b)"),
        ("smooth(alpha=1e-05)+learned(order=full)", "smooth(alpha=1e-05)+learned(order=full)"),
        ("smooth(alpha=1)", "smooth(alpha=1.0)+rtn"),
        ("smooth + other", "smooth+other+rtn"),
        ("smooth+both", "smooth+both"),
    ],
)
def test_the_canonical_spelling_parses_back(text, canonical):
    recipe = Recipe.parse(text)
    assert str(recipe) == canonical
    assert Recipe.parse(canonical) == recipe
    assert Recipe.parse(recipe) is recipe


def test_a_name_depends_on_the_scheme():
    for scheme, spelled in (
        ("w4a16-g64", "smooth(alpha=0.25)+learned"),
        ("w8a8", "other+learned"),
        ("fp8-a8", "other+learned"),
    ):
        assert str(Recipe.parse("named", QuantScheme.parse(scheme))) == spelled
    assert str(Recipe.parse("learned", QuantScheme.parse("w8a8"))) == "learned"


def test_values_have_the_types_of_their_defaults():
    (part,) = Recipe.parse("learned(alpha=1, order=full, steps=7, fold=false, text=7)").parts
    assert part.method is METHODS["learned"]
    expected = Parameters(alpha=1.0, order="full", steps=7, fold=False, text="7")
    assert part.parameters == expected
    assert isinstance(part.parameters.alpha, float) and part.parameters.fold is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "magic",
            "method 'magic' is not one of autoround, awq, ",
        ),
        ("rtn+magic", "method 'magic' is not one of"),
        ("other(x=1)", "method other has no parameter 'x': it takes none"),
        ("smooth(beta=1)", "no parameter 'beta': it takes alpha, order, steps, fold, text"),
        ("smooth(alpha=high)", "parameter alpha is a number, got 'high'"),
        ("smooth(steps=1.5)", "parameter steps is a whole number, got '1.5'"),
        ("smooth(fold=1)", "parameter fold is true or false, got '1'"),
        ("smooth(order=up)", "parameter order is one of off, full, static, got 'up'"),
        ("smooth(alpha=2)", "method smooth: alpha must be in 0 to 1, got 2.0"),
        ("smooth(alpha=nan)", "alpha must be in 0 to 1, got nan"),
        ("smooth(alpha=0.1, alpha=0.2)", "parameter alpha is given twice"),
        ("smooth(alpha)", "'alpha' is not parameter=value"),
        ("smooth(alpha=0.1,)", "'' is not parameter=value"),
        ("rtn+learned", "rtn and learned quantize the layers: choose one"),
        ("both+smooth", "both quantizes the layers, so what prepares them must come before it"),
        ("finished+learned", "finished works on the quantized model, so it must come last"),
        ("named+finished", "named is a whole recipe, so it stands alone"),
        ("named(a=1)", "named is a whole recipe, so it stands alone"),
        ("rtn+rtn", "rtn and rtn quantize the layers: choose one"),
        ("smooth+smooth", "names smooth twice"),
        ("", "does not parse at ''"),
        ("rtn+", "does not parse at ''"),
        ("smooth rtn", "does not parse at 'rtn': methods are joined by +"),
        ("smooth(alpha=0.1", r"does not parse at '\(alpha=0.1': methods are joined by \+"),
        ("rtn,smooth", "does not parse at ',smooth'"),
        (3, "a recipe is a text such as 'rtn', got 3"),
    ],
)
def test_a_mistake_is_named(text, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.parse(text)


def test_every_method_is_described():
    text = (Path(__file__).parents[2] / "docs/methods.md").read_text()
    described = set(re.findall(r"^## `(\w+)`", text, re.MULTILINE))
    assert described == OWN
