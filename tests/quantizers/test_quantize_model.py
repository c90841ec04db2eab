import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.errors import LayerError, QuantizationError, SchemeError, WeightError
from tests.plain_model import TOKENS, Model, snapshot, unchanged


def test_report_and_replacement():
    model, seen = Model(), []
    before = model(TOKENS)
    report = qk.quantize_model(
        model, "rtn", "w8a16", calibration=[TOKENS], progress=lambda *a: seen.append(a)
    )
    assert [r.name for r in report.layers] == [
        f"blocks.{i}.{part}" for i in range(3) for part in ("up", "down")
    ]
    assert all(isinstance(model.get_submodule(r.name), qk.WQLinear) for r in report.layers)
    assert isinstance(model.lm_head, nn.Linear) and "lm_head" in report.skipped
    for r in report.layers:
        assert 0 < r.weight_error < 0.01 and 0 < r.output_error < 0.01
        assert r.scheme == "w8a16"
    weights = sum(r.n * r.k for r in report.layers)
    assert report.bits_per_weight == 8 * report.weight_bytes / weights
    # The kernels' layouts pad such small layers; the plain one does not.
    plain = qk.quantize_model(Model(), "rtn", "w8a16", backend="reference")
    assert 8 < plain.bits_per_weight < 8.6
    assert report.weight_bytes == sum(
        model.get_submodule(r.name).packed.nbytes for r in report.layers
    )
    assert (model(TOKENS) - before).norm() / before.norm() < 0.01
    assert [s[0] for s in seen] == list(range(7)) and seen[-1][:2] == (6, 6)


def test_mixed_precision_include_and_exclude():
    model = Model()
    report = qk.quantize_model(
        model,
        scheme="w4a16-g24",
        exclude=["blocks.0.*"],
        overrides={"*.down": "w8a8", "blocks.1.up": None, "lm_head": "w8a16"},
    )
    assert {r.name: r.scheme for r in report.layers} == {
        "blocks.1.down": "w8a8",
        "blocks.2.up": "w4a16-g24",
        "blocks.2.down": "w8a8",
        "lm_head": "w8a16",
    }
    assert set(report.skipped) == {"blocks.0.up", "blocks.0.down", "blocks.1.up"}
    # The embedding shared its weight with the head and keeps it.
    assert isinstance(model.embed.weight, nn.Parameter)
    assert report.layers[0].output_error is None
    model = Model()
    report = qk.quantize_model(model, scheme="w8a16", include=["lm_head"])
    assert [r.name for r in report.layers] == ["lm_head"]


def test_static_activations_take_their_scale_from_calibration():
    model, inputs = Model(), []
    model.blocks[0].up.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    qk.quantize_model(model, scheme="w8a8-static", calibration=[TOKENS, TOKENS.flip(0)])
    scale = model.blocks[0].up.activation_scale
    assert len(inputs) == 2
    assert torch.allclose(scale, torch.cat(inputs).abs().max() / 127)


@pytest.mark.parametrize(
    ("kwargs", "error", "named"),
    [
        ({"method": "magic"}, QuantizationError, "magic"),
        ({"scheme": "w4a17"}, SchemeError, "w4a17"),
        ({"scheme": "w8a8-static"}, LayerError, "calibration"),
        ({"include": ["nothing.*"]}, LayerError, r"nothing\.\*"),
        ({"overrides": {"nope": "w8a16"}}, LayerError, "nope"),
        ({"exclude": ["*"]}, LayerError, "no linear layer is left"),
        ({"calibration": []}, LayerError, "no batch"),
        ({"backend": "nonesuch"}, QuantizationError, "nonesuch"),
    ],
)
def test_wrong_arguments_leave_the_model_alone(kwargs, error, named):
    model = Model()
    before = snapshot(model)
    with pytest.raises(error, match=named):
        qk.quantize_model(model, **kwargs)
    unchanged(model, before)


def test_a_bad_weight_or_an_interrupt_leaves_the_model_alone():
    model = Model()
    model.blocks[2].down.weight.data[1, 2] = float("nan")
    before = snapshot(model)
    with pytest.raises(WeightError, match=r"blocks\.2\.down\.weight\[1, 2\] is nan"):
        qk.quantize_model(model, scheme="w8a16")
    unchanged(model, before)

    def interrupt(done, total, name):
        if done == 3:
            raise KeyboardInterrupt

    model = Model()
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        qk.quantize_model(model, scheme="w8a16", progress=interrupt)
    unchanged(model, before)


def test_twice_is_an_error():
    model = Model()
    qk.quantize_model(model, scheme="w8a16")
    with pytest.raises(LayerError, match=r"blocks\.0\.up is quantized already"):
        qk.quantize_model(model, scheme="w8a16")


def test_a_shared_layer_stays_shared():
    model = Model()
    model.blocks[1].up = model.blocks[0].up
    qk.quantize_model(model, scheme="w8a16")
    assert model.blocks[1].up is model.blocks[0].up
