"""`qkernels sensitivity` and what `qkernels quantize` makes of its file."""

import json

import pytest

import qkernels as qk
from qkernels.cli.mixed import split_schemes
from tests.cli.conftest import model_folder, run, text_file  # noqa: F401

SCHEMES = "w3a16-g32-sym,w8a16-g32-sym"


def test_a_mixture_is_chosen_and_quantized(run, model_folder, text_file, tmp_path):  # noqa: F811
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    bits, picture, out = (tmp_path / name for name in ("bits.json", "bits.png", "out"))
    code, text, err = run(
        *("sensitivity", model_folder, "--budget", 6, "--schemes", SCHEMES, "-o", bits),
        *("--calibration", text_file, "--picture", picture),
    )
    assert code == 0, err
    assert "w3a16-g32-sym" in text and "bits a weight of 6, with a loss of" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    schemes = json.loads(bits.read_text())["schemes"]
    assert set(schemes.values()) == {"w3a16-g32-sym", "w8a16-g32-sym"}
    arguments = ("quantize", model_folder, "--scheme", "w4a16-g32-sym", "--overrides", bits)
    code, text, err = run(*arguments, "-o", out, "--override", "*.0.mlp.up_proj=none")
    assert code == 0, err
    model = qk.load_model(out)
    up = schemes.pop("model.layers.0.mlp.up_proj")
    assert up is not None and not hasattr(model.model.layers[0].mlp.up_proj, "scheme")
    assert {name: str(model.get_submodule(name).scheme) for name in schemes} == schemes


def test_what_is_wrong_is_said_before_the_work(run, model_folder, text_file, tmp_path):  # noqa: F811
    bits = tmp_path / "bits.json"
    arguments = ("sensitivity", model_folder, "--calibration", text_file, "-o", bits)
    code, _, err = run(*arguments, "--budget", 1)
    assert code == 1 and "1 bits a weight is too small" in err and not bits.exists()
    code, _, err = run(*arguments, "--budget", 6, "--schemes", "w5a16")
    assert code == 1 and "does not parse" in err
    code, _, err = run(*arguments[:-1], tmp_path / "missing" / "bits.json", "--budget", 6)
    assert code == 1 and "does not exist: make it" in err
    bits.write_text("{}")
    code, _, err = run(
        "quantize", model_folder, "--scheme", "w4a16", "--overrides", bits, "-o", "x"
    )
    assert code == 1 and 'hold no "schemes"' in err


def test_schemes_are_split_at_commas_that_are_not_in_a_table():
    assert split_schemes("w4a16,table(0,1)-g32,nf4") == ["w4a16", "table(0,1)-g32", "nf4"]
