"""Keys and values of the tokens a batch has seen, and the positions of the tokens it sees now."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.models.spec import ModelSpec

# b rows, s tokens in this call, h key/value heads on this rank, c slots, d head size

BLOCK = 64


class Past(Protocol):
    """What a block's attention knows of the tokens' places: their positions [b s], and what each of them sees. Generation and scoring have their own."""

    @property
    def positions(self) -> Tensor: ...

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Rotated queries, keys and values [b h s d] -> the values that each query sees, weighed by its attention [b h s d]."""
        ...


def causal_mix(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """b h s d -> b h s d, where a row is all there is and no mask is needed: one would turn off the flash kernel."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1])


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
        blocks = [number for number in numbers if spec.is_block(number)]
        shape = (rows, heads, slots, spec.head_dim)
        keys, values = ({number: torch.zeros(shape, dtype=dtype, device=device) for number in blocks} for _ in range(2))
        return cls(keys, values, torch.zeros(rows, dtype=torch.long, device=device))

    def layer(self, number: int, tokens: int) -> "CachedPast":
        """The part of the cache that the block `number` reads and writes when the rows see `tokens` more tokens each."""
        positions = self.lengths.unsqueeze(1) + torch.arange(tokens, device=self.lengths.device)
        stop = -(-(self.longest + tokens) // BLOCK) * BLOCK  # kernels like lengths that repeat; slots of the future are masked anyway
        return CachedPast(self.keys[number][:, :, :stop], self.values[number][:, :, :stop], positions, is_fresh=self.longest == 0)

    def advance(self, counts: Tensor, most: int) -> None:
        """Notes that every row has seen `counts` more tokens, `most` of them at most (padding beyond a row's count is forgotten)."""
        self.lengths = self.lengths + counts
        self.longest += most


@dataclass(frozen=True)
class CachedPast:
    """One block's keys and values [b h c d] and the positions [b s] of the tokens that come now."""

    keys: Tensor
    values: Tensor
    positions: Tensor
    is_fresh: bool

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Adds the new keys and values to the cache; each query sees its row up to itself."""
        self._write(key, value)
        if self.is_fresh:
            return causal_mix(query, key, value)
        return F.scaled_dot_product_attention(query, self.keys, self.values, attn_mask=self._mask(), enable_gqa=query.shape[1] != key.shape[1])

    def _write(self, key: Tensor, value: Tensor) -> None:
        index = self.positions[:, None, :, None].expand_as(key)
        self.keys.scatter_(2, index, key)
        self.values.scatter_(2, index, value)

    def _mask(self) -> Tensor:
        """[b 1 s c]: true where the key's position is not after the query's."""
        slots = torch.arange(self.keys.shape[2], device=self.positions.device)
        return (slots <= self.positions.unsqueeze(-1)).unsqueeze(1)
