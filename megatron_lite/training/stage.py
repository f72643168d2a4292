"""The layers of one pipeline stage as a module that trains, and what DeepSpeed must know of its parameters."""

from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_lite.parallel.adapter import Adapted
from megatron_lite.parallel.mesh import Axis
from megatron_lite.parallel.shards import Partial, RankLocal, Rule, Split, SplitGroups, SplitParts
from megatron_lite.training.shared_heads import separate


class TrainedStage(nn.Module):
    """Layers by number, run one after the other: tokens or hidden states in, hidden states or this rank's logits out."""

    def __init__(self, layers: Mapping[int, nn.Module], *, recompute: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(number): layer for number, layer in layers.items()})
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        for layers in self._together():
            x = checkpoint(layers, x, use_reentrant=False) if self._recomputes(layers) else layers(x)
        return x

    def kept(self) -> Iterator[tuple[int, list[tuple[str, nn.Parameter, Rule]]]]:
        """What checkpoints hold of every layer that has files: all of it, or of a model with adapters these only. A tied head lies in the embedding's file."""
        adapted = any(isinstance(module, Adapted) for module in self.modules())
        for number, layer in self.layers.items():
            if number == "0" or not hasattr(layer, "word_embeddings"):
                held = [entry for entry in named_rules(layer) if not adapted or entry[1].requires_grad]
                if held:
                    yield int(number), held

    def _together(self) -> Iterator[nn.Sequential]:
        """The layers in groups whose activations are kept or recomputed together: blocks by `recompute`, all others alone."""
        group: list[nn.Module] = []
        for layer in self.layers.values():
            if _is_block(layer) and len(group) < max(1, self.recompute):
                group.append(layer)
                continue
            if group:
                yield nn.Sequential(*group)
            group = [layer] if _is_block(layer) else []
            if not _is_block(layer):
                yield nn.Sequential(layer)
        if group:
            yield nn.Sequential(*group)

    def _recomputes(self, layers: nn.Sequential) -> bool:
        return bool(self.recompute) and self.training and torch.is_grad_enabled() and _is_block(layers[0])


def _is_block(layer: nn.Module) -> bool:
    return hasattr(layer, "attention")


def named_rules(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, Rule]]:
    """Path, parameter and rule of everything a layer holds."""
    for path, parameter in module.named_parameters():
        module_name, _, name = path.rpartition(".")
        yield path, parameter, cast(dict[str, Rule], module.get_submodule(module_name).rules)[name]


def make_trainable(layer: nn.Module, tp: Axis) -> bool:
    """Prepares a layer's parameters for training at this cut. True where norms that had drifted apart between saved ranks were averaged.

    A bias that is a term of a sum trains on the first rank only, or it would move tp times as fast.
    """
    averaged = False
    separate(layer, tp)
    layer.train()
    for path, parameter, rule in list(named_rules(layer)):
        if isinstance(rule, RankLocal):
            parameter, changed = _one_copy(layer, path, parameter, tp)
            averaged |= changed
        parameter.requires_grad_(not isinstance(rule, Partial) or tp.is_first)
        if isinstance(rule, Split | SplitParts | SplitGroups):
            parameter.model_parallel = True  # pyright: ignore[reportAttributeAccessIssue]
    return averaged


@torch.no_grad()
def _one_copy(layer: nn.Module, path: str, parameter: nn.Parameter, tp: Axis) -> tuple[nn.Parameter, bool]:
    """The parameter, with copies that differ (its rows, and those of other ranks) averaged in fp32; the gradients of all of them would be the same."""
    rows = parameter.detach().reshape(-1, parameter.shape[-1])
    means = tp.gather(rows.float().mean(0).unsqueeze(-1)).T
    drifted = tp.maximum((means != means[0]).any() | (rows != rows[0]).any())
    if not drifted:
        return parameter, False
    module_name, _, name = path.rpartition(".")
    merged = nn.Parameter(means.mean(0).to(parameter.dtype))
    layer.get_submodule(module_name).register_parameter(name, merged)
    return merged, True
