"""Looks at a folder and says which checkpoint lies there: format, step, cut and layer files. Reads names only, no weights."""

import re
from collections import defaultdict
from collections.abc import Iterable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_lite.checkpoint.index import HUGGINGFACE_FILES, index_of
from megatron_lite.checkpoint.unfinished import refuse_unfinished
from megatron_lite.errors import CheckpointError

Format = Literal["neox", "sequential", "huggingface", "mesh-transformer"]

LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
SHARD, STEP, ARRAYS = re.compile(r"shard_(\d+)"), re.compile(r"step_(\d+)"), re.compile(r"(\d+)\.npz")  # of mesh-transformer-jax
STEPS = re.compile(r"(global_step|step_)\d+")
RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")


@dataclass(frozen=True)
class CheckpointLayout:
    """Where a checkpoint's weights lie. `tp` is the cut of its files; `numbers` the layers that have files (empty where names do not tell)."""

    format: Format
    folder: Path
    tag: str
    tp: int
    numbers: tuple[int, ...]

    def layer_file(self, number: int, part: int) -> Path:
        return self.folder / f"layer_{number:02d}-model_{part:02d}-model_states.pt"

    def rank_file(self, part: int) -> Path:
        return self.folder / f"mp_rank_{part:02d}_model_states.pt"

    def shard(self, part: int) -> Path:
        return self.folder / f"shard_{part}"

    def array_files(self, part: int) -> list[Path]:
        """Files of one shard, in the order of what they hold."""
        numbers = sorted(int(match[1]) for path in self.shard(part).glob("*.npz") if (match := ARRAYS.fullmatch(path.name)))
        return [self.shard(part) / f"{number}.npz" for number in numbers]

    def __str__(self) -> str:
        step = f" {self.tag}" if self.tag else ""
        return f"{self.folder if not self.tag else self.folder.parent}{step} ({self.format}, model-parallel-size {self.tp})"


def find_checkpoint(folder: Path, *, iteration: int | None = None) -> CheckpointLayout:
    """The checkpoint of `folder`: the step that `latest` names, or global_step{iteration}, or weights lying in the folder itself.

    Raises CheckpointError where there is none, or where a file of the cut is missing.
    """
    try:
        return _find(folder, iteration)
    except PermissionError as error:
        raise CheckpointError(f"{error.filename or folder} cannot be read: {error.strerror}; check the permissions of the checkpoint and its folders") from None


def _find(folder: Path, iteration: int | None) -> CheckpointLayout:
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint folder {folder}; set load to the folder that holds `latest`, or download the weights first")
    names = _names(folder)
    refuse_unfinished(folder)
    if iteration is None and "config.json" in names and not names.isdisjoint(HUGGINGFACE_FILES):
        index_of(folder)  # raises where one is missing
        return CheckpointLayout("huggingface", folder, "", 1, ())
    if iteration is None and any(LAYER_FILE.fullmatch(name) or RANK_FILE.fullmatch(name) for name in names):
        return _neox(folder, folder.name)
    if iteration is None and "config.json" in names and "latest" not in names:
        raise CheckpointError(f"{folder} has a config.json but none of {', '.join(HUGGINGFACE_FILES)}; is the download complete?")
    if (step := _mesh_transformer_step(folder, names, iteration)) is not None:
        return _mesh_transformer(step)
    if "latest" not in names:
        _refuse_adapters(folder, names)
    tag = f"global_step{iteration}" if iteration is not None else _latest(folder)
    if not (folder / tag).is_dir():
        asked = f"iteration {iteration} was asked for" if iteration is not None else f"{folder / 'latest'} names {tag}"
        raise CheckpointError(f"{asked}, but there is no folder {folder / tag}; {_steps(folder) or 'there is no global_step folder in it either'}")
    return _neox(folder / tag, tag)


def _names(folder: Path) -> set[str]:
    try:
        return {path.name for path in folder.iterdir()}
    except OSError as error:
        raise CheckpointError(f"the checkpoint folder {folder} cannot be read: {error.strerror}; check its permissions") from None


def _latest(folder: Path) -> str:
    try:
        tag = (folder / "latest").read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        if not (steps := _steps(folder)):
            raise CheckpointError(
                f"{folder} holds no checkpoint: no file `latest`, no folder global_stepN, no weights; name a folder that does, or download them first"
            ) from None
        raise CheckpointError(f"{folder} has no file `latest`, which names the step to load; {steps}, or say iteration=N; nothing was loaded") from None
    except PermissionError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / 'latest'} cannot be read ({error}); it should hold one word such as global_step150000") from None
    if not tag or "/" in tag or tag.startswith("."):
        raise CheckpointError(f"{folder / 'latest'} says {tag!r}; it should hold the name of a folder beside it, such as global_step150000")
    return tag


def _steps(folder: Path) -> str:
    steps = sorted((path.name for path in folder.iterdir() if STEPS.fullmatch(path.name) and path.is_dir()), key=lambda name: (len(name), name))
    return f"the steps there are: {', '.join(steps)}" if steps else ""


def _mesh_transformer_step(folder: Path, names: set[str], iteration: int | None) -> Path | None:
    """The folder of shards of mesh-transformer-jax: this one, or the step in it that is asked for, else the last."""
    if iteration is None and any(SHARD.fullmatch(name) for name in names):
        return folder
    steps = {int(match[1]): folder / name for name in names if (match := STEP.fullmatch(name))} if "latest" not in names else {}
    return steps.get(max(steps) if iteration is None else iteration) if steps else None


def _mesh_transformer(folder: Path) -> CheckpointLayout:
    found = sorted(int(match[1]) for name in _names(folder) if (match := SHARD.fullmatch(name)))
    if not found:
        raise CheckpointError(f"{folder} holds no folder shard_0; is the download complete, and is it the right folder?")
    layout = CheckpointLayout("mesh-transformer", folder, folder.name, found[-1] + 1, ())
    files = max(int(path.stem) for part in found for path in layout.array_files(part)) + 1 if any(layout.array_files(part) for part in found) else 1
    wanted = [layout.shard(part) / f"{number}.npz" for part in range(layout.tp) for number in range(files)]
    missing = [f"{path.parent.name}/{path.name}" for path in wanted if not path.is_file()]
    _refuse_missing(folder, missing, f"the others are {layout.tp} shards of {files} files")
    return layout


def _neox(folder: Path, tag: str) -> CheckpointLayout:
    parts: dict[int, set[int]] = defaultdict(set)
    names = _names(folder)
    for name in names:
        if match := LAYER_FILE.fullmatch(name):
            parts[int(match[1])].add(int(match[2]))
    if not parts:
        return _sequential(folder, tag, names)
    tp = 1 + max(part for found in parts.values() for part in found)
    layout = CheckpointLayout("neox", folder, tag, tp, tuple(sorted(parts)))
    missing = [layout.layer_file(number, part).name for number in layout.numbers for part in range(tp) if part not in parts[number]]
    _refuse_missing(folder, missing, f"the other files are cut for model-parallel-size {tp}")
    return layout


def _sequential(folder: Path, tag: str, names: set[str]) -> CheckpointLayout:
    ranks = sorted(int(match[1]) for name in names if (match := RANK_FILE.fullmatch(name)))
    if not ranks:
        _refuse_adapters(folder, names)
        raise CheckpointError(
            f"{folder} holds neither layer_*-model_*-model_states.pt nor mp_rank_*_model_states.pt files; is the download complete, and is it the right folder?"
        )
    layout = CheckpointLayout("sequential", folder, tag, ranks[-1] + 1, ())
    _refuse_missing(folder, [layout.rank_file(part).name for part in range(layout.tp) if part not in ranks], "files with higher numbers are there")
    return layout


def _refuse_adapters(folder: Path, names: set[str]) -> None:
    if "adapter_config.json" in names:
        raise CheckpointError(f"{folder} holds low-rank adapters, no model; name them with lora_load, and with load the checkpoint that they were trained on")


def _refuse_missing(folder: Path, missing: list[str], why: str) -> None:
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(f"{folder} lacks {', '.join(missing[:3])}{more} ({why}); fetch the missing files again")


def check_numbers(layout: CheckpointLayout, wanted: Iterable[int], *, layers: int) -> None:
    """Raises CheckpointError where layers of the model are missing, or the checkpoint has layers that the model lacks. Passes where numbers are not known."""
    found, wanted = set(layout.numbers), set(wanted)
    if not found or found == wanted:
        return
    depth, tied = _kind(found)
    if depth != layers:
        such = f", as in a model of {depth} layers" if depth > 0 else ""
        raise CheckpointError(
            f"num_layers is {layers}, but layer {max(found)} is the last one in {layout.folder}{such}; "
            "is it the right configuration, and the download complete?"
        )
    head = layers + 4
    if head in found - wanted:
        raise CheckpointError(f"{layout.folder} has an output matrix of its own (layer {head}), but the configuration ties it; set no_weight_tying: true")
    if tied and wanted - found == {head}:
        raise CheckpointError(f"{layout.folder} has no output matrix (layer {head}); fetch it, or set no_weight_tying: false if the model uses its embedding")
    missing = [layout.layer_file(number, 0).name if layout.format == "neox" else f"layer {number}" for number in sorted(wanted - found)]
    _refuse_missing(layout.folder, missing, f"num_layers is {layers}")


def _kind(numbers: Set[int]) -> tuple[int, bool]:
    """Depth of the model with these layer numbers, and whether its head is tied: n + 1 is the last block, n + 3 the norm, n + 4 a head of its own."""
    last = max(numbers)
    tied = last - 1 not in numbers and last - 2 in numbers
    return last - 3 if tied else last - 4, tied
