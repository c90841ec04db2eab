"""The driver on tiny models of Transformers: blocks see what they see in the finished model."""

import pytest
import torch

import qkernels as qk
from qkernels.calibration.blocks import find_blocks

transformers = pytest.importorskip("transformers", reason="models come from transformers")

VOCABULARY = 100
LLAMA_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
BART = {
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 96 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "max_position_embeddings": 64,
}
MIXTRAL = {**LLAMA_LIKE, "num_key_value_heads": 2, "num_local_experts": 4}
SMALL_GPT = {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 3, "n_head": 4}
GEMMA = {
    **LLAMA_LIKE,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
}

ARCHITECTURES = {
    "LlamaForCausalLM": ("LlamaConfig", LLAMA_LIKE | {"num_key_value_heads": 2}),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", LLAMA_LIKE),
    # Masks that differ from block to block.
    "Gemma3ForCausalLM": ("Gemma3TextConfig", GEMMA),
    "MixtralForCausalLM": (
        "MixtralConfig",
        MIXTRAL,
    ),
    "BloomForCausalLM": ("BloomConfig", SMALL_GPT),
    # Layers in front of the blocks.
    "OPTForCausalLM": ("OPTConfig", OPT),
    "BertForMaskedLM": ("BertConfig", LLAMA_LIKE),
    "BartForConditionalGeneration": ("BartConfig", BART),
}


def make(name):
    config, options = ARCHITECTURES[name]
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**options)).eval()


def batches_for(model):
    """Two lengths, with and without a mask of padding."""
    torch.manual_seed(1)
    ids = torch.randint(5, VOCABULARY, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    batches = [{"input_ids": ids}, {"input_ids": ids[:1, :7]}]
    batches.append({"input_ids": ids.flip(0), "attention_mask": mask})
    if model.config.is_encoder_decoder:
        batches = [b | {"decoder_input_ids": b["input_ids"].flip(1)[:, :6]} for b in batches]
    return batches


def tokens_of(batch):
    """Which tokens are no padding, of models whose mask speaks of all; None for all."""
    if "attention_mask" not in batch or "decoder_input_ids" in batch:
        return None
    return batch["attention_mask"].flatten().bool()


def first_inputs(model, blocks, batches):
    """The layer of each block that runs first, and the largest of all its inputs but padding."""
    found: dict[str, tuple[str, float]] = {}
    present = []

    def note(block, name):
        def hook(_, args):
            first, largest = found.get(block, (name, 0.0))
            if first == name:
                x = args[0].flatten(0, -2)
                kept = tokens_of(present[0])
                x = x if kept is None or len(kept) != len(x) else x[kept]
                found[block] = name, max(largest, float(x.abs().max()))

        return hook

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(note(block.name, name))
        for block in blocks
        for name in block.layers
    ]
    with torch.no_grad():
        for batch in batches:
            present[:] = [batch]
            model(**batch)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_static_scales_are_those_of_the_finished_model(name):
    model = make(name)
    batches = batches_for(model)
    with torch.no_grad():
        want = [model(**batch)[0] for batch in batches]
    cached = model.config.use_cache if hasattr(model.config, "use_cache") else None
    caches = []
    for module in model.modules():
        module.register_forward_pre_hook(
            lambda _, args, kwargs: caches.append(kwargs.get("past_key_values")), with_kwargs=True
        )
    report = qk.quantize_model(model, "rtn", "w8a8-static", calibration=batches, include=["*"])
    assert report.whole_model is None and not report.unreached
    left = [model.get_submodule(name) for name in report.skipped]
    assert all(isinstance(module, torch.nn.Embedding) for module in left)
    assert getattr(model.config, "use_cache", None) == cached
    # A cache would hold keys and values of every block.
    assert caches and not any(cache is not None for cache in caches)
    blocks = find_blocks(model, [layer.name for layer in report.layers])
    assert len(blocks) >= model.config.num_hidden_layers
    firsts = first_inputs(model, blocks, batches)
    assert len(firsts) == len(blocks)
    for layer, largest in firsts.values():
        scale = float(model.get_submodule(layer).activation_scale)
        assert scale == pytest.approx(largest / 127, rel=1e-5), layer
    with torch.no_grad():
        for batch, dense in zip(batches, want, strict=True):
            got, kept = model(**batch)[0].flatten(0, 1), tokens_of(batch)
            dense = dense.flatten(0, 1)
            got, dense = (got, dense) if kept is None else (got[kept], dense[kept])
            assert (got - dense).norm() / dense.norm() < 0.1


def test_blocks_that_share_all_weights_are_run_whole():
    config = transformers.AlbertConfig(**LLAMA_LIKE, embedding_size=32)
    model = transformers.AlbertForMaskedLM(config).eval()
    batches = batches_for(model)
    ffn = "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn"
    seen = []
    handle = model.get_submodule(ffn).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].abs().max())
    )
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    report = qk.quantize_model(
        model, scheme="w8a8-static", calibration=batches, include=["*albert_layer_groups*"]
    )
    assert "albert.encoder.albert_layer_groups.0 is called more than once" in report.whole_model
    scale = float(model.get_submodule(ffn).activation_scale)
    assert len(seen) == 9 and scale == pytest.approx(float(max(seen)) / 127, rel=1e-6)


def test_a_cache_of_the_caller_is_not_filled_twice():
    """A cache that a batch brings is an object which every run of a block adds to."""
    model = make("LlamaForCausalLM")
    ids = torch.arange(5, 17)[None]
    scales = []
    for cache in (None, transformers.DynamicCache(config=model.config)):
        model = make("LlamaForCausalLM")
        batch = {"input_ids": ids} | ({"past_key_values": cache} if cache is not None else {})
        report = qk.quantize_model(model, scheme="w8a8-static", calibration=[batch])
        assert report.whole_model is None
        scales.append(
            {r.name: float(model.get_submodule(r.name).activation_scale) for r in report.layers}
        )
    assert scales[0] == scales[1]
    assert cache.get_seq_length() == len(ids[0])
