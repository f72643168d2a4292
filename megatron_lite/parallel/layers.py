"""Layers that know their cut, as data: `rules` says for every parameter how ranks share it. Nowhere else is that stated."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.parallel.mesh import Axis
from megatron_lite.parallel.shards import Partial, RankLocal, Replicate, Rule, Split, SplitGroups, SplitParts

# b batch, s tokens in this call, d hidden size, v rows of the vocabulary on this rank


def columns(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[b s d] -> [b s columns]. From norms that drifted apart comes one x for every saved rank, [ranks b s d], each meant for the columns of its rank."""
    if x.dim() < 4:
        return F.linear(x, weight, bias)
    biases = bias.chunk(len(x)) if bias is not None else [None] * len(x)
    return torch.cat([F.linear(*mine) for mine in zip(x, weight.chunk(len(x)), biases, strict=True)], -1)


class ColumnLinear(nn.Linear):
    """Ranks compute different output columns of the same input."""

    rules: dict[str, Rule] = {"weight": Split(0), "bias": Split(0)}

    def __init__(self, inputs: int, outputs: int, *, tp: Axis, bias: bool = True) -> None:
        super().__init__(inputs, outputs // tp.size, bias=bias)
        self.tp = tp

    def forward(self, x: Tensor) -> Tensor:
        return columns(self.tp.copy(x), self.weight, self.bias)


class PartialColumnLinear(nn.Linear):
    """A ColumnLinear whose input has been through tp.copy: layers of the same input share one reduction of its gradient."""

    rules: dict[str, Rule] = {"weight": Split(0), "bias": Split(0)}

    def __init__(self, inputs: int, outputs: int, *, tp: Axis, bias: bool = True) -> None:
        super().__init__(inputs, outputs // tp.size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return columns(x, self.weight, self.bias)


class RowLinear(nn.Linear):
    """Ranks hold different input columns; outputs are summed, then the bias is added, the same on every rank."""

    rules: dict[str, Rule] = {"weight": Split(1), "bias": Replicate()}

    def __init__(self, inputs: int, outputs: int, *, tp: Axis, bias: bool = True) -> None:
        super().__init__(inputs // tp.size, outputs, bias=bias)
        self.tp = tp

    def forward(self, x: Tensor) -> Tensor:
        summed = self.tp.sum(F.linear(x, self.weight))
        return summed if self.bias is None else summed + self.bias


class PartialRowLinear(nn.Linear):
    """Ranks hold different input columns and a term of the bias each; the caller sums over the ranks, so that two layers can share one reduction."""

    rules: dict[str, Rule] = {"weight": Split(1), "bias": Partial()}

    def __init__(self, inputs: int, outputs: int, *, tp: Axis, bias: bool = True) -> None:
        super().__init__(inputs // tp.size, outputs, bias=bias)


class LayerNorm(nn.LayerNorm):
    """Every rank normalises the whole hidden state with its own copy of the scale: [b s d] -> [b s d], or [ranks b s d] where this rank took the place of
    several whose copies differ."""

    rules: dict[str, Rule] = {"weight": RankLocal(), "bias": RankLocal()}

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dim() == self.bias.dim() == 1:
            return super().forward(x)
        pairs = zip(*torch.broadcast_tensors(self.weight, self.bias), strict=True)
        return torch.stack([F.layer_norm(x, self.normalized_shape, weight, bias, self.eps) for weight, bias in pairs])


class PartialLayerNorm(LayerNorm):
    """A LayerNorm whose input has been through tp.copy: what reaches its scale are terms of a sum over the ranks, too."""

    def __init__(self, hidden: int, *, eps: float, tp: Axis) -> None:
        super().__init__(hidden, eps=eps)
        self.tp = tp

    def forward(self, x: Tensor) -> Tensor:
        if self.tp.size == 1 or not (torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(x)
        weight, bias = self.tp.copy(torch.stack([self.weight, self.bias])).unbind(0)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.Module):
    """Scales to unit mean square (Zhang and Sennrich 2019); computed in fp32. Merging ranks averages copies that drifted apart."""

    rules: dict[str, Rule] = {"scale": Replicate()}

    def __init__(self, hidden: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.scale


class GroupedQueryLinear(nn.Linear):
    """Projections of grouped-query attention, [q heads | k heads | v heads] of this rank; a key/value head is on several ranks where there are more ranks."""

    def __init__(self, hidden: int, *, heads: int, kv_heads: int, head_dim: int, tp: Axis) -> None:
        self.rules: dict[str, Rule]
        super().__init__(hidden, (heads // tp.size + 2 * max(1, kv_heads // tp.size)) * head_dim, bias=False)
        self.rules = {"weight": SplitGroups(heads, kv_heads)}
        self.tp = tp

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.tp.copy(x))


class StackedColumnLinear(nn.Linear):
    """Two projections of the same input, one above the other, each cut by itself: [b s d] -> [b s (2 columns)]."""

    rules: dict[str, Rule] = {"weight": SplitParts(0, (1, 1))}

    def __init__(self, inputs: int, outputs: int, *, tp: Axis) -> None:
        super().__init__(inputs, 2 * outputs // tp.size, bias=False)
        self.tp = tp

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.tp.copy(x))


class VocabularyEmbedding(nn.Module):
    """Ranks hold different rows of the table: tokens [b s] -> [b s d]."""

    rules: dict[str, Rule] = {"weight": Split(0, padded=True)}

    def __init__(self, vocab: int, hidden: int, *, tp: Axis) -> None:
        super().__init__()
        self.tp = tp
        self.weight = nn.Parameter(torch.empty(vocab // tp.size, hidden))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.tp.sum(self.share(tokens))

    def share(self, tokens: Tensor) -> Tensor:
        """The term of this rank: zeros for tokens whose row another rank holds."""
        if self.tp.size == 1:
            return F.embedding(tokens, self.weight)
        local = tokens - self.tp.index * len(self.weight)
        elsewhere = (local < 0) | (local >= len(self.weight))
        return F.embedding(local.masked_fill(elsewhere, 0), self.weight).masked_fill(elsewhere.unsqueeze(-1), 0)


class VocabularyLinear(nn.Module):
    """Ranks compute the logits of different words, never gathered here: [b s d] -> [b s v]."""

    rules: dict[str, Rule] = {"weight": Split(0, padded=True), "bias": Split(0, padded=True)}

    def __init__(self, vocab: int, hidden: int, *, tp: Axis, bias: bool = False) -> None:
        super().__init__()
        self.tp = tp
        self.weight = nn.Parameter(torch.empty(vocab // tp.size, hidden))
        self.bias = nn.Parameter(torch.zeros(vocab // tp.size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return columns(self.tp.copy(x), self.weight, self.bias)
