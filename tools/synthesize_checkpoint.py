#!/usr/bin/env python3
"""Writes a checkpoint of random weights in the exact layout of the 20B release, to rehearse a machine before downloading, and for benchmarks."""

import argparse
import multiprocessing
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # last, because a top-level evaluate.py must not shadow the `evaluate` package

from megatron_lite.checkpoint.find import CheckpointLayout
from megatron_lite.checkpoint.write import name_latest, save, step_folder, write_layer
from megatron_lite.config.load import load_config
from megatron_lite.config.sections import RunConfig
from megatron_lite.data.tokenizer import load_tokenizer
from megatron_lite.errors import OutputError, TokenizerError, UserError
from megatron_lite.log import set_up_logging
from megatron_lite.models.architecture import Architecture, architecture_named
from megatron_lite.models.spec import BYTES, ModelSpec, spec_of
from megatron_lite.parallel.layout import Layout, check_cut, stage_numbers
from megatron_lite.parallel.mesh import Axis
from megatron_lite.progress import progress

PERIOD = 4_194_301
"""A prime number of random values, repeated: no two rows of a matrix are alike, and writing waits for the disk, not for the generator."""


@dataclass(frozen=True)
class LayerFile:
    """One file to write: the tensors that one tensor-parallel rank holds of one layer, by name and shape."""

    number: int
    part: int
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def numbers(self) -> int:
        """How many numbers it holds."""
        return sum(map(prod, self.shapes.values()))


def main(words: Sequence[str] | None = None) -> int:
    options = parse(words)
    set_up_logging()
    try:
        settings = dict(word.split("=", 1) if "=" in word else (word, "") for word in options.settings)
        config = load_config([options.config], settings)
        tp = options.model_parallel_size or config.parallel.model_parallel_size
        spec = spec_of(config.model, vocab=_padded(options.vocab, tp) if options.vocab else padded_vocabulary(config, tp), dtype=options.dtype)
        check_cut(Layout(tp=tp), heads=spec.heads, kv_heads=spec.kv_heads, ffn=spec.ffn, layers=spec.layers)
        pipes = max(1, config.parallel.pipe_parallel_size) if options.mp_rank_files else 0
        synthesize(spec, layer_files(architecture_named(config.model.family), spec, tp), options, tp=tp, pipes=pipes)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path, help="a YAML such as configs/20B.yml")
    parser.add_argument("folder", type=Path, help="where to write; `latest` comes last")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that win over the file, such as num_layers=4")
    parser.add_argument("--model-parallel-size", type=positive, help="cut of the files (default: the configuration's)")
    parser.add_argument("--step", type=int, default=150000, help="number of the step (default %(default)s)")
    parser.add_argument("--dtype", choices=tuple(BYTES), default="float16", help="number format (default %(default)s)")
    parser.add_argument("--vocab", type=positive, help="rows of the embedding (default: the tokenizer's entries, padded as NeoX does)")
    parser.add_argument("--mp-rank-files", action="store_true", help="also write mp_rank_*_model_states.pt, which hold no weights")
    parser.add_argument("--workers", type=positive, default=min(8, multiprocessing.cpu_count()), help="files written at once (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="other numbers (default %(default)s)")
    return parser.parse_intermixed_args(words)


def positive(word: str) -> int:
    """A whole number of at least 1; argparse tells the user where it is none."""
    if int(word) < 1:
        raise ValueError
    return int(word)


def padded_vocabulary(config: RunConfig, tp: int) -> int:
    """Rows of the embedding, by NeoX's rule."""
    if config.tokenizer.padded_vocab_size:
        return config.tokenizer.padded_vocab_size
    multiple = config.tokenizer.make_vocab_size_divisible_by * tp
    try:
        return _padded(load_tokenizer(config.tokenizer).vocab_size, multiple)
    except TokenizerError as error:
        raise TokenizerError(f"{error}; or give --vocab N, the rows of the embedding (50432 for 20B)") from None


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def layer_files(architecture: Architecture, spec: ModelSpec, tp: int) -> list[LayerFile]:
    """Every file of a checkpoint cut for tp ranks."""
    plan = architecture.plan(spec, Axis("tp", 0, tuple(range(tp))))
    numbers = stage_numbers(spec.layers, 1)[0]
    return [LayerFile(number, part, shapes) for number in numbers if (shapes := _shapes(plan[number], number, spec)) for part in range(tp)]


def _shapes(make: Callable[[], torch.nn.Module], number: int, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a layer's tensors in the file of one rank; none for a tied head, which has no file."""
    if number == spec.head_number and spec.tied_head:
        return {}
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in make().named_parameters()}
    if 2 <= number < spec.norm_number and spec.rotary_dim:
        shapes["attention.rotary_emb.inv_freq"] = (spec.rotary_dim // 2,)  # a buffer of the release's files; readers derive it
    return shapes


def synthesize(spec: ModelSpec, files: Sequence[LayerFile], options: argparse.Namespace, *, tp: int, pipes: int) -> None:
    """Writes folder/global_stepN with all of its files, and `latest` when they are there."""
    folder, size, started = options.folder, sum(file.numbers for file in files) * BYTES[spec.dtype], time.monotonic()
    check_place(folder, options.step, size)
    layout = step_folder(folder, options.step, tp=tp)
    with multiprocessing.get_context("fork").Pool(options.workers) as pool, progress("writing", size) as advance:
        for count in pool.imap_unordered(_Writer(spec, layout, options.seed), files):
            advance(count * BYTES[spec.dtype])
    for rank in range(pipes * tp):
        save(rank_state(spec, options.step, pipes=pipes, tp=tp), layout.rank_file(rank))
    name_latest(folder, layout.tag)
    seconds = time.monotonic() - started
    print(f"{folder}: {len(files)} layer files, {size / 1e9:.2f} GB in {seconds:.1f} s ({size / 1e9 / seconds:.2f} GB/s)")


def check_place(folder: Path, step: int, needed: int) -> None:
    """Raises OutputError where a checkpoint lies already, or the disk has no room for so many bytes. Makes nothing."""
    if present := [path for path in (folder / "latest", folder / f"global_step{step}") if path.exists()]:
        raise OutputError(f"{present[0]} is there already, and random weights replace nothing; choose another folder, or delete it first")
    place = next(place for place in (folder.resolve(), *folder.resolve().parents) if place.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OutputError(f"the checkpoint takes {needed / 1e9:.1f} GB; {place} has {free / 1e9:.1f} GB free; choose another folder")


@dataclass(frozen=True)
class _Writer:
    """Writes one file in a process of the pool; returns how many numbers it holds."""

    spec: ModelSpec
    layout: CheckpointLayout
    seed: int

    def __call__(self, file: LayerFile) -> int:
        torch.set_num_threads(1)
        torch.serialization.set_crc32_options(False)  # the check sum takes longer than the disk
        write_layer(self.layout, file.number, file.part, dict(self._tensors(file)))
        return file.numbers

    def _tensors(self, file: LayerFile) -> Iterator[tuple[str, Tensor]]:
        """Tensors that differ from those of every other file, the same for the same seed on every machine."""
        state = np.random.SeedSequence((self.seed % 2**64, file.number, file.part)).generate_state(1)
        generator = torch.Generator().manual_seed(int(state[0]))
        dtype: torch.dtype = getattr(torch, self.spec.dtype)
        for name, shape in file.shapes.items():
            if name.endswith("inv_freq"):
                yield name, (self.spec.rotary_base ** (-torch.arange(0, self.spec.rotary_dim, 2) / self.spec.rotary_dim)).to(dtype)
                continue
            some = torch.randn(min(PERIOD, prod(shape)), generator=generator)
            around_one = "norm" in name and not name.endswith("bias")
            some = some.mul_(0.1).add_(1) if around_one else some.mul_((2 / (5 * self.spec.hidden)) ** 0.5)
            yield name, _repeated(some.to(dtype), prod(shape)).view(shape)


def _repeated(some: Tensor, count: int) -> Tensor:
    """So many numbers, the same ones again and again."""
    whole = torch.empty(count, dtype=some.dtype)
    for piece in whole.split(len(some)):
        piece.copy_(some[: len(piece)])
    return whole


def rank_state(spec: ModelSpec, step: int, *, pipes: int, tp: int) -> dict[str, object]:
    """What mp_rank files of a pipeline save hold: counters, and no weights."""
    counters = {"global_steps": step, "skipped_steps": 0, "iteration": step, "dp_world_size": 1, "mp_world_size": pipes * tp}
    stated = {
        "num_layers": spec.layers,
        "hidden_size": spec.hidden,
        "num_attention_heads": spec.heads,
        "max_position_embeddings": spec.max_positions,
        "padded_vocab_size": spec.vocab,
        "model_parallel_size": tp,
    }
    return {"module": None, "optimizer": None, **counters, "args": stated}


if __name__ == "__main__":
    sys.exit(main())
