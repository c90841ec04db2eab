"""Loading needs the packed model and one layer, never the dense model; saving one shard."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qkernels import rounding
from qkernels.checkpoints import FORMATS
from qkernels.checkpoints.format import WeightKind
from qkernels.checkpoints.store import ShardWriter
from tests.memory import EXACT

transformers = pytest.importorskip("transformers", reason="models come from transformers")

LINEARS = {
    **{f"self_attn.{name}": (1024, 1024) for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{f"mlp.{name}": (2816, 1024) for name in ("gate_proj", "up_proj")},
    "mlp.down_proj": (1024, 2816),
}
BLOCKS = 8


def write_model(folder: Path, blocks: int) -> None:
    """A Llama of 4-bit layers; those of one kind are alike, so that it is made in no time."""
    config = transformers.LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        vocab_size=256,
        dtype=torch.bfloat16,
        tie_word_embeddings=False,
    )
    row, kinds = FORMATS["qkernels"], {}
    folder.mkdir()
    writer = ShardWriter(folder, "5MB")
    for part, shape in LINEARS.items():
        weight = rounding.quantize(torch.randn(shape), "w4a16-g128-sym")
        tensors = row.write_layer(weight)
        for i in range(blocks):
            kinds[f"model.layers.{i}.{part}"] = WeightKind.of(weight)
            for name, tensor in tensors.items():
                writer.add(f"model.layers.{i}.{part}.{name}", tensor)
    for i in range(blocks):
        for name in ("input_layernorm", "post_attention_layernorm"):
            writer.add(f"model.layers.{i}.{name}.weight", torch.ones(1024, dtype=torch.bfloat16))
    writer.add("model.norm.weight", torch.ones(1024, dtype=torch.bfloat16))
    for name in ("model.embed_tokens", "lm_head"):
        writer.add(f"{name}.weight", torch.ones(256, 1024, dtype=torch.bfloat16))
    writer.finish()
    text = {**config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    text["quantization_config"] = row.write_config(kinds, ["lm_head"])
    dumped = json.dumps(text, default=lambda value: str(value).removeprefix("torch."))
    (folder / "config.json").write_text(dumped)


SCRIPT = """
import sys
from pathlib import Path
import qkernels as qk
from transformers import AutoModelForCausalLM
small, large, out = sys.argv[1:]
def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))
def grown(work):
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is held now
    before = memory("VmRSS")
    result = work()
    print(memory("VmHWM") - before)
    return result
# Whatever is imported or made once is there before it is measured.
qk.save_model(qk.load_model(small), out + "-small", format="qkernels", max_shard_size="5MB")
load = AutoModelForCausalLM.from_pretrained
load(small)
model = grown(lambda: qk.load_model(large))
del model
model = grown(lambda: load(large))
grown(lambda: qk.save_model(model, out, format="qkernels", max_shard_size="5MB"))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_loading_and_saving_are_bounded(tmp_path):
    small, large, out = (tmp_path / name for name in ("small", "large", "out"))
    write_model(small, 1)
    write_model(large, BLOCKS)
    stored = sum(path.stat().st_size for path in large.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, (small, large, out))],
        capture_output=True,
        text=True,
        check=True,
        env=EXACT,
    )
    loading, from_pretrained, saving = map(int, done.stdout.split())
    # The packed model and one layer; the dense model is 3.8 times the file.
    assert loading <= 1.3 * stored
    assert from_pretrained <= 1.3 * stored
    # A shard of a tenth of the file, and one layer.
    assert saving <= 0.5 * stored
