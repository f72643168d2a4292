#!/usr/bin/env python3
"""Says what a checkpoint folder holds (format, step, cut, tensors, sizes), and how two folders differ."""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # last, because a top-level evaluate.py must not shadow the `evaluate` package

from megatron_lite.checkpoint.contents import Stored, files_of, stored_tensors
from megatron_lite.checkpoint.find import CheckpointLayout, find_checkpoint
from megatron_lite.checkpoint.merged import merged_beside
from megatron_lite.errors import UserError
from megatron_lite.progress import say

Row = tuple[str, ...]


@dataclass
class Values:
    """What the numbers of some tensors look like."""

    least: float = float("inf")
    greatest: float = float("-inf")
    nans: int = 0
    infinities: int = 0

    def see(self, tensor: Tensor) -> None:
        if not tensor.is_floating_point() or not tensor.numel():
            return
        numbers = tensor.float()
        self.nans += int(numbers.isnan().sum())
        self.infinities += int(numbers.isinf().sum())
        finite = numbers[numbers.isfinite()]
        if finite.numel():
            self.least = min(self.least, float(finite.min()))
            self.greatest = max(self.greatest, float(finite.max()))

    def cells(self) -> Row:
        extremes = (f"{self.least:.4g}", f"{self.greatest:.4g}") if self.least <= self.greatest else ("-", "-")
        return *extremes, str(self.nans), str(self.infinities)


def describe(layout: CheckpointLayout, *, values: bool) -> Iterator[str]:
    """The checkpoint as lines: what it is, then a table of its tensors, equal layers in one row."""
    files = [file for file, _, _ in files_of(layout)]
    yield str(layout)
    yield f"{len(files)} files of weights, {sum(file.stat().st_size for file in files):,} bytes on disk"
    if layout.format == "neox" and (states := sum(1 for _ in layout.folder.glob("mp_rank_*_model_states.pt"))):
        yield f"{states} files mp_rank_* beside them, not opened: they hold no weights"
    if merged := merged_beside(layout.folder):
        yield f"low-rank adapters are merged into them: those of {', '.join(each.folder for each in merged)}"
    layers: dict[Row, list[int | None]] = {}
    seen: dict[Row, Values] = {}
    total = parameters = 0
    for stored in stored_tensors(layout):
        kind = (stored.name, shape(stored.tensor), str(stored.tensor.dtype).removeprefix("torch."))
        layers.setdefault(kind, []).append(stored.layer)
        total += stored.tensor.nbytes
        parameters += stored.tensor.numel()
        if values:
            seen.setdefault(kind, Values()).see(stored.tensor)
    header = ("layers", "tensor", "shape", "dtype", "count", *(("least", "greatest", "NaN", "Inf") if values else ()))
    yield ""
    yield from table([header, *((ranges(found), *kind, str(len(found)), *(seen[kind].cells() if values else ())) for kind, found in layers.items())])
    yield ""
    yield f"{sum(map(len, layers.values())):,} tensors, {parameters:,} numbers, {total:,} bytes"


def differences(first: CheckpointLayout, second: CheckpointLayout) -> Iterator[str]:
    """A line for every tensor that is not bit for bit the same in both; nothing where all are."""
    if first.tp != second.tp:
        yield f"the first is cut for model-parallel-size {first.tp}, the second for {second.tp}: shapes and parts differ for that reason alone"
    theirs = {key(stored): stored for stored in stored_tensors(second)}
    for mine in stored_tensors(first):
        other = theirs.pop(key(mine), None)
        if other is None:
            yield f"{title(mine)}: only in the first"
        elif difference := how_they_differ(mine.tensor, other.tensor):
            yield f"{title(mine)}: {difference}"
    for other in theirs.values():
        yield f"{title(other)}: only in the second"


def how_they_differ(mine: Tensor, other: Tensor) -> str:
    """Empty where two tensors are the same bits."""
    if mine.shape != other.shape or mine.dtype != other.dtype:
        return f"{shape(mine)} {mine.dtype} and {shape(other)} {other.dtype}".replace("torch.", "")
    if torch.equal(mine.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)):
        return ""
    distance = (mine.double() - other.double()).abs()
    return f"{int((distance != 0).sum()):,} of {mine.numel():,} numbers differ, by at most {float(distance.max()):.4g}"


def key(stored: Stored) -> tuple[int | None, str, int]:
    return stored.layer, stored.name, stored.part


def title(stored: Stored) -> str:
    return f"layer {stored.layer} part {stored.part} {stored.name}" if stored.layer is not None else f"part {stored.part} {stored.name}"


def shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "scalar"


def ranges(numbers: Iterable[int | None]) -> str:
    """0, 2, 3, 4, 9 as `0 2-4 9`."""
    parts: list[list[int]] = []
    for number in sorted({number for number in numbers if number is not None}):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return " ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts) or "-"


def table(rows: Sequence[Row]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a folder with `latest`, a global_step folder, or a Hugging Face folder")
    parser.add_argument("other", type=Path, nargs="?", help="compare with this one, bit for bit; exit code 1 if they differ")
    parser.add_argument("--iteration", type=int, help="the step to look at; left out: the one that `latest` names")
    parser.add_argument("--values", action="store_true", help="read all numbers: least, greatest, NaN and Inf")
    arguments = parser.parse_args(words)
    try:
        layout = find_checkpoint(arguments.folder, iteration=arguments.iteration)
        if arguments.other is None:
            say("\n".join(describe(layout, values=arguments.values)))
            return 0
        found = list(differences(layout, find_checkpoint(arguments.other, iteration=arguments.iteration)))
        say("\n".join(found or ["the same tensors, bit for bit"]))
        return 1 if found else 0
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
