import pytest

import qkernels as qk
from tests.cli.conftest import run, text_file

__all__ = ["run", "saved", "text_file"]


@pytest.fixture
def saved(tmp_path):
    """A model folder in compressed-tensors, with and without zero points."""
    pytest.importorskip("transformers", reason="models come from transformers")
    from tests.checkpoints.models import tiny_model

    model = tiny_model(tied=False)
    qk.quantize_model(model, scheme="w4a16-g32-sym", overrides={"*.up_proj": "w4a16-g32"})
    folder = tmp_path / "out"
    qk.save_model(model, folder)
    return folder
