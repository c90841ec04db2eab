"""Ranges of static activations beside those of nvidia-modelopt, torchao and llm-compressor.

nvidia-modelopt has TensorRT's calibrators: histograms of 2048 bins from 0 to the largest magnitude,
which ends just below a power of two here, so that ours has the same bins. What its KL divergence
defines otherwise than we do:

- The first bin counts as many values as the second one. Here it does.
- The range ends where the last bin does that is kept, ours in the middle of the next one.
- Where that last bin is empty, and what is clipped is counted there, the divergence is infinite.
  Ours is finite; it is the least at other bins here.

Its percentiles end at the lower edge of a bin. Its least squared error cannot be compared: release
0.47.0 hands the number of bits over in the place of a bias, and takes the narrowest range. torchao
tries 100 ranges, and llm-compressor 20, whose ends shrink together.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qkernels.calibration.observers import range_of
from qkernels.calibration.ranges import Numbers
from qkernels.calibration.thresholds import UNIFORM_BINS
from tests.bounds import BIN_BOUND
from tests.calibration.test_observers import error_of
from tests.oracles.packages import package, require, run

TOP = 8.0
BIN = TOP / UNIFORM_BINS
PERCENTS = (90.0, 99.0, 99.9)

MODELOPT = """
import json, os, sys
from modelopt.torch.quantization.calib.histogram import HistogramCalibrator
from safetensors.torch import load_file

folder, made = sys.argv[1], {}
for name, x in load_file(f"{folder}/x.safetensors").items():
    seen = HistogramCalibrator(num_bits=8)
    seen.collect(x)
    for percent in json.loads(sys.argv[2]):
        made[f"{name}/{percent}"] = float(seen.compute_amax("percentile", percentile=percent))
    made[f"{name}/kl"] = float(seen.compute_amax("entropy"))
json.dump(made, open(f"{folder}/made.json", "w"))
os._exit(0)
"""

LLMCOMPRESSOR = """
import json, os, sys
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor.observers import Observer
from safetensors.torch import load_file

folder, made = sys.argv[1], {}
for name, x in load_file(f"{folder}/x.safetensors").items():
    for bits in (4, 8):
        for symmetric in (True, False):
            args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="tensor")
            seen = Observer.load_from_registry(
                "memoryless_mse", base_name="input", args=args, norm=2.0, maxshrink=0.95
            )
            seen(x[None])
            made[f"{name}/{bits}/{symmetric}"] = float(seen.min_vals), float(seen.max_vals)
json.dump(made, open(f"{folder}/made.json", "w"))
os._exit(0)
"""

BINS = np.arange(UNIFORM_BINS)
MEANS = {
    "heavy tail": 1e5 / (1 + BINS) ** 1.5,
    "exponential": 2000 * np.exp(-BINS / 100),
    "two humps": 3000 * np.exp(-((BINS / 60) ** 2)) + 60 * np.exp(-(((BINS - 500) / 40) ** 2)),
    "narrow": np.maximum(1, 1e4 * np.exp(-BINS / 10)),
}
"""About how many values each bin has."""


def counts_of(kind):
    counts = MEANS[kind].round()
    counts[0], counts[-1] = counts[1], max(counts[-1], 1)
    return torch.from_numpy(counts.astype(np.int64))


def values(kind):
    """Of both signs, in the middles of bins; the largest is the last number below `TOP`."""
    x = ((torch.from_numpy(BINS) + 0.5) * BIN).float().repeat_interleave(counts_of(kind))
    x[-1] = torch.nextafter(torch.tensor(TOP), torch.tensor(0.0))
    generator = torch.Generator().manual_seed(0)
    x *= torch.randint(2, x.shape, generator=generator) * 2 - 1
    return x[torch.randperm(len(x), generator=generator)]


def between(kind):
    """The same, spread evenly over their bins: steps that meet the middles of all are no news."""
    x = values(kind)
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) - 0.5
    return (x + noise * BIN).clamp(-TOP, TOP)


def symmetric_end(kind, observer):
    low, high = range_of(values(kind)[None], Numbers.integers(), observer)
    return float(torch.maximum(-low, high))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """(name of a package, its program) -> what that prints, by the names of cases."""
    made = {}

    def of(name, program, *arguments):
        require(name)
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            make = values if program is MODELOPT else between
            save_file({kind: make(kind) for kind in MEANS}, folder / "x.safetensors")
            run(program, folder, *arguments)
            made[name] = json.loads((folder / "made.json").read_text())
        return made[name]

    return of


@pytest.mark.parametrize("kind", MEANS)
def test_kl_is_that_of_tensorrt(theirs, kind):
    made = theirs("modelopt", MODELOPT, json.dumps(PERCENTS))[f"{kind}/kl"]
    found = symmetric_end(kind, "kl")
    assert found == pytest.approx(made + BIN / 2, rel=1e-6)
    kept = round(made / BIN)
    assert 128 < kept < UNIFORM_BINS and counts_of(kind)[kept - 1] > 0


@pytest.mark.parametrize("percent", PERCENTS)
@pytest.mark.parametrize("kind", MEANS)
def test_percentiles_are_those_of_tensorrt_up_to_a_bin(theirs, kind, percent):
    made = theirs("modelopt", MODELOPT, json.dumps(PERCENTS))[f"{kind}/{percent}"]
    found = symmetric_end(kind, f"percentile(percent={percent})")
    assert abs(found - (made + BIN / 2)) <= BIN / 2 + BIN_BOUND * found


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", MEANS)
def test_mse_leaves_no_more_than_that_of_llmcompressor(theirs, kind, bits, symmetric):
    made = theirs("llmcompressor", LLMCOMPRESSOR)[f"{kind}/{bits}/{symmetric}"]
    x, numbers = between(kind), Numbers.integers(bits, symmetric=symmetric)
    low, high = (float(end) for end in range_of(x[None], numbers, "mse"))
    assert error_of(x, low, high, numbers) <= 1.01 * error_of(x, *made, numbers)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", MEANS)
def test_mse_leaves_no_more_than_that_of_torchao(kind, bits):
    package("torchao")
    from torchao.quantization.granularity import PerTensor
    from torchao.quantization.observer import AffineQuantizedMSEObserver
    from torchao.quantization.quant_primitives import MappingType

    x, numbers = between(kind), Numbers.integers(bits)
    seen = AffineQuantizedMSEObserver(
        *(MappingType.SYMMETRIC, torch.int8, PerTensor()),
        quant_min=int(numbers.least),
        quant_max=int(numbers.most),
        zero_point_dtype=torch.int32,
    )
    seen(x[None])
    low, high = (float(end) for end in range_of(x[None], numbers, "mse"))
    other = float(seen.max_val)
    assert 0 < other <= TOP
    assert error_of(x, low, high, numbers) <= 1.01 * error_of(x, -other, other, numbers)
