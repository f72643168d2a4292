"""Saves of gpt-neox with pipe-parallel-size 0: the whole model in mp_rank_NN_model_states.pt, under `module`, as sequential.<layer>.<name>."""

from pathlib import Path

from torch import Tensor

from megatron_lite.checkpoint.find import CheckpointLayout
from megatron_lite.checkpoint.neox import joined, spelled
from megatron_lite.checkpoint.pickled import open_pickled
from megatron_lite.checkpoint.source import Shards
from megatron_lite.errors import CheckpointError


class RankFiles:
    """A checkpoint of one file per tensor-parallel rank. Files are mapped anew for every layer, so that what was read leaves memory."""

    def __init__(self, layout: CheckpointLayout) -> None:
        self.layout = layout
        self.tp = layout.tp

    def shards(self, number: int) -> Shards:
        return joined({self.layout.rank_file(part): _layer(self.layout.rank_file(part), number) for part in range(self.tp)})

    def place(self, number: int) -> Path:
        return self.layout.rank_file(0)


def _layer(path: Path, number: int) -> dict[str, Tensor]:
    content = open_pickled(path)
    module = content.get("module") if isinstance(content, dict) else None
    if not isinstance(module, dict):
        raise CheckpointError(f"{path} holds no weights (its `module` is {type(module).__name__}); the layer_*-model_*.pt files of this save are missing")
    prefix = f"sequential.{number}."
    return spelled({name.removeprefix(prefix): tensor for name, tensor in module.items() if name.startswith(prefix) and isinstance(tensor, Tensor)})
