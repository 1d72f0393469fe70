"""Folders of tiny actors and critics, made once, and the process group of one."""

from collections.abc import Callable

import pytest

from dschat.rlhf.rlhf_engine import DeepSpeedRLHFEngine
from dschat.utils.distributed import Distributed, init_distributed
from tests.rlhf.tiny_roles import MODELS, Folders, Setting, save_folders


@pytest.fixture(scope="session")
def distributed() -> Distributed:
    return init_distributed()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Folders]:
    return {family: save_folders(tmp_path_factory.mktemp(family), family) for family in MODELS}


@pytest.fixture
def load_roles(
    folders: dict[str, Folders], distributed: Distributed
) -> Callable[..., DeepSpeedRLHFEngine]:
    """Roles of a setting, loaded from the folders of one family."""

    def load(setting: Setting, family: str = "llama", **changes: object) -> DeepSpeedRLHFEngine:
        return setting.load(folders[family], distributed, **changes)

    return load
