"""What is measured: a model, a scheme and a recipe in each row."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from qkernels.calibration.observers import DEFAULT_OBSERVER, ObserverChoice
from qkernels.errors import QuantizationError
from qkernels.quantizers.recipe import Recipe
from qkernels.scheme import QuantScheme

LANGUAGE, ENCODER = "smollm2", "minilm"
MODELS = (LANGUAGE, ENCODER)

_OBSERVER, _QAT = " observer=", " qat="
"""Between a recipe and the observer of static activations, where that is not the default, and the
steps of training behind it."""

_OPTIONS = re.compile(f"({_OBSERVER}|{_QAT})")

BASELINE = "rtn"
"""The recipe whose loss others win back, and that none may be worse than."""


@dataclass(frozen=True)
class Row:
    """A configuration. Its name, "smollm2 w4a16-g64 gptq", is what patterns are matched with.

    Attributes:
        recipe: "rtn"; with an observer of static activations, "rtn observer=mse"; with training
            that begins where the recipe ends, "gptq qat=64".
    """

    model: str
    scheme: str
    recipe: str

    @property
    def name(self) -> str:
        return f"{self.model} {self.scheme} {self.recipe}"

    @property
    def method(self) -> str:
        """The recipe alone."""
        return _OPTIONS.split(self.recipe)[0]

    @property
    def observer(self) -> str:
        """What finds the range of static activations."""
        return self._options().get(_OBSERVER, str(DEFAULT_OBSERVER))

    @property
    def training_steps(self) -> str:
        """Of training with quantization, behind the recipe; "0" where there is none."""
        return self._options().get(_QAT, "0")

    def _options(self) -> dict[str, str]:
        _, *words = _OPTIONS.split(self.recipe)
        return dict(zip(words[::2], words[1::2], strict=True))

    @staticmethod
    def parse(name: str) -> Row:
        """The row of a name.

        Raises:
            ValueError: for another model, or a name of fewer words.
        """
        words = name.split(maxsplit=2)
        if len(words) < 3 or words[0] not in MODELS:
            raise ValueError(
                f"{name!r} is no row: write MODEL SCHEME RECIPE, MODEL one of {', '.join(MODELS)}"
            )
        return Row(*words)

    def why_not(self) -> str | None:
        """Why it cannot be measured, as for a recipe that is not there; or None."""
        try:
            scheme = QuantScheme.parse(self.scheme)
            ObserverChoice.parse(self.observer)
            if _OBSERVER in self.recipe and not scheme.activation.is_static:
                return f"{scheme} has no static activations to observe"
            if _QAT in self.recipe:
                if self.model != LANGUAGE:
                    return "training is on the divergence of logits, which an encoder has not"
                if not self.training_steps.isdecimal() or int(self.training_steps) < 1:
                    return f"qat={self.training_steps} is no number of steps, 1 or more"
                if scheme.scale_levels != "one":
                    return (
                        f"{scheme} has scales that are quantized themselves, which are not learned"
                    )
            for part in Recipe.parse(self.method, scheme).parts:
                reason = part.method.why_not(scheme, part.parameters)
                if reason is not None:
                    return f"{part} does not make {scheme}: {reason}"
        except QuantizationError as error:
            return str(error)
        return None


_DATA_FREE = (BASELINE, "rtn(grid=mse)")
_INTEGERS = (
    *_DATA_FREE,
    "hqq",
    "awq",
    "autoround",
    "gptq",
    "rotate+gptq",
    "guided+gptq",
    "gptq+distill",
    "best",
)
"""Every method, those that prepare or finish around `gptq`; but for `obq`, whose N K^3 operations a
layer are 9e13 for this model, hours on two cores."""

_ACTIVATIONS = (
    BASELINE,
    "smoothquant",
    "smoothquant(steps=11)",
    "outlier_suppression",
    "gptq",
    "smoothquant(steps=11)+gptq",
    "zeroquant",
    "rotate+gptq",
    "rotate+smoothquant(steps=11)+gptq",
)

_STATIC = (
    *_ACTIVATIONS,
    *(f"rtn{_OBSERVER}{name}" for name in ("moving_average", "percentile", "kl", "mse")),
    *(f"{name}{_OBSERVER}tokenwise" for name in (BASELINE, "outlier_suppression")),
)
"""With every observer; token-wise clipping is Outlier Suppression's."""

_FEW_BIT_ACTIVATIONS = (
    BASELINE,
    "smoothquant(steps=11)+gptq",
    "rotate+gptq",
    "rotate+smoothquant(steps=11)+gptq",
)

_RECIPES: dict[str, dict[str, tuple[str, ...]]] = {
    LANGUAGE: {
        "w4a16-g64": (*_INTEGERS, "awq(keep=0.01)"),
        "w4a16-g64-sym": _INTEGERS,
        "w3a16-g64": (*_INTEGERS, f"gptq{_QAT}64", f"best{_QAT}64"),
        "w2a16-g32": _INTEGERS,
        # Of about one size, 3.6 bits a weight, with what is beside the codes.
        "w3a16-g32": (BASELINE, "gptq"),
        "w3a16-g32-spqr": (BASELINE, "gptq", "spqr(outliers=0.0055)"),
        "nf4-g64": (*_DATA_FREE, "gptq"),
        "nf4-g64-dq": (BASELINE,),
        "fp4-g64": (*_DATA_FREE, "gptq"),
        "log4-g64": _DATA_FREE,
        "binary-g64": _DATA_FREE,
        "fp8e4m3-a16": _DATA_FREE,
        "w8a16-g64-sym": _DATA_FREE,
        "w8a8": _ACTIVATIONS,
        "w8a8-outliers6": (BASELINE, "gptq"),
        "w8a8-outliers2": (BASELINE,),
        "w8a8-gtensor": _ACTIVATIONS,
        "w8a8-gtensor-tensor": _ACTIVATIONS,
        "w8a8-gtensor-static": _STATIC,
        "w8a8-gtensor-position": (BASELINE, "smoothquant", "outlier_suppression"),
        "w4a8-g64": (*_ACTIVATIONS, "awq", "qoq"),
        "w4a4-g64": _FEW_BIT_ACTIVATIONS,
    },
    ENCODER: {
        "w8a16-g64-sym": (BASELINE,),
        "w4a16-g64": _INTEGERS,
        "w4a16-g64-sym": _INTEGERS,
        "w3a16-g64": _INTEGERS,
        "nf4-g64": _DATA_FREE,
        "w8a8-static": _STATIC,
    },
}
"""model -> scheme -> recipes. A method that does not make the scheme has no row there."""


def _rows() -> Iterator[Row]:
    for model, schemes in _RECIPES.items():
        for scheme, recipes in schemes.items():
            for recipe in recipes:
                row = Row(model, scheme, recipe)
                if row.why_not() is None:
                    yield row


ROWS = tuple(_rows())
