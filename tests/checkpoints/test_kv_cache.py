"""What a folder says of a KV cache in 8 bits is kept: scheme and scales, through every way."""

import copy
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import qkernels as qk
from qkernels.checkpoints import open_checkpoint
from qkernels.checkpoints.kv_cache import is_of_cache
from qkernels.errors import CheckpointError
from tests.checkpoints.folders import edit_tensors
from tests.checkpoints.models import (
    LAYER,
    change_quantization,
    config_of,
    logits,
    put,
    tiny_model,
)
from tests.checkpoints.test_golden import GOLDEN

pytest.importorskip("transformers", reason="models come from transformers")

SCALES = {
    **{f"{LAYER}self_attn.{part}_scale": torch.tensor([0.5]) for part in "kvq"},
    f"{LAYER}self_attn.k_zero_point": torch.tensor([3], dtype=torch.int8),
    f"{LAYER}self_attn.kv_scale": torch.tensor(0.25),
    f"{LAYER}self_attn.v_proj.output_scale": torch.tensor([0.125], dtype=torch.bfloat16),
    f"{LAYER}self_attn.k_proj.k_scale": torch.tensor(2.0),
}


@pytest.fixture
def with_cache(saved):
    """A folder in compressed-tensors, with the golden folder's scheme and scales of every name."""
    scheme = config_of(GOLDEN / "ct-kv-cache-fp8")["quantization_config"]["kv_cache_scheme"]
    change_quantization(kv_cache_scheme=scheme)(saved)
    edit_tensors(saved, lambda tensors: tensors.update(SCALES))
    return saved


def check(folder, source):
    """Whether `folder` says of the cache what `source` says, to the last bit."""
    want, got = (
        {name: x for name, x in load_file(f / "model.safetensors").items() if is_of_cache(name)}
        for f in (source, folder)
    )
    assert want.keys() == got.keys() and want
    assert all(want[n].dtype == got[n].dtype and torch.equal(want[n], got[n]) for n in want)
    sections = [config_of(f)["quantization_config"]["kv_cache_scheme"] for f in (source, folder)]
    assert sections[0] == sections[1] and sections[0]["num_bits"] == 8


def test_it_is_known_by_its_names():
    assert all(is_of_cache(name) for name in SCALES)
    others = ("k_proj.weight_scale", "k_proj.scales", "attn.qk_scale", "k_scale.weight", "scale")
    assert not any(is_of_cache(f"model.{name}") for name in others)


@pytest.mark.parametrize("format", ["compressed-tensors", "qkernels"])
def test_it_goes_through_load_and_save(with_cache, tmp_path, format):
    model = qk.load_model(with_cache)
    assert not [name for name in model.state_dict() if is_of_cache(name)]
    for copied in (model, copy.deepcopy(model)):
        qk.save_model(copied, tmp_path / "one", format)
        check(tmp_path / "one", with_cache)
        again = qk.load_model(tmp_path / "one")
        assert torch.equal(logits(again), logits(model))
        qk.save_model(again, tmp_path / "two")
        check(tmp_path / "two", with_cache)
        shutil.rmtree(tmp_path / "one")
        shutil.rmtree(tmp_path / "two")


def test_it_goes_through_save_pretrained(with_cache, tmp_path):
    model = qk.load_model(with_cache)
    model.save_pretrained(tmp_path / "out")
    check(tmp_path / "out", with_cache)


def test_convert_carries_it(run, with_cache, tmp_path):
    for to, out in (("qkernels", "one"), ("compressed-tensors", "two")):
        assert run("convert", with_cache, "--to", to, "-o", tmp_path / out)[0] == 0
        check(tmp_path / out, with_cache)


@pytest.mark.parametrize("format", ["gptq", "gptq_v2"])
def test_formats_without_a_place_for_it_say_so(run, with_cache, tmp_path, format):
    named = f"{format} has no place for the scales of a KV cache .*k_scale and 6 like it.*left out"
    model = qk.load_model(with_cache)
    with pytest.warns(UserWarning, match=named):
        qk.save_model(model, tmp_path / "one", format)
    assert torch.equal(logits(qk.load_model(tmp_path / "one")), logits(model))
    code, text, err = run("convert", with_cache, "--to", format, "-o", tmp_path / "two")
    assert code == 0 and "no place for the scales of a KV cache" in text + err


def test_a_scheme_alone_and_scales_alone_are_kept(saved, tmp_path):
    put(f"{LAYER}self_attn.k_scale", torch.ones(1))(saved)
    qk.save_model(qk.load_model(saved), tmp_path / "scales")
    assert f"{LAYER}self_attn.k_scale" in open_checkpoint(tmp_path / "scales").kv_cache
    assert config_of(tmp_path / "scales")["quantization_config"]["kv_cache_scheme"] is None
    edit_tensors(saved, lambda tensors: tensors.pop(f"{LAYER}self_attn.k_scale"))
    change_quantization(kv_cache_scheme={"num_bits": 8, "dynamic": True})(saved)
    qk.save_model(qk.load_model(saved), tmp_path / "scheme")
    assert config_of(tmp_path / "scheme")["quantization_config"]["kv_cache_scheme"]["dynamic"]


def test_models_without_one_are_saved_without_a_word(tmp_path):
    model = tiny_model()
    qk.quantize_model(model, scheme="w4a16-g32")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for format in ("gptq", "qkernels"):
            qk.save_model(model, tmp_path / format, format)
    assert "kv_cache_scheme" not in config_of(tmp_path / "qkernels")["quantization_config"]


def test_what_another_package_put_on_a_model_is_kept(tmp_path):
    """As Transformers does with compressed-tensors: scales are parameters of the attention."""
    model = tiny_model()
    qk.quantize_model(model, scheme="w4a16-g32")
    attention = model.get_submodule(LAYER + "self_attn")
    attention.k_scale = torch.nn.Parameter(torch.tensor([0.5]), requires_grad=False)
    said = {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8}}
    model.config.quantization_config = SimpleNamespace(to_dict=lambda: said)
    qk.save_model(model, tmp_path / "out")
    assert config_of(tmp_path / "out")["quantization_config"]["kv_cache_scheme"] == {"num_bits": 8}
    assert f"{LAYER}self_attn.k_scale" in open_checkpoint(tmp_path / "out").kv_cache
    with pytest.warns(UserWarning, match="KV cache"):
        qk.save_model(model, tmp_path / "gptq", "gptq")
    qk.load_model(tmp_path / "gptq")


def test_a_scheme_that_is_none_is_refused(saved):
    change_quantization(kv_cache_scheme="fp8")(saved)
    with pytest.raises(CheckpointError, match="kv_cache_scheme must be an object, got 'fp8'"):
        qk.load_model(saved)
