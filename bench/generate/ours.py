"""A model on this package, or dense, as a process: `python -m bench.generate.ours JSON`."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from torch import Tensor

import qkernels as qk
from bench.generate.reply import serve
from qkernels.cli.demo import quantize_head
from qkernels.integrations.decoding import prepare_decoding
from qkernels.models.loading import load_dense, load_model_and_tokenizer
from qkernels.modules import WQLinear
from qkernels.scheme import QuantScheme

DENSE, FILE = "dense", "file"
"""In place of a scheme: all layers in bf16; the blocks of the file as they are."""


def start(file: str, scheme: str, head: str, compile: bool) -> tuple[dict[str, Any], Any]:
    """The model of `file`, quantized to `scheme`, ready to generate; see `reply.serve`."""
    model: Any
    if scheme == FILE:
        model, _ = load_model_and_tokenizer(file, torch.bfloat16, tokenizer=False)
    else:
        model, _ = load_dense(file, torch.bfloat16, tokenizer=False)
    if scheme not in (DENSE, FILE):
        qk.quantize_model(model, "rtn", scheme)
        quantize_head(model, QuantScheme.parse(head))
    # To write on past the end of a text.
    model.generation_config.eos_token_id = None
    if compile:
        options = prepare_decoding(model)
    else:
        options = {}
        if scheme != DENSE:
            qk.fuse(model)
    schemes = {str(m.scheme) for m in model.modules() if isinstance(m, WQLinear)}

    def generate(prompt: list[int], new: int) -> tuple[float, float]:
        return times(model, torch.tensor([prompt]), new, options)

    return {"schemes": sorted(schemes)}, generate


def times(model: Any, ids: Tensor, new: int, options: dict[str, Any]) -> tuple[float, float]:
    """Seconds to the first new token, and from it to the last, of Transformers' `generate`."""
    clock = _Clock()
    # Else its cache would have the size of the longest that was written before.
    vars(model).pop("_previous_max_cache_length", None)
    with torch.inference_mode():
        started = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new,
            pad_token_id=0,
            stopping_criteria=[clock],
            **options,
        )
    return clock.seen[0] - started, clock.seen[-1] - clock.seen[0]


class _Clock:
    """Asked at each token whether to stop; notes when."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.seen.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool)


def main(arguments: list[str]) -> None:
    """Serves the request that the one argument spells as JSON."""
    request = json.loads(arguments[0])
    torch.set_num_threads(request.pop("threads"))
    serve(lambda: start(**request))


if __name__ == "__main__":
    main(sys.argv[1:])
