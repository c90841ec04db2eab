"""What bitsandbytes' operators run here, on words that it wrote, without the package."""

import itertools
import json
import sys
import types

import pytest
import torch

import qkernels_bitsandbytes as entry
from qkernels.errors import LayerError
from qkernels.integrations import bitsandbytes as ours
from tests.bounds import FROBENIUS_BOUND
from tests.integrations.modules import golden


@pytest.fixture
def words(monkeypatch):
    """The arguments of gemm_4bit for a golden folder, and its weight."""

    def of(folder, layer):
        tensors, weight, _ = golden(folder, layer)
        key = next(name for name in tensors if "quant_state" in name)
        state = json.loads(bytes(tensors[key].tolist()))
        monkeypatch.setattr(ours, "_values", lambda *a: tensors["weight.quant_map"])
        absmax, nested = tensors["weight.absmax"], ()
        if "nested_offset" in state:
            offset = torch.tensor(state["nested_offset"])
            nested = (absmax, tensors["weight.nested_quant_map"], offset)
            absmax = tensors["weight.nested_absmax"]
        about = (state["shape"], absmax, state["blocksize"], key.rpartition("__")[2])
        return (tensors["weight"], *about), nested, weight

    return of


LAYER = "model.layers.0.self_attn.k_proj"
BLOCKS = ("crossed", "even", "large", "many", "odd", "one", "storage")
FOLDERS = ("bnb-nf4-blocks", "bnb-nf4-dq-blocks", "bnb-fp4-blocks")
LAYERS = [("bnb-nf4", LAYER), ("bnb-nf4-dq", LAYER), *itertools.product(FOLDERS, BLOCKS)]


@pytest.mark.parametrize("dtype", FROBENIUS_BOUND)
@pytest.mark.parametrize(("folder", "layer"), LAYERS)
def test_four_bits(words, folder, layer, dtype):
    arguments, nested, weight = words(folder, layer)
    bias = torch.randn(len(weight), dtype=dtype)
    x = torch.randn(2, 3, weight.shape[1], dtype=dtype)
    y = ours._gemm_4bit(x, *arguments, bias, *nested)
    exact = x.double() @ weight.double().T + bias.double()
    assert y.dtype == dtype
    assert (y.double() - exact).norm() / exact.norm() < FROBENIUS_BOUND[dtype]
    eye = torch.eye(weight.shape[1])
    assert torch.equal(ours._gemm_4bit(eye, *arguments, None, *nested).T, weight)
    assert ours._gemm_4bit(x[:0], *arguments, None, *nested).shape == (0, 3, len(weight))


def test_a_dense_weight_where_blocks_cross_rows(words):
    (stored, shape, absmax, block, quant_type), _, weight = words("bnb-nf4-blocks", "crossed")
    assert shape[1] % block
    dense = ours._dequantize_4bit(
        None, None, stored, absmax, block, quant_type, shape, torch.float32
    )
    assert torch.equal(dense, weight)


def test_eight_bits():
    tensors, weight, _ = golden("bnb-int8", LAYER)
    x = torch.randint(-127, 128, (3, weight.shape[1]), dtype=torch.int8)
    largest, bias = torch.rand(3) * 10, torch.randn(len(weight))
    given = (x, tensors["weight"], largest, tensors["SCB"].float())
    y = ours._int8_scaled_mm(*given, bias, torch.float32)
    exact = (x.double() * largest[:, None].double() / 127) @ weight.double().T + bias.double()
    assert (y.double() - exact).norm() / exact.norm() < FROBENIUS_BOUND[torch.float32]
    assert ours._int8_scaled_mm(*given).dtype == torch.float16


def test_what_a_kernel_is_slower_at_is_not_its_own(monkeypatch):
    cases = []
    for rows in (1, 1000):
        problem = (ours._INT8, 256, 256, rows, torch.device("cpu"), torch.float32)
        cases.append(ours._most_rows(*problem))
    assert all(rows == 0 or rows > 1000 for rows in cases)
    kernel = ours.select(
        ours.make_problem(ours._INT8, n=64, k=64, m=7, device="cpu", layout="vnni")
    )
    monkeypatch.setattr(ours, "_MOST_ROWS", {(kernel.name, torch.bfloat16): 5})
    ours._most_rows.cache_clear()
    most = ours._most_rows(ours._INT8, 64, 64, 7, torch.device("cpu"), torch.bfloat16)
    ours._most_rows.cache_clear()
    assert most in (0, 5)


def register(monkeypatch, said, module):
    if said is None:
        monkeypatch.delenv(entry.VARIABLE, raising=False)
    else:
        monkeypatch.setenv(entry.VARIABLE, said)
    monkeypatch.setitem(sys.modules, "qkernels.integrations.bitsandbytes", module)
    entry.register()


@pytest.mark.parametrize(
    ("said", "devices"),
    [(None, [("cpu",)]), ("", [("cpu",)]), ("cuda,cpu", [("cuda", "cpu")]), ("0", [])],
)
def test_the_environment_names_the_devices(monkeypatch, said, devices):
    called = []
    register(monkeypatch, said, types.SimpleNamespace(register=called.append))
    assert called == devices


def test_nothing_of_ours_keeps_bitsandbytes_from_being_imported(monkeypatch):
    with pytest.warns(UserWarning, match="runs on its own kernels"):
        register(monkeypatch, None, None)

    def unable(devices):
        raise RuntimeError("the dispatcher will not have it")

    with pytest.warns(UserWarning, match="the dispatcher will not have it"):
        register(monkeypatch, None, types.SimpleNamespace(register=unable))
    with pytest.warns(UserWarning, match="'tpu' is neither 0 nor"):
        register(monkeypatch, "tpu", None)


def test_another_device_is_an_error():
    with pytest.raises(LayerError, match="device 'tpu' is not one of cpu, cuda"):
        ours.register(("cpu", "tpu"))


def test_what_fails_half_way_leaves_nothing(monkeypatch):
    """Here for want of its operators."""
    modules = types.ModuleType("bitsandbytes.nn.modules")
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn.modules", modules)
    monkeypatch.setattr(torch.library, "get_kernel", None, raising=False)
    with pytest.raises(TypeError):
        ours.register(("cpu",))
    assert not ours._undo
