"""`from_pretrained` on quantized folders whose names are not the model's."""

import re

import pytest
import torch

import qkernels as qk
from qkernels.integrations.transformers import stop_using, use
from qkernels.modules.experts import WQExperts
from tests.checkpoints import experts

transformers = pytest.importorskip("transformers", reason="models come from transformers")

pytestmark = pytest.mark.filterwarnings("ignore:saved in the qkernels format")

WRITERS = {
    "awq": (experts.awq, experts.AWQ_SECTION),
    "gptq": (experts.gptq, experts.GPTQ_SECTION),
    "bitsandbytes": (experts.eight_bits, experts.EIGHT_BITS_SECTION),
    "compressed-tensors": (experts.float8, experts.FLOAT8_SECTION),
}


@pytest.fixture(autouse=True)
def used():
    use(WRITERS)
    yield
    stop_using()


def assert_loads(folder):
    """As `load_model` does, with nothing to report; the model."""
    want = qk.load_model(folder)
    found, info = type(want).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    first, second = found.state_dict(), want.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name
    assert torch.equal(experts.outputs(found), experts.outputs(want))
    return found


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "DeepseekV3"])
def test_experts_that_are_stored_one_by_one(name, writer, tmp_path):
    experts.save_dense(experts.mixture(name), tmp_path / "in")
    experts.rewrite(tmp_path / "in", *WRITERS[writer])
    model = assert_loads(tmp_path / "in")
    assert any(isinstance(module, WQExperts) for module in model.modules())
    # In the format that it came in, or our own.
    model.save_pretrained(tmp_path / "out")
    assert_loads(tmp_path / "out")


def test_experts_that_are_not_all_quantized(tmp_path):
    def most(tensor):
        return experts.is_expert(tensor) and "layers.0" in tensor and ".experts.1." not in tensor

    experts.save_dense(experts.mixture("Mixtral"), tmp_path / "in")
    experts.rewrite(tmp_path / "in", *WRITERS["awq"], chosen=most)
    model = assert_loads(tmp_path / "in")
    stack = next(module for module in model.modules() if isinstance(module, WQExperts))
    assert [isinstance(layer, qk.WQLinear) for layer in stack.layers] == [True, False, True]


@pytest.mark.parametrize("name", experts.renamed_models())
def test_names_that_transformers_has_changed(name, tmp_path):
    def linear(tensor):
        return bool(re.search(r"(proj|qkv|fc\d+|Wqkv)\.weight$", tensor)) and "patch" not in tensor

    experts.save_dense(experts.renamed_models()[name]().eval(), tmp_path / "in")
    experts.rewrite(tmp_path / "in", *WRITERS["bitsandbytes"], chosen=linear)
    assert_loads(tmp_path / "in")
