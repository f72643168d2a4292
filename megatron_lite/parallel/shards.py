"""How a parameter is cut over tensor-parallel ranks: six rules, and `take`, which serves any cut from files of any other cut.

Shards are what the ranks of one cut hold, in rank order. They may be memory-mapped: only the slices that are needed are touched.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm
from typing import Protocol

import torch
from torch import Tensor


class Rule(Protocol):
    def split(self, full: Tensor, size: int) -> list[Tensor]:
        """What each of `size` ranks holds of the whole parameter."""
        ...

    def merge(self, shards: Sequence[Tensor]) -> Tensor:
        """The whole parameter from what the ranks hold."""
        ...

    def take(self, shards: Sequence[Tensor], index: int, size: int) -> Tensor:
        """What rank `index` of `size` holds, from the shards of another cut."""
        ...

    def whole(self, shard: Sequence[int], count: int) -> tuple[int, ...]:
        """The shape of the whole parameter, given the shape of one of `count` equal shards."""
        ...


def take(rule: Rule, shards: Sequence[Tensor], index: int, size: int) -> Tensor:
    """What rank `index` of `size` holds of a parameter stored as `shards`: bit for bit the file where the cut is the same."""
    return shards[index] if len(shards) == size else rule.take(shards, index, size)


@dataclass(frozen=True)
class Split:
    """Ranks hold consecutive equal slices along `dim`. `padded`: rows of a vocabulary, filled up with zeros until they divide."""

    dim: int
    padded: bool = False

    def split(self, full: Tensor, size: int) -> list[Tensor]:
        return [self.take([full], index, size) for index in range(size)]

    def merge(self, shards: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(shards), self.dim)

    def whole(self, shard: Sequence[int], count: int) -> tuple[int, ...]:
        return tuple(n * count if dim == self.dim else n for dim, n in enumerate(shard))

    def take(self, shards: Sequence[Tensor], index: int, size: int) -> Tensor:
        pieces = self.pieces(shards, index, size)
        missing = self._length(shards, size) - sum(piece.shape[self.dim] for piece in pieces)
        if missing:
            pieces.append(shards[0].new_zeros([missing if dim == self.dim else n for dim, n in enumerate(shards[0].shape)]))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.dim)

    def pieces(self, shards: Sequence[Tensor], index: int, size: int) -> list[Tensor]:
        """The parts of shards that make up what rank `index` of `size` holds, in order along `dim`; padding is not among them."""
        length = self._length(shards, size)
        return _between(shards, self.dim, index * length, (index + 1) * length)

    def _length(self, shards: Sequence[Tensor], size: int) -> int:
        total = sum(shard.shape[self.dim] for shard in shards)
        assert self.padded or total % size == 0, f"{total} along dim {self.dim} cannot be cut in {size}"
        return -(-total // size)


@dataclass(frozen=True)
class SplitParts:
    """Several matrices stacked along `dim`, each cut by itself: rank i holds [part_0 slice i | part_1 slice i | ...].

    `parts` are the relative sizes of the stacked matrices, such as (1, 1) for [up | gate].
    """

    dim: int
    parts: tuple[int, ...]

    def split(self, full: Tensor, size: int) -> list[Tensor]:
        return [self.take([full], index, size) for index in range(size)]

    def merge(self, shards: Sequence[Tensor]) -> Tensor:
        return self.take(shards, 0, 1)

    def whole(self, shard: Sequence[int], count: int) -> tuple[int, ...]:
        return tuple(n * count if dim == self.dim else n for dim, n in enumerate(shard))

    def take(self, shards: Sequence[Tensor], index: int, size: int) -> Tensor:
        by_part = zip(*(shard.split(self._sizes(shard), self.dim) for shard in shards), strict=True)
        return torch.cat([Split(self.dim).take(part, index, size) for part in by_part], self.dim)

    def _sizes(self, shard: Tensor) -> list[int]:
        length, whole = shard.shape[self.dim], sum(self.parts)
        assert length % whole == 0, f"{length} along dim {self.dim} is not made of parts {self.parts}"
        return [length // whole * part for part in self.parts]


@dataclass(frozen=True)
class SplitGroups:
    """Rows of grouped-query attention, [q heads | k heads | v heads]: each kind is cut by itself, by whole heads. With more ranks than key/value heads,
    neighbouring ranks hold the same one."""

    heads: int
    kv_heads: int

    def split(self, full: Tensor, size: int) -> list[Tensor]:
        return [self.take([full], index, size) for index in range(size)]

    def merge(self, shards: Sequence[Tensor]) -> Tensor:
        return self.take(shards, 0, 1)

    def whole(self, shard: Sequence[int], count: int) -> tuple[int, ...]:
        return (shard[0] // sum(self._counts(count)) * (self.heads + 2 * self.kv_heads), *shard[1:])

    def take(self, shards: Sequence[Tensor], index: int, size: int) -> Tensor:
        counts = self._counts(len(shards))
        rows = len(shards[0]) // sum(counts)
        query, *others = zip(*(shard.split([count * rows for count in counts]) for shard in shards), strict=True)
        once = max(1, len(shards) // self.kv_heads)
        first, held = index * self.kv_heads // size, self._counts(size)[1]
        mine = [torch.cat(kind[::once])[first * rows : (first + held) * rows] for kind in others]
        return torch.cat([Split(0).take(query, index, size), *mine])

    def _counts(self, size: int) -> tuple[int, int, int]:
        """Heads of queries, keys and values on each of `size` ranks."""
        held = max(1, self.kv_heads // size)
        return self.heads // size, held, held


@dataclass(frozen=True)
class Replicate:
    """Every rank holds the same. Copies that drifted apart stay local where ranks are split further, and are averaged in fp32 where ranks are merged."""

    def split(self, full: Tensor, size: int) -> list[Tensor]:
        return [full] * size

    def merge(self, shards: Sequence[Tensor]) -> Tensor:
        return self.take(shards, 0, 1)

    def whole(self, shard: Sequence[int], count: int) -> tuple[int, ...]:
        return tuple(shard)

    def take(self, shards: Sequence[Tensor], index: int, size: int) -> Tensor:
        merged = [shards[rank] for rank in _ranks_within(len(shards), index, size)]
        if all(torch.equal(merged[0], shard) for shard in merged[1:]):
            return merged[0]
        return torch.stack([shard.float() for shard in merged]).mean(0).to(merged[0].dtype)


def drifted(rule: Rule, stored: Sequence[Tensor], size: int) -> bool:
    """Whether copies that all ranks should hold are not the same, and `size` ranks are no finer cut of those that stored them."""
    return isinstance(rule, Replicate) and size % len(stored) != 0 and not all(torch.equal(stored[0], other) for other in stored[1:])


@dataclass(frozen=True)
class RankLocal(Replicate):
    """Copies that may have drifted apart in training, as 20B's norms did, each belonging to the columns of its rank. Merging ranks keeps the different
    copies [copies, ...], each for an equal share of the new rank's columns, so that no cut changes the model; `merge`, for formats that know only one,
    averages."""

    def merge(self, shards: Sequence[Tensor]) -> Tensor:
        return Replicate().take(shards, 0, 1)

    def take(self, shards: Sequence[Tensor], index: int, size: int) -> Tensor:
        merged = [shards[rank] for rank in _ranks_within(len(shards), index, size)]
        return merged[0] if all(torch.equal(merged[0], shard) for shard in merged[1:]) else torch.stack(merged)


@dataclass(frozen=True)
class Partial:
    """Ranks hold terms of a sum. Splitting further leaves each term with the first rank of its group and zeros with the others, which is exact, unlike
    dividing; merging adds in fp32."""

    def split(self, full: Tensor, size: int) -> list[Tensor]:
        return [self.take([full], index, size) for index in range(size)]

    def merge(self, shards: Sequence[Tensor]) -> Tensor:
        return self.take(shards, 0, 1)

    def whole(self, shard: Sequence[int], count: int) -> tuple[int, ...]:
        return tuple(shard)

    def take(self, shards: Sequence[Tensor], index: int, size: int) -> Tensor:
        stored = len(shards)
        if size % stored == 0:
            return shards[index * stored // size] if index % (size // stored) == 0 else torch.zeros_like(shards[0])
        if stored % size and index:
            return torch.zeros_like(shards[0])
        terms = shards[index * stored // size : (index + 1) * stored // size] if stored % size == 0 else shards
        return torch.stack([term.float() for term in terms]).sum(0).to(shards[0].dtype)


def _ranks_within(stored: int, index: int, size: int) -> list[int]:
    """Which of `stored` ranks the rank `index` of `size` takes the place of, for each of the equal shares of its columns that have one such rank."""
    shares = lcm(stored, size) // size
    return [(index * shares + share) * stored // (size * shares) for share in range(shares)]


def _between(shards: Sequence[Tensor], dim: int, start: int, stop: int) -> list[Tensor]:
    """Elements [start, stop) along `dim` of the shards laid end to end, without touching the others."""
    pieces: list[Tensor] = []
    offset = 0
    for shard in shards:
        length = shard.shape[dim]
        first, last = max(start - offset, 0), min(stop - offset, length)
        if first < last:
            pieces.append(shard.narrow(dim, first, last - first))
        offset += length
    return pieces
