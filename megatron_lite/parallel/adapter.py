"""Low-rank adapters (Hu et al. 2021): frozen linear layers that add B A x, where A and B are small and train, at every cut.

A and B of a layer live beside its weight, in one module, so that the layer's own names and rules stay what they are. The weight may be held in 8 bits.
"""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.parallel.layers import (
    ColumnLinear,
    GroupedQueryLinear,
    LayerNorm,
    PartialColumnLinear,
    PartialLayerNorm,
    PartialRowLinear,
    RowLinear,
    StackedColumnLinear,
    VocabularyLinear,
    columns,
)
from megatron_lite.parallel.mesh import Axis
from megatron_lite.parallel.quantized import Quantized, QuantizedColumns, product
from megatron_lite.parallel.shards import Replicate, Rule, Split, take

# b batch, s tokens in this call, d input size, r rank

A, B = "lora_A", "lora_B"


def factor_rules(weight: Rule) -> tuple[Rule, Rule]:
    """How A [r inputs] and B [outputs r] are cut beside a weight: whichever has the cut dim of the weight is cut like it, the other is whole on every rank."""
    return (Split(1), Replicate()) if weight == Split(1) else (Replicate(), weight)


def low_rank_delta(weight: Rule, a: Tensor, b: Tensor, *, index: int, size: int) -> Tensor:
    """What rank `index` of `size` adds to its part of the weight, from the whole A and B."""
    rule_a, rule_b = factor_rules(weight)
    return take(rule_b, [b], index, size) @ take(rule_a, [a], index, size)


class Adapted(nn.Module):
    """A frozen linear layer and its adapter. B begins with zeros, so that at first nothing is added."""

    def __init__(self, base: nn.Linear | Quantized, *, rank: int, scale: float, tp: Axis) -> None:
        super().__init__()
        stated = cast(dict[str, Rule], base.rules)
        rule_a, rule_b = factor_rules(stated["weight"])
        self.rules: dict[str, Rule] = {**stated, A: rule_a, B: rule_b}
        self.scale, self.tp = scale, tp
        self.weight, self.bias = base.weight.requires_grad_(False), base.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.scale_bits, dtype = (base.scale_bits, base.dtype) if isinstance(base, Quantized) else (None, base.weight.dtype)
        self.lora_A = nn.Parameter(self.weight.new_zeros(rank, self.weight.shape[1], dtype=dtype))
        self.lora_B = nn.Parameter(self.weight.new_zeros(self.weight.shape[0], rank, dtype=dtype))

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B. Of the one that every rank holds whole, the ranks' gradients are terms of a sum."""
        if self.rules[A] == Split(1):
            return self.lora_A, self.tp.copy(self.lora_B)
        return self.tp.copy(self.lora_A), self.lora_B

    def adapted(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """W x + B A x. The second product is added to the first in place: no other tensor of this size is made or kept."""
        a, b = self.factors()
        rows = x.flatten(0, -2)
        low = F.linear(rows, a) * self.scale
        return product(rows, self.weight, self.scale_bits, bias).addmm_(low, b.T).unflatten(0, x.shape[:-1])


class AdaptedPartialColumns(Adapted):
    """Of PartialColumnLinear, whose input has been through tp.copy."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            return self.adapted(x, self.bias)
        a, b = self.factors()  # an x for every saved rank, from norms that drifted apart
        return product(x, self.weight, self.scale_bits, self.bias) + columns(F.linear(x, a) * self.scale, b)


class AdaptedColumns(AdaptedPartialColumns):
    """Of every other layer whose ranks compute different output columns: ColumnLinear, StackedColumnLinear, GroupedQueryLinear."""

    def __init__(self, base: nn.Linear | Quantized, *, rank: int, scale: float, tp: Axis) -> None:
        super().__init__(base, rank=rank, scale=scale, tp=tp)
        self.entry = tp

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.entry.copy(x))


class AdaptedRows(Adapted):
    """Of RowLinear: outputs are summed, then the bias is added."""

    def forward(self, x: Tensor) -> Tensor:
        summed = self.tp.sum(self.adapted(x, None))
        return summed if self.bias is None else summed + self.bias


class AdaptedPartialRows(Adapted):
    """Of PartialRowLinear: this rank's term of a sum that the caller takes."""

    def forward(self, x: Tensor) -> Tensor:
        return self.adapted(x, self.bias)


ADAPTED: dict[type[nn.Module], type[Adapted]] = {
    ColumnLinear: AdaptedColumns,
    PartialColumnLinear: AdaptedPartialColumns,
    StackedColumnLinear: AdaptedColumns,
    GroupedQueryLinear: AdaptedColumns,
    RowLinear: AdaptedRows,
    PartialRowLinear: AdaptedPartialRows,
}


def kind_of(module: nn.Module) -> type[nn.Module]:
    """The class of a layer, also of one whose weight is held in 8 bits."""
    return module.kind if isinstance(module, Quantized) else type(module)


def adapt(layer: nn.Module, path: str, *, rank: int, scale: float, tp: Axis) -> Adapted:
    """Puts an adapter on the linear layer at `path` of a layer, whose parameters keep their paths."""
    base = layer.get_submodule(path)
    made = ADAPTED[kind_of(base)](cast(nn.Linear | Quantized, base), rank=rank, scale=scale, tp=tp)
    parent, _, name = path.rpartition(".")
    setattr(layer.get_submodule(parent), name, made)
    return made


def sum_before_norms(layers: Iterable[nn.Module], tp: Axis) -> None:
    """Where frozen norms may differ between ranks, the ranks' gradients are summed before the norms: behind them they belong to different scales."""
    modules = [module for layer in layers for module in layer.modules()]
    norms = [module for module in modules if isinstance(module, LayerNorm) and not isinstance(module, PartialLayerNorm)]
    for module in modules if norms else ():  # RMSNorms are the same on every rank
        if isinstance(module, AdaptedColumns):
            module.entry = Axis(tp.name)
        elif isinstance(module, ColumnLinear | QuantizedColumns | VocabularyLinear):
            module.tp = Axis(tp.name)
    for norm in norms:
        norm.register_forward_pre_hook(lambda _, inputs: tp.copy(inputs[0]))


@torch.no_grad()
def merge_delta(weight: Tensor, rule: Rule, a: Tensor, b: Tensor, *, index: int, size: int) -> None:
    """Adds B A to this rank's part of a weight, in fp32, then rounded to the weight's own format."""
    weight.copy_(merged(weight, rule, a, b, index=index, size=size))


def merged(weight: Tensor, rule: Rule, a: Tensor, b: Tensor, *, index: int, size: int) -> Tensor:
    """The part that rank `index` of `size` holds of W + B A, in fp32."""
    delta = low_rank_delta(rule, a.to(weight.device, torch.float32), b.to(weight.device, torch.float32), index=index, size=size)
    return delta.add_(weight)


def merged_parts(stored: Sequence[Tensor], rule: Rule, a: Tensor, b: Tensor) -> list[Tensor]:
    """W + B A in fp32, cut as W is stored."""
    return [merged(part, rule, a, b, index=index, size=len(stored)) for index, part in enumerate(stored)]
