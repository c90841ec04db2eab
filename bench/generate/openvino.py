"""OpenVINO GenAI as a process: `python -m bench.generate.openvino JSON`."""

from __future__ import annotations

import json
import sys
from typing import Any

from bench.generate.reply import NotHere, serve


def start(file: str, threads: int) -> tuple[dict[str, Any], Any]:
    """The model of `file`, ready to generate; see `reply.serve`."""
    try:
        import numpy as np
        import openvino
        import openvino_genai as genai
    except ImportError as error:
        raise NotHere(f"the package {error.name} is not installed") from None
    # It makes a model of the blocks as they are, and quantizes what they multiply to 8 bits.
    pipeline = genai.LLMPipeline(file, "CPU", INFERENCE_NUM_THREADS=threads)

    def generate(prompt: list[int], new: int) -> tuple[float, float]:
        ids = np.array([prompt], dtype=np.int64)
        inputs = genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        limits = genai.GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False)
        metrics = pipeline.generate(inputs, limits).perf_metrics
        first = metrics.get_ttft().mean
        return first / 1e3, (metrics.get_generate_duration().mean - first) / 1e3

    return {"version": genai.__version__}, generate


if __name__ == "__main__":
    about = json.loads(sys.argv[1])
    serve(lambda: start(**about))
