"""AutoRound beside the package of that name: one block, the same tokens, as many steps.

The package draws other batches and starts from ranges, ours from searched scales; what is held
against it is the error of the model's hidden states.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import qkernels as qk
from tests.bounds import FOREIGN_LAYER_LOSS
from tests.oracles.models import llama
from tests.oracles.packages import require, run

STEPS, BATCH, SEQUENCES, LENGTH = 40, 4, 32, 64

_PROGRAM = """
import json, os, sys
os.environ["TORCHDYNAMO_DISABLE"] = "1"
import torch
from auto_round import AutoRound
from safetensors.torch import load_file, save_file
from tests.oracles.models import llama
from tests.tiny_model import tiny_tokenizer

folder, options = sys.argv[1], json.loads(sys.argv[2])
model, given = llama(), load_file(f"{folder}/model.safetensors")
ids = given.pop("ids")
model.load_state_dict(given)
rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
rounder = AutoRound(
    model, tokenizer=tiny_tokenizer(), dataset=rows, nsamples=len(rows), seqlen=ids.shape[1],
    device_map="cpu", enable_torch_compile=False, **options,
)
made, _ = rounder.quantize()
weights = {
    name: module.weight.contiguous().clone()
    for name, module in made.named_modules()
    if name.startswith("model.layers") and isinstance(module, torch.nn.Linear)
}
save_file(weights, f"{folder}/made.safetensors")
# Its threads may keep the process from ending.
os._exit(0)
"""


@pytest.mark.parametrize("bits", [3, 4])
def test_a_block_is_as_near_as_theirs(tmp_path, bits):
    require("auto_round")
    torch.manual_seed(0)
    model = llama()
    ids = torch.randint(0, 128, (2 * SEQUENCES, LENGTH))
    ids, unseen = ids[:SEQUENCES], ids[SEQUENCES:]
    save_file({**model.state_dict(), "ids": ids}, tmp_path / "model.safetensors")
    options = {"bits": bits, "group_size": 32, "sym": False, "iters": STEPS, "batch_size": BATCH}
    run(_PROGRAM, tmp_path, json.dumps(options))

    def states():
        with torch.no_grad():
            return [model.model(part).last_hidden_state.float() for part in (ids, unseen)]

    def losses():
        pairs = zip(states(), wanted, strict=True)
        return [float((got - dense).square().sum()) for got, dense in pairs]

    wanted = states()
    dense = {name: values.clone() for name, values in model.state_dict().items()}
    found = {}
    theirs = load_file(tmp_path / "made.safetensors")
    assert len(theirs) == 7
    for name, weight in theirs.items():
        model.get_submodule(name).weight.data = weight.to(torch.bfloat16)
    found["theirs"] = losses()
    model.load_state_dict(dense)
    recipe = f"autoround(steps={STEPS}, batch={BATCH})"
    qk.quantize_model(model, recipe, f"w{bits}a16-g32", calibration=[ids], check_kernels=False)
    found["ours"] = losses()
    for ours, others in zip(found["ours"], found["theirs"], strict=True):
        assert ours <= (1 + FOREIGN_LAYER_LOSS) * others
