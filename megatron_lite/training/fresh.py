"""New weights: every tensor is drawn whole, from a seed of its own, and then cut. So the initial model is the same at every cut."""

import hashlib
import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from megatron_lite.config.sections import Initializer, ModelSection
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.mesh import Axis
from megatron_lite.parallel.shards import Rule, take

Fill = Callable[[Tensor, torch.Generator], Tensor]

WRITES_TO_RESIDUAL = ("attention.dense.weight", "mlp.dense_4h_to_h.weight")
"""Weights that follow output_layer_init_method: what they compute is added to the residual stream."""


def draw_layer(layer: nn.Module, number: int, *, model: ModelSection, spec: ModelSpec, seed: int, tp: Axis) -> None:
    """Fills this rank's part of the layer with new weights."""
    with torch.no_grad():
        for path, parameter in layer.named_parameters():
            module_name, _, name = path.rpartition(".")
            rule = cast(dict[str, Rule], layer.get_submodule(module_name).rules)[name]
            key = (seed, 0 if path.startswith("word_embeddings") else number, path)  # a tied head is the embedding
            whole = new_tensor(path, rule.whole(parameter.shape, tp.size), key, model=model, spec=spec)
            parameter.copy_(take(rule, [whole], tp.index, tp.size))


def new_tensor(path: str, shape: tuple[int, ...], key: tuple[object, ...], *, model: ModelSection, spec: ModelSpec) -> Tensor:
    """A whole parameter: biases 0, norms 1, matrices by NeoX's init_method and output_layer_init_method."""
    if len(shape) == 1:
        return torch.zeros(shape) if path.endswith("bias") else torch.ones(shape)
    method = model.output_layer_init_method if path.endswith(WRITES_TO_RESIDUAL) else model.init_method
    digest = hashlib.sha256(repr(key).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return initializers(spec, model.init_method_std)[method](torch.empty(shape), generator)


def initializers(spec: ModelSpec, std: float) -> dict[Initializer, Fill]:
    """NeoX's distributions by their names."""

    def normal(deviation: float) -> Fill:
        return lambda tensor, generator: tensor.normal_(std=deviation, generator=generator)

    def orthogonal(gain: float) -> Fill:
        return lambda tensor, generator: nn.init.orthogonal_(tensor, gain, generator=generator)

    return {
        "normal": normal(std),
        "scaled_normal": normal(std / math.sqrt(2 * spec.layers)),
        "single_residual_scaled_normal": normal(std / math.sqrt(spec.layers)),
        "small_init": normal(math.sqrt(2 / (5 * spec.hidden))),
        "wang_init": normal(2 / spec.layers / math.sqrt(spec.hidden)),
        "orthogonal": orthogonal(1.0),
        "scaled_orthogonal": orthogonal(1 / math.sqrt(2 * spec.layers)),
        "xavier_uniform": lambda tensor, generator: nn.init.xavier_uniform_(tensor, generator=generator),
        "xavier_normal": lambda tensor, generator: nn.init.xavier_normal_(tensor, generator=generator),
    }
