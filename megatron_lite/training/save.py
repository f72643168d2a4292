"""Saves while training goes on: a copy to host memory, then every rank writes its files into a folder that gets its name only when all of it is there.

The ranks' writing threads meet through files: processes that train must not be kept waiting, and their communication not be mixed with theirs.
"""

import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from megatron_lite.checkpoint.find import CheckpointLayout
from megatron_lite.checkpoint.merged import Merged, write_merged
from megatron_lite.checkpoint.write import name_latest, save
from megatron_lite.errors import OutputError
from megatron_lite.log import logger
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.training.engine import Engine
from megatron_lite.training.folders import DRAFT, delete, fresh_folder, put_in_place, step_of
from megatron_lite.training.manifest import NAME, Entry, entry_of, read_entries, write_entries
from megatron_lite.training.state import read_layers
from megatron_lite.whole import sync

STATE = "training.json"
PATIENCE = 1800.0  # seconds in which the slowest rank must have written its files


@dataclass(frozen=True)
class Progress:
    """How far a training has come; what a continued run needs beside tensors. `words` are the rows of the vocabulary that are more than filling."""

    iteration: int
    samples: int
    updates: int
    skipped: int
    words: int
    optimizer: str
    states: tuple[str, ...]
    loss_scaler: Mapping[str, float]
    best_validation: float | None
    wandb_id: str | None


@dataclass(frozen=True)
class Retention:
    """Which steps stay: the last so many (None: all), and these."""

    last: int | None
    always: tuple[int, ...]


class Contents(Protocol):
    """What a checkpoint holds beside the optimizer's state."""

    def weights_file(self, layout: CheckpointLayout, number: int, part: int) -> Path:
        """Where a rank writes its part of a layer."""
        ...

    def complete(self, draft: Path) -> list[Path]:
        """Makes of the ranks' files what is not there yet, on the writer, and returns what it made. Files that are only for this go."""
        ...


@dataclass(frozen=True)
class WholeModel:
    """All weights, as NeoX writes them, and which adapters they held before they were trained: these must not be added again."""

    merged: tuple[Merged, ...] = ()

    def weights_file(self, layout: CheckpointLayout, number: int, part: int) -> Path:
        return layout.layer_file(number, part)

    def complete(self, draft: Path) -> list[Path]:
        return write_merged(draft, self.merged)


WHOLE_MODEL = WholeModel()


class Saver:
    """Writes checkpoints into a folder, one at a time, in a thread. Failures are raised by the next call."""

    def __init__(
        self, folder: Path, mesh: Mesh, retention: Retention, *, configs: Sequence[Path] = (), contents: Contents = WHOLE_MODEL, with_optimizer: bool = True
    ) -> None:
        self.folder, self.mesh, self.retention = folder, mesh, retention
        self.configs, self.contents, self.with_optimizer = configs, contents, with_optimizer
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def save(self, engine: Engine, progress: Progress) -> None:
        """Begins to save: training stands still until the host has a copy. Every rank calls this."""
        self.wait()
        final = self.folder / f"global_step{progress.iteration}"
        draft = final.with_name(final.name + DRAFT)
        if self.mesh.is_writer:
            fresh_folder(draft)
        self.mesh.wait()
        layout = CheckpointLayout("neox", draft, final.name, self.mesh.tp.size, ())
        files: dict[Path, object] = {}
        for number, weights, states in read_layers(engine):
            files[self.contents.weights_file(layout, number, self.mesh.tp.index)] = weights
            if self.with_optimizer:
                files[optimizer_file(layout, number, self.mesh.tp.index)] = states
        self._thread = threading.Thread(target=self._run, args=(files, draft, final, progress), name="save")
        self._thread.start()

    def check(self) -> None:
        """Raises what has gone wrong in the meantime."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def wait(self) -> None:
        """Until what was begun is on the disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def close(self) -> None:
        """Nothing more will be saved."""

    @property
    def kept(self) -> str:
        return f"saved in {self.folder}"

    def _run(self, files: Mapping[Path, object], draft: Path, final: Path, progress: Progress) -> None:
        try:
            self._write(files, draft)
            if self.mesh.is_writer:
                self._publish(draft, final, progress)
        except OSError as error:
            self._failure = OutputError(f"the checkpoint {final} cannot be written: {error.strerror or error}; free some space or choose another folder")
        except Exception as error:  # whatever it is: a thread that ends in silence would leave a training that never saves
            self._failure = error

    def _write(self, files: Mapping[Path, object], draft: Path) -> None:
        """This rank's files, and last a list of them."""
        for path, content in files.items():
            save(content, path)
            sync(path)
        write_entries({path.name: entry_of(path) for path in files}, draft / f"rank{self.mesh.rank}.list")

    def _publish(self, draft: Path, final: Path, progress: Progress) -> None:
        """Turns the draft into a checkpoint when all ranks' lists are there."""
        lists = [draft / f"rank{rank}.list" for rank in range(self.mesh.layout.size)]
        _await(lambda: all(path.exists() for path in lists), f"{draft}: other processes have not written their files")
        entries = {name: entry for path in lists for name, entry in read_entries(path).items()}
        made = self.contents.complete(draft)
        entries = {name: entry for name, entry in entries.items() if (draft / name).exists()}
        (draft / STATE).write_text(json.dumps(asdict(progress), indent=1), encoding="utf-8")
        for config in self.configs:
            (draft / "configs").mkdir(exist_ok=True)
            shutil.copyfile(config, draft / "configs" / config.name)
        for path in (draft / STATE, *made):
            sync(path)
            entries[path.name] = entry_of(path)
        for path in lists:
            path.unlink()
        write_entries(entries, draft / NAME)
        put_in_place(draft, final)
        name_latest(self.folder, final.name)
        sync(self.folder)
        logger.info(f"saved {final}: {_size(entries)}")
        self._delete_old(progress.iteration)

    def _delete_old(self, newest: int) -> None:
        if self.retention.last is None:
            return
        steps = sorted(step for path in self.folder.glob("global_step*") if (step := step_of(path)) is not None and step <= newest)
        for step in steps[: -self.retention.last]:
            if step not in self.retention.always:
                delete(self.folder / f"global_step{step}")


def optimizer_file(layout: CheckpointLayout, number: int, part: int) -> Path:
    return layout.folder / f"optimizer-layer_{number:02d}-model_{part:02d}.pt"


def _await(ready: Callable[[], bool], otherwise: str) -> None:
    end = time.monotonic() + PATIENCE
    while not ready():
        if time.monotonic() > end:
            raise OutputError(f"{otherwise} after {PATIENCE:.0f} s; all hosts must see the same folder")
        time.sleep(0.02)


def _size(entries: Mapping[str, Entry]) -> str:
    total = sum(entry.bytes for entry in entries.values())
    return f"{total / 1e9:.2f} GB" if total >= 1e8 else f"{total / 1e6:.1f} MB"
