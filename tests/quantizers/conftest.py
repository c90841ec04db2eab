"""Folders of dense models, made once."""

import pytest

from tests.quantizers.stream_folders import write_model


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    made = {}

    def folder(family):
        if family not in made:
            made[family] = write_model(tmp_path_factory.mktemp(family), family)
        return made[family]

    return folder


@pytest.fixture
def llama(folders):
    return folders("Llama")
