"""Checkpoints that lie in somebody else's folders: what may not be read is said to be that, and not to be damaged or missing."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_lite.checkpoint.contents import stored_tensors
from megatron_lite.checkpoint.convert import refuse_mixture
from megatron_lite.checkpoint.find import find_checkpoint
from megatron_lite.errors import UserError
from tests.models import SMALL, write_random

NOBODY = 65534


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that everybody may enter, which pytest's own are not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def told(act: Callable[[], object]) -> str:
    """The sentence in which the act ends for a user who is not the owner of all."""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        sentence = "no sentence"
        try:
            if os.geteuid() == 0:
                os.setegid(NOBODY)
                os.seteuid(NOBODY)
            act()
        except UserError as error:
            sentence = str(error)
        except BaseException as error:
            sentence = f"no UserError but {error!r}"
        os.write(writing, sentence.encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as file:
        return file.read()


def everything(folder: Path) -> None:
    for _ in stored_tensors(find_checkpoint(folder)):
        pass


@pytest.mark.parametrize(
    ("name", "mode", "said"),
    [
        ("", 0, "the checkpoint folder {} cannot be read: Permission denied; check its permissions"),
        ("", 0o444, "{}/download-unfinished cannot be read: Permission denied; check the permissions of the checkpoint and its folders"),
        ("latest", 0, "{}/latest cannot be read: Permission denied; check the permissions of the checkpoint and its folders"),
        ("global_step0", 0, "the checkpoint folder {}/global_step0 cannot be read: Permission denied; check its permissions"),
        (
            "global_step0/layer_02-model_00-model_states.pt",
            0,
            "{}/global_step0/layer_02-model_00-model_states.pt cannot be read: Permission denied; check its permissions",
        ),
    ],
)
def test_layer_files_that_may_not_be_read(name: str, mode: int, said: str, place: Path) -> None:
    folder = place / "checkpoint"
    layout = write_random(folder, replace(SMALL, layers=1), tp=1)
    said = said.replace("global_step0", layout.folder.name)
    path = folder / name.replace("global_step0", layout.folder.name)
    path.chmod(mode)
    assert told(lambda: everything(folder)) == said.format(folder)
    path.chmod(0o755)


def test_a_hugging_face_file_that_may_not_be_read(place: Path) -> None:
    (place / "config.json").write_text("{}")
    save_file({"a": torch.zeros(1)}, place / "model.safetensors")
    (place / "model.safetensors").chmod(0)
    assert told(lambda: everything(place)) == f"{place}/model.safetensors cannot be read: Permission denied; check its permissions"


def test_a_folder_within_one_that_is_closed(place: Path) -> None:
    (place / "closed" / "model").mkdir(parents=True)
    (place / "closed").chmod(0)
    model = place / "closed" / "model"
    assert told(lambda: find_checkpoint(model)) == f"{model} cannot be read: Permission denied; check the permissions of the checkpoint and its folders"
    assert told(lambda: refuse_mixture(model)) == f"{model} cannot be read: Permission denied; choose another folder"
    (place / "closed").chmod(0o755)
