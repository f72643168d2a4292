"""Low-rank adapters in training: put on frozen layers, filled, and saved as what they are, a small folder in PEFT's format."""

import hashlib
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_lite.checkpoint.adapters import Adapters, by_module, known_by, linears, weight_rule
from megatron_lite.checkpoint.find import CheckpointLayout
from megatron_lite.checkpoint.peft import WEIGHTS, Pair, write_peft
from megatron_lite.checkpoint.pickled import open_pickled
from megatron_lite.config.lora import LoraSection
from megatron_lite.config.sections import Family
from megatron_lite.errors import CheckpointError, LayoutError
from megatron_lite.models.architecture import Architecture
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.adapter import A, Adapted, B, adapt, factor_rules, sum_before_norms
from megatron_lite.parallel.mesh import Axis
from megatron_lite.parallel.shards import Replicate, Rule, take
from megatron_lite.run import Run
from megatron_lite.training.manifest import check_content, check_sizes

PIECE = "adapter-layer_{number:02d}-model_{part:02d}.pt"


def check_lora(lora: LoraSection, run: Run, tp: int) -> None:
    """Raises UserError where adapters cannot be trained at this cut, or those to begin with are not what lora asks for."""
    spec = run.spec
    if spec.kv_heads < tp and "query_key_value" in lora.layers(spec.family):
        raise LayoutError(
            f"model-parallel-size {tp} puts each of the {spec.kv_heads} key/value heads on several ranks, where an adapter of query_key_value cannot be "
            f"trained; use model-parallel-size {spec.kv_heads} or less, or other lora.targets"
        )
    if run.adapters:
        check_content(run.adapters.folder / WEIGHTS, check_sizes(run.adapters.folder))
        paths = targets(whole_block(run.architecture, spec), lora, spec.family)
        _check_adapters(run.adapters, lora, {(number, path) for number in blocks(spec) for path in paths})


def blocks(spec: ModelSpec) -> range:
    """The numbers of the layers that can have adapters."""
    return range(2, spec.layers + 2)


def whole_block(architecture: Architecture, spec: ModelSpec) -> nn.Module:
    """A block as one rank alone would hold it, without memory."""
    with torch.device("meta"):
        return architecture.plan(spec, Axis("tp"))[2]()


def targets(layer: nn.Module, lora: LoraSection, family: str) -> list[str]:
    """Paths of the linear layers that get an adapter."""
    chosen = lora.layers(family)
    return [path for path, _ in linears(layer) if path.rpartition(".")[2] in chosen]


def put_adapters(layers: Mapping[int, nn.Module], lora: LoraSection, known: Adapters | None, *, family: Family, seed: int, tp: Axis) -> None:
    """Freezes this rank's layers and puts adapters on them: those that are known, or new ones, the same at every cut, which add nothing at first."""
    for number, layer in layers.items():
        layer.requires_grad_(False).train()
        for path in targets(layer, lora, family):
            made = adapt(layer, path, rank=lora.rank, scale=lora.scale, tp=tp)
            if known:
                _fill(made, known.pairs[number, path], tp)
            else:
                _draw(made, (seed, number, path), tp)
            for name, parameter in ((A, made.lora_A), (B, made.lora_B)):
                if not isinstance(made.rules[name], Replicate):
                    parameter.model_parallel = True  # pyright: ignore[reportAttributeAccessIssue]
    sum_before_norms(layers.values(), tp)


@torch.no_grad()
def _draw(made: Adapted, key: tuple[object, ...], tp: Axis) -> None:
    """A as PEFT draws it, uniform within 1 / sqrt(inputs), but whole and from a seed of its own."""
    rule = made.rules[A]
    shape = rule.whole(made.lora_A.shape, tp.size)
    digest = hashlib.sha256(repr((*key, A)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    bound = shape[1] ** -0.5
    made.lora_A.copy_(take(rule, [torch.empty(shape).uniform_(-bound, bound, generator=generator)], tp.index, tp.size))


@torch.no_grad()
def _fill(made: Adapted, pair: Pair, tp: Axis) -> None:
    made.lora_A.copy_(take(made.rules[A], [pair.a], tp.index, tp.size))
    made.lora_B.copy_(take(made.rules[B], [pair.b], tp.index, tp.size))


def _check_adapters(adapters: Adapters, lora: LoraSection, wanted: Set[tuple[int, str]]) -> None:
    """Raises CheckpointError where these adapters are not of the rank, scale and targets that are to be trained."""
    found = sorted({(len(pair.a), pair.scale * len(pair.a)) for pair in adapters.pairs.values()})
    if found != [(lora.rank, lora.alpha)] or adapters.pairs.keys() != wanted:
        theirs = "; ".join(f"rank {rank}, alpha {alpha:g}" for rank, alpha in found)
        names = ", ".join(sorted({path.rpartition(".")[2] for _, path in adapters.pairs}))
        raise CheckpointError(
            f"the adapters in {adapters.folder} have {theirs}, on {names} of {len({number for number, _ in adapters.pairs})} layers; lora asks for rank "
            f"{lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.targets)} of all: make lora agree with them"
        )


@dataclass(frozen=True)
class AdaptersOnly:
    """What a checkpoint of a training with adapters holds: no weights of the model, only adapters, in PEFT's format, beside the optimizer's state."""

    architecture: Architecture
    spec: ModelSpec
    lora: LoraSection
    base: Path
    known: Mapping[str, str]

    def weights_file(self, layout: CheckpointLayout, number: int, part: int) -> Path:
        return layout.folder / PIECE.format(number=number, part=part)

    def complete(self, draft: Path) -> list[Path]:
        """Puts the ranks' pieces together."""
        factors: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        used: list[Path] = []
        block = whole_block(self.architecture, self.spec)
        rules = {path: factor_rules(weight_rule(module)) for path, module in linears(block)}
        for number in blocks(self.spec):
            pieces = sorted(draft.glob(PIECE.format(number=number, part=0).replace("model_00", "model_*")))
            parts = [_piece(path) for path in pieces]
            for path in targets(block, self.lora, self.spec.family):
                factors[number, path] = (_merged(rules[path][0], parts, f"{path}.{A}"), _merged(rules[path][1], parts, f"{path}.{B}"))
            used += pieces
        made = by_module(self.architecture, self.spec, factors)
        files = write_peft(draft, made, rank=self.lora.rank, alpha=self.lora.alpha, base=str(self.base), metadata=self.known)
        for path in used:
            path.unlink()
        return files


def _piece(path: Path) -> dict[str, Tensor]:
    content = open_pickled(path)
    assert isinstance(content, dict), path
    return content


def _merged(rule: Rule, parts: list[dict[str, Tensor]], name: str) -> Tensor:
    return rule.merge([part[name] for part in parts])


def adapters_of(run: Run, lora: LoraSection) -> AdaptersOnly:
    """How a training with adapters on this run's model saves."""
    assert run.config.checkpoint.load is not None
    return AdaptersOnly(run.architecture, run.spec, lora, run.config.checkpoint.load, known_by(run.source))
