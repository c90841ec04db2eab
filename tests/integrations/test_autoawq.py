"""What stands in for AutoAWQ's extensions, without the package."""

import importlib
import importlib.util
import sys
import types

import pytest
import torch
from torch import nn

from qkernels import WQLinear_GEMM, WQLinear_GEMV, WQLinear_GEMVFast
from qkernels.errors import LayerError, WeightError
from qkernels.integrations import autoawq, words
from tests.bounds import FROBENIUS_BOUND


@pytest.fixture
def extensions(monkeypatch):
    monkeypatch.delitem(sys.modules, "awq", raising=False)
    autoawq.install()
    yield importlib.import_module("awq_ext"), importlib.import_module("awq_v2_ext")
    autoawq.uninstall()


def module(cls, n=48, k=256, group=64):
    linear = nn.Linear(k, n, bias=False).half()
    made = cls.from_linear(linear, 4, group)
    return made, made.to_weight().dequantize()


def close(y, x, weight):
    exact = x.double() @ weight.double().T
    assert y.shape == exact.shape and y.dtype == x.dtype
    assert (y.double() - exact).norm() / exact.norm() < FROBENIUS_BOUND[x.dtype]


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_products(extensions, rows):
    ext, v2 = extensions
    x = torch.randn(rows, 256, dtype=torch.float16)
    gemm, weight = module(WQLinear_GEMM)
    given = (gemm.qweight, gemm.scales, gemm.qzeros)
    close(ext.gemm_forward_cuda(x, *given, 8), x, weight)
    dense = ext.dequantize_weights_cuda(*given, 0, 0, 0, False)
    assert torch.equal(dense, weight.half().T)
    gemv, weight = module(WQLinear_GEMV)
    given = (gemv.qweight, gemv.scales, gemv.qzeros)
    close(ext.gemv_forward_cuda(x, *given, 64), x, weight)
    close(ext.gemmv2_forward_cuda(x, *given, 64, 8), x, weight)
    for group in (32, 64, 128, 256):
        fast, weight = module(WQLinear_GEMVFast, group=group)
        given = (fast.qweight, fast.scales, fast.qzeros)
        close(
            v2.gemv_forward_cuda_decode(x[:, None], *given, rows, 48, 256, group)[:, 0], x, weight
        )
        close(v2.gemm_forward_cuda_prefill(x[None], *given)[0], x, weight)


def test_prefill_and_decode_share_a_twin(extensions, monkeypatch):
    _, v2 = extensions
    fast, _ = module(WQLinear_GEMVFast)
    given = (fast.qweight, fast.scales, fast.qzeros)
    packed = []
    real = words._pack
    monkeypatch.setattr(words, "_pack", lambda *a: (packed.append(a[0]), real(*a))[1])
    x = torch.randn(2, 1, 256, dtype=torch.float16)
    v2.gemm_forward_cuda_prefill(x, *given)
    v2.gemv_forward_cuda_decode(x, *given, 2, 48, 256, 64)
    assert len(packed) == 1
    with pytest.raises(WeightError, match="3 groups"):
        v2.gemm_forward_cuda_prefill(x, given[0], given[1][:3], given[2][:3])


def test_experts(extensions, monkeypatch):
    ext, _ = extensions
    experts, tokens, top_k = 5, 40, 2
    made = [module(WQLinear_GEMM) for _ in range(experts)]
    stacked = [
        torch.stack([getattr(layer, name) for layer, _ in made])
        for name in ("qweight", "scales", "qzeros")
    ]
    weights = torch.stack([weight for _, weight in made])
    packed = []
    real = words._pack
    monkeypatch.setattr(words, "_pack", lambda *a: (packed.append(a[0]), real(*a))[1])
    dense = ext.dequantize_weights_cuda(*stacked, 0, 0, 0, False)
    assert torch.equal(dense, weights.half().transpose(1, 2))

    gating = torch.randn(tokens, experts)
    gating[:, 3] = -100
    chosen, ids = torch.empty(tokens, top_k), torch.empty(tokens, top_k, dtype=torch.int32)
    places = torch.empty(tokens, top_k, dtype=torch.int32)
    ext.topk_softmax(chosen, ids, places, gating)
    values, indices = gating.softmax(-1).topk(top_k, dim=-1)
    assert torch.equal(chosen, values) and torch.equal(ids.long(), indices)
    assert places[3].tolist() == [3, tokens + 3]

    ordered = torch.full((ids.numel() + experts * 15,), ids.numel(), dtype=torch.int32)
    owners = torch.empty(ids.numel() + experts, dtype=torch.int32)
    count = torch.empty(1, dtype=torch.int32)
    ext.moe_alig_block_size(ids, experts, 16, ordered, owners, count)
    assert int(count) % 16 == 0
    for block in range(int(count) // 16):
        inside = ordered[16 * block : 16 * block + 16]
        assert (ids.flatten()[inside[inside < ids.numel()].long()] == owners[block]).all()
    assert sorted(ordered[ordered < ids.numel()].tolist()) == list(range(ids.numel()))

    for width, scaled in ((1, False), (top_k, True)):
        x = torch.randn(tokens, width, 256, dtype=torch.float16)
        given = (chosen, ordered, owners, count, scaled, 8)
        y = ext.grouped_gemm_forward(x, *stacked, *given)
        exact = torch.einsum(
            "tak,tank->tan",
            x.double().expand(-1, top_k, -1),
            weights.double()[ids.long()],
        )
        exact = exact * chosen[..., None].double() if scaled else exact
        assert y.shape == exact.shape and y.dtype == x.dtype
        error = (y.double() - exact).norm() / exact.norm()
        assert error < 2 * FROBENIUS_BOUND[torch.float16]
    assert len(packed) == experts


def test_what_has_no_weights(extensions):
    ext, _ = extensions
    x = torch.randn(3, 4, 32, dtype=torch.float16)
    out = torch.empty(3, 4, 16, dtype=torch.float16)
    ext.silu_and_mul(out, x)
    exact = nn.functional.silu(x[..., :16].float()) * x[..., 16:].float()
    assert torch.allclose(out.float(), exact, atol=1e-3)
    gamma, out = torch.rand(32).half(), torch.empty_like(x)
    ext.layernorm_forward_cuda(x, gamma, out, 1e-5)
    exact = nn.functional.rms_norm(x.float(), (32,), gamma.float(), 1e-5)
    assert torch.allclose(out.float(), exact, atol=2e-3)

    angles = torch.arange(10)[:, None] / 10 ** torch.arange(4)
    cache = torch.cat((angles.cos(), angles.sin()), -1)
    positions = torch.tensor([7, 0, 3])
    query, key = torch.randn(3, 2 * 8), torch.randn(3, 8)
    turned = []
    for tensor in (query, key):
        heads = tensor.view(3, -1, 8)
        pairs = torch.complex(heads[..., :4], heads[..., 4:])
        pairs = pairs * torch.polar(torch.ones(3, 1, 4), angles[positions][:, None])
        turned.append(torch.cat((pairs.real, pairs.imag), -1).flatten(1))
    ext.rotary_embedding_neox(positions, query, key, 8, cache)
    assert torch.allclose(query, turned[0], atol=1e-6)
    assert torch.allclose(key, turned[1], atol=1e-6)


def test_installed_and_taken_away_again(monkeypatch):
    monkeypatch.delitem(sys.modules, "awq", raising=False)
    before = types.ModuleType("awq_ext")
    monkeypatch.setitem(sys.modules, "awq_ext", before)
    monkeypatch.delitem(sys.modules, "awq_v2_ext", raising=False)
    autoawq.install()
    autoawq.install()
    assert sys.modules["awq_ext"].gemm_forward_cuda is autoawq.gemm_forward_cuda
    assert importlib.util.find_spec("awq_v2_ext") is not None
    autoawq.uninstall()
    autoawq.uninstall()
    assert sys.modules["awq_ext"] is before and "awq_v2_ext" not in sys.modules
    monkeypatch.setitem(sys.modules, "awq", types.ModuleType("awq"))
    with pytest.raises(LayerError, match="before the first import of awq"):
        autoawq.install()
    assert sys.modules["awq_ext"] is before


def test_what_others_put_there_stays(monkeypatch):
    monkeypatch.delitem(sys.modules, "awq", raising=False)
    # None keeps a module from being imported.
    monkeypatch.setitem(sys.modules, "awq_ext", None)
    monkeypatch.setitem(sys.modules, "awq_v2_ext", None)
    autoawq.install()
    sys.modules["awq_v2_ext"] = theirs = types.ModuleType("awq_v2_ext")
    autoawq.uninstall()
    assert sys.modules["awq_ext"] is None and sys.modules["awq_v2_ext"] is theirs
    autoawq.install()
    del sys.modules["awq_ext"]
    autoawq.uninstall()
    assert "awq_ext" not in sys.modules and sys.modules["awq_v2_ext"] is theirs
