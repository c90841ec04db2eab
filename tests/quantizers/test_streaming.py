"""A folder quantized a block at a time is the one that a model in memory gives, bit for bit."""

import gc
import json
import shutil
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file

import qkernels as qk
from bench.survey.classes import model_classes
from bench.survey.models import example
from qkernels.checkpoints import store
from qkernels.checkpoints.dense_folder import DenseFolder, UnusedTensorsWarning
from qkernels.checkpoints.store import Store
from qkernels.errors import CheckpointError, LayerError, RecipeError, WeightError
from qkernels.models.loading import load_dense
from qkernels.quantizers import resume
from qkernels.quantizers.method import Method
from qkernels.quantizers.methods import METHODS
from qkernels.quantizers.recipe import Recipe
from qkernels.scheme import QuantScheme
from tests.checkpoints.folders import WRITTEN, edit_config
from tests.quantizers.stream_folders import (
    FAMILIES,
    SCHEME,
    batches,
    contents,
    in_memory,
    streamed,
    weights_of,
    write_model,
)

WITHOUT_INPUTS = "hqq(zeros=integer, grid=mse)"


def formats_of(family):
    """Formats that are written and hold the layers of a family."""
    names = ("compressed-tensors", "awq", "gptq", "gptq_v2", "qkernels")
    return names[-1:] if family == "GPT2" else names


WHOLE = [name for name, row in METHODS.items() if row.prepare_model or row.finishes]
"""Methods that need all of a model at once."""

STREAMED = [
    name
    for name, row in METHODS.items()
    if name not in WHOLE and row.why_idle([QuantScheme.parse(SCHEME)], row.parameters()) is None
]

_CHOSEN = {"steps": 3, "zeros": "integer"}


def recipe_of(method):
    """A recipe of a method, with few steps where it takes some, for formats of all kinds."""
    known = {part.name for part in fields(METHODS[method].parameters)}
    chosen = {name: value for name, value in _CHOSEN.items() if name in known}
    return f"{method}({', '.join(f'{name}={value}' for name, value in chosen.items())})"


@pytest.mark.parametrize(
    ("family", "method"),
    [("Llama", method) for method in STREAMED]
    + [(family, method) for family in list(FAMILIES)[1:] for method in ("rtn", "gptq", "awq")],
)
def test_the_folder_is_that_of_a_model_in_memory(folders, tmp_path, family, method):
    source, formats, method = folders(family), formats_of(family), recipe_of(method)
    (part,) = Recipe.parse(method).parts
    if part.method.adds(part.parameters):
        formats = ["qkernels"]
    calibration = batches(family)
    expected = in_memory(source, tmp_path / "memory", method, formats, calibration=calibration)
    for name in formats:
        # The format is no part of what a block becomes, so the blocks of the first are taken.
        options = {"calibration": calibration, "format": name, "resume": tmp_path / "run"}
        assert streamed(source, tmp_path / name, method, **options) == expected
        assert contents(tmp_path / name) == contents(tmp_path / "memory" / name)
        assert len(list((tmp_path / name).glob("model-0*.safetensors"))) > 2


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_inputs_are_scaled_as_in_memory(folders, tmp_path, family):
    source, options = folders(family), {"calibration": batches(family), "scheme": "w8a8"}
    method = "smoothquant+gptq"
    expected = in_memory(source, tmp_path / "memory", method, ["qkernels"], **options)
    # The second is of the blocks that the first has left.
    for number in range(2):
        out = tmp_path / f"streamed-{number}"
        options |= {"format": "qkernels", "resume": tmp_path / "run"}
        assert streamed(source, out, method, **options) == expected
        assert contents(out) == contents(tmp_path / "memory" / "qkernels")


@pytest.mark.parametrize("format", WRITTEN)
def test_every_format_without_calibration(llama, tmp_path, format):
    expected = in_memory(llama, tmp_path / "memory", "rtn", [format])
    assert streamed(llama, tmp_path / "out", format=format) == expected
    assert contents(tmp_path / "out") == contents(tmp_path / "memory" / format)
    assert not (tmp_path / "out.unfinished").exists()


@pytest.mark.parametrize(
    "name",
    [
        # Norms whose weights are called gamma and beta, rotary frequencies that moved.
        "EsmForMaskedLM",
        # Buffers that are made like parameters.
        "IBertForMaskedLM",
        # Its head reads weights of layers that it does not call.
        "MobileBertForMaskedLM",
        "GptOssForCausalLM",
        "WhisperForConditionalGeneration",
        "SiglipModel",
    ],
)
def test_other_architectures(tmp_path, name):
    made = example(model_classes()[name], torch.float32)
    made.model().save_pretrained(tmp_path / "source")
    options = {"scheme": "w8a16", "calibration": [dict(made.inputs)]}
    expected = in_memory(tmp_path / "source", tmp_path / "memory", "rtn", ["qkernels"], **options)
    found = streamed(tmp_path / "source", tmp_path / "out", format="qkernels", **options)
    assert found == expected
    assert contents(tmp_path / "out") == contents(tmp_path / "memory" / "qkernels")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, None])
@pytest.mark.parametrize("family", ["Llama", "T5"])
def test_types_are_those_of_from_pretrained(folders, tmp_path, family, dtype):
    own = torch.float32
    expected = in_memory(
        folders(family), tmp_path / "memory", "rtn", ["qkernels"], dtype=dtype or own
    )
    found = streamed(folders(family), tmp_path / "out", dtype=dtype, format="qkernels")
    assert found == expected
    assert contents(tmp_path / "out") == contents(tmp_path / "memory" / "qkernels")


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Llama", {"exclude": ["model.layers.1.*"]}),
        ("Llama", {"include": ["*mlp*", "lm_head"]}),
        ("Llama", {"overrides": {"lm_head": "w8a16", "*.0.*": "w8a8-static"}}),
        ("Qwen3", {"overrides": {"lm_head": "w8a16-g32"}}),
        ("Qwen3", {"overrides": {"lm_head": "w8a16-g32", "*embed_tokens": "w8a16-g32"}}),
        ("Llama", {"overrides": {"*embed_tokens": "w8a16-g32"}}),
        ("Mixtral", {"exclude": ["*expert_1"]}),
        ("Mixtral", {"exclude": ["model.layers.0.mlp.experts.down_proj"]}),
        ("GPT2", {"exclude": ["*c_proj"]}),
    ],
)
@pytest.mark.parametrize("calibrated", [True, False])
def test_parts_of_a_model(folders, tmp_path, family, options, calibrated):
    if calibrated:
        options = {**options, "calibration": batches(family)}
    elif any("static" in str(s) for s in options.get("overrides", {}).values()):
        pytest.skip("static activations are calibrated")
    expected = in_memory(folders(family), tmp_path / "memory", "rtn", ["qkernels"], **options)
    found = streamed(folders(family), tmp_path / "out", format="qkernels", **options)
    assert found == expected
    assert contents(tmp_path / "out") == contents(tmp_path / "memory" / "qkernels")


def live_bytes():
    """Bytes of all tensors that were made since `gc.freeze`, each memory once."""
    held = {}
    for found in gc.get_objects():
        if isinstance(found, torch.Tensor) and not found.is_meta:
            storage = found.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


@pytest.fixture
def frozen(llama, tmp_path):
    # What is imported on the way has many objects.
    streamed(llama, tmp_path / "first", "gptq", calibration=batches())
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("frozen")
@pytest.mark.parametrize("method", ["rtn", WITHOUT_INPUTS, "gptq", "awq"])
def test_memory_is_that_of_three_blocks(tmp_path, monkeypatch, method):
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6}
    source = write_model(tmp_path / "source", shard="1MB", **sizes)
    shapes = {n: p.numel() * 4 for n, p in DenseFolder(source).model.named_parameters()}
    block = sum(size for name, size in shapes.items() if name.startswith("model.layers.0."))
    rest = sum(size for name, size in shapes.items() if ".layers." not in name)
    calibration = None if method in ("rtn", WITHOUT_INPUTS) else batches()[:1]
    gc.collect()
    seen = []

    def look(*_):
        seen.append(live_bytes())

    def looking(place, name):
        real = getattr(place, name)

        def before(*args, **kwargs):
            look()
            return real(*args, **kwargs)

        monkeypatch.setattr(place, name, before)

    for place, name in ((Store, "get"), (resume, "save_file"), (store.ShardWriter, "add")):
        looking(place, name)
    streamed(source, tmp_path / "out", method, calibration=calibration, progress=look)
    assert len(seen) > 100
    # Statistics of the widest layer, counted apart: H, what is made of it, and the cross term.
    beside = rest + 3 * 4 * sizes["intermediate_size"] ** 2 if calibration else 0
    assert block < max(seen) < 3 * block + beside
    if method == "rtn":
        # The measure sees what is held: a model in memory is more.
        seen.clear()
        model, _ = load_dense(source, torch.float32, tokenizer=False)
        qk.quantize_model(model, method, SCHEME, progress=look)
        assert max(seen) > 5 * block


def test_another_run_is_an_error(llama, tmp_path):
    kept = tmp_path / "run"
    expected = streamed(llama, tmp_path / "out", resume=kept)
    assert kept.is_dir()
    for options, named in (
        ({"scheme": "w8a16"}, "the schemes of layers"),
        ({"method": WITHOUT_INPUTS}, "the recipe"),
        ({"dtype": torch.bfloat16}, "the model"),
        ({"calibration": batches()}, "the calibration batches"),
    ):
        with pytest.raises(CheckpointError, match=f"differs in {named}"):
            streamed(llama, tmp_path / "other", resume=kept, **options)
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        changed = shutil.copytree(llama, tmp_path / name)
        file = next(f for f in changed.glob("*.safetensors") if name in load_file(f))
        tensors = load_file(file)
        store.save_file({**tensors, name: tensors[name] + 1}, file)
        with pytest.raises(CheckpointError, match="differs in the model"):
            streamed(changed, tmp_path / "other", resume=kept)
    assert not (tmp_path / "other").exists()
    assert streamed(llama, tmp_path / "again", resume=kept) == expected


def test_places_that_are_taken(llama, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").touch()
    with pytest.raises(CheckpointError, match="out exists and is not an empty folder"):
        streamed(llama, out)
    for kept, what in ((llama / "run", "the model"), (tmp_path / "new", "the folder to write")):
        with pytest.raises(CheckpointError, match=f"{what}.*: keep finished blocks elsewhere"):
            streamed(llama, tmp_path / "new", resume=kept)
    with pytest.raises(CheckpointError, match="max_shard_size '5XB' is no size"):
        streamed(llama, tmp_path / "new", max_shard_size="5XB")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_wrong_with_a_folder_shows_before_the_work(llama, tmp_path):
    def refuses(source, error, match, **options):
        with pytest.raises(error, match=match):
            streamed(source, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.unfinished").exists()

    whole = weights_of(llama)
    single = tmp_path / "single"
    shutil.copytree(llama, single, ignore=shutil.ignore_patterns("*.safetensors*"))

    def write(tensors):
        store.save_file(tensors, single / "model.safetensors", metadata={"format": "pt"})
        return single

    last = "model.layers.2.mlp.down_proj.weight"
    bad = {**whole, last: whole[last].clone()}
    bad[last][3, 3] = float("nan")
    refuses(write(bad), WeightError, rf"{last} holds|{last}")
    refuses(write({n: t for n, t in whole.items() if n != last}), CheckpointError, f"lacks {last}")
    refuses(write({**whole, last: whole[last][:, 1:].contiguous()}), CheckpointError, last)
    refuses(llama, CheckpointError, "gptq has no nf4 codebooks", scheme="nf4-g32", format="gptq")
    refuses(llama, LayerError, "gptq learns from inputs", method="gptq")
    refuses(llama, LayerError, "calibration holds no batch", calibration=[])
    refuses(llama, LayerError, "pattern 'x' matches none", include=["x"])
    with pytest.warns(UnusedTensorsWarning, match="holds extra, which a LlamaForCausalLM"):
        streamed(write({**whole, "extra": torch.zeros(1)}), tmp_path / "out")


def test_other_kinds_of_sources(llama, tmp_path):
    quantized = tmp_path / "quantized"
    streamed(llama, quantized)
    with pytest.raises(CheckpointError, match="holds a quantized model: start from the original"):
        streamed(quantized, tmp_path / "out")
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="is a GGUF file, which is read as a whole"):
        streamed(gguf, tmp_path / "out")
    pickles = tmp_path / "pickles"
    pickles.mkdir()
    shutil.copy(llama / "config.json", pickles)
    (pickles / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match="is a pickle"):
        streamed(pickles, tmp_path / "out")
    with pytest.raises(CheckpointError, match="nowhere"):
        streamed(tmp_path / "nowhere", tmp_path / "out")


def test_models_that_are_not_taken_block_by_block(tmp_path):
    import transformers

    rwkv = transformers.RwkvConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32
    )
    torch.manual_seed(0)
    transformers.RwkvForCausalLM(rwkv).save_pretrained(tmp_path / "rwkv")
    with pytest.raises(LayerError, match=r"changes weights of its blocks.*leave out --stream"):
        streamed(tmp_path / "rwkv", tmp_path / "out")
    albert = transformers.AlbertConfig(
        vocab_size=64,
        embedding_size=32,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
    )
    transformers.AlbertForMaskedLM(albert).save_pretrained(tmp_path / "albert")
    calibration = batches()
    with pytest.raises(
        LayerError, match=r"one block at a time \(.*called more than once.*--stream"
    ):
        streamed(tmp_path / "albert", tmp_path / "out", calibration=calibration)
    # Without a forward they are taken as they are.
    streamed(tmp_path / "albert", tmp_path / "out", resume=tmp_path / "run")


@pytest.mark.parametrize("name", [*WHOLE, "before", "after"])
def test_methods_that_need_the_whole_model(llama, tmp_path, monkeypatch, name):
    before = Method(name="before", title="", prepare_model=lambda task, parameters: None)
    after = Method(name="after", title="", finish=lambda task, parameters: {})
    for row in (before, after):
        monkeypatch.setitem(METHODS, row.name, row)
    recipe = f"rtn+{name}" if METHODS[name].finishes else name
    with pytest.raises(RecipeError, match=f"{name} works on the whole model.*leave out --stream"):
        streamed(llama, tmp_path / "out", recipe, calibration=batches(), scheme="w8a8-static")
    assert not list(tmp_path.iterdir())


def test_two_tensors_for_one(folders, tmp_path):
    source = shutil.copytree(folders("Qwen3"), tmp_path / "source")
    shutil.copytree(source, tmp_path / "single", ignore=shutil.ignore_patterns("*.safetensors*"))
    whole = weights_of(source)
    head = whole["model.embed_tokens.weight"] + 1
    single = tmp_path / "single"
    store.save_file({**whole, "lm_head.weight": head}, single / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"are one tensor by the model's config, and differ"):
        streamed(single, tmp_path / "out")


def test_the_architecture_may_be_left_out(llama, tmp_path):
    source = shutil.copytree(llama, tmp_path / "source")
    edit_config(source, lambda config: config.pop("architectures"))
    streamed(source, tmp_path / "out")
    streamed(llama, tmp_path / "expected")
    found, expected = contents(tmp_path / "out"), contents(tmp_path / "expected")
    assert json.loads(found.pop("config.json")) == json.loads(expected.pop("config.json"))
    assert found == expected
