"""The tables of methods and of named recipes, read by recipes, the driver, the CLI and the docs."""

from __future__ import annotations

from dataclasses import dataclass

from qkernels.quantizers.autoround import AUTOROUND
from qkernels.quantizers.awq import AWQ
from qkernels.quantizers.distill import DISTILL
from qkernels.quantizers.gptq import GPTQ
from qkernels.quantizers.guided import GUIDED
from qkernels.quantizers.hqq import HQQ
from qkernels.quantizers.method import Method
from qkernels.quantizers.obq import OBQ
from qkernels.quantizers.outlier_suppression import OUTLIER_SUPPRESSION
from qkernels.quantizers.rotate import ROTATE
from qkernels.quantizers.rtn import RTN
from qkernels.quantizers.smoothquant import SMOOTHQUANT
from qkernels.quantizers.spqr import SPQR
from qkernels.quantizers.zeroquant import ZEROQUANT
from qkernels.scheme import QuantScheme

METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        *(AUTOROUND, AWQ, DISTILL, GPTQ, GUIDED, HQQ, OBQ),
        *(OUTLIER_SUPPRESSION, ROTATE, RTN, SMOOTHQUANT, SPQR, ZEROQUANT),
    )
}

LAST = RTN.name
"""What quantizes the layers where a recipe only prepares, and those that calibration never saw."""


@dataclass(frozen=True)
class NamedRecipe:
    """What a name stands for.

    Attributes:
        weights: where activations stay in 16 bits, and where no scheme is known.
        activations: where they are quantized.
    """

    weights: str
    activations: str

    def spelled(self, scheme: QuantScheme | None) -> str:
        """For layers of a scheme."""
        return self.weights if scheme is None or scheme.weight_only else self.activations


RECIPES = {
    "best": NamedRecipe("gptq+distill", "smoothquant(steps=11)+gptq"),
    "fast": NamedRecipe("gptq", "smoothquant+gptq"),
    "qoq": NamedRecipe("rotate+awq", "rotate+awq"),
}
"""Recipes by a name of their own: `best` and `fast` chosen by what they gave on a model, `qoq` that
of QServe; see docs/methods.md."""
