"""What the files of a checkpoint hold, tensor by tensor under the names they have there; for looking at checkpoints, not for loading them."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_lite.checkpoint.find import CheckpointLayout, Format
from megatron_lite.checkpoint.mesh_transformer import layer_count, leaves, read_array, shard_arrays
from megatron_lite.checkpoint.pickled import open_pickled
from megatron_lite.checkpoint.unopened import unopened
from megatron_lite.errors import CheckpointError

NUMBERED = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in a file, memory-mapped. `layer` is None where the name has no number; the number then is out of `name`."""

    file: Path
    layer: int | None
    part: int
    name: str
    tensor: Tensor


def stored_tensors(layout: CheckpointLayout) -> Iterator[Stored]:
    """Every tensor of the checkpoint, file by file. Raises CheckpointError at a missing, damaged or untrusted file."""
    if layout.format == "mesh-transformer":
        yield from _leaves(layout)
        return
    for file, layer, part in files_of(layout):
        for name, tensor in _open(file, layout.format).items():
            if layer is not None:
                yield Stored(file, layer, part, name, tensor)
            else:
                number = NUMBERED.search(name)
                yield Stored(file, int(number[1]) if number else None, part, NUMBERED.sub(".N.", name, count=1), tensor)


def files_of(layout: CheckpointLayout) -> list[tuple[Path, int | None, int]]:
    """File, layer (where one file is one layer) and part of the cut, of every file that holds weights."""
    if layout.format == "neox":
        return [(layout.layer_file(number, part), number, part) for number in layout.numbers for part in range(layout.tp)]
    if layout.format == "sequential":
        return [(layout.rank_file(part), None, part) for part in range(layout.tp)]
    if layout.format == "mesh-transformer":
        return [(path, None, part) for part in range(layout.tp) for path in layout.array_files(part)]
    names = sorted(layout.folder.glob("model*.safetensors")) or sorted(layout.folder.glob("pytorch_model*.bin"))
    return [(path, None, 0) for path in names]


def _leaves(layout: CheckpointLayout) -> Iterator[Stored]:
    """The arrays of every shard under the names that they had; without names where an optimizer's stand among them."""
    for part in range(layout.tp):
        arrays = list(shard_arrays(layout, part))
        layers = layer_count(len(arrays))
        names = [(leaf.layer, leaf.name if leaf.layer is not None else f"{leaf.module}.{leaf.name}") for leaf in leaves(layers)] if layers else []
        names += [(None, "step")] if layers else [(None, f"leaf {number}") for number in range(len(arrays))]
        for (layer, name), (file, member) in zip(names, arrays, strict=True):
            yield Stored(file, layer, part, name, read_array(file, member))


def _open(path: Path, kind: Format) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    content = open_pickled(path)
    if kind == "sequential" and isinstance(content, dict):
        content = content.get("module")
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no tensors by name but a {type(content).__name__}; fetch it again, or look at another step")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _open_safetensors(path: Path) -> Mapping[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise unopened(path, error) from None
