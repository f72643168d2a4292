"""Looks at a folder and says which checkpoint lies there: format, step, cut and layer files. Reads names only, no weights."""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_lite.errors import CheckpointError

Format = Literal["neox", "sequential", "huggingface"]

LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
HUGGINGFACE_FILES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")


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

    def __str__(self) -> str:
        step = f" {self.tag}" if self.tag else ""
        return f"{self.folder if not self.tag else self.folder.parent}{step} ({self.format}, model-parallel-size {self.tp})"


def find_checkpoint(folder: Path, *, iteration: int | None = None) -> CheckpointLayout:
    """The checkpoint of `folder`: the step that `latest` names, or global_step{iteration}, or weights lying in the folder itself.

    Raises CheckpointError where there is none, or where a file of the cut is missing.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint folder {folder}; set load to the folder that holds `latest`, or download the weights first")
    if (folder / "config.json").exists() and iteration is None:
        return _huggingface(folder)
    if iteration is None and _has_weights(folder):
        return _neox(folder, folder.name)
    tag = f"global_step{iteration}" if iteration is not None else _latest(folder)
    if not (folder / tag).is_dir():
        asked = f"iteration {iteration} was asked for" if iteration is not None else f"{folder / 'latest'} names {tag}"
        raise CheckpointError(f"{asked}, but there is no folder {folder / tag}; {_steps(folder)}")
    return _neox(folder / tag, tag)


def _has_weights(folder: Path) -> bool:
    return any(LAYER_FILE.fullmatch(path.name) or RANK_FILE.fullmatch(path.name) for path in folder.iterdir())


def _latest(folder: Path) -> str:
    try:
        tag = (folder / "latest").read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no file `latest`, which names the step to load; {_steps(folder)}, or say iteration=N; nothing was loaded"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / 'latest'} cannot be read ({error}); it should hold one word such as global_step150000") from None
    if not tag or "/" in tag or tag.startswith("."):
        raise CheckpointError(f"{folder / 'latest'} says {tag!r}; it should hold the name of a folder beside it, such as global_step150000")
    return tag


def _steps(folder: Path) -> str:
    steps = sorted((path.name for path in folder.glob("global_step*") if path.is_dir()), key=lambda name: (len(name), name))
    return f"the steps there are: {', '.join(steps)}" if steps else "there is no global_step folder in it either"


def _neox(folder: Path, tag: str) -> CheckpointLayout:
    parts: dict[int, set[int]] = defaultdict(set)
    for path in folder.iterdir():
        if match := LAYER_FILE.fullmatch(path.name):
            parts[int(match[1])].add(int(match[2]))
    if not parts:
        return _sequential(folder, tag)
    tp = 1 + max(part for found in parts.values() for part in found)
    layout = CheckpointLayout("neox", folder, tag, tp, tuple(sorted(parts)))
    missing = [layout.layer_file(number, part).name for number in layout.numbers for part in range(tp) if part not in parts[number]]
    _refuse_missing(folder, missing, f"the other files are cut for model-parallel-size {tp}")
    return layout


def _sequential(folder: Path, tag: str) -> CheckpointLayout:
    ranks = sorted(int(match[1]) for path in folder.iterdir() if (match := RANK_FILE.fullmatch(path.name)))
    if not ranks:
        raise CheckpointError(
            f"{folder} holds neither layer_*-model_*-model_states.pt nor mp_rank_*_model_states.pt files; is the download complete, and is it the right folder?"
        )
    layout = CheckpointLayout("sequential", folder, tag, ranks[-1] + 1, ())
    _refuse_missing(folder, [layout.rank_file(part).name for part in range(layout.tp) if part not in ranks], "files with higher numbers are there")
    return layout


def _huggingface(folder: Path) -> CheckpointLayout:
    if not any((folder / name).exists() for name in HUGGINGFACE_FILES):
        raise CheckpointError(f"{folder} has a config.json but none of {', '.join(HUGGINGFACE_FILES)}; is the download complete?")
    return CheckpointLayout("huggingface", folder, "", 1, ())


def _refuse_missing(folder: Path, missing: list[str], why: str) -> None:
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(f"{folder} lacks {', '.join(missing[:3])}{more} ({why}); fetch the missing files again")


def check_numbers(layout: CheckpointLayout, wanted: Iterable[int], *, layers: int) -> None:
    """Raises CheckpointError where layer files are missing, or belong to a model of another depth."""
    if layout.format != "neox":
        return
    missing = sorted(set(wanted) - set(layout.numbers))
    blocks = [number for number in layout.numbers if 2 <= number]
    surplus = [number for number in layout.numbers if number > layers + 4]
    # the last two numbers are the norm and the head; a gap of one number lies before them
    depth = blocks[-1] - 4 if len(blocks) > 2 and blocks[-1] - blocks[-2] == 1 else len(blocks)
    if surplus or (missing and layers + 3 in missing and layers + 4 in missing):
        raise CheckpointError(f"num_layers is {layers}, but the files in {layout.folder} are of a model of {depth} layers; is it the right configuration?")
    _refuse_missing(layout.folder, [layout.layer_file(number, 0).name for number in missing], f"num_layers is {layers}")
