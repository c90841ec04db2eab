"""The model classes of the installed Transformers, by kind, as its auto classes list them."""

from __future__ import annotations

from dataclasses import dataclass

from transformers.models.auto import modeling_auto

KINDS = {
    "causal": ("CAUSAL_LM",),
    "masked": ("MASKED_LM",),
    "seq2seq": ("SEQ_TO_SEQ_CAUSAL_LM",),
    "vision": (
        "IMAGE_CLASSIFICATION",
        "IMAGE",
        "IMAGE_TEXT_TO_TEXT",
        "MULTIMODAL_LM",
        "ZERO_SHOT_IMAGE_CLASSIFICATION",
    ),
    "speech": ("CTC", "SPEECH_SEQ_2_SEQ", "AUDIO_CLASSIFICATION"),
    "encoder": ("TEXT_ENCODING", "BASE"),
}
"""Kind -> the auto-mappings that its classes stand in; a class is of the first kind that has it."""


@dataclass(frozen=True)
class ModelClass:
    """A class to try, and the type of config that its auto class makes it from."""

    name: str
    kind: str
    model_type: str


def model_classes() -> dict[str, ModelClass]:
    """Name -> each class of `KINDS`, in their order."""
    found: dict[str, ModelClass] = {}
    for kind, mappings in KINDS.items():
        for mapping in mappings:
            part = "" if mapping == "BASE" else f"FOR_{mapping}_"
            listed = getattr(modeling_auto, f"MODEL_{part}MAPPING_NAMES")
            for model_type, names in listed.items():
                for name in (names,) if isinstance(names, str) else names:
                    found.setdefault(name, ModelClass(name, kind, model_type))
    return found
