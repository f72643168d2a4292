"""The optimizers, and which parameters they decay. None of them needs a compiler."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lite.errors import ConfigError
from megatron_lite.training.recipe import OptimizerRecipe

Groups = list[dict[str, Any]]


def parameter_groups(module: nn.Module, decay: float) -> Groups:
    """NeoX's two groups of the trainable parameters: matrices, and norms and biases, which do not decay."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.dim() > 1]
    others = [parameter for parameter in trainable if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(recipe: OptimizerRecipe, groups: Groups, *, rate: float) -> torch.optim.Optimizer:
    """Adam is AdamW, as in NeoX: the decay is no part of the gradient."""
    if recipe.eight_bit:
        return _eight_bit(recipe, groups, rate)
    if recipe.kind == "adam":
        return torch.optim.AdamW(groups, lr=rate, betas=recipe.betas, eps=recipe.eps, fused=True)
    if recipe.kind == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=recipe.momentum)
    return Lion(groups, lr=rate, betas=recipe.betas)


def _eight_bit(recipe: OptimizerRecipe, groups: Groups, rate: float) -> torch.optim.Optimizer:
    try:
        from megatron_lite.training.eight_bit import EightBitAdam
    except ImportError:
        raise ConfigError(
            "use_bnb_optimizer is true, but the package bitsandbytes is not installed; run `pip install bitsandbytes`, or set use_bnb_optimizer to false"
        ) from None
    return EightBitAdam(groups, lr=rate, betas=recipe.betas, eps=recipe.eps)


def prepare_to_save(optimizer: torch.optim.Optimizer) -> None:
    """Gives every state of the optimizer the shape of its parameter and the meaning of its name, in whatever form the optimizer keeps it."""
    if unpack := getattr(optimizer, "unpack", None):
        unpack()


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al. 2023): the sign of an average of gradient and momentum, with decoupled decay."""

    def __init__(self, params: Iterable[Tensor] | Groups, *, lr: float, betas: tuple[float, float], weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        assert closure is None
        for group in self.param_groups:
            near, far = group["betas"]
            for parameter in (parameter for parameter in group["params"] if parameter.grad is not None):
                average = self.state[parameter].setdefault("exp_avg", torch.zeros_like(parameter))
                direction = average.lerp(parameter.grad, 1 - near).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
                average.lerp_(parameter.grad, 1 - far)
