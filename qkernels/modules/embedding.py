"""`WQEmbedding`: nn.Embedding with a quantized weight, alone or in the memory of an output head."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from qkernels import ops, rounding
from qkernels.errors import LayerError, SchemeError, WeightError
from qkernels.layouts import LAYOUTS, PLAIN, Layout, PackedWeight, allocate, pack, write_rows
from qkernels.modules.kinds import is_embedding_kind, take_place_of, why_not_plain_embedding
from qkernels.modules.packed import PackedModule
from qkernels.modules.view import WeightView
from qkernels.scheme import Activation, QuantScheme
from qkernels.weight import QuantizedWeight, row_slices


class WQEmbedding(PackedModule, nn.Embedding):
    """Rows of a quantized weight [N, K] by their numbers, in place of `nn.Embedding`.

    Only the rows that are looked up are dequantized: they are those of `dequantize()`, rounded to
    `dtype`. The weight is held in the plain layout on every device, or it is that of another module
    with a packed weight, such as the output head: see `source`. Nothing of it can be trained.

    It is an `nn.Embedding` to whoever asks, and has no parameters: `weight` is a `WeightView`.
    Given another number of rows, as by `resize_token_embeddings` of Transformers, it becomes dense.

    Attributes:
        num_embeddings, embedding_dim: N and K.
        padding_idx: as that of `nn.Embedding`, which is for training alone.
        scheme: the `QuantScheme`.
        dtype: of the rows, and of the weight that the module stands for.
        source: the module whose packed weight this one looks up, or None where it has its own. They
            move together. Its buffers are there under this one's name too, as one parameter of two
            dense modules is, for state dicts and for tools that move tensors by name.
        embed_scale: what the rows are multiplied by, in embeddings of Transformers that do so.
    """

    # For training alone.
    max_norm = None
    norm_type = 2.0
    scale_grad_by_freq = False
    sparse = False

    source: PackedModule | None

    def __init__(
        self,
        weight: PackedWeight | PackedModule,
        *,
        padding_idx: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # Not that of nn.Embedding, which makes a weight.
        super(nn.Embedding, self).__init__()
        packed = weight if isinstance(weight, PackedWeight) else weight.packed
        self.num_embeddings, self.embedding_dim = packed.n, packed.k
        self.padding_idx = _padding_row(padding_idx, packed.n)
        self.scheme = packed.scheme
        # Not registered: it is a module of its own elsewhere in the model.
        vars(self)["source"] = None if isinstance(weight, PackedWeight) else weight
        own = packed.scheme.scale_dtype if self.source is None else self.source.dtype
        self.dtype = own if dtype is None else dtype
        self._dense_class: type[nn.Module] = nn.Embedding
        assert self.source is not None or packed.layout is PLAIN
        self._install(packed)
        self._follow(always=True)

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, scheme: QuantScheme | str, *, name: str = "embedding"
    ) -> WQEmbedding:
        """Rounds the weight of `embedding` to nearest and packs it, a slice of rows at a time.

        Args:
            embedding: of fp16, bf16 or fp32; it is not changed. One of Transformers' that multiply
                their rows by a number is taken with it.
            scheme: a `QuantScheme` or its spelling, without quantized activations.
            name: what errors call the embedding.

        Raises:
            LayerError: for what is no embedding, or computes something else.
            SchemeError, WeightError: for a scheme that does not parse or is not weight-only, and a
                weight that is not finite or of another dtype.
        """
        if isinstance(embedding, WQEmbedding):
            raise LayerError(f"{name} is quantized already, as {embedding.scheme}")
        if not is_embedding_kind(embedding):
            raise LayerError(f"{name} is a {type(embedding).__name__}, not an nn.Embedding")
        reason = why_not_plain_embedding(embedding)
        if reason is not None:
            raise LayerError(f"{name} cannot be quantized: {reason}")
        scheme = QuantScheme.parse(scheme)
        reason = why_not_scheme(scheme)
        if reason is not None:
            raise SchemeError(f"{name} {reason}")
        weight = embedding.weight.detach()
        try:
            parameters = rounding.fit(weight, scheme)
            packed = allocate(PLAIN, parameters, weight.device)
            for start, stop in row_slices(*weight.shape):
                codes = rounding.encode_rows(weight[start:stop], parameters, start)
                write_rows(packed, start, codes)
        except WeightError as error:
            raise WeightError(f"{name}: {error}") from None
        made = cls(packed, dtype=weight.dtype)
        made.stand_in_for(embedding)
        return made

    @classmethod
    def from_weight(
        cls,
        weight: QuantizedWeight,
        *,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> WQEmbedding:
        """An embedding of a weight that someone else quantized, on `device` or where the weight is.

        Args:
            dtype: of the rows; None for that of the scales.
        """
        target = weight.codes.device if device is None else torch.device(device)
        return cls(pack(weight, PLAIN, target), padding_idx=padding_idx, dtype=dtype)

    def stand_in_for(self, before: nn.Module) -> None:
        """Takes over what makes `before`, whose place it takes, more than its weight: its padding,
        its factor, and what others have put on it."""
        self.padding_idx = cast(Any, before).padding_idx
        factor = before._buffers.get("embed_scale")
        if factor is not None:
            if factor.is_meta:
                factor = torch.tensor(cast(Any, before).scalar_embed_scale, dtype=factor.dtype)
            self.register_buffer("embed_scale", factor.to(self._words.device), persistent=False)
        take_place_of(self, before)
        self._dense_class = type(before)

    @property
    def packed(self) -> PackedWeight:
        """The weight as it is held now."""
        self._follow()
        return super().packed

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight that the embedding stands for, [N, K]: a `WeightView`."""
        if torch.compiler.is_compiling():
            return self.dequantize().to(self.dtype)
        return WeightView(self, self._shape(), self.dtype, self._words.device)

    def view_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """For `WeightView`."""
        return ops.linear_operator(x, self._product_buffers(), bias, self._spec)

    def view_resize(self, values: Tensor) -> bool:
        """For `WeightView`: becomes dense where `values` have another number of rows."""
        if values.dim() != 2 or values.shape[1] != self.embedding_dim:
            return False
        if values.shape[0] == self.num_embeddings:
            return False
        mine = (
            *("source", "scheme", "dtype", "_dense_class"),
            *("_layout", "_names", "_held", "_by_position", "_spec"),
        )
        for name in self._held:
            del self._buffers[name]
        self.__class__ = self._dense_class  # type: ignore[assignment]
        for name in mine:
            vars(self).pop(name, None)
        for name in ("max_norm", "norm_type", "scale_grad_by_freq", "sparse"):
            setattr(self, name, getattr(WQEmbedding, name))
        self.num_embeddings = values.shape[0]
        nn.Module.register_parameter(self, "weight", nn.Parameter(values))
        return True

    def forward(self, input: Tensor) -> Tensor:
        """Rows [..., K] of `dtype` for int64 or int32 `input` [...], times `embed_scale`.

        Raises:
            IndexError: for an index that is not in [0, N). On a GPU a later call of torch raises.
            WeightError: for a wrong dtype or device of `input`.
        """
        rows = ops.embedding_operator(input, self._packed_buffers(), self._spec, self.dtype)
        factor: Any = self._buffers.get("embed_scale", vars(self).get("embed_scale"))
        if factor is None:
            return rows
        # As the forwards of Transformers do: by a number, or by a tensor in the weight's type.
        return rows * (factor.to(self.dtype) if isinstance(factor, Tensor) else factor)

    def dequantize(self) -> Tensor:
        """The weight as fp32 [N, K], without `embed_scale`."""
        return torch.ops.qkernels.dequantize(self._packed_buffers(), self._spec)

    def dense_weight(self) -> Tensor:
        """The weight [N, K] in `dtype`, as its rows are looked up, without `embed_scale`."""
        rows = torch.arange(self.num_embeddings, device=self._words.device)
        return ops.embedding_operator(rows, self._packed_buffers(), self._spec, self.dtype)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        self._follow()
        layout = self._layout if self.source is None else f"{self._layout} of another module"
        return (
            f"{self.num_embeddings}, {self.embedding_dim}{padding}, scheme={self.scheme}, "
            f"layout={layout}"
        )

    def view_scale(self, factor: float) -> None:
        """For `WeightView`."""
        if self.source is None:
            super().view_scale(factor)
        else:
            self.source.view_scale(factor)

    def _shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def _layout_on(self, device: torch.device) -> Layout:
        return LAYOUTS[PLAIN.name]

    @property
    def _words(self) -> Tensor:
        self._follow()
        return super()._words

    def _packed_buffers(self) -> list[Tensor]:
        self._follow()
        return super()._packed_buffers()

    def _follow(self, *, always: bool = False) -> None:
        """Takes the buffers that `source` has now.

        Where these are on another device, as while accelerate keeps them elsewhere, those stay that
        are here.
        """
        source = self.source
        if source is None or torch.compiler.is_compiling():
            return
        words, own = source._words, super()._words
        if not always and (words is own or words.device != own.device):
            return
        for name in self._held:
            del self._buffers[name]
        self._layout, self._spec = source._layout, source._spec
        self._names, self._held = source._names, source._held
        for name in self._held:
            self.register_buffer(name, source._buffers[name])

    def _apply(self, fn: Any, recurse: bool = True) -> WQEmbedding:
        factor = self._buffers.get("embed_scale")
        if factor is not None:
            self._buffers["embed_scale"] = fn(factor)
        if self.source is None:
            super()._apply(fn, recurse)
            return self
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self._words.device)).dtype
        # What is moved already stays where it is, when its own turn comes.
        self.source._apply(fn, recurse)
        self._follow(always=True)
        return self

    def _save_to_state_dict(self, *arguments: Any) -> None:
        self._follow()
        super()._save_to_state_dict(*arguments)

    def _load_packed(self, *arguments: Any, with_bias: bool = False) -> None:
        if self.source is None:
            super()._load_packed(*arguments)
        else:
            self.source._load_packed(*arguments, with_bias=with_bias)
            self._follow(always=True)


def why_not_scheme(scheme: QuantScheme) -> str | None:
    """Why an embedding does not take `scheme`, as what follows its name in a sentence, or None."""
    if scheme.weight_only:
        return None
    alone = QuantScheme(scheme.weight, scheme.group_size, activation=Activation())
    return (
        f"is an embedding, which has no activations to quantize as {scheme} says: give it a scheme "
        f"of weights alone, such as {alone}"
    )


def _padding_row(padding_idx: int | None, n: int) -> int | None:
    if padding_idx is None:
        return None
    if not -n <= padding_idx < n:
        raise WeightError(f"padding_idx must be one of {n} rows, got {padding_idx}")
    return padding_idx % n
