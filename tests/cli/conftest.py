"""A tiny model folder, and the command line called as a user calls it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qkernels.cli.app import app
from tests.tiny_model import write_folder

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def text_file(tmp_path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("It is a truth universally acknowledged. " * 40)
    return file


@pytest.fixture
def run() -> Run:
    """run(*arguments) -> exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        return result.exit_code, result.stdout, result.stderr

    return call
