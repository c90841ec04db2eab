"""The outcome of a class, a row of the survey's table."""

from __future__ import annotations

from dataclasses import dataclass, field

WORKS, FAILS, LEFT_ALONE, STARTS_NOT = "works", "fails", "left alone", "starts not"
OUTCOMES = (WORKS, FAILS, LEFT_ALONE, STARTS_NOT)
"""All is as it should be; something is not; nothing of it can be quantized; its dense forward does
not run in a tiny model."""


@dataclass
class Row:
    """What came of a class.

    Attributes:
        step: what was tried when it failed; None where all was.
        reason: why it failed, does not start or is left alone, in a line.
        detail: what the process printed where it failed: a traceback.
        parameters: of the tiny model.
        inputs: the names of what its forward was given.
        quantized: share of the parameters outside of embeddings that are quantized.
        error: largest relative error of its outputs; None where they have another shape.
        sensitive: that error is past the bound, and a dense model with the same weights errs
            alike: rounding tips a choice (of an expert, of a length), or weighs heavily.
        skipped: layer or parameter -> why it is not quantized, as the report says.
        shares: layer or parameter -> its part of all parameters.
        head: what came of its output head where that was asked for; None without one.
        generates: None where it does; why not, else.
        seconds: for everything.
    """

    name: str
    kind: str
    model_type: str
    outcome: str = WORKS
    step: str | None = "start"
    reason: str | None = None
    detail: str | None = None
    parameters: int = 0
    inputs: list[str] = field(default_factory=list)
    quantized: float | None = None
    error: float | None = None
    sensitive: bool = False
    skipped: dict[str, str] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    head: str | None = None
    generates: str | None = None
    seconds: float = 0.0
