"""SpQR: which weights stay in 16 bits, what the others become, and how both are stored."""

import pytest
import torch

import qkernels as qk
from qkernels import rounding, sparse
from qkernels.backends import cpu_calibration
from qkernels.errors import RecipeError, SchemeError
from qkernels.quantizers.columns import Columns, Kept, descend
from qkernels.quantizers.gptq import GPTQ, GptqParameters
from qkernels.quantizers.spqr import SPQR, SpqrParameters, choose
from qkernels.scheme import QuantScheme
from tests.quantizers.test_gptq import K, N, correlated_inputs, output_error, task_of, weight_of
from tests.tiny_model import tiny_model

TOKENS = torch.arange(96).view(4, 24) % 60


def outlying():
    """A weight with a few large numbers, and where they are."""
    weight = weight_of()
    mask = torch.rand(N, K, generator=torch.Generator().manual_seed(3)) < 0.02
    return torch.where(mask, weight.sign() * 20 + weight, weight), mask


def test_the_weights_that_cost_most_stay():
    weight, mask = outlying()
    gram = torch.eye(K)
    part = float(mask.float().mean())
    found = choose(weight, QuantScheme.parse("w3a16-g16"), gram, gram.diagonal(), part)
    # Two in one group hide each other until others are taken out.
    assert (found & mask).sum() >= 0.9 * mask.sum() and found.sum() == mask.sum()
    assert not choose(weight, QuantScheme.parse("w3a16-g16"), gram, gram.diagonal(), 0).any()


def test_an_outlier_by_hand():
    """Without it the codes 0..3 are the others themselves."""
    weight, x = torch.tensor([[0.0, 1.0, 2.0, 3.0, 0.0, 1.0, 50.0, 3.0]]), 4 * torch.eye(8)
    made = SPQR.quantize(task_of(weight, "w2a16-g8-sfp32", x), SpqrParameters(outliers=1 / 8))
    assert made.sparse_columns.tolist() == [6] and made.sparse_ends.tolist() == [1]
    left = made.codes[:, [0, 1, 2, 3, 4, 5, 7]]
    assert left.tolist() == [[0, 1, 2, 3, 0, 1, 3]] and made.zeros.tolist() == [[0]]
    assert torch.allclose(made.dequantize(), weight, rtol=1e-4)


@pytest.mark.parametrize(("covariance", "column"), [(0.0, 8), (3.6, 11)])
def test_what_an_error_costs_by_hand(covariance, column):
    """Both weights of 1.5 are half way between two codes, where all others but the ends are near
    theirs. With [H^-1]_jj = H_ii / (H_ii H_jj - H_ij^2), an error in column 8 costs 4, or
    4 - 3.6^2 / 4 = 0.76 where column 9 makes up for it; one in column 11 costs 1."""
    weight = torch.tensor([[*[0.0] * 4, *[3.0] * 4, 1.5, 1, 1, 1.5, 2, 2, 1, 2]])
    h = torch.eye(16)
    h[8, 8] = h[9, 9] = 4
    h[8, 9] = h[9, 8] = covariance
    x = 4 * torch.linalg.cholesky(h).T
    assert torch.allclose(x.T @ x / 16, h, atol=1e-6)
    made = SPQR.quantize(task_of(weight, "w2a16-sfp32", x), SpqrParameters(outliers=1 / 16))
    assert made.sparse_columns.tolist() == [column]


@pytest.mark.parametrize("scheme", ["w3a16-g16", "w3a16-g16-spqr", "w4a16-g24-sym", "w3a16"])
def test_outliers_that_stay_leave_less_error_than_gptq(scheme):
    weight, _ = outlying()
    x = correlated_inputs()
    wanted = x @ weight.T
    task = task_of(weight, scheme, x)
    made = SPQR.quantize(task, SpqrParameters(outliers=0.03))
    assert len(made.sparse_values) == round(0.03 * N * K)
    error = output_error(made, x, wanted)
    assert error < 0.6 * output_error(GPTQ.quantize(task, GptqParameters()), x, wanted)
    # What stays is what it has to be beside the others, to the rounding of 16 bits.
    assert error < output_error(made.replace(sparse_values=made.sparse_values * 1.01), x, wanted)


def test_without_outliers_it_is_gptq():
    task = task_of(weight_of(), "w3a16-g16", correlated_inputs())
    made = SPQR.quantize(task, SpqrParameters(outliers=0, sweeps=0))
    wanted = GPTQ.quantize(task, GptqParameters(sweeps=0))
    assert made.sparse_ends is None
    assert torch.equal(made.codes, wanted.codes) and torch.equal(made.scales, wanted.scales)


@pytest.mark.parametrize("scheme", ["w3a16-g16", "w4a16-g24-sym"])
@pytest.mark.parametrize("compiled", [True, False])
def test_kept_numbers_leave_nothing(scheme, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(cpu_calibration, "runs_on", lambda tensor: False)
    fitted = rounding.fit(weight_of(), QuantScheme.parse(scheme))
    left = torch.randn(K, N, generator=torch.Generator().manual_seed(5))
    factors = torch.eye(K) + 0.1 * torch.triu(torch.randn(K, K), 1)
    kept = Kept.of(torch.rand(N, K, generator=torch.Generator().manual_seed(6)) < 0.2)
    codes = torch.zeros(K, N, dtype=torch.uint8)
    order = torch.randperm(K).tolist()
    moved = Columns(fitted).round_block(left.clone(), factors, order, codes, kept=kept)
    mask = kept.mask[order]
    assert not moved[mask].any() and moved[~mask].any()
    # Each number, less what those before it left, is its code and what it is beyond that.
    wanted = left - (moved.t() @ (factors - factors.diagonal().diag())).t()
    made = fitted.dequantize_rows(codes.t().contiguous(), 0).t() + kept.beyond
    assert torch.allclose(wanted[mask], made[order][mask], atol=1e-4)
    assert not kept.beyond[~kept.mask].any()


def test_a_sweep_never_raises_the_error():
    weight, mask = outlying()
    x = correlated_inputs()
    gram = x.T @ x / len(x)
    made = rounding.quantize(torch.where(mask, 0, weight), "w3a16-g16")
    kept = Kept.of(mask)
    kept.beyond.copy_((weight - made.dequantize()).t() * kept.mask)

    def error(made):
        left = weight - made.dequantize() - kept.numbers
        return float(((left @ gram) * left).sum())

    before = error(made)
    for _ in range(3):
        made = descend(made, weight, gram, kept)
        after = error(made)
        assert after <= before * (1 + 1e-6)
        before = after


def test_scales_and_zero_points_of_four_bits_by_hand():
    scales = torch.linspace(1, 16, 16).flip(0)[:, None]
    zeros = torch.full((16, 1), 2.5)
    fields = rounding.quantize_in_blocks(scales, zeros, torch.float16)
    assert fields["scales"][:, 0].tolist() == list(range(15, -1, -1))
    assert fields["block_ranges"].tolist() == [[[1, 1, 0, 2.5]]]
    codes = torch.zeros(16, 16, dtype=torch.uint8)
    codes[:, 1] = 3
    weight = qk.QuantizedWeight(scheme=QuantScheme.parse("w3a16-g16-spqr"), codes=codes, **fields)
    assert torch.equal(weight.group_scales(), scales) and torch.equal(weight.group_zeros(), zeros)
    assert torch.equal(weight.dequantize()[:, :2], scales * torch.tensor([-2.5, 0.5]))


@pytest.mark.parametrize("n", [1, 15, 17, 40])
def test_scales_in_blocks_are_near_what_they_were(n):
    weight = torch.randn(n, 64, generator=torch.Generator().manual_seed(0))
    plain = rounding.fit(weight, QuantScheme.parse("w3a16-g16"))
    blocks = rounding.fit(weight, QuantScheme.parse("w3a16-g16-spqr"))
    off = (plain.group_scales() - blocks.group_scales()).abs()
    for start in range(0, n, 16):
        own = plain.group_scales()[start : start + 16]
        step = (own.amax(dim=0) - own.amin(dim=0)) / 15
        assert (off[start : start + 16] <= 0.55 * step + 1e-3).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("m", [0, 1, 3, 4, 17, 70, 130])
@pytest.mark.parametrize(("n", "k"), [(40, 100), (70, 33000), (1, 16)])
def test_the_compiled_product_is_torchs(m, n, k, dtype):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(n, k, generator=generator) < 0.02
    mask[0, 0] = True
    fields = sparse.fields_of(torch.randn(n, k, generator=generator), mask)
    scheme = QuantScheme.parse("w4a16")
    hub = rounding.quantize(torch.zeros(n, k), scheme).replace(**fields)
    layer = qk.WQLinear.from_weight(hub, dtype=dtype, backend="cpu")
    x = torch.randn(m, k, generator=generator).to(dtype)
    wanted = sparse.product(x, fields)
    assert fields["sparse_columns"].dtype == (torch.int32 if k > 32768 else torch.int16)
    exact = x.double() @ hub.dequantize().double().T
    assert torch.allclose(wanted.double(), exact, rtol=1e-4, atol=1e-3)
    assert torch.allclose(
        layer(x).double(), exact, rtol=2e-2 if dtype.itemsize == 2 else 1e-4, atol=1e-3
    )


def test_a_model_is_quantized_saved_and_loaded(tmp_path):
    model = tiny_model()
    options = {"scheme": "w3a16-g16-spqr", "calibration": [TOKENS]}
    report = qk.quantize_model(model, "spqr(outliers=0.02)", **options)
    assert all(layer.scheme == "w3a16-g16-spqr" for layer in report.layers)
    with torch.no_grad():
        wanted = model(TOKENS).logits
    qk.save_model(model, tmp_path / "own", format="qkernels")
    with torch.no_grad():
        assert torch.equal(qk.load_model(tmp_path / "own")(TOKENS).logits, wanted)


def test_distilled_and_fused():
    model = tiny_model()
    qk.quantize_model(model, "spqr+distill(steps=2)", "w3a16-g32", calibration=[TOKENS])
    with torch.no_grad():
        wanted = model(TOKENS).logits
        qk.fuse(model)
        assert torch.equal(model(TOKENS).logits, wanted)


def test_what_does_not_fit_is_refused():
    with pytest.raises(SchemeError, match="for groups of integers with zero points"):
        QuantScheme.parse("w3a16-g16-sym-spqr")
    with pytest.raises(RecipeError, match=r"outliers must be in \[0, 0.5\], got 0.6"):
        qk.quantize_model(tiny_model(), "spqr(outliers=0.6)", "w3a16-g16", calibration=[TOKENS])
    with pytest.raises(SchemeError, match="beside integers with 16-bit activations"):
        qk.quantize_model(tiny_model(), "spqr", "w8a8", calibration=[TOKENS])
