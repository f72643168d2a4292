"""The weights of Hugging Face folders: safetensors or .bin files, one or many with an index."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_lite.checkpoint.config_json import check_config
from megatron_lite.checkpoint.find import CheckpointLayout
from megatron_lite.checkpoint.index import index_of
from megatron_lite.checkpoint.pickled import open_pickled
from megatron_lite.checkpoint.source import Shards
from megatron_lite.checkpoint.unopened import unopened
from megatron_lite.errors import CheckpointError
from megatron_lite.models.architecture import Architecture
from megatron_lite.models.spec import ModelSpec

BUFFERS = re.compile(r"(attn|attention)\.(bias|masked_bias|embed_positions)$|\.(inv_freq|cos_cached|sin_cached)$")
"""How names end that versions of transformers saved, and that every reader derives."""
HEADS = {"lm_head.weight", "embed_out.weight"}


class HuggingFaceFolder:
    """A Hugging Face checkpoint, read layer by layer under our names."""

    tp = 1

    def __init__(self, layout: CheckpointLayout, architecture: Architecture, spec: ModelSpec) -> None:
        self.folder = layout.folder
        self.names = architecture.huggingface(spec)
        check_config(self.folder, spec)
        self.files = _index(self.folder)
        self._refuse_surplus(spec.tied_head)

    def _refuse_surplus(self, tied: bool) -> None:
        """A weight that is left out, such as the biases of some LLaMA-like models, would make another model of it."""
        known = {name for made in self.names.values() for name in made.names} | (HEADS if tied else set())
        surplus = sorted(name for name in self.files.keys() - known if not BUFFERS.search(name))
        if surplus:
            more = f" and {len(surplus) - 3} more" if len(surplus) > 3 else ""
            raise CheckpointError(
                f"{self.folder} holds {', '.join(surplus[:3])}{more}, which the model of its configuration does not have; is it of another architecture?"
            )

    def shards(self, number: int) -> Shards:
        found: dict[str, list[Tensor]] = {}
        opened: dict[Path, Mapping[str, Tensor]] = {}
        for (layer, name), made in self.names.items():
            if layer == number and (stored := made.among(self.files)):
                found[name] = [made.assemble([self._tensor(each, opened) for each in stored])]
        return found

    def _tensor(self, stored: str, opened: dict[Path, Mapping[str, Tensor]]) -> Tensor:
        path = self.files[stored]
        if path not in opened:
            opened[path] = _open(path)
        if stored not in opened[path]:
            raise CheckpointError(f"{path} lacks {stored}, which the index of {self.folder} promises; fetch both again")
        return opened[path][stored]

    def place(self, number: int) -> Path:
        return self.folder


def _open(path: Path) -> Mapping[str, Tensor]:
    """The tensors of one file, memory-mapped."""
    if path.suffix == ".safetensors":
        return _Safetensors(path)
    content = open_pickled(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; a file of weights holds tensors by name")
    return cast(dict[str, Tensor], content)


class _Safetensors(Mapping[str, Tensor]):
    """Tensors of one file, mapped when they are asked for."""

    def __init__(self, path: Path) -> None:
        try:
            self.file = safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise unopened(path, error) from None

    def __contains__(self, name: object) -> bool:
        return name in self.file.keys()  # noqa: SIM118 - the file itself is no container

    def __getitem__(self, name: str) -> Tensor:
        return self.file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.file.keys())

    def __len__(self) -> int:
        return len(self.file.keys())


def _index(folder: Path) -> dict[str, Path]:
    """Stored name -> file."""
    files = index_of(folder)
    return files if isinstance(files, dict) else dict.fromkeys(_open(files), files)
