"""Folders of checkpoints: drafts that get their name when they are complete, and what a killed run leaves behind."""

import fcntl
import shutil
import tempfile
import time
from hashlib import sha256
from pathlib import Path
from typing import IO

from megatron_lite.checkpoint.write import name_latest
from megatron_lite.errors import CheckpointError, OutputError
from megatron_lite.training.manifest import check_sizes
from megatron_lite.whole import sync

DRAFT, REPLACED = ".draft", ".replaced"
PATIENCE = 10.0
"""Seconds in which a training that was killed is surely gone."""
HELD: list[IO[str]] = []
"""Files that are locked as long as this process lives."""


def hold(folder: Path) -> None:
    """Keeps other trainings of this host out of the folder while this process lives. Raises OutputError where one is in it."""
    path = Path(tempfile.gettempdir()) / f"deepy-{sha256(str(folder.resolve()).encode()).hexdigest()[:16]}.lock"
    try:
        file = path.open("a")
    except OSError:  # another user's, whose folder this is not
        return
    HELD.append(file)
    ends = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() > ends:
                raise OutputError(f"another training saves in {folder} already; wait for its end, or set save to another folder") from None
            time.sleep(0.2)
        else:
            return


def step_of(path: Path) -> int | None:
    """The step of a finished checkpoint's folder."""
    digits = path.name.removeprefix("global_step")
    return int(digits) if digits.isdigit() else None


def recover(folder: Path) -> None:
    """Finishes or clears away what a killed run left in its folder: drafts that were complete get their name, others go."""
    for draft in sorted(folder.glob(f"global_step*{DRAFT}")):
        if _is_whole(draft):
            final = draft.with_name(draft.name.removesuffix(DRAFT))
            put_in_place(draft, final)
            name_latest(folder, final.name)
        else:
            shutil.rmtree(draft)
    for old in folder.glob(f"global_step*{REPLACED}"):
        shutil.rmtree(old)


def _is_whole(draft: Path) -> bool:
    try:
        return bool(check_sizes(draft))
    except CheckpointError:  # the machine went down before all of it was on the disk
        return False


def put_in_place(draft: Path, final: Path) -> None:
    """Gives the folder its name. Where that is taken by an earlier run, recover() finishes what a kill in between interrupts."""
    if final.exists():
        replaced = final.with_name(final.name + REPLACED)
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
        draft.rename(final)
        shutil.rmtree(replaced)
    else:
        draft.rename(final)
    sync(final.parent)


def delete(folder: Path) -> None:
    """Takes the name away first, so that no half a checkpoint is ever found."""
    doomed = folder.with_name(folder.name + REPLACED)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def fresh_folder(draft: Path) -> None:
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"the checkpoint folder {draft} cannot be made: {error.strerror}; set save to a folder that can be written") from None
