"""What an engine knows of its parameters, tensor by tensor and whole: weights, their masters in fp32, and the optimizer's state; read out and put back.

DeepSpeed holds masters and states as flat pieces spread over the replicas; the pieces of one cut fit no other. Whole tensors are cut by the rules.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lite.parallel.shards import RankLocal, Replicate, Rule, take
from megatron_lite.training.engine import Engine
from megatron_lite.training.shared_heads import Tensors, joined, separated
from megatron_lite.training.stage import named_rules

MASTER = "master"
"""The name of the fp32 weight beside the optimizer's own names, such as exp_avg."""
WEIGHT = "weight"
"""The name of the weight in the number format of training, beside these."""

Shards = Callable[[int], Mapping[str, Mapping[str, list[Tensor]]]]
"""Layer number -> path -> name of the state -> what each rank of the stored cut held."""


def read_layers(engine: Engine) -> Iterator[tuple[int, Tensors, dict[str, Tensors]]]:
    """(number, weights, states) of every layer of this stage, in host memory. The replicas share the work: each gets other layers, but all must call."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    dp = engine.mesh.dp
    _link(engine)
    for place, (number, held) in enumerate(engine.stage.kept()):
        tensors: dict[str, Tensors] = {}
        for path, parameter, _ in held:
            weight = _whole(parameter)
            found = {MASTER: weight.float()}
            if parameter.requires_grad:
                found[MASTER] = _present(safe_get_full_fp32_param(parameter))
                found |= {name: _present(safe_get_full_optimizer_state(parameter, name)) for name in state_names(engine)}
            else:  # a term of a sum that stays as it is
                found |= {name: torch.zeros_like(found[MASTER]) for name in state_names(engine)}
            if place % dp.size == dp.index:
                tensors[path] = {name: tensor.to("cpu", copy=True) for name, tensor in {**found, WEIGHT: weight}.items()}
        if tensors:
            states = joined(tensors)
            yield number, {path: named.pop(WEIGHT) for path, named in states.items()}, states


def state_names(engine: Engine) -> list[str]:
    """What the optimizer keeps for every weight, once it has taken a step."""
    for flat, state in engine.optimizer.state.items():
        return sorted(name for name, value in state.items() if isinstance(value, Tensor) and value.shape == flat.shape)
    return []


def updates(engine: Engine) -> int:
    """How many steps the optimizer counts."""
    return next((int(state["step"]) for state in engine.optimizer.state.values() if "step" in state), 0)


def write_masters(engine: Engine, shards: Shards) -> None:
    """Puts fp32 weights in place, from shards of any cut. Every rank calls this."""
    for parameter, found in _cut(engine, shards):
        _put(parameter, found[MASTER], None)


def write_states(engine: Engine, shards: Shards, *, names: list[str], count: int) -> None:
    """Puts fp32 weights and the optimizer's state in place, from shards of any cut, as after `count` steps; no names, no state yet. Every rank calls this."""
    for flat in _flat_parameters(engine) if names else ():
        state: dict[str, Tensor] = {name: torch.zeros_like(flat) for name in names}
        if engine.recipe.optimizer.kind == "adam":
            state["step"] = torch.tensor(float(count), device=flat.device)
        engine.optimizer.state[flat] = state
    _link(engine)
    for parameter, found in _cut(engine, shards):
        for name in (MASTER, *names):
            _put(parameter, found[name], None if name == MASTER else name)


def _cut(engine: Engine, shards: Shards) -> Iterator[tuple[nn.Parameter, Tensors]]:
    """Every trainable parameter with what this rank holds of each of its states."""
    tp, device = engine.mesh.tp, engine.mesh.device
    for name, layer in engine.stage.layers.items():
        trained = [entry for entry in named_rules(layer) if entry[1].requires_grad]
        stored = separated(layer, shards(0 if hasattr(layer, "word_embeddings") else int(name)), tp) if trained else {}
        for path, parameter, rule in trained:
            yield parameter, {key: take(_plain(rule), parts, tp.index, tp.size).to(device) for key, parts in stored[path].items()}


def _plain(rule: Rule) -> Rule:
    """Ranks hold the same where they have trained together."""
    return Replicate() if isinstance(rule, RankLocal) else rule


def _put(parameter: nn.Parameter, value: Tensor, name: str | None) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if hasattr(parameter, "ds_id"):
        zero3: Any = parameter
        zero3._z3_optimizer.set_local_hp_param(_local_piece(zero3, value), zero3, name)
    elif name is None:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, name)


def _local_piece(parameter: Any, value: Tensor) -> Tensor:
    """The slice of a whole tensor that ZeRO-3 keeps on this rank; DeepSpeed's own setter reads beyond the end where ranks do not divide the tensor."""
    length = parameter.ds_tensor.numel()
    start = length * parameter._z3_optimizer._get_param_partition_rank(parameter)
    piece = value.new_zeros(length)
    found = value.flatten()[start : start + length]
    piece[: len(found)] = found
    return piece


def _link(engine: Engine) -> None:
    """Lets DeepSpeed find the optimizer's state of every parameter. ZeRO 1 and 2 do so themselves, but when only the first group has a state."""
    optimizer = engine.deepspeed.optimizer
    if hasattr(optimizer, "_hp_optimizer_states_linked"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _flat_parameters(engine: Engine) -> list[Tensor]:
    """The flat fp32 tensors that the optimizer really works on."""
    if engine.recipe.zero_stage == 3:
        return list(engine.deepspeed.optimizer.fp32_partitioned_groups_flat)
    return [parameter for group in engine.optimizer.param_groups for parameter in group["params"]]


def _whole(parameter: nn.Parameter) -> Tensor:
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with GatheredParameters([parameter]):
        return parameter.detach().clone()


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "DeepSpeed does not know a parameter that trains"
    return tensor
