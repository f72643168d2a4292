"""How our parameters are made of the tensors of other formats."""

from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, init=False)
class Same:
    """The very tensor, under the first of these names that is there."""

    names: tuple[str, ...]

    def __init__(self, *names: str) -> None:
        object.__setattr__(self, "names", names)

    def among(self, stored: Container[str]) -> list[str] | None:
        """The names to read, or None where they are not stored."""
        return next(([name] for name in self.names if name in stored), None)

    def assemble(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0]

    def take_apart(self, tensor: Tensor) -> dict[str, Tensor]:
        """The stored tensors that `assemble` makes this one of."""
        return {self.names[0]: tensor}


@dataclass(frozen=True)
class Stacked:
    """These tensors one above the other; `parts` are the relative numbers of their rows."""

    names: tuple[str, ...]
    parts: tuple[int, ...]

    def among(self, stored: Container[str]) -> list[str] | None:
        return list(self.names) if all(name in stored for name in self.names) else None

    def assemble(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(tensors))

    def take_apart(self, tensor: Tensor) -> dict[str, Tensor]:
        rows = len(tensor) // sum(self.parts)
        return dict(zip(self.names, tensor.split([part * rows for part in self.parts]), strict=True))


@dataclass(frozen=True)
class ByHead:
    """Head by head, that head's rows of each of these tensors: NeoX's [head][q|k|v][head_dim]."""

    names: tuple[str, ...]
    heads: int

    def among(self, stored: Container[str]) -> list[str] | None:
        return list(self.names) if all(name in stored for name in self.names) else None

    def assemble(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack([tensor.unflatten(0, (self.heads, -1)) for tensor in tensors], 1).flatten(0, 2)

    def take_apart(self, tensor: Tensor) -> dict[str, Tensor]:
        by_part = tensor.unflatten(0, (self.heads, len(self.names), -1)).unbind(1)
        return {name: part.flatten(0, 1) for name, part in zip(self.names, by_part, strict=True)}


WeightMap = dict[tuple[int, str], Same | Stacked | ByHead]
