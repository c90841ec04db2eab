"""What several modules of these tests share."""

import pytest

from tests.csrc.selftest import Emulator, build


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return build(tmp_path_factory.mktemp("emulator"))
