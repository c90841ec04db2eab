"""What several modules of these tests share."""

import pytest

from tests.csrc.selftest import Emulator, build
from tests.csrc.sharing import held


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    with held(tmp_path_factory, "emulator") as folder:
        return build(folder)
