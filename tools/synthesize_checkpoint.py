#!/usr/bin/env python3
"""Writes a checkpoint of random weights in the exact layout of the 20B release, to rehearse a machine before downloading, and for benchmarks."""

import argparse
import multiprocessing
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_lite.checkpoint.find import CheckpointLayout
from megatron_lite.checkpoint.write import name_latest, save, step_folder, write_layer
from megatron_lite.config.load import load_config
from megatron_lite.data.tokenizer import load_tokenizer
from megatron_lite.errors import OutputError, TokenizerError, UserError
from megatron_lite.models.architecture import Architecture, architecture_named
from megatron_lite.models.memory import parameters
from megatron_lite.models.spec import ModelSpec, spec_of
from megatron_lite.parallel.layout import Layout, check_cut, stage_numbers
from megatron_lite.parallel.mesh import Axis

PERIOD = 4_194_301
"""A prime number of random values, repeated: no two rows of a matrix are alike, and writing waits for the disk, not for the generator."""


@dataclass(frozen=True)
class LayerFile:
    """One file to write: which layer, which tensor-parallel rank."""

    number: int
    part: int


def main(words: Sequence[str] | None = None) -> int:
    options = parse(words)
    try:
        config = load_config([options.config], dict(word.split("=", 1) for word in options.settings))
        tp = options.model_parallel_size or config.parallel.model_parallel_size
        vocab = options.vocab or config.tokenizer.padded_vocab_size or _padded(load_tokenizer(config.tokenizer).vocab_size, config.tokenizer.make_vocab_size_divisible_by * tp)
        spec = spec_of(config.model, vocab=vocab, dtype=options.dtype)
        check_cut(Layout(tp=tp), heads=spec.heads, kv_heads=spec.kv_heads, ffn=spec.ffn, layers=spec.layers)
        pipes = max(1, config.parallel.pipe_parallel_size) if options.mp_rank_files else 0
        synthesize(architecture_named(config.model.family), spec, options.folder, tp=tp, step=options.step, mp_rank_files=pipes * tp, workers=options.workers, seed=options.seed)
    except TokenizerError as error:
        return _refuse(f"{error} (or give --vocab N, the rows of the embedding)")
    except UserError as error:
        return _refuse(str(error))
    return 0


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path, help="a YAML such as configs/20B.yml")
    parser.add_argument("folder", type=Path, help="where to write; `latest` comes last")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that win over the file, such as num_layers=4")
    parser.add_argument("--model-parallel-size", type=int, help="cut of the files (default: the configuration's)")
    parser.add_argument("--step", type=int, default=150000, help="number of the step (default %(default)s)")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--vocab", type=int, help="rows of the embedding (default: the tokenizer's, padded as NeoX does)")
    parser.add_argument("--mp-rank-files", action="store_true", help="also write mp_rank_*_model_states.pt, which hold no weights")
    parser.add_argument("--workers", type=int, default=min(8, multiprocessing.cpu_count()), help="files written at once (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_intermixed_args(words)


def synthesize(architecture: Architecture, spec: ModelSpec, folder: Path, *, tp: int, step: int, mp_rank_files: int = 0, workers: int = 1, seed: int = 0) -> None:
    """Writes folder/global_stepN with every layer file, and `latest` when all are there."""
    folder.mkdir(parents=True, exist_ok=True)
    _check_space(folder, spec)
    layout = step_folder(folder, step, tp=tp)
    files = [LayerFile(number, part) for number, _ in tensors_by_layer(architecture, spec, tp) for part in range(tp)]
    started, written = time.monotonic(), 0
    with multiprocessing.get_context("fork").Pool(workers) as pool, tqdm(unit="B", unit_scale=True, desc="writing", total=2 * parameters(spec), leave=False) as bar:
        for size in pool.imap_unordered(_Writer(architecture, spec, layout, seed), files):
            written += size
            bar.update(size)
    for rank in range(mp_rank_files):
        save(rank_state(spec, step, mp_rank_files), layout.rank_file(rank))
    name_latest(folder, layout.tag)
    seconds = time.monotonic() - started
    print(f"{folder}: {len(files)} layer files, {written / 1e9:.2f} GB in {seconds:.1f} s ({written / 1e9 / seconds:.2f} GB/s)")


def tensors_by_layer(architecture: Architecture, spec: ModelSpec, tp: int) -> Iterator[tuple[int, dict[str, tuple[int, ...]]]]:
    """Layer number -> name and shape of each tensor in the files of one rank of `tp`, for the layers that have files."""
    plan = architecture.plan(spec, Axis("tp", 0, tuple(range(tp))))
    for number in stage_numbers(spec.layers, 1)[0]:
        if number == spec.head_number and spec.tied_head:
            continue
        with torch.device("meta"):
            shapes = {name: tuple(parameter.shape) for name, parameter in plan[number]().named_parameters()}
        if 2 <= number < spec.norm_number and spec.rotary_dim:
            shapes["attention.rotary_emb.inv_freq"] = (spec.rotary_dim // 2,)  # a buffer of the release's files; readers derive it
        yield number, shapes


@dataclass(frozen=True)
class _Writer:
    """Writes one file in a process of the pool; returns its bytes of tensors."""

    architecture: Architecture
    spec: ModelSpec
    layout: CheckpointLayout
    seed: int

    def __call__(self, file: LayerFile) -> int:
        torch.set_num_threads(1)
        torch.serialization.set_crc32_options(False)  # the check sum takes longer than the disk
        shapes = dict(tensors_by_layer(self.architecture, self.spec, self.layout.tp))[file.number]
        generator = torch.Generator().manual_seed(hash((self.seed, file.number, file.part)) % 2**63)
        tensors = {name: self._tensor(name, shape, generator) for name, shape in shapes.items()}
        write_layer(self.layout, file.number, file.part, tensors)
        return sum(tensor.nbytes for tensor in tensors.values())

    def _tensor(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        dtype: torch.dtype = getattr(torch, self.spec.dtype)
        if name.endswith("inv_freq"):
            return (self.spec.rotary_base ** (-torch.arange(0, self.spec.rotary_dim, 2) / self.spec.rotary_dim)).to(dtype)
        centre, scale = (1.0, 0.1) if "norm" in name and name.endswith("weight") else (0.0, (2 / (5 * self.spec.hidden)) ** 0.5)
        count = int(torch.tensor(shape).prod())
        some = torch.randn(min(PERIOD, count), generator=generator).mul_(scale).add_(centre).to(dtype)
        return some.repeat(-(-count // PERIOD))[:count].clone().view(shape)


def rank_state(spec: ModelSpec, step: int, ranks: int) -> dict[str, object]:
    """What mp_rank files of a pipeline save hold: counters, and no weights."""
    names = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "padded_vocab_size", "model_parallel_size")
    values = (spec.layers, spec.hidden, spec.heads, spec.max_positions, spec.vocab, ranks)
    return {
        "module": None,
        "optimizer": None,
        "global_steps": step,
        "skipped_steps": 0,
        "iteration": step,
        "dp_world_size": 1,
        "mp_world_size": ranks,
        "args": dict(zip(names, values, strict=True)),
    }


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _check_space(folder: Path, spec: ModelSpec) -> None:
    needed, free = 2 * parameters(spec), shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(f"the checkpoint takes {needed / 1e9:.1f} GB; {folder} has {free / 1e9:.1f} GB free; choose another folder")


def _refuse(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
