"""Folders whose names are not the model's: as other packages and Transformers 4 wrote them."""

import functools
import importlib
import re

import pytest
import torch

import qkernels as qk
from qkernels.checkpoints import open_checkpoint
from qkernels.checkpoints.names import in_names_of
from qkernels.errors import CheckpointError
from qkernels.modules.experts import WQExperts
from qkernels.modules.rows import WQRows
from tests.bounds import FROBENIUS_BOUND
from tests.checkpoints import experts
from tests.checkpoints.experts import CLASSES, mixture, outputs, rewrite, save_dense
from tests.checkpoints.folders import edit_config, edit_tensors

transformers = pytest.importorskip("transformers", reason="models come from transformers")
loading = pytest.importorskip(
    "transformers.core_model_loading", reason="this transformers has no tables of names"
)

WRITERS = {
    "awq": (experts.awq, experts.AWQ_SECTION),
    "gptq": (experts.gptq, experts.GPTQ_SECTION),
    "bitsandbytes": (experts.eight_bits, experts.EIGHT_BITS_SECTION),
    "compressed-tensors": (experts.float8, experts.FLOAT8_SECTION),
}


def folder_of(model, tmp_path, writer, **options):
    """A quantized folder of a dense model, and the model of its dequantized weights."""
    quantize, section = WRITERS[writer] if isinstance(writer, str) else writer
    save_dense(model, tmp_path / "in")
    dense = rewrite(tmp_path / "in", quantize, section, **options)
    return tmp_path / "in", experts.dense_model(tmp_path / "in", dense, tmp_path / "dense")


def assert_same_numbers(folder, wanted):
    """Each weight of the model that is loaded is that of the dense one, bit for bit."""
    model = qk.load_model(folder)
    dense = dict(wanted.named_parameters())
    seen = 0
    for name, module in model.named_modules():
        if isinstance(module, WQExperts):
            assert torch.equal(torch.as_tensor(module.weight.values()), dense[name]), name
            seen += len(module)
        elif isinstance(module, qk.WQLinear) and f"{name}.weight" in dense:
            assert torch.equal(module.dequantize(), dense[f"{name}.weight"]), name
            seen += 1
    assert seen
    for name, parameter in model.named_parameters():
        if name in dense:
            assert torch.equal(parameter, dense[name]), name
    return model


def assert_close(model, wanted):
    got, want = outputs(model).double(), outputs(wanted).double()
    assert (got - want).norm() <= FROBENIUS_BOUND[torch.float32] * want.norm()


@pytest.mark.parametrize("writer", ["awq", "gptq", "bitsandbytes"])
@pytest.mark.parametrize("name", CLASSES)
def test_experts_are_read_under_the_names_of_transformers_4(tmp_path, name, writer):
    folder, wanted = folder_of(mixture(name), tmp_path, writer)
    assert any(".experts.0." in layer for layer in open_checkpoint(folder).layers)
    model = assert_same_numbers(folder, wanted)
    assert_close(model, wanted)
    assert not any(isinstance(module, WQRows) for module in model.modules())


@pytest.mark.parametrize("name", experts.renamed_models())
def test_names_that_changed_are_read(tmp_path, name):
    def linear(tensor):
        return bool(re.search(r"(proj|qkv|fc\d+|Wqkv)\.weight$", tensor)) and "patch" not in tensor

    torch.manual_seed(0)
    model = experts.renamed_models()[name]().eval()
    folder, wanted = folder_of(model, tmp_path, "bitsandbytes", chosen=linear)
    model = assert_same_numbers(folder, wanted)
    assert_close(model, wanted)


def test_a_layer_and_an_expert_may_be_dense(tmp_path):
    def most(tensor):
        return experts.is_expert(tensor) and "layers.0" in tensor and ".experts.1." not in tensor

    folder, wanted = folder_of(mixture("Mixtral"), tmp_path, "awq", chosen=most)
    model = assert_same_numbers(folder, wanted)
    stacks = [m for m in model.modules() if isinstance(m, WQExperts)]
    assert [type(layer) for layer in stacks[0].layers] == [
        qk.WQLinear,
        torch.nn.Linear,
        qk.WQLinear,
    ]
    assert len(stacks) == 2
    assert_close(model, wanted)


def test_half_of_an_expert_may_not_be_dense(tmp_path):
    folder, _ = folder_of(
        mixture("Qwen3Moe"), tmp_path, "awq", chosen=lambda n: experts.is_expert(n) and "gate" in n
    )
    with pytest.raises(CheckpointError, match=r"experts\.0\.up_proj.*is not quantized"):
        qk.load_model(folder)


def test_columns_in_different_orders_stay_apart(tmp_path):
    writer = functools.partial(experts.gptq, order_of=lambda layer: hash_of(layer))
    folder, wanted = folder_of(mixture("Qwen3Moe"), tmp_path, (writer, experts.GPTQ_SECTION))
    model = assert_same_numbers(folder, wanted)
    assert_close(model, wanted)
    rows = model.model.layers[0].mlp.experts.gate_up_proj.layers[1]
    assert isinstance(rows, WQRows) and rows.out_features == 64 and rows.in_features == 32
    assert rows.bias is None and len(rows.layers) == 2
    x = torch.randn(3, 32)
    assert torch.equal(rows(x), torch.cat([layer(x) for layer in rows.layers], dim=1))
    # As a folder of our own.
    qk.save_model(model, tmp_path / "out", format="qkernels")
    again = qk.load_model(tmp_path / "out")
    assert torch.equal(outputs(again), outputs(model))
    assert {n: t.shape for n, t in again.state_dict().items()} == {
        n: t.shape for n, t in model.state_dict().items()
    }


def hash_of(layer):
    return sum(map(ord, layer))


@pytest.mark.parametrize("equal", [True, False])
def test_scales_of_whole_tensors_become_those_of_rows(tmp_path, equal):
    writer = functools.partial(
        experts.float8, input_scale=lambda layer: 0.25 if equal or "w1" in layer else 0.5
    )
    folder, wanted = folder_of(mixture("Mixtral"), tmp_path, (writer, experts.FLOAT8_SECTION))
    model = assert_same_numbers(folder, wanted)
    expert = model.model.layers[0].mlp.experts.gate_up_proj.layers[0]
    if equal:
        assert str(expert.scheme) == "fp8-a8-static"
    else:
        # Inputs are rounded by different scales.
        assert [float(layer.packed.buffers["activation_scale"]) for layer in expert.layers] == [
            0.25,
            0.5,
        ]


def without(part):
    def change(tensors):
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return change


def copied(old, new):
    def change(tensors):
        found = {n.replace(old, new): t.clone() for n, t in tensors.items() if old in n}
        assert found
        tensors.update(found)

    return change


def moved(old, new):
    def change(tensors):
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def shorter(part):
    def change(tensors):
        for name in [name for name in tensors if part in name]:
            tensors[name] = tensors[name][..., : tensors[name].shape[-1] // 2].contiguous()

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("layers.1.mlp.experts.1.gate_proj"), r"takes 3 of .*gate_proj.*number 1 is miss"),
        (without("layers.0.mlp.experts.2."), r"takes 3 of .*has 2, and number 2 is missing"),
        (without("layers.0.mlp.experts.0.up_proj.qweight"), r"experts\.0\.up_proj"),
        (moved("experts.1.", "experts.7."), r"takes 3 of .*has 3, and number 1 is missing"),
        (moved("experts.2.up", "experts.3.up"), r"takes 3 of .*up_proj.*number 2 is missing"),
        (moved("model.layers.0.mlp.experts.1", "layers.0.mlp.experts.1"), r"in another order"),
        (copied("experts.2.", "experts.3."), r"takes 3 of .*the file has 4"),
        (copied("experts.2.", "expert.2."), r"no layer .*mlp\.expert\.2\.(gate|up|down)_proj"),
        (shorter("layers.0.mlp.experts.1.up_proj"), r"experts\.1\.up_proj has 16 rows.* 32"),
    ],
)
def test_experts_that_do_not_fit_are_errors(tmp_path, change, message):
    folder, _ = folder_of(mixture("Qwen3Moe"), tmp_path, "awq")
    edit_tensors(folder, change)
    with pytest.raises(CheckpointError, match=message):
        qk.load_model(folder)


def test_two_names_for_one_place_are_an_error(tmp_path):
    folder, _ = folder_of(mixture("Mixtral"), tmp_path, "awq")
    edit_tensors(folder, copied("block_sparse_moe.gate.weight", "mlp.gate.weight"))
    with pytest.raises(CheckpointError, match=r"are both .*mlp\.gate\.weight of the model"):
        qk.load_model(folder)


def test_a_config_that_claims_more_experts_costs_nothing(tmp_path):
    folder, _ = folder_of(mixture("Mixtral"), tmp_path, "awq")
    edit_config(folder, lambda config: config.update(num_local_experts=10**9))
    with pytest.raises(CheckpointError):
        qk.load_model(folder)


def test_a_folder_with_the_models_names_is_taken_as_it_is(tmp_path):
    model = mixture("Mixtral")
    qk.quantize_model(model, scheme="w4a16-g16", exclude=["*expert_1"])
    qk.save_model(model, tmp_path / "out", format="qkernels")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert in_names_of(mixture("Mixtral"), checkpoint) is checkpoint


@pytest.mark.parametrize("count", [2, 10**4])
def test_a_config_with_other_experts_than_our_own_format_costs_nothing(tmp_path, count):
    model = mixture("Qwen3Moe")
    qk.quantize_model(model, scheme="w4a16-g16")
    qk.save_model(model, tmp_path / "out", format="qkernels")
    edit_tensors(tmp_path / "out", without(".mlp.gate."))
    edit_config(tmp_path / "out", lambda config: config.update(num_local_experts=count))
    for load in (qk.load_model, transformers.AutoModel.from_pretrained):
        with pytest.raises(CheckpointError, match=rf"{count} experts in the .*, and 3 in the file"):
            load(tmp_path / "out")


def test_experts_of_our_own_format_are_found_by_a_model_without_a_head(tmp_path):
    def some(tensor):
        return experts.is_expert(tensor) and ".experts.2." not in tensor

    writer = functools.partial(experts.gptq, order_of=hash_of)
    section = experts.GPTQ_SECTION
    folder, _ = folder_of(mixture("Qwen3Moe"), tmp_path, (writer, section), chosen=some)
    model = qk.load_model(folder)
    qk.save_model(model, tmp_path / "out", format="qkernels")
    base, info = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert any(isinstance(module, WQRows) for module in base.modules())
    with torch.no_grad():
        found, wanted = (m(experts.TOKENS).last_hidden_state for m in (base, model.model))
    assert torch.equal(found, wanted)


def test_a_tensor_that_no_model_has_changes_nothing_about_experts(tmp_path):
    writer = functools.partial(experts.gptq, order_of=hash_of)
    folder, _ = folder_of(mixture("Qwen3Moe"), tmp_path, (writer, experts.GPTQ_SECTION))
    model = qk.load_model(folder)
    qk.save_model(model, tmp_path / "out", format="qkernels")
    unused = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    edit_tensors(tmp_path / "out", lambda tensors: tensors.update(unused))
    assert torch.equal(outputs(qk.load_model(tmp_path / "out")), outputs(model))
    assert torch.equal(outputs(qk.load_model(tmp_path / "out")), outputs(model))


CONVERSIONS = {
    # Rows that take turns, and rows of heads in another order.
    "interleaved": lambda: loading.WeightConverter(
        ["mlp.gate.weight", "mlp.up.weight"],
        "mlp.gate_up_proj.weight",
        [loading.Concatenate(dim=0), loading.Interleave(dim=0, inverse=True)],
    ),
    "permuted": lambda: loading.WeightConverter(
        ["mlp.gate.weight", "mlp.up.weight"],
        "mlp.gate_up_proj.weight",
        [loading.PermuteForRope(permute_layer_names=["gate"]), loading.Concatenate(dim=0)],
    ),
    "turned": lambda: loading.WeightConverter(
        "mlp.stored.weight", "mlp.gate_up_proj.weight", [loading.Transpose(0, 1)]
    ),
}


@pytest.fixture
def converted(monkeypatch, tmp_path):
    """Makes a folder of a Phi-3, whose layers Transformers is told to convert, and that model."""

    def make(kind, writer="bitsandbytes"):
        text = {k: v for k, v in experts.SIZES.items() if k != "moe_intermediate_size"}
        torch.manual_seed(0)
        model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**text, pad_token_id=0)).eval()
        mapping = lambda *args, **kwargs: [CONVERSIONS[kind]()]  # noqa: E731
        for name in ("conversion_mapping", "modeling_utils"):
            module = importlib.import_module(f"transformers.{name}")
            monkeypatch.setattr(module, "get_model_conversion_mapping", mapping)
        return folder_of(model, tmp_path, writer, chosen=lambda name: ".mlp." in name)

    return make


@pytest.mark.parametrize("writer", ["awq", "gptq", "bitsandbytes"])
@pytest.mark.parametrize("kind", ["interleaved", "permuted"])
def test_rows_go_where_a_conversion_moves_them(converted, kind, writer):
    folder, wanted = converted(kind, writer)
    stored = {layer.rpartition(".")[2] for layer in open_checkpoint(folder).layers}
    assert stored == {"down_proj", "gate", "up"}
    assert_close(assert_same_numbers(folder, wanted), wanted)


def test_a_conversion_that_turns_a_quantized_layer_is_refused(converted):
    folder, _ = converted("turned")
    with pytest.raises(CheckpointError, match="by Transpose of Transformers"):
        qk.load_model(folder)


def test_rows_that_take_turns_must_be_quantized_alike(converted):
    folder, _ = converted(
        "interleaved",
        (functools.partial(experts.gptq, order_of=hash_of), experts.GPTQ_SECTION),
    )
    with pytest.raises(CheckpointError, match="take turns"):
        qk.load_model(folder)


def marian():
    torch.manual_seed(0)
    config = transformers.MarianConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=48,
        pad_token_id=0,
        decoder_start_token_id=0,
    )
    return transformers.MarianMTModel(config).eval()


def test_tables_of_positions_that_are_not_stored_are_computed(tmp_path):
    def linear(tensor):
        return bool(re.search(r"(proj|fc\d)\.weight$", tensor))

    def answer(model):
        ids = experts.TOKENS[:, 1:]
        with torch.no_grad():
            return model(input_ids=ids, decoder_input_ids=ids).logits

    folder, wanted = folder_of(marian(), tmp_path, "bitsandbytes", chosen=linear)
    assert "model.encoder.embed_positions.weight" not in open_checkpoint(folder).store
    model = qk.load_model(folder)
    positions = model.model.encoder.embed_positions.weight
    assert torch.equal(positions, wanted.model.encoder.embed_positions.weight)
    got, want = answer(model), answer(wanted)
    assert (got - want).norm() <= FROBENIUS_BOUND[torch.float32] * want.norm()
    # What the code would draw at random is missing still.
    edit_tensors(folder, without("encoder.layers.0.final_layer_norm.weight"))
    with pytest.raises(CheckpointError, match="missing"):
        qk.load_model(folder)


def test_what_would_be_random_is_not_computed(tmp_path, monkeypatch):
    folder, _ = folder_of(mixture("Mixtral"), tmp_path, "awq")
    edit_tensors(folder, without("embed_tokens"))
    monkeypatch.setattr(
        transformers.MixtralForCausalLM, "_keys_to_ignore_on_load_missing", ["embed_tokens"]
    )
    with pytest.raises(CheckpointError, match=r"missing .*embed_tokens"):
        qk.load_model(folder)


def test_scales_of_a_cache_go_along(tmp_path):
    folder, _ = folder_of(mixture("Mixtral"), tmp_path, "compressed-tensors")
    name, scheme = "model.layers.0.self_attn.k_scale", {"num_bits": 8, "type": "float"}
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.tensor([0.5])}))
    edit_config(folder, lambda config: config["quantization_config"].update(kv_cache_scheme=scheme))
    model = qk.load_model(folder)
    qk.save_model(model, tmp_path / "out")
    again = open_checkpoint(tmp_path / "out")
    assert again.kv_cache == (name,) and float(again.store.get(name)) == 0.5
    assert again.config["quantization_config"]["kv_cache_scheme"] == scheme
    assert torch.equal(outputs(qk.load_model(tmp_path / "out")), outputs(model))
