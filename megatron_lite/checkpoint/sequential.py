"""Saves of gpt-neox with pipe-parallel-size 0: the whole model in mp_rank_NN_model_states.pt, under `module`, as sequential.<layer>.<name>."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from megatron_lite.checkpoint.find import CheckpointLayout
from megatron_lite.checkpoint.neox import joined, spelled
from megatron_lite.checkpoint.pickled import open_pickled
from megatron_lite.checkpoint.source import Shards
from megatron_lite.errors import CheckpointError

NAME = re.compile(r"sequential\.(\d+)\.(.+)")


class RankFiles:
    """A checkpoint of one file per tensor-parallel rank. Files are mapped anew for every layer, so that what was read leaves memory."""

    def __init__(self, layout: CheckpointLayout) -> None:
        self.layout = layout
        self.tp = layout.tp

    def shards(self, number: int) -> Shards:
        return joined({self.layout.rank_file(part): _layer(self.layout.rank_file(part), number) for part in range(self.tp)})

    def place(self, number: int) -> Path:
        return self.layout.rank_file(0)

    def numbers(self) -> tuple[int, ...]:
        """The layers that have parameters in the files."""
        return tuple(sorted({number for number, names in _layers(self.layout.rank_file(0)).items() if spelled(names)}))


def _layer(path: Path, number: int) -> dict[str, Tensor]:
    return spelled(_layers(path).get(number, {}))


def _layers(path: Path) -> Mapping[int, dict[str, Tensor]]:
    """Layer number -> name -> tensor, as the file has them."""
    content = open_pickled(path)
    module = content.get("module") if isinstance(content, dict) else None
    if not isinstance(module, dict):
        raise CheckpointError(f"{path} holds no weights (its `module` is {type(module).__name__}); the layer_*-model_*.pt files of this save are missing")
    layers: dict[int, dict[str, Tensor]] = {}
    for key, tensor in module.items():
        if (match := NAME.fullmatch(str(key))) and isinstance(tensor, Tensor):
            layers.setdefault(int(match[1]), {})[match[2]] = tensor
    if not layers:
        has = ", ".join(map(str, list(module)[:3])) or "nothing"
        raise CheckpointError(f"{path} holds no tensor named sequential.N.*, as gpt-neox writes them (it has {has}); is it of another program?")
    return layers
