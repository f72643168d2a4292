"""The only place where the parts meet: a configuration becomes a Run, a Run becomes the layers of this process."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from tqdm import tqdm

from megatron_lite.checkpoint.find import CheckpointLayout, check_numbers, find_checkpoint
from megatron_lite.checkpoint.load import load_layers, open_source, vocabulary_rows
from megatron_lite.checkpoint.source import Source
from megatron_lite.config.sections import RunConfig
from megatron_lite.data.tokenizer import Tokenizer, load_tokenizer
from megatron_lite.errors import CheckpointError, ConfigError, FitError, TokenizerError
from megatron_lite.log import logger
from megatron_lite.models.architecture import Architecture, architecture_named
from megatron_lite.models.spec import DType, ModelSpec, spec_of
from megatron_lite.parallel.layout import Layout, check_cut, stage_numbers
from megatron_lite.parallel.mesh import Mesh, build_mesh, joined_world
from megatron_lite.parallel.stage import Stage

DTYPES: dict[str, DType] = {"fp16": "float16", "bfloat16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True)
class Run:
    """Everything that is decided before weights are read."""

    config: RunConfig
    mesh: Mesh
    architecture: Architecture
    spec: ModelSpec
    tokenizer: Tokenizer
    checkpoint: CheckpointLayout
    source: Source


@contextmanager
def open_run(config: RunConfig) -> Iterator[Run]:
    """Joins the other processes and reads everything but the weights. Raises UserError where the parts do not fit together."""
    patience = timedelta(days=7) if config.generation.text_gen_type == "interactive" else timedelta(minutes=30)  # people think
    with joined_world(timeout=patience) as (rank, world, device):
        pp, tp = max(1, config.parallel.pipe_parallel_size), config.parallel.model_parallel_size
        layout = Layout(pp=pp, dp=max(1, world // (pp * tp)), tp=tp)
        architecture = architecture_named(config.model.family)
        dtype: DType = DTYPES[config.precision] if device.type == "cuda" else "float32"  # half precision is slow and inexact on CPUs
        spec = spec_of(config.model, vocab=0, dtype=dtype)
        check_cut(layout, heads=spec.heads, kv_heads=spec.kv_heads, ffn=spec.ffn, layers=spec.layers)
        mesh = build_mesh(layout, rank=rank, device=device)
        tokenizer = load_tokenizer(config.tokenizer)
        checkpoint = _checkpoint(config, spec)
        source = open_source(checkpoint, architecture, spec)
        rows = vocabulary_rows(source)
        if tokenizer.vocab_size > rows:
            raise TokenizerError(
                f"the tokenizer {config.tokenizer.vocab_file} has {tokenizer.vocab_size} entries, but the checkpoint {checkpoint} has {rows} rows; they do not belong together"
            )
        spec = spec_of(config.model, vocab=-(-rows // tp) * tp, dtype=dtype)
        yield Run(config, mesh, architecture, spec, tokenizer, checkpoint, source)


def _checkpoint(config: RunConfig, spec: ModelSpec) -> CheckpointLayout:
    if config.checkpoint.load is None:
        raise ConfigError("load is not set; it names the folder of the checkpoint (nothing is ever made up: without a checkpoint there is no text)")
    checkpoint = find_checkpoint(config.checkpoint.load, iteration=config.checkpoint.iteration)
    numbers = stage_numbers(spec.layers, 1)[0]
    check_numbers(checkpoint, numbers[:-1] if spec.tied_head else numbers, layers=spec.layers)
    return checkpoint


def load_stage(run: Run) -> Stage:
    """This process's layers, filled from the checkpoint, with a progress bar on the writer."""
    mesh, spec = run.mesh, run.spec
    numbers = stage_numbers(spec.layers, mesh.layout.pp)[mesh.pp.index]
    plan = run.architecture.plan(spec, mesh.tp)
    dtype: torch.dtype = getattr(torch, spec.dtype)
    started = time.monotonic()
    bar = tqdm(
        total=_stage_bytes(spec, mesh.layout, mesh.pp.index), unit="B", unit_scale=True, desc="loading", disable=not mesh.is_writer, leave=False, mininterval=0.2
    )
    with bar:
        try:
            layers = load_layers(plan, numbers, run.source, tp=mesh.tp, dtype=dtype, device=mesh.device, progress=bar.update)
        except torch.OutOfMemoryError as error:
            raise FitError(f"the weights do not fit on {mesh.device} of rank {mesh.rank}: {str(error).splitlines()[0]}; spread the model over more GPUs") from None
        if mesh.device.type == "cuda":
            torch.cuda.synchronize()
    mesh.wait()
    seconds = time.monotonic() - started
    held = sum(parameter.nbytes for layer in layers.values() for parameter in layer.parameters())
    logger.info(f"loaded {run.checkpoint}: {held / 1e9:.2f} GB a process in {seconds:.1f} s ({held * mesh.layout.size / 1e9 / seconds:.2f} GB/s over all), {mesh.layout}")
    if not layers:
        raise CheckpointError("no layer was loaded")
    return Stage(layers, mesh, spec.hidden, dtype)


def _stage_bytes(spec: ModelSpec, layout: Layout, stage: int) -> int:
    from megatron_lite.models.memory import generation_footprint

    return generation_footprint(spec, layout, stage, rows=0, context=0).weights
