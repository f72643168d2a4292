"""What a block with parallel residuals (GPT-NeoX, GPT-J) computes with when few launches do it: its own weights, and its products by the library."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.inference.kernels.attention import Turn
from megatron_lite.models import gptj, neox
from megatron_lite.models.attention import Rotary, angles
from megatron_lite.parallel.adapter import Adapted
from megatron_lite.parallel.layers import LayerNorm, columns
from megatron_lite.parallel.quantized import dequantized, place_of, scales_of

# s tokens, d hidden size, h heads on this rank, n inner states on this rank, c copies of norms


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

    def heads(self, normed: Tensor) -> Tensor:
        """Queries, keys and values [s (h 3 d)] of any number of tokens [c s d], by the library."""
        return columns(copies(normed, 0, self.norms.copies[0]), self._whole(self.first, self.first_scales, 0, normed.dtype), self.first_bias[0])[0]

    def inner(self, normed: Tensor) -> Tensor:
        """The MLP's inner states [s n] of the same."""
        states = copies(normed, self.norms.second, self.norms.copies[1])
        return activated(states, self._whole(self.first, self.first_scales, 1, normed.dtype), self.first_bias[1], self.activation)

    def combined(self, mixed: Tensor, inner: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
        """This rank's term of what the block adds to the stream, by the library."""
        larger = self._whole(self.second, self.second_scales, 1, inner.dtype).t()
        expanded = torch.mm(inner, larger, out=out) if bias is None else torch.addmm(bias, inner, larger, out=out)
        return torch.addmm(expanded, mixed, self._whole(self.second, self.second_scales, 0, inner.dtype).t(), out=expanded)

    def _whole(self, weights: tuple[Tensor, Tensor], scales: tuple[Tensor, Tensor] | None, index: int, dtype: torch.dtype) -> Tensor:
        """One of two matrices in the format of the states: until the next one is asked for, where it is held in 8 bits."""
        return weights[index] if scales is None else dequantized(weights[index], scales[index], dtype, self.place)


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
