#!/usr/bin/env python3
"""Writes a checkpoint of random weights in the exact layout of the 20B release, or of GPT-J's, to rehearse a machine before downloading, and for benchmarks."""

import argparse
import multiprocessing
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # last, because a top-level evaluate.py must not shadow the `evaluate` package

from megatron_lite.benchmark.words import positive
from megatron_lite.checkpoint.convert import Model, to_huggingface
from megatron_lite.checkpoint.find import CheckpointLayout
from megatron_lite.checkpoint.synthetic import SLIM_SHARDS, RandomWeights, SlimShard, layer_shapes, random_tensors, rank_state, slim_size, whole_size
from megatron_lite.checkpoint.write import name_latest, save, step_folder, write_layer
from megatron_lite.config.load import load_config
from megatron_lite.config.sections import RunConfig
from megatron_lite.data.tokenizer import load_tokenizer
from megatron_lite.errors import ConfigError, OutputError, TokenizerError, UserError
from megatron_lite.log import set_up_logging
from megatron_lite.models.architecture import Architecture, architecture_named
from megatron_lite.models.spec import BYTES, DType, ModelSpec, spec_of
from megatron_lite.parallel.layout import Layout, check_cut, stage_numbers
from megatron_lite.progress import progress


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
        dtype: DType = options.dtype or ("bfloat16" if options.format == "mesh-transformer" else "float16")
        tp = options.model_parallel_size or config.parallel.model_parallel_size
        spec = spec_of(config.model, vocab=_padded(options.vocab, tp) if options.vocab else padded_vocabulary(config, tp), dtype=dtype)
        check_cut(Layout(tp=tp), heads=spec.heads, kv_heads=spec.kv_heads, ffn=spec.ffn, layers=spec.layers)
        architecture = architecture_named(config.model.family)
        if options.format == "huggingface":
            synthesize_huggingface(architecture, spec, options)
        elif options.format == "mesh-transformer":
            synthesize_slim(spec, options)
        else:
            pipes = max(1, config.parallel.pipe_parallel_size) if options.mp_rank_files else 0
            synthesize(spec, layer_files(architecture, spec, tp), options, tp=tp, pipes=pipes)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path, help="a YAML such as configs/20B.yml")
    parser.add_argument("folder", type=Path, help="where to write; `latest` comes last")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that win over the file, such as num_layers=4")
    parser.add_argument("--format", choices=("neox", "huggingface", "mesh-transformer"), default="neox", help="whose files (default %(default)s)")
    parser.add_argument("--model-parallel-size", type=positive, help="cut of the files (default: the configuration's, 8 of mesh-transformer)")
    parser.add_argument("--step", type=int, default=150000, help="number of the step (default %(default)s)")
    parser.add_argument("--dtype", choices=tuple(BYTES), help="number format (default: float16, bfloat16 of mesh-transformer)")
    parser.add_argument("--vocab", type=positive, help="rows of the embedding (default: the tokenizer's entries, padded as NeoX does)")
    parser.add_argument("--mp-rank-files", action="store_true", help="also write mp_rank_*_model_states.pt, which hold no weights")
    parser.add_argument("--workers", type=positive, default=min(8, multiprocessing.cpu_count()), help="files written at once (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="other numbers (default %(default)s)")
    return parser.parse_intermixed_args(words)


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
    numbers = stage_numbers(spec.layers, 1)[0]
    return [LayerFile(number, part, shapes) for number in numbers if (shapes := _shapes(architecture, spec, number, tp)) for part in range(tp)]


def _shapes(architecture: Architecture, spec: ModelSpec, number: int, tp: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a layer's tensors in the file of one rank; none for a tied head, which has no file."""
    shapes = layer_shapes(architecture, spec, number, tp)
    if spec.is_block(number) and spec.rotary_dim:
        shapes["attention.rotary_emb.inv_freq"] = (spec.rotary_dim // 2,)  # a buffer of the release's files; readers derive it
    return shapes


def synthesize(spec: ModelSpec, files: Sequence[LayerFile], options: argparse.Namespace, *, tp: int, pipes: int) -> None:
    """Writes folder/global_stepN with all of its files, and `latest` when they are there."""
    folder, size = options.folder, sum(file.numbers for file in files) * BYTES[spec.dtype]
    check_place(folder, options.step, size)
    layout = step_folder(folder, options.step, tp=tp)
    with timed(f"{folder}: {len(files)} layer files", size):
        with multiprocessing.get_context("fork").Pool(options.workers) as pool, progress("writing", size) as advance:
            for count in pool.imap_unordered(_Writer(spec, layout, options.seed), files):
                advance(count * BYTES[spec.dtype])
        for rank in range(pipes * tp):
            save(rank_state(spec, options.step, pipes=pipes, tp=tp), layout.rank_file(rank))
        name_latest(folder, layout.tag)


def check_place(folder: Path, step: int, needed: int) -> None:
    """Raises OutputError where a checkpoint lies already, or the disk has no room for so many bytes. Makes nothing."""
    if present := [path for path in (folder / "latest", folder / f"global_step{step}", folder / "shard_0") if path.exists()]:
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
        write_layer(self.layout, file.number, file.part, dict(random_tensors(file.shapes, self.spec, self.seed, file.number, file.part)))
        return file.numbers


def synthesize_huggingface(architecture: Architecture, spec: ModelSpec, options: argparse.Namespace) -> None:
    """Writes a folder that transformers reads, one layer after the other."""
    size = whole_size(architecture, spec) * BYTES[spec.dtype]
    check_place(options.folder, options.step, size)
    model = Model(RandomWeights(architecture, spec, options.seed), architecture, spec)
    with timed(f"{options.folder}: a Hugging Face folder", size), progress("writing", size) as advance:
        to_huggingface(model, options.folder, dtype=getattr(torch, spec.dtype), extra={}, progress=advance)


def synthesize_slim(spec: ModelSpec, options: argparse.Namespace) -> None:
    """Writes folder/step_N/shard_M/P.npz."""
    shards = options.model_parallel_size or SLIM_SHARDS
    if spec.family != "gptj" or spec.dtype != "bfloat16" or any(count % shards for count in (spec.heads, spec.vocab, spec.ffn)):
        raise ConfigError(f"mesh-transformer-jax wrote GPT-J in bfloat16, heads and vocabulary in {shards} equal shards; give such a model")
    size = slim_size(spec, shards) * BYTES[spec.dtype]
    folder = options.folder / f"step_{options.step}"
    check_place(folder, options.step, size)
    shard = SlimShard(spec, shards, options.seed, folder)
    with (
        timed(f"{folder}: {shards} shards", size),
        multiprocessing.get_context("fork").Pool(options.workers, torch.set_num_threads, (1,)) as pool,
        progress("writing", size) as advance,
    ):
        for count in pool.imap_unordered(shard, range(shards)):
            advance(count * BYTES[spec.dtype])


@contextmanager
def timed(what: str, size: int) -> Iterator[None]:
    """Says when it is done what was written, and how fast."""
    started = time.monotonic()
    yield
    seconds = time.monotonic() - started
    print(f"{what}, {size / 1e9:.2f} GB in {seconds:.1f} s ({size / 1e9 / seconds:.2f} GB/s)")


if __name__ == "__main__":
    sys.exit(main())
