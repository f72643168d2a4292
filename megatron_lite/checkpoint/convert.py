"""Any checkpoint -> layer files of any cut, or a Hugging Face folder: one layer in memory at a time, and nothing that looks complete until it is."""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_lite.checkpoint.adapters import Adapters
from megatron_lite.checkpoint.find import LAYER_FILE, RANK_FILE, SHARD, STEP, CheckpointLayout
from megatron_lite.checkpoint.load import matched
from megatron_lite.checkpoint.merged import Merged, merged_in, write_merged
from megatron_lite.checkpoint.source import Source
from megatron_lite.checkpoint.write import name_latest, write_layer
from megatron_lite.errors import OutputError
from megatron_lite.models.architecture import Architecture
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.adapter import merged_parts
from megatron_lite.parallel.layout import stage_numbers
from megatron_lite.parallel.mesh import Axis
from megatron_lite.parallel.shards import RankLocal, Replicate, Rule, drifted, take

Progress = Callable[[int], object]
# Names of files -> what they make of the folder that they lie in, whatever `latest` says
KINDS = {
    "a Hugging Face model": re.compile(r"config\.json|(pytorch_)?model.*\.(safetensors|bin)(\.index\.json)?"),
    "layer files": LAYER_FILE,
    "files of a pipe-parallel-size-0 save": RANK_FILE,
    "a model of mesh-transformer-jax": re.compile(f"{SHARD.pattern}|{STEP.pattern}"),
}


@dataclass(frozen=True)
class Model:
    """A checkpoint to convert, and what it is; spec.vocab are the stored rows of its embedding. `adapters` are merged into it."""

    source: Source
    architecture: Architecture
    spec: ModelSpec
    adapters: Adapters | None = None

    def layers(self) -> Iterator[tuple[int, dict[str, tuple[Rule, list[Tensor]]]]]:
        """Number -> name -> how it is cut and its stored parts, for every layer that has weights of its own. Raises CheckpointError where the checkpoint is
        none of this model."""
        plan = self.architecture.plan(self.spec, Axis("tp"))
        for number in stage_numbers(self.spec.layers, 1)[0]:
            if number == self.spec.head_number and self.spec.tied_head:
                continue
            with torch.device("meta"):
                layer = plan[number]()
            found: dict[str, tuple[Rule, list[Tensor]]] = {}
            for path, (rule, stored, _) in matched(layer, number, self.source, 1).items():
                module, _, name = path.rpartition(".")
                pair = self.adapters.pairs.get((number, module)) if self.adapters and name == "weight" else None
                found[path] = (rule, merged_parts(stored, rule, pair.a, pair.b.float() * pair.scale) if pair else stored)
            yield number, found

    def merged(self) -> list[Merged]:
        """The adapters that the weights hold once they are written."""
        mine = [Merged(self.adapters.fingerprint(), str(self.adapters.folder))] if self.adapters else []
        return [*merged_in(self.source), *mine]


def to_neox(model: Model, folder: Path, *, tp: int, step: int, dtype: torch.dtype, progress: Progress) -> list[str]:
    """Writes folder/global_stepN cut for `tp`, `latest` last. Returns the names of tensors whose copies differed and were averaged."""
    tag, averaged = f"global_step{step}", []
    with appearing(folder / tag) as partial:
        layout = CheckpointLayout("neox", partial, tag, tp, ())
        for number, tensors in model.layers():
            averaged += [f"layer {number} {name}" for name, (rule, stored) in tensors.items() if drifted(rule, stored, tp)]
            for part in range(tp):
                mine = {name: take(_single(rule), stored, part, tp).to(dtype).clone() for name, (rule, stored) in tensors.items()}
                write_layer(layout, number, part, mine)
                progress(sum(tensor.nbytes for tensor in mine.values()))
        write_merged(partial, model.merged())
    name_latest(folder, tag)
    return averaged


def to_huggingface(model: Model, folder: Path, *, dtype: torch.dtype, extra: Mapping[str, object], progress: Progress) -> list[str]:
    """Writes a folder that transformers' from_pretrained reads: a safetensors file per layer, their index and config.json, with `extra` in it.
    Returns the names of tensors whose copies differed and were averaged."""
    names = model.architecture.huggingface(model.spec)
    count = len(stage_numbers(model.spec.layers, 1)[0]) - model.spec.tied_head
    index: dict[str, str] = {}
    averaged, total = [], 0
    with appearing(folder) as partial:
        for position, (number, tensors) in enumerate(model.layers(), start=1):
            averaged += [f"layer {number} {name}" for name, (rule, stored) in tensors.items() if drifted(rule, stored, 1)]
            file = f"model-{position:05d}-of-{count:05d}.safetensors"
            parts: dict[str, Tensor] = {}
            for name, (rule, stored) in tensors.items():
                whole = _single(rule).merge(stored).to(dtype)
                parts |= {theirs: part.contiguous().clone() for theirs, part in names[number, name].take_apart(whole).items()}
            save_file(parts, partial / file, {"format": "pt"})
            index |= dict.fromkeys(parts, file)
            size = sum(part.nbytes for part in parts.values())
            total += size
            progress(size)
        rows = sum(len(shard) for shard in model.source.shards(0)["word_embeddings.weight"])
        config = {"model_type": model.architecture.model_type, "vocab_size": rows, "dtype": str(dtype).removeprefix("torch."), **extra}
        _write_json(partial / "config.json", {**model.architecture.config(model.spec), **config, "torch_dtype": config["dtype"]})
        write_merged(partial, model.merged())
        _write_json(partial / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
    return averaged


def refuse_mixture(folder: Path) -> None:
    """Raises OutputError where layer files in this folder and what it holds already would be taken for each other: `latest` names one step of one kind."""
    names = _names(folder)
    for kind, pattern in KINDS.items():
        if found := [name for name in names if pattern.fullmatch(name)]:
            raise OutputError(f"{folder} holds {kind} ({found[0]}): of it and layer files in one folder only one would be found; choose another folder")
    for mark in ("manifest.json", "adapter_config.json"):
        if found := sorted(folder.glob(f"global_step*/{mark}")):
            step = found[0].parent.name
            raise OutputError(f"{folder} holds checkpoints of a training ({step}), which goes on from the step that `latest` names; choose another folder")


def refuse_filled(folder: Path) -> None:
    """Raises OutputError where there is anything in the folder."""
    if _names(folder):
        raise OutputError(f"{folder} exists and is not empty; choose another folder, or delete it first")


def _names(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        raise OutputError(f"{folder} is a file; choose another folder") from None
    except OSError as error:
        raise OutputError(f"{folder} cannot be read: {error.strerror}; choose another folder") from None


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder to write into that gets its name only when all is written. Else it goes; what a killed process leaves is called .partial."""
    partial = folder.with_name(folder.name + ".partial")
    refuse_filled(folder)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.replace(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        advice = "choose another folder" if isinstance(error, PermissionError) else "free some space or choose another folder"
        raise OutputError(f"{partial} cannot be written: {reason}; {advice}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _single(rule: Rule) -> Rule:
    """The formats know one norm for all ranks of a cut."""
    return Replicate() if isinstance(rule, RankLocal) else rule


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
