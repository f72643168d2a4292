"""Keys and values of the tokens a batch has seen, and the positions of the tokens it sees now."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.models.spec import ModelSpec

# b rows, s tokens in this call, h key/value heads on this rank, c slots, d head size

BLOCK = 64


@dataclass
class Cache:
    """One slot per row and position. Rows may be ragged: a slot is written before it is read, and no token looks past its own position, so what padding
    left behind is never attended to."""

    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    lengths: Tensor
    longest: int = 0

    @classmethod
    def empty(cls, numbers: Iterable[int], spec: ModelSpec, *, rows: int, slots: int, heads: int, dtype: torch.dtype, device: torch.device) -> "Cache":
        """Room for `rows` rows of `slots` tokens in each of the blocks `numbers`, for the `heads` key/value heads of this rank."""
        blocks = [number for number in numbers if 2 <= number < spec.norm_number]
        shape = (rows, heads, slots, spec.head_dim)
        keys, values = ({number: torch.zeros(shape, dtype=dtype, device=device) for number in blocks} for _ in range(2))
        return cls(keys, values, torch.zeros(rows, dtype=torch.long, device=device))

    def layer(self, number: int, tokens: int) -> "Past":
        """The part of the cache that the block `number` reads and writes when the rows see `tokens` more tokens each."""
        positions = self.lengths.unsqueeze(1) + torch.arange(tokens, device=self.lengths.device)
        stop = -(-(self.longest + tokens) // BLOCK) * BLOCK  # kernels like lengths that repeat; slots of the future are masked anyway
        return Past(self.keys[number][:, :, :stop], self.values[number][:, :, :stop], positions, is_fresh=self.longest == 0)

    def advance(self, counts: Tensor, most: int) -> None:
        """Notes that every row has seen `counts` more tokens, `most` of them at most (padding beyond a row's count is forgotten)."""
        self.lengths = self.lengths + counts
        self.longest += most


@dataclass(frozen=True)
class Past:
    """One block's keys and values [b h c d] and the positions [b s] of the tokens that come now."""

    keys: Tensor
    values: Tensor
    positions: Tensor
    is_fresh: bool

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the new tokens' keys and values [b h s d] at their positions; returns all there are."""
        index = self.positions[:, None, :, None].expand_as(keys)
        self.keys.scatter_(2, index, keys)
        self.values.scatter_(2, index, values)
        return self.keys, self.values

    def mask(self) -> Tensor:
        """[b 1 s c]: true where the key's position is not after the query's."""
        slots = torch.arange(self.keys.shape[2], device=self.positions.device)
        return (slots <= self.positions.unsqueeze(-1)).unsqueeze(1)
