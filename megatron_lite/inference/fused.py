"""The blocks of parallel-residual models (GPT-NeoX, GPT-J) for one new token a row: five launches a block instead of forty, one of them the reduction over
the tensor-parallel ranks, and attention beside the MLP. The residual stream stays in fp32."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from megatron_lite.inference.aside import Aside
from megatron_lite.inference.block import FusedBlock, Norms
from megatron_lite.inference.kernels.attention import Scratch, attend_pages
from megatron_lite.inference.kernels.exchange import sum_and_norm
from megatron_lite.inference.kernels.linear import MOST_ROWS, Projection, combine, project
from megatron_lite.inference.kernels.norm import add_and_norm
from megatron_lite.inference.kernels.prompt import place_prompts
from megatron_lite.inference.kernels.shares import meet, sum_shares
from megatron_lite.inference.paged import FilledPast, PagedPast
from megatron_lite.parallel.layers import LayerNorm
from megatron_lite.parallel.mesh import Axis
from megatron_lite.parallel.peers import Peers, Shares

# b rows, d hidden size, h heads on this rank, c copies of norms

SPLITS = 5
"""Terms of the second product: the attention's inputs and four times as many of the MLP."""


class Add(Protocol):
    """Adds what a block computed to the stream, and norms it."""

    def __call__(self, *, scale: Tensor, shift: Tensor, out: Tensor, eps: float) -> None: ...


def normed_into(stream: Tensor, norms: Norms | None, add: Add, *, like: Tensor) -> Tensor:
    """What `add` makes of the stream: [c b d] as the norms leave it, or the stream itself [1 b d], in the format of `like`."""
    scale, shift, eps = (norms.scale, norms.shift, norms.eps) if norms else (stream[:0], stream[:0], 0.0)
    out = torch.empty(len(scale), *stream.shape, dtype=like.dtype, device=stream.device)
    add(scale=scale, shift=shift, out=out, eps=eps)
    return out if norms else stream.to(like.dtype).unsqueeze(0)


def attend(block: FusedBlock, past: PagedPast, heads: Tensor, mixed: Tensor, scratch: Scratch) -> None:
    """[b (h 3 d)] -> mixed [b (h d)]."""
    query, key, value = heads.view(len(heads), -1, 3, block.head_dim).unbind(2)
    attend_pages((query, key, value), (past.keys, past.values), past.table, past.lengths, mixed.view(query.shape), scratch, block.turn)


@dataclass(frozen=True)
class FusedStack:
    """Consecutive blocks and the norm behind them, if it is on this stage."""

    blocks: Sequence[FusedBlock]
    last: Norms | None
    tp: Axis
    peers: Peers | None
    aside: Aside
    shares: Shares | None = None

    @classmethod
    def of(cls, blocks: Sequence[nn.Module], last: LayerNorm | None, *, tp: Axis, peers: Peers | None) -> "FusedStack | None":
        fused = [FusedBlock.of(block) for block in blocks]
        known = [block for block in fused if block is not None]
        if not known or len(known) < len(fused):
            return None
        return cls(known, Norms.of(last) if last else None, tp, peers, Aside(known[0].norms.scale.device))

    def run(self, x: Tensor, pasts: Sequence[PagedPast], scratch: Scratch, *, is_share: bool) -> Tensor:
        """Hidden states [b d], or this rank's share of them -> what the last norm makes of the stream [c b d], or the stream itself [1 b d]."""
        stream = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        compute = self._few if len(x) <= MOST_ROWS else self._many
        enter = self._summed if is_share else self._normed
        normed = enter(stream, x.unsqueeze(0), None, self.blocks[0].norms, like=x)
        for index, (block, past) in enumerate(zip(self.blocks, pasts, strict=True)):
            terms = compute(block, past, normed, scratch)
            following = self.blocks[index + 1].norms if index + 1 < len(self.blocks) else self.last
            normed = self._summed(stream, terms, block.bias, following, like=x)
        return normed

    def read(self, x: Tensor, pasts: Sequence[FilledPast], last: Tensor) -> Tensor:
        """The same for the tokens [s d] of packed prompts, whose keys and values are kept: what the last norm makes of the stream at `last` [c n d]. Of the
        last block the other tokens need nothing but keys and values."""
        block, past = self.blocks[-1], pasts[-1]
        stream, add = self._read_all(x, self.blocks[:-1], pasts)
        normed = normed_into(stream, block.norms, add, like=x)
        mixed = self._attended(block, past, block.heads(normed)).index_select(0, last)
        share = block.combined(mixed, block.inner(normed.index_select(1, last)), block.small_bias)
        return self._normed(stream.index_select(0, last), self.tp.sum_in_place(share).unsqueeze(0), None, self.last, like=x)

    def pass_on(self, x: Tensor, pasts: Sequence[FilledPast]) -> Tensor:
        """The stream behind the last block [s d], for the next stage."""
        stream, add = self._read_all(x, self.blocks, pasts)
        return normed_into(stream, None, add, like=x)[0]

    def _read_all(self, x: Tensor, blocks: Sequence[FusedBlock], pasts: Sequence[FilledPast]) -> tuple[Tensor, Add]:
        """The stream behind these blocks [s d], and what adds to it what the last of them computed."""
        stream = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        add: Add = partial(add_and_norm, stream, x.unsqueeze(0), None)
        shares = self.shares if self.shares is not None and len(x) <= self.shares.halves.shape[1] else None
        if shares is not None:
            meet(shares)  # the others have read what was laid for the prompts before
        for index, (block, past) in enumerate(zip(blocks, pasts, strict=False)):
            share = self._read_block(block, past, normed_into(stream, block.norms, add, like=x), shares.halves[index % 2, : len(x)] if shares else None)
            if shares is not None:
                meet(shares)
                add = partial(sum_shares, stream, shares, index % 2)
            else:
                add = partial(add_and_norm, stream, self.tp.sum_in_place(share).unsqueeze(0), None)
        return stream, add

    def _read_block(self, block: FusedBlock, past: FilledPast, normed: Tensor, place: Tensor | None) -> Tensor:
        """What this rank adds to the stream for a block [s d], at its place if it has one."""
        heads, inner = block.heads(normed), block.inner(normed)
        del normed  # what is not needed any more is let go: a long prompt takes as much again
        mixed = self._attended(block, past, heads)
        del heads
        return block.combined(mixed, inner, block.small_bias, out=place)

    def _attended(self, block: FusedBlock, past: FilledPast, flat: Tensor) -> Tensor:
        """[s (h 3 d)] -> [s (h d)]; keys and values are kept."""
        heads = flat.view(len(flat), -1, 3, block.head_dim)
        place_prompts(heads, (past.keys, past.values), (past.pages, past.places), past.positions[0], block.turn)
        query, key, value = heads.transpose(0, 1).unsqueeze(0).unbind(3)
        return past.inner.mix(query, key, value)[0].transpose(0, 1).flatten(1)

    def _summed(self, stream: Tensor, terms: Tensor, bias: Tensor | None, norms: Norms | None, *, like: Tensor) -> Tensor:
        """Adds the sum over the ranks to the stream, and norms it."""
        if self.tp.size == 1:
            return self._normed(stream, terms, bias, norms, like=like)
        if self.peers is None:
            share = terms.float().sum(0) if bias is None else terms.float().sum(0) + bias
            return self._normed(stream, self.tp.sum_in_place(share).unsqueeze(0), None, norms, like=like)
        return normed_into(stream, norms, partial(sum_and_norm, stream, terms, bias, peers=self.peers), like=like)

    def _normed(self, stream: Tensor, terms: Tensor, bias: Tensor | None, norms: Norms | None, *, like: Tensor) -> Tensor:
        """Adds to the stream, and norms it."""
        return normed_into(stream, norms, partial(add_and_norm, stream, terms, bias), like=like)

    def _few(self, block: FusedBlock, past: PagedPast, normed: Tensor, scratch: Scratch) -> Tensor:
        """Terms of what a block adds to the stream [t b d], without its bias. Attention, which waits more than it reads, goes on beside the MLP."""
        widths = [len(weight) for weight in block.first]
        heads, inner, mixed = (normed.new_empty(normed.shape[1], width) for width in (*widths, block.second[0].shape[1]))
        terms = torch.empty(SPLITS, *normed.shape[1:], dtype=torch.float32, device=normed.device)
        outs, (one, two) = (heads, inner), block.norms.copies
        plans = Projection(one), Projection(two, block.norms.second, block.activation)

        def product(index: int) -> None:
            scale = block.first_scales[index] if block.first_scales else None
            project(normed, block.first[index], block.first_bias[index], outs[index], plans[index], scale=scale, beside=widths[1 - index])

        with self.aside.begun():
            product(0)
            attend(block, past, heads, mixed, scratch)
        product(1)
        self.aside.join()
        combine((mixed, inner), block.second, terms, scales=block.second_scales)
        return terms

    def _many(self, block: FusedBlock, past: PagedPast, normed: Tensor, scratch: Scratch) -> Tensor:
        """The same for so many rows that the library's products are faster."""
        heads, inner = block.heads(normed), block.inner(normed)
        mixed = normed.new_empty(len(heads), block.second[0].shape[1])
        attend(block, past, heads, mixed, scratch)
        return block.combined(mixed, inner, None).unsqueeze(0)
