"""The blocks of parallel-residual models (GPT-NeoX, GPT-J) for one new token a row: five launches a block instead of forty, one of them the reduction over
the tensor-parallel ranks, and attention beside the MLP. The residual stream stays in fp32."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.inference.aside import Aside
from megatron_lite.inference.kernels.attention import Scratch, Turn, attend_pages
from megatron_lite.inference.kernels.exchange import sum_and_norm
from megatron_lite.inference.kernels.linear import MOST_ROWS, Projection, combine, project
from megatron_lite.inference.kernels.norm import add_and_norm
from megatron_lite.inference.kernels.prompt import place_prompts
from megatron_lite.inference.paged import FilledPast, PagedPast
from megatron_lite.models import gptj, neox
from megatron_lite.models.attention import Rotary, angles
from megatron_lite.parallel.adapter import Adapted
from megatron_lite.parallel.layers import LayerNorm, columns
from megatron_lite.parallel.mesh import Axis
from megatron_lite.parallel.peers import Peers
from megatron_lite.parallel.quantized import dequantized, place_of, scales_of

# b rows, d hidden size, h heads on this rank, c copies of norms

SPLITS = 5
"""Terms of the second product: the attention's inputs and four times as many of the MLP."""


@dataclass(frozen=True)
class Norms:
    """Scales and shifts [c d] of the norms that read one state: for the attention first, then for the MLP; `copies` of each. The MLP's begin at `second`."""

    scale: Tensor
    shift: Tensor
    eps: float
    copies: tuple[int, int]
    second: int

    @classmethod
    def of(cls, *norms: LayerNorm) -> "Norms":
        pairs = [torch.broadcast_tensors(torch.atleast_2d(norm.weight), torch.atleast_2d(norm.bias)) for norm in norms]
        counts = [len(scale) for scale, _ in pairs]
        scale, shift = (torch.cat([pair[kind] for pair in pairs]).detach().contiguous() for kind in (0, 1))
        return cls(scale, shift, norms[0].eps, (counts[0], counts[-1]), 0 if len(norms) == 1 else counts[0])


@dataclass(frozen=True)
class FusedBlock:
    """What one block computes with. `bias` is what this rank adds to the reduction, in fp32 and as small as the weights; `place` is where matrices of 8 bits
    are widened."""

    norms: Norms
    first: tuple[Tensor, Tensor]
    first_bias: tuple[Tensor | None, Tensor | None]
    second: tuple[Tensor, Tensor]
    bias: Tensor | None
    small_bias: Tensor | None
    head_dim: int
    turn: Turn | None
    activation: str
    first_scales: tuple[Tensor, Tensor] | None = None
    second_scales: tuple[Tensor, Tensor] | None = None
    place: Tensor | None = None

    @classmethod
    def of(cls, block: nn.Module) -> "FusedBlock | None":
        """The block's own weights, not copied; None where it is of another kind."""
        if any(isinstance(module, Adapted) for module in block.modules()):
            return None  # adapters in training are computed beside their weights
        if isinstance(block, neox.ParallelBlock):
            norms = Norms.of(block.input_layernorm, block.post_attention_layernorm)
        elif isinstance(block, gptj.Block):
            norms = Norms.of(block.input_layernorm)
        else:
            return None
        attention, mlp = block.attention, block.mlp
        columns_of = zip((attention.query_key_value.weight, mlp.dense_h_to_4h.weight), norms.copies, strict=True)
        if any(len(weight) % (16 * count) for weight, count in columns_of if count > 1):
            return None  # no tile ends where the columns of a norm's copy do
        biases = [bias.detach().float() for bias in (attention.dense.bias, mlp.dense_4h_to_h.bias) if bias is not None]
        bias = torch.stack(biases).sum(0) if biases else None
        return cls(
            norms,
            (attention.query_key_value.weight, mlp.dense_h_to_4h.weight),
            (attention.query_key_value.bias, mlp.dense_h_to_4h.bias),
            (attention.dense.weight, mlp.dense_4h_to_h.weight),
            bias,
            None if bias is None else bias.to(block.input_layernorm.weight.dtype),
            attention.head_dim,
            turn_of(attention.rotary, attention.dense.weight.device),
            "gelu_tanh" if mlp.approximate == "tanh" else "gelu",
            scales_of(attention.query_key_value, mlp.dense_h_to_4h),
            scales_of(attention.dense, mlp.dense_4h_to_h),
            place_of(attention.dense),
        )

    def projected(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Queries, keys and values [s (h 3 d)] and the MLP's inner states [s n] of any number of tokens [c s d], by the library."""
        heads = columns(copies(normed, 0, self.norms.copies[0]), self._whole_first(0, normed.dtype), self.first_bias[0])[0]
        states = copies(normed, self.norms.second, self.norms.copies[1])
        return heads, activated(states, self._whole_first(1, normed.dtype), self.first_bias[1], self.activation)

    def combined(self, mixed: Tensor, inner: Tensor, bias: Tensor | None) -> Tensor:
        """This rank's term of what the block adds to the stream, by the library."""
        expanded = F.linear(inner, self._whole_second(1, inner.dtype), bias)
        return torch.addmm(expanded, mixed, self._whole_second(0, inner.dtype).t(), out=expanded)

    def _whole_first(self, index: int, dtype: torch.dtype) -> Tensor:
        """A matrix of the first product in the format of the states: until the next one is asked for, where it is held in 8 bits."""
        return self.first[index] if self.first_scales is None else dequantized(self.first[index], self.first_scales[index], dtype, self.place)

    def _whole_second(self, index: int, dtype: torch.dtype) -> Tensor:
        """The same of the second product."""
        return self.second[index] if self.second_scales is None else dequantized(self.second[index], self.second_scales[index], dtype, self.place)


def turn_of(rotary: Rotary, device: torch.device) -> Turn | None:
    if not rotary.dim:
        return None
    return Turn(*angles(rotary.dim, rotary.base, rotary.max_positions, device), rotary.pairing == "interleaved")


def copies(normed: Tensor, first: int, count: int) -> Tensor:
    """The copies of one norm, as column layers take them: [1 s d], or [c 1 s d]."""
    return normed[first : first + 1] if count == 1 else normed[first : first + count].unsqueeze(1)


def activated(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """[s n]: GELU behind a product, without a pass of its own where the library can."""
    if activation == "gelu_tanh" and x.is_cuda and x.dim() == 3 and bias is not None:
        return torch.ops.aten._addmm_activation(bias, x[0], weight.t(), use_gelu=True)  # cuBLASLt's epilogue, which is the tanh form
    return F.gelu(columns(x, weight, bias), approximate="tanh" if activation == "gelu_tanh" else "none")[0]


def normed_into(stream: Tensor, norms: Norms | None, add: Callable[..., None], *, like: Tensor) -> Tensor:
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
        """The same for the tokens [s d] of packed prompts, whose keys and values are kept: what the last norm makes of the stream at `last` [c n d]."""
        ends = self._read_all(x, pasts)[last]
        return self._normed(ends, ends.new_empty(0, *ends.shape), None, self.last, like=x)

    def pass_on(self, x: Tensor, pasts: Sequence[FilledPast]) -> Tensor:
        """The stream behind the last block [s d], for the next stage."""
        return self._read_all(x, pasts).to(x.dtype)

    def _read_all(self, x: Tensor, pasts: Sequence[FilledPast]) -> Tensor:
        stream = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for block, past in zip(self.blocks, pasts, strict=True):
            x = self._read_block(block, past, self._normed(stream, x.unsqueeze(0), None, block.norms, like=x))
        self._normed(stream, x.unsqueeze(0), None, None, like=x)
        return stream

    def _read_block(self, block: FusedBlock, past: FilledPast, normed: Tensor) -> Tensor:
        """What a block adds to the stream [s d], summed over the ranks."""
        flat, inner = block.projected(normed)
        del normed  # what is not needed any more is let go: a long prompt takes as much again
        heads = flat.view(len(flat), -1, 3, block.head_dim)
        place_prompts(heads, (past.keys, past.values), (past.pages, past.places), past.positions[0], block.turn)
        query, key, value = heads.transpose(0, 1).unsqueeze(0).unbind(3)
        mixed = past.inner.mix(query, key, value)[0].transpose(0, 1).flatten(1)
        del flat, heads, query, key, value
        return self.tp.sum_in_place(block.combined(mixed, inner, block.small_bias))

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
        heads, inner = block.projected(normed)
        mixed = normed.new_empty(len(heads), block.second[0].shape[1])
        attend(block, past, heads, mixed, scratch)
        return block.combined(mixed, inner, None).unsqueeze(0)
