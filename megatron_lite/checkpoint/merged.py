"""Which low-rank adapters a checkpoint's weights hold already: a small file beside them, which other programs pass over."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_lite.checkpoint.config_json import read_json
from megatron_lite.checkpoint.source import Source
from megatron_lite.errors import CheckpointError

RECORD = "merged-adapters.json"


@dataclass(frozen=True)
class Merged:
    """Adapters that went into the weights: their fingerprint, and where they lay then."""

    fingerprint: str
    folder: str


def merged_in(source: Source) -> tuple[Merged, ...]:
    """The adapters that these weights hold, in the order in which they were merged."""
    place = source.place(0)
    return merged_beside(place if place.is_dir() else place.parent)


def merged_beside(folder: Path) -> tuple[Merged, ...]:
    """The same, of the folder that the files of weights lie in."""
    path = folder / RECORD
    if not path.exists():
        return ()
    found = read_json(path).get("adapters")
    try:
        return tuple(Merged(**each) for each in found)  # pyright: ignore[reportGeneralTypeIssues, reportOptionalIterable]
    except TypeError:
        raise CheckpointError(f"{path} is not what tools/convert.py --lora wrote; fetch it again, or convert again") from None


def write_merged(folder: Path, merged: Sequence[Merged]) -> list[Path]:
    """Writes the record where there is something to say, and returns what it wrote."""
    if not merged:
        return []
    (folder / RECORD).write_text(json.dumps({"adapters": [asdict(each) for each in merged]}, indent=2) + "\n", encoding="utf-8")
    return [folder / RECORD]


def refuse_again(fingerprint: str, folder: Path, source: Source) -> None:
    """Raises CheckpointError where the weights hold these adapters."""
    known = next((each for each in merged_in(source) if each.fingerprint == fingerprint), None)
    if known is not None:
        raise CheckpointError(
            f"the weights of {source.place(0)} hold the adapters in {folder} already (merged from {known.folder}) and would get them twice; leave lora_load "
            "(or --lora) out, or load the checkpoint that the adapters were trained on"
        )
