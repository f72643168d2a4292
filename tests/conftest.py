"""Shared by all tests: GPU tests are skipped aloud where GPUs are missing, slow ones run when asked for, shared data is found."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.launching import Launch

# last, because a top-level evaluate.py must not shadow the `evaluate` package that lm-eval imports
sys.path.append(str(Path(__file__).resolve().parents[1]))
# Models here are small and processes many: threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

GPUS_NEEDED = {"gpu": 1, "multigpu": 2}
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    needs = [(item, GPUS_NEEDED[name]) for item in items for name in GPUS_NEEDED if item.get_closest_marker(name)]
    if needs:
        found = gpus_found()
        for item, needed in needs:
            if found < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPU(s), {found} found"))
    if not config.getoption("markexpr"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: run it with pytest -m slow"))


def gpus_found() -> int:
    """Asked without torch: a process that has asked CUDA once cannot fork others that use it."""
    from launcher.hardware import find_hardware

    hardware = find_hardware()
    return len(hardware) if hardware.kind == "GPU" else 0


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub that does not answer, and an empty cache."""
    from megatron_lite.data import hub
    from tests.web import NOWHERE

    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    for name in (*hub.PROXIES, *hub.OFFLINE, "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    hub.is_reachable.cache_clear()
    yield
    hub.is_reachable.cache_clear()


@pytest.fixture
def launch(tmp_path: Path) -> "Iterator[Launch]":
    """Starts launchers of scripts in this folder."""
    from tests.launching import launchers

    with launchers(tmp_path) as start:
        yield start


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of tokenizers and texts that lies beside the checkout on the maintainers' machines."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no folder {SHARED_DATA}: tokenizers and texts of others are not part of the project")
    return SHARED_DATA


@pytest.fixture
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder is the project's, where names of configurations are found."""
    monkeypatch.chdir(Path(__file__).resolve().parents[1])
