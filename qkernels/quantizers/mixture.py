"""A scheme for each layer, chosen under a budget; saved and read back as JSON."""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qkernels.errors import QuantizationError, SchemeError
from qkernels.quantizers.allocation import allocate
from qkernels.quantizers.sensitivity import Sensitivity, check_budget
from qkernels.scheme import QuantScheme


@dataclass(frozen=True)
class Mixture:
    """Attributes:
    schemes: layer -> scheme; None leaves it as it is.
    bits_per_weight: mean over all layers, scales and zero points among them.
    loss: the sum of what the layers lose alone, in nats a token.
    budget: the most bits a weight that were allowed.
    """

    schemes: Mapping[str, str | None]
    bits_per_weight: float
    loss: float
    budget: float

    @property
    def overrides(self) -> dict[str, str | None]:
        """What `quantize_model` takes: each layer by its name alone, as a pattern."""
        return {glob.escape(name): scheme for name, scheme in self.schemes.items()}

    def save(self, path: str | Path, sensitivity: Sensitivity | None = None) -> None:
        """Writes it as JSON; with what it was chosen by, for a look or another budget."""
        content: dict[str, Any] = {**asdict(self), "schemes": dict(self.schemes)}
        if sensitivity is not None:
            content["sensitivity"] = {n: asdict(s) for n, s in sensitivity.layers.items()}
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def mix(sensitivity: Sensitivity, budget: float, *, together: bool = False) -> Mixture:
    """The schemes that lose least in all, with at most `budget` bits a weight in the mean.

    Losses of layers are taken to add up.

    Args:
        budget: as `stored_bits` counts them, so that "w4a16-g64" everywhere takes 4.3125.
        together: layers that read one tensor get one scheme, so that they can be fused.

    Raises:
        QuantizationError: for a budget that no choice of these schemes fits.
    """
    groups: dict[str, list[str]] = {}
    for name, layer in sensitivity.layers.items():
        first = layer.same_as or name
        groups.setdefault(sensitivity.layers[first].reads if together else first, []).append(name)
    choices = {name: layer.choices for name, layer in sensitivity.layers.items()}
    numbers = sensitivity.numbers
    least = sum(min(c.bits for c in layer.choices) for layer in sensitivity.layers.values())
    check_budget(budget, least, numbers)
    taken = allocate(choices, int(budget * numbers), groups.values())
    return Mixture(
        {name: choice.scheme for name, choice in taken.items()},
        sum(choice.bits for choice in taken.values()) / numbers,
        sum(choice.loss for choice in taken.values()),
        budget,
    )


def read_overrides(path: str | Path) -> dict[str, QuantScheme | None]:
    """The overrides of a mixture that was saved, or of any JSON with "schemes": {layer: scheme}.

    Raises:
        QuantizationError: for a file that cannot be read or holds something else.
        SchemeError: for a scheme that does not parse, naming the layer.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise QuantizationError(f"cannot read the overrides {path}: {error.strerror}") from None
    except ValueError:
        raise QuantizationError(f"the overrides {path} are no JSON") from None
    schemes = content.get("schemes") if isinstance(content, dict) else None
    if not isinstance(schemes, dict) or not schemes:
        raise QuantizationError(f'the overrides {path} hold no "schemes": {{layer: scheme}}')
    parsed: dict[str, QuantScheme | None] = {}
    for name, scheme in schemes.items():
        if not isinstance(scheme, str | None):
            raise SchemeError(f"{path}: the scheme of {name} is {scheme!r}: use a text or null")
        try:
            parsed[glob.escape(name)] = None if scheme is None else QuantScheme.parse(scheme)
        except SchemeError as error:
            raise SchemeError(f"{path}: {name}: {error}") from None
    return parsed
