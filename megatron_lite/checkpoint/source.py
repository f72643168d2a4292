"""What every checkpoint format offers the loader: the stored parts of each layer's tensors, under our names."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

Shards = Mapping[str, Sequence[Tensor]]
"""Parameter name -> what each rank of the stored cut held, memory-mapped."""


class Source(Protocol):
    tp: int

    def shards(self, number: int) -> Shards:
        """The stored parts of the layer's tensors. Dropping the result unmaps the files."""
        ...

    def place(self, number: int) -> Path:
        """The file or folder to name when something is wrong with the layer."""
        ...
