"""NeoX's layer files: layer_NN-model_MM-model_states.pt, one per layer and tensor-parallel rank, whatever the pipeline was."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from torch import Tensor

from megatron_lite.checkpoint.find import CheckpointLayout
from megatron_lite.checkpoint.pickled import open_pickled
from megatron_lite.checkpoint.source import Shards
from megatron_lite.errors import CheckpointError

# Spellings since gpt-neox 2.0's MLP was renamed (2024-09) -> those of the 20B release
RENAMED = (("mlp.linear1.", "mlp.dense_h_to_4h."), ("mlp.linear2.", "mlp.dense_4h_to_h."))
# Buffers that are derived instead, and TransformerEngine's empty states
IGNORED = re.compile(r".*(rotary_emb\.inv_freq|_extra_state)$")


class LayerFiles:
    """A checkpoint of layer files, read layer by layer."""

    def __init__(self, layout: CheckpointLayout) -> None:
        self.layout = layout
        self.tp = layout.tp

    def shards(self, number: int) -> Shards:
        return joined({self.place(number, part): _tensors(self.place(number, part)) for part in range(self.tp)})

    def place(self, number: int, part: int = 0) -> Path:
        return self.layout.layer_file(number, part)


def _tensors(path: Path) -> dict[str, Tensor]:
    content = open_pickled(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; a layer file holds tensors by name")
    return spelled({name: value for name, value in content.items() if isinstance(value, Tensor)})


def spelled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names of the 20B release, whichever version of gpt-neox wrote them."""
    names: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for new, old in RENAMED:
            name = name.replace(new, old)
        if not IGNORED.fullmatch(name):
            names[name] = tensor
    return names


def joined(parts: Mapping[Path, dict[str, Tensor]]) -> Shards:
    """The parts' tensors by name, in rank order; raises CheckpointError where the parts differ in what they hold."""
    (first, names), *others = parts.items()
    for path, tensors in others:
        if different := sorted(names.keys() ^ tensors.keys()):
            raise CheckpointError(
                f"{first.name} and {path.name} in {first.parent} hold different tensors ({', '.join(different[:3])}); are they of one checkpoint?"
            )
    return {name: [cast(Tensor, tensors[name]) for tensors in parts.values()] for name in names}
