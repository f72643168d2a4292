"""A cache in pages: rows of any length share one block of memory, and a row holds no more pages than it needs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.models.cache import Past
from megatron_lite.models.spec import BYTES, ModelSpec

# b rows, s tokens in this call, h query heads and g key/value heads on this rank, p tokens in a page, d head size

PAGE = 64
"""Tokens in a page."""


def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE)


def page_bytes(spec: ModelSpec, *, blocks: int, tp: int) -> int:
    """What a page takes in all of a stage's blocks."""
    return blocks * 2 * spec.kv_heads_of(tp) * PAGE * spec.head_dim * BYTES[spec.dtype]


class FreePages:
    """Which pages nobody holds. Page 0 is never given out: slots without a row write there, and the filler of captured readings."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, 0, -1))

    def __len__(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        assert count <= len(self._free), f"{count} pages wanted, {len(self._free)} are free"
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        return taken[::-1]

    def give_back(self, pages: Iterable[int]) -> None:
        self._free.extend(pages)


@dataclass(frozen=True)
class PagedCache:
    """Keys and values [pages g p d] of every block on this stage."""

    keys: dict[int, Tensor]
    values: dict[int, Tensor]

    @classmethod
    def empty(cls, numbers: Iterable[int], spec: ModelSpec, *, pages: int, tp: int, dtype: torch.dtype, device: torch.device) -> "PagedCache":
        blocks = [number for number in numbers if spec.is_block(number)]
        shape = (pages, spec.kv_heads_of(tp), PAGE, spec.head_dim)
        keys, values = ({number: torch.zeros(shape, dtype=dtype, device=device) for number in blocks} for _ in range(2))
        return cls(keys, values)

    def step(self, number: int, table: Tensor, lengths: Tensor) -> "PagedPast":
        """What a block sees when each row has one new token."""
        return PagedPast(self.keys[number], self.values[number], table, lengths)

    def fill(self, number: int, inner: Past, pages: Tensor, places: Tensor) -> "FilledPast":
        """What a block sees of whole prompts, token i of which goes to places[i] of pages[i]."""
        return FilledPast(self.keys[number], self.values[number], inner, pages, places)


@dataclass(frozen=True)
class PagedPast:
    """One new token a row, at position lengths[b]; table [b pages] says where a row's pages are."""

    keys: Tensor
    values: Tensor
    table: Tensor
    lengths: Tensor

    @property
    def positions(self) -> Tensor:
        return self.lengths.unsqueeze(1).long()

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[b h 1 d] -> [b h 1 d]; the new keys and values [b g 1 d] are added to the cache."""
        page = self.table.gather(1, self.positions // PAGE).squeeze(1).long()
        place = self.lengths.long() % PAGE
        self.keys[page, :, place] = key.squeeze(2)
        self.values[page, :, place] = value.squeeze(2)
        keys, values = (pages[self.table.long()].transpose(1, 2).flatten(2, 3) for pages in (self.keys, self.values))  # b g (pages p) d
        seen = torch.arange(keys.shape[2], device=keys.device) <= self.positions
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=seen[:, None, None], enable_gqa=query.shape[1] != key.shape[1])


@dataclass(frozen=True)
class FilledPast:
    """Prompts packed in one row, whose keys and values are kept."""

    keys: Tensor
    values: Tensor
    inner: Past
    pages: Tensor
    places: Tensor

    @property
    def positions(self) -> Tensor:
        return self.inner.positions

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.keys[self.pages, :, self.places] = key[0].transpose(0, 1)
        self.values[self.pages, :, self.places] = value[0].transpose(0, 1)
        return self.inner.mix(query, key, value)


def places_of(prompts: Sequence[tuple[int, Sequence[int]]]) -> tuple[np.ndarray, np.ndarray]:
    """For every token of prompts packed in a row, given as (tokens, pages): its page, and its place there."""
    pages = [np.repeat(held[: pages_for(length)], PAGE)[:length] for length, held in prompts]
    return np.concatenate(pages), np.concatenate([np.arange(length) % PAGE for length, _ in prompts])
