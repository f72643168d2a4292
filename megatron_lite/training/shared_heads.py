"""Key/value heads that several ranks hold, because there are more ranks than heads: in training each is a parameter of its own, whose gradient is summed
over its ranks and counts once in the norm. Files hold query, key and value heads as one, as ever."""

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.parallel.layers import GroupedQueryLinear
from megatron_lite.parallel.mesh import Axis
from megatron_lite.parallel.shards import Replicate, Rule, Split, SplitGroups, take

# h rows of this rank's query heads, g rows of a key head and its value head

Tensors = dict[str, Tensor]
WEIGHT, SHARED = ".weight", ".shared"


class SharedHeads(nn.Module):
    """A GroupedQueryLinear in two parts: `weight` [h d] is of this rank's own query heads, `shared` [g d] of the key/value head that others hold, too."""

    rules: dict[str, Rule] = {"weight": Split(0), "shared": Replicate()}

    def __init__(self, fused: GroupedQueryLinear, tp: Axis) -> None:
        super().__init__()
        self.tp = tp
        rule = fused.rules["weight"]
        assert isinstance(rule, SplitGroups)
        self.rule = rule
        self.place = tp.index * rule.kv_heads // tp.size
        own, shared = self.parted(fused.weight.detach())
        self.weight = nn.Parameter(own.clone())
        self.shared = nn.Parameter(self._of_the_first(shared).clone())
        self.shared.model_parallel = self.is_first  # pyright: ignore[reportAttributeAccessIssue]  # what counts in the norm

    @property
    def first(self) -> int:
        """The first rank that holds this key/value head."""
        return self.place * self.tp.size // self.rule.kv_heads

    @property
    def is_first(self) -> bool:
        return self.tp.index == self.first

    def forward(self, x: Tensor) -> Tensor:
        shared = self.shared
        if torch.is_grad_enabled():
            shared = self._mine(self.tp.copy(self._among_all(shared)))  # in its place the gradients of all who hold this head meet
        return F.linear(self.tp.copy(x), torch.cat([self.weight, shared]))

    def parted(self, fused: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of the query heads, and those of the key/value head."""
        heads = self.rule.heads // self.tp.size
        rows = len(fused) // (heads + 2)
        return fused[: heads * rows], fused[heads * rows :]

    def _among_all(self, shared: Tensor) -> Tensor:
        """In its place among the heads of all ranks, the others being zeros."""
        before, behind = self.place, self.rule.kv_heads - 1 - self.place
        return F.pad(shared, (0, 0, before * len(shared), behind * len(shared)))

    def _mine(self, heads: Tensor) -> Tensor:
        return heads.chunk(self.rule.kv_heads)[self.place]

    def _of_the_first(self, shared: Tensor) -> Tensor:
        """What the first of its ranks holds: copies may have drifted apart where they were saved."""
        return self._mine(self.tp.sum(self._among_all(shared if self.is_first else torch.zeros_like(shared))))


def separate(layer: nn.Module, tp: Axis) -> None:
    """Makes SharedHeads of what several ranks hold. All ranks of the axis call together."""
    for path, module in list(layer.named_modules()):
        if isinstance(module, GroupedQueryLinear) and isinstance(rule := module.rules["weight"], SplitGroups) and tp.size > rule.kv_heads:
            parent, _, name = path.rpartition(".")
            setattr(layer.get_submodule(parent), name, SharedHeads(module, tp))


def joined(found: Mapping[str, Tensors]) -> dict[str, Tensors]:
    """Tensors by path and name, as files hold them."""
    whole = {path: tensors for path, tensors in found.items() if not path.endswith(SHARED)}
    for path, tensors in found.items():
        if path.endswith(SHARED):
            own = path.removesuffix(SHARED) + WEIGHT
            whole[own] = {name: torch.cat([whole[own][name], tensor]) for name, tensor in tensors.items()}
    return whole


def separated(layer: nn.Module, stored: Mapping[str, Mapping[str, list[Tensor]]], tp: Axis) -> dict[str, Mapping[str, list[Tensor]]]:
    """The stored shards of every tensor by path and name, as the layer has them in training."""
    found = dict(stored)
    for path, module in _shared(layer):
        fused = found.pop(path + WEIGHT)
        # as if all ranks had stored what this one holds
        found[path + WEIGHT] = {name: [module.parted(take(module.rule, parts, tp.index, tp.size))[0]] * tp.size for name, parts in fused.items()}
        found[path + SHARED] = {name: [module.parted(take(module.rule, parts, module.first, tp.size))[1]] * tp.size for name, parts in fused.items()}
    return found


def _shared(layer: nn.Module) -> Iterator[tuple[str, SharedHeads]]:
    return ((path, module) for path, module in layer.named_modules() if isinstance(module, SharedHeads))
