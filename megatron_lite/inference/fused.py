"""The blocks of parallel-residual models (GPT-NeoX, GPT-J) for one new token a row: four launches a block instead of forty, one of them the reduction over
the tensor-parallel ranks. The residual stream stays in fp32."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_lite.inference.kernels.attention import Scratch, Turn, attend_pages
from megatron_lite.inference.kernels.exchange import exchange
from megatron_lite.inference.kernels.linear import Projection, combine, project
from megatron_lite.inference.kernels.norm import add_and_norm
from megatron_lite.inference.paged import PagedPast
from megatron_lite.models import gptj, neox
from megatron_lite.models.attention import Rotary, angles
from megatron_lite.parallel.layers import LayerNorm
from megatron_lite.parallel.mesh import Axis
from megatron_lite.parallel.peers import Peers

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
    """What one block computes with. `bias` is what this rank adds to the reduction."""

    norms: Norms
    first: tuple[Tensor, Tensor]
    first_bias: tuple[Tensor | None, Tensor | None]
    second: tuple[Tensor, Tensor]
    bias: Tensor | None
    head_dim: int
    turn: Turn | None
    activation: str

    @classmethod
    def of(cls, block: nn.Module) -> "FusedBlock | None":
        """The block's own weights, not copied; None where it is of another kind."""
        if isinstance(block, neox.ParallelBlock):
            norms = Norms.of(block.input_layernorm, block.post_attention_layernorm)
        elif isinstance(block, gptj.Block):
            norms = Norms.of(block.input_layernorm)
        else:
            return None
        attention, mlp = block.attention, block.mlp
        biases = [bias.detach().float() for bias in (attention.dense.bias, mlp.dense_4h_to_h.bias) if bias is not None]
        return cls(
            norms,
            (attention.query_key_value.weight, mlp.dense_h_to_4h.weight),
            (attention.query_key_value.bias, mlp.dense_h_to_4h.bias),
            (attention.dense.weight, mlp.dense_4h_to_h.weight),
            torch.stack(biases).sum(0) if biases else None,
            attention.head_dim,
            turn_of(attention.rotary, attention.dense.weight.device),
            "gelu_tanh" if mlp.approximate == "tanh" else "gelu",
        )


def turn_of(rotary: Rotary, device: torch.device) -> Turn | None:
    if not rotary.dim:
        return None
    return Turn(*angles(rotary.dim, rotary.base, rotary.max_positions, device), rotary.pairing == "interleaved")


@dataclass(frozen=True)
class FusedStack:
    """Consecutive blocks and the norm behind them, if it is on this stage."""

    blocks: Sequence[FusedBlock]
    last: Norms | None
    tp: Axis
    peers: Peers | None

    @classmethod
    def of(cls, blocks: Sequence[nn.Module], last: LayerNorm | None, *, tp: Axis, peers: Peers | None) -> "FusedStack | None":
        fused = [FusedBlock.of(block) for block in blocks]
        known = [block for block in fused if block is not None]
        return cls(known, Norms.of(last) if last else None, tp, peers) if known and len(known) == len(fused) else None

    def run(self, x: Tensor, pasts: Sequence[PagedPast], scratch: Scratch) -> Tensor:
        """[b d] in the model's precision -> what the last norm makes of the stream [c b d], or the stream itself [1 b d]."""
        rows, width = x.shape
        stream = torch.zeros(rows, width, dtype=torch.float32, device=x.device)
        terms = torch.empty(SPLITS, rows, width, dtype=torch.float32, device=x.device)
        normed = self._normed(stream, x.unsqueeze(0), None, self.blocks[0].norms)
        for index, (block, past) in enumerate(zip(self.blocks, pasts, strict=True)):
            self._block(block, past, normed, terms, scratch)
            following = self.blocks[index + 1].norms if index + 1 < len(self.blocks) else self.last
            if self.tp.size == 1:
                normed = self._normed(stream, terms, block.bias, following, like=x)
            else:
                self._reduce(stream, terms, block.bias)
                normed = self._normed(stream, terms[:0], None, following, like=x)
        return normed

    def _normed(self, stream: Tensor, terms: Tensor, bias: Tensor | None, norms: Norms | None, *, like: Tensor | None = None) -> Tensor:
        """Adds to the stream, and norms it."""
        like = terms if like is None else like
        if norms is None:
            empty = stream.new_empty(0, stream.shape[1])
            add_and_norm(stream, terms, bias, empty, empty, empty, eps=0.0)
            return stream.to(like.dtype).unsqueeze(0)
        out = torch.empty(len(norms.scale), *stream.shape, dtype=like.dtype, device=stream.device)
        add_and_norm(stream, terms, bias, norms.scale, norms.shift, out, eps=norms.eps)
        return out

    def _block(self, block: FusedBlock, past: PagedPast, normed: Tensor, terms: Tensor, scratch: Scratch) -> None:
        rows = normed.shape[1]
        heads, inner = (normed.new_empty(rows, len(weight)) for weight in block.first)
        project(normed, block.first, block.first_bias, (heads, inner), Projection(block.norms.copies, block.norms.second, block.activation))
        query, key, value = heads.view(rows, -1, 3, block.head_dim).unbind(2)
        mixed = torch.empty(query.shape, dtype=heads.dtype, device=heads.device)
        attend_pages((query, key, value), (past.keys, past.values), past.table, past.lengths, mixed, scratch, block.turn)
        combine((mixed.flatten(1), inner), block.second, terms)

    def _reduce(self, stream: Tensor, terms: Tensor, bias: Tensor | None) -> None:
        if self.peers is not None:
            exchange(stream, terms, bias, self.peers)
        else:
            share = terms.sum(0) if bias is None else terms.sum(0) + bias
            stream += self.tp.sum(share)
