"""Low-rank adapters of a whole model, under our names: found, read, held against the model they are for, and merged into its weights."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from megatron_lite.checkpoint.find import CheckpointLayout
from megatron_lite.checkpoint.merged import merged_in, refuse_again
from megatron_lite.checkpoint.peft import CONFIG, Pair, read_peft
from megatron_lite.checkpoint.source import Source
from megatron_lite.errors import CheckpointError
from megatron_lite.models.architecture import Architecture
from megatron_lite.models.spec import ModelSpec
from megatron_lite.models.weights import ByHead, Same, Stacked
from megatron_lite.parallel.adapter import ADAPTED, kind_of, merge_delta
from megatron_lite.parallel.mesh import Axis
from megatron_lite.parallel.shards import Rule

SAMPLES = 64  # numbers of the embedding by which a base is known again
BASE = "megatron_lite.base"


@dataclass(frozen=True)
class Adapters:
    """(layer number, path of a linear layer) -> its adapter, whole. `stated` is what adapter_config.json says."""

    folder: Path
    pairs: Mapping[tuple[int, str], Pair]
    stated: Mapping[str, object]

    def merge_into(self, layer: nn.Module, number: int, tp: Axis) -> None:
        """Adds the adapters of a layer to this rank's part of its weights."""
        for path, module in linears(layer):
            if pair := self.pairs.get((number, path)):
                merge_delta(module.weight, weight_rule(module), pair.a, pair.b.float() * pair.scale, index=tp.index, size=tp.size)

    def fingerprint(self) -> str:
        """64 hexadecimal digits: sha256 of what is added to which layer, wherever the files lie and whoever wrote them."""
        digest = hashlib.sha256()
        for (number, path), pair in sorted(self.pairs.items(), key=lambda item: item[0]):
            digest.update(f"{number} {path} {pair.scale} {list(pair.a.shape)} {list(pair.b.shape)}\n".encode())
            for factor in (pair.a, pair.b):
                digest.update(factor.float().contiguous().numpy().tobytes())
        return digest.hexdigest()


def linears(layer: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers that can have an adapter, by path."""
    for path, module in layer.named_modules():
        if kind_of(module) in ADAPTED:
            yield path, cast(nn.Linear, module)


def weight_rule(module: nn.Module) -> Rule:
    return cast(dict[str, Rule], module.rules)["weight"]


def find_adapters(folder: Path) -> CheckpointLayout:
    """Where adapters lie: in the folder itself, or in the step that its `latest` names. Raises CheckpointError where there are none."""
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder of adapters {folder}; set lora_load to one that a training with lora has saved, or to one of PEFT's")
    chosen = folder
    if not (folder / CONFIG).exists() and (folder / "latest").exists():
        chosen = folder / (folder / "latest").read_text(encoding="utf-8").strip()
    if not (chosen / CONFIG).exists():
        whole = any(chosen.glob("layer_*-model_*.pt")) or (chosen / "config.json").exists()
        hint = "it is a whole checkpoint, which load names" if whole else "set lora_load to a folder of adapters"
        raise CheckpointError(f"{chosen} holds no adapters (no {CONFIG}); {hint}")
    cut = {path.stem.rpartition("_")[2] for path in chosen.glob("optimizer-layer_*-model_*.pt")}
    return CheckpointLayout("neox", chosen, "" if chosen == folder else chosen.name, max(1, len(cut)), ())


def read_adapters(folder: Path, architecture: Architecture, spec: ModelSpec, source: Source) -> Adapters:
    """The adapters of a folder, for this model whose weights come from `source`. Raises CheckpointError where they are for another one."""
    place = find_adapters(folder).folder
    found = read_peft(place)
    _check_base(place, found.metadata, source)
    shapes = _shapes(architecture, spec)
    left, pairs = dict(found.pairs), {}
    for (number, name), made in architecture.huggingface(spec).items():
        path = name.removesuffix(".weight")
        if path in shapes and name.endswith(".weight"):
            mine = {module: left.pop(module) for module in _modules(made) if module in left}
            if mine:
                pairs[number, path] = fused(made, mine, shapes[path], place)
    if left:
        raise CheckpointError(
            f"{place} holds an adapter of {next(iter(left))}, which is none of the linear layers in the {spec.layers} blocks of this {spec.family} model; "
            "is it for another model?"
        )
    adapters = Adapters(place, pairs, found.config)
    if merged_in(source):
        refuse_again(adapters.fingerprint(), place, source)
    return adapters


def _shapes(architecture: Architecture, spec: ModelSpec) -> dict[str, torch.Size]:
    """The shape of every weight in a block that can have an adapter."""
    with torch.device("meta"):
        block = architecture.plan(spec, Axis("tp"))[2]()
    return {path: module.weight.shape for path, module in linears(block)}


def _modules(made: Same | Stacked | ByHead) -> list[str]:
    names = made.names[:1] if isinstance(made, Same) else made.names
    return [name.removesuffix(".weight") for name in names]


def fused(made: Same | Stacked | ByHead, found: Mapping[str, Pair], shape: torch.Size, place: Path) -> Pair:
    """The adapter of our layer from those of the modules it is made of. Where they do not share A, theirs lie one above the other, and B has zeros between."""
    modules, first = _modules(made), next(iter(found.values()))
    rows = dict(zip(modules, map(len, made.take_apart(torch.empty(shape[0], 1)).values()), strict=True))
    for module, pair in found.items():
        if (len(pair.b), pair.a.shape[1]) != (rows[module], shape[1]):
            theirs, ours = [len(pair.b), pair.a.shape[1]], [rows[module], shape[1]]
            raise CheckpointError(f"{place}: the adapter of {module} is for a weight {theirs}, the model's is {ours}; is it for another model?")
    if len(found) == len(modules) and all(torch.equal(pair.a, first.a) and pair.scale == first.scale for pair in found.values()):
        return Pair(first.a, made.assemble([found[module].b for module in modules]), first.scale)
    a = torch.cat([pair.a.float() for pair in found.values()])
    parts, start = {module: torch.zeros(count, len(a)) for module, count in rows.items()}, 0
    for module, pair in found.items():
        parts[module][:, start : start + len(pair.a)] = pair.b.float() * pair.scale
        start += len(pair.a)
    return Pair(a, made.assemble(list(parts.values())), 1.0)


def by_module(architecture: Architecture, spec: ModelSpec, factors: Mapping[tuple[int, str], tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """The same adapters by the modules of transformers: those that are one layer here share A, and each has its rows of B."""
    names = architecture.huggingface(spec)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for (number, path), (a, b) in factors.items():
        parts = names[number, f"{path}.weight"].take_apart(b)
        found |= {name.removesuffix(".weight"): (a, part) for name, part in parts.items()}
    return found


def known_by(source: Source) -> dict[str, str]:
    """Some numbers of the embedding, by which the weights that adapters were trained on are known again in any format and cut."""
    return {BASE: json.dumps(_samples(source))}


def _samples(source: Source) -> list[float]:
    shards = source.shards(0)["word_embeddings.weight"]
    rows, columns = shards[0].shape
    places = [(row % (rows * len(shards)), row * 37 % columns) for row in range(SAMPLES)]
    return [float(shards[row // rows][row % rows, column]) for row, column in places]


def _check_base(place: Path, metadata: Mapping[str, str], source: Source) -> None:
    """Raises CheckpointError where the adapters say what they were trained on, and it is not this. Number formats may differ."""
    if BASE not in metadata:
        return
    known, found = json.loads(metadata[BASE]), _samples(source)
    if any(abs(a - b) > 2**-7 * abs(a) + 1e-6 for a, b in zip(known, found, strict=True)):
        raise CheckpointError(
            f"the adapters in {place} were trained on other weights than those of {source.place(0)}; set load to the checkpoint they belong to"
        )
