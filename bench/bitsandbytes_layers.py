"""`python -m bench.bitsandbytes_layers`: layers of bitsandbytes, on its kernels and on ours.

Its own two ways are timed: as it is installed (on CPUs with AVX512_BF16, Linear4bit repacks its
words at the first forward, with scales in bf16), and the default implementation, which writes the
weight out for torch's product. Each line is one layer and number of rows: the least time of each
way in turns, and ours as a share of both.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qkernels.integrations import bitsandbytes as ours

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_REPACKS = "support_avx512bf16_for_cpu"


def layer(kind: str, n: int, k: int, dtype: torch.dtype) -> nn.Module:
    """A layer [n, k] of bitsandbytes on the CPU: nf4, nf4-dq, fp4, int8 or int8-6 (threshold 6)."""
    import bitsandbytes as bnb

    weight = torch.randn(n, k) * 0.02
    made: nn.Module
    if kind.startswith("int8"):
        threshold = 6.0 if kind.endswith("6") else 0.0
        made = bnb.nn.Linear8bitLt(k, n, False, has_fp16_weights=False, threshold=threshold)
        made.weight = bnb.nn.Int8Params(weight.half(), has_fp16_weights=False, requires_grad=False)
    else:
        quant_type, doubled = kind.removesuffix("-dq"), kind.endswith("-dq")
        made = bnb.nn.Linear4bit(k, n, False, compute_dtype=dtype, quant_type=quant_type)
        made.weight = bnb.nn.Params4bit(weight, quant_type=quant_type, compress_statistics=doubled)
    return made.to("cpu").eval()


def ways(kind: str, n: int, k: int, x: Tensor) -> dict[str, Callable[[], float]]:
    """The ways to run one layer, each of which returns the seconds of a forward."""
    plain = layer(kind, n, k, x.dtype)
    installed = copy.deepcopy(plain)

    plain.__dict__[_REPACKS] = False

    def by(model: nn.Module, on_ours: bool) -> Callable[[], float]:
        def run() -> float:
            (ours.register if on_ours else ours.unregister)()
            start = time.perf_counter()
            model(x)
            return time.perf_counter() - start

        return run

    return {"default": by(plain, False), "installed": by(installed, False), "ours": by(plain, True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", nargs="+", default=["nf4", "nf4-dq", "int8", "int8-6"])
    parser.add_argument("--m", nargs="+", type=int, default=[1, 4, 16, 64, 128, 256, 512, 1024])
    parser.add_argument("--shapes", nargs="+", default=["4096,4096"])
    parser.add_argument("--dtypes", nargs="+", choices=_DTYPES, default=list(_DTYPES))
    parser.add_argument("--seconds", type=float, default=1.5, help="for each line")
    options = parser.parse_args()
    # Otherwise importing bitsandbytes registers ours.
    os.environ["QKERNELS_BITSANDBYTES"] = "0"
    for shape in options.shapes:
        n, k = map(int, shape.split(","))
        for kind in options.layers:
            for name in options.dtypes:
                for m in options.m:
                    x = torch.randn(m, k, dtype=_DTYPES[name])
                    least = _time(ways(kind, n, k, x), options.seconds)
                    print(_line(f"{n}x{k} {kind} {name} M={m}", least), flush=True)


@torch.no_grad()
def _time(contestants: dict[str, Callable[[], float]], seconds: float) -> dict[str, float]:
    least: dict[str, float] = {}
    for name, run in contestants.items():
        run()
        least[name] = run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, run in contestants.items():
            least[name] = min(least[name], run())
    return least


def _line(what: str, least: dict[str, float]) -> str:
    times = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in least.items())
    shares = ", ".join(
        f"{least['ours'] / least[name]:.2f} of {name}" for name in least if name != "ours"
    )
    return f"{what}: {times}; ours {shares}"


if __name__ == "__main__":
    main()
