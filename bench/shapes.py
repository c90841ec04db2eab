"""Layer shapes of real models, as (N, K) = (output channels, input channels)."""

from __future__ import annotations

from dataclasses import dataclass

M_VALUES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Rows of x: a decode step of one sequence up to the prefill of a long prompt."""


@dataclass(frozen=True)
class Layer:
    """One linear layer: weight [n, k], named `model name`."""

    model: str
    name: str
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.model} {self.name} {self.n}x{self.k}"

    @property
    def shape(self) -> str:
        return f"{self.n}x{self.k}"


@dataclass(frozen=True)
class _Decoder:
    """What the shapes of a decoder block follow from; fused as inference engines fuse them."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    def layers(self, model: str) -> tuple[Layer, ...]:
        attention = self.heads * self.head_dim
        qkv = attention + 2 * self.kv_heads * self.head_dim
        return (
            Layer(model, "qkv", qkv, self.hidden),
            Layer(model, "o", self.hidden, attention),
            Layer(model, "gate_up", 2 * self.intermediate, self.hidden),
            Layer(model, "down", self.hidden, self.intermediate),
        )


# From the config.json of each model.
_DECODERS = {
    "llama3-8b": _Decoder(4096, 14336, heads=32, kv_heads=8, head_dim=128),
    "llama3-70b": _Decoder(8192, 28672, heads=64, kv_heads=8, head_dim=128),
    "qwen2.5-7b": _Decoder(3584, 18944, heads=28, kv_heads=4, head_dim=128),
    "qwen3-8b": _Decoder(4096, 12288, heads=32, kv_heads=8, head_dim=128),
    "smollm2-135m": _Decoder(576, 1536, heads=9, kv_heads=3, head_dim=64),
}

# First the one that most targets are set on: a run may end at its time limit.
_SQUARES = (
    (8192, 8192),
    (4096, 4096),
    (4096, 14336),
    (14336, 4096),
    (8192, 28672),
    (2048, 2048),
    (5120, 1024),
    (4096, 11008),
    (11008, 4096),
)

_CPU_SHAPES = ((4096, 4096), (4096, 11008), (11008, 4096))

MODELS: dict[str, tuple[Layer, ...]] = {
    **{model: decoder.layers(model) for model, decoder in _DECODERS.items()},
    "targets": tuple(Layer("targets", "linear", n, k) for n, k in _SQUARES),
    "targets-cpu": tuple(Layer("targets-cpu", "linear", n, k) for n, k in _CPU_SHAPES),
}
"""Layers by model; `targets` and `targets-cpu` are the shapes performance targets are set on."""


def parse_shape(text: str) -> Layer:
    """The layer that "N,K" or "NxK" spells.

    Raises:
        ValueError: naming the text and the accepted form.
    """
    parts = text.lower().replace("x", ",").split(",")
    try:
        n, k = (int(part) for part in parts)
    except ValueError:
        raise ValueError(f"shape {text!r} is not N,K, for example 4096,14336") from None
    if n < 1 or k < 1:
        raise ValueError(f"shape {text!r} needs N and K of 1 or more")
    return Layer("custom", "linear", n, k)


def model_layers(name: str) -> tuple[Layer, ...]:
    """The layers of the model called `name`.

    Raises:
        ValueError: naming the model and those that are known.
    """
    if name not in MODELS:
        raise ValueError(f"model {name!r} is not known: use one of {', '.join(MODELS)}")
    return MODELS[name]


def without_repeats(layers: list[Layer]) -> list[Layer]:
    """`layers` in order, each shape once: the same shape under two names is timed once."""
    first: dict[tuple[int, int], Layer] = {}
    for layer in layers:
        first.setdefault((layer.n, layer.k), layer)
    return list(first.values())
