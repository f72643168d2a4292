"""The only place where the parts meet: a configuration becomes a Run, a Run becomes the layers of this process."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
from torch import nn

from megatron_lite.checkpoint.adapters import Adapters, read_adapters
from megatron_lite.checkpoint.find import CheckpointLayout, find_checkpoint
from megatron_lite.checkpoint.load import Settle, load_layers, open_source, spec_as_stored, vocabulary_rows
from megatron_lite.checkpoint.source import Source
from megatron_lite.config.sections import RunConfig
from megatron_lite.data.tokenizer import Tokenizer, load_tokenizer
from megatron_lite.errors import ConfigError, FitError, TokenizerError
from megatron_lite.log import logger
from megatron_lite.models.architecture import Architecture, architecture_named
from megatron_lite.models.memory import generation_footprint
from megatron_lite.models.spec import DTYPES, DType, ModelSpec, spec_of
from megatron_lite.parallel.budget import hold_to
from megatron_lite.parallel.join import joined_world
from megatron_lite.parallel.layout import Layout, check_cut
from megatron_lite.parallel.mesh import Mesh, build_mesh
from megatron_lite.parallel.quantized import quantize, share_place
from megatron_lite.parallel.stage import Stage
from megatron_lite.progress import progress


@dataclass(frozen=True)
class Run:
    """Everything that is decided before weights are read. `adapters` are added to them."""

    config: RunConfig
    mesh: Mesh
    architecture: Architecture
    spec: ModelSpec
    tokenizer: Tokenizer
    checkpoint: CheckpointLayout
    source: Source
    adapters: Adapters | None = None


@contextmanager
def open_run(config: RunConfig) -> Iterator[Run]:
    """Joins the other processes and reads everything but the weights. Raises UserError where the parts do not fit together."""
    patience = timedelta(days=7) if config.generation_mode == "interactive" else timedelta(minutes=30)  # people think
    with joined_world(timeout=patience) as (rank, world, device):
        hold_to(config.launcher.gpu_memory_limit, device)
        layout = layout_of(config, world)
        spec = spec_of(config.model, vocab=0, dtype="float32")
        check_cut(layout, heads=spec.heads, kv_heads=spec.kv_heads, ffn=spec.ffn, layers=spec.layers)
        yield prepare(config, build_mesh(layout, rank=rank, device=device))


def layout_of(config: RunConfig, world: int) -> Layout:
    """The layout of these settings, with as many replicas as the processes make."""
    pp, tp = max(1, config.parallel.pipe_parallel_size), config.parallel.model_parallel_size
    return Layout(pp=pp, dp=max(1, world // (pp * tp)), tp=tp, blocks=config.parallel.pipe_stage_layers or ())


def prepare(config: RunConfig, mesh: Mesh) -> Run:
    """The run of these settings on processes that have joined already."""
    architecture = architecture_named(config.model.family)
    dtype: DType = DTYPES[config.precision] if mesh.device.type == "cuda" else "float32"  # half precision is slow and inexact on CPUs
    if config.checkpoint.load is None:
        raise ConfigError("load is not set; it names the folder of the checkpoint (nothing is ever made up: without a checkpoint there is no text)")
    checkpoint = find_checkpoint(config.checkpoint.load, iteration=config.checkpoint.iteration)
    spec = _as_stored(config, checkpoint, spec_of(config.model, vocab=0, dtype=dtype))
    source = open_source(checkpoint, architecture, spec)
    tokenizer = load_tokenizer(config.tokenizer)
    rows = vocabulary_rows(source)
    if tokenizer.vocab_size > rows:
        raise TokenizerError(
            f"the tokenizer {config.tokenizer.vocab_file or config.tokenizer.tokenizer_type} has {tokenizer.vocab_size} entries, "
            f"but the checkpoint {checkpoint} has {rows} rows for them; it is not this model's tokenizer, or files of the checkpoint are missing"
        )
    tp, lora = mesh.tp.size, config.checkpoint.lora_load
    adapters = read_adapters(lora, architecture, spec, source) if lora else None
    return Run(config, mesh, architecture, replace(spec, vocab=-(-rows // tp) * tp), tokenizer, checkpoint, source, adapters)


def _as_stored(config: RunConfig, checkpoint: CheckpointLayout, spec: ModelSpec) -> ModelSpec:
    """The spec with what the checkpoint knows better, which is said."""
    stored = spec_as_stored(checkpoint, spec)
    if stored.activation != spec.activation:
        form = "the erf form" if stored.activation == "gelu" else "the tanh form"
        logger.info(
            f"GELU is computed in {form}, as config.json in {checkpoint.folder} says, whatever bias_gelu_fusion ({config.where('bias_gelu_fusion')}) is"
        )
    return stored


def load_stage(run: Run) -> Stage:
    """This process's layers, filled from the checkpoint, with a progress bar on the writer."""
    mesh, spec = run.mesh, run.spec
    numbers = mesh.layout.numbers(spec.layers)[mesh.pp.index]
    plan = run.architecture.plan(spec, mesh.tp)
    dtype: torch.dtype = getattr(torch, spec.dtype)
    expected = generation_footprint(replace(spec, quantization=None), mesh.layout, mesh.pp.index, rows=0, context=0).weights
    started = time.monotonic()
    with progress("loading", expected, shown=mesh.is_writer) as advance:
        try:
            layers = load_layers(plan, numbers, run.source, tp=mesh.tp, dtype=dtype, device=mesh.device, progress=advance, settle=_settling(run))
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            raise FitError(f"the weights do not fit on {mesh.device} of rank {mesh.rank}: {reason}; spread the model over more GPUs") from None
        if mesh.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # what reading and rounding took for a moment
        share_place(layers.values())
    mesh.wait()
    seconds = time.monotonic() - started
    held = sum(parameter.nbytes for layer in layers.values() for parameter in layer.parameters()) / 1e9
    speed = held * mesh.layout.size / seconds
    added = f" with the adapters of {run.adapters.folder}" if run.adapters else ""
    logger.info(f"loaded {run.checkpoint}{added}: {held:.2f} GB a process in {seconds:.1f} s ({speed:.2f} GB/s over all), {mesh.layout}")
    return Stage(layers, mesh, spec.hidden, dtype)


def _settling(run: Run) -> Settle | None:
    """What is done with a layer as soon as it is filled: adapters go into its matrices, which are rounded then. None where nothing is to be done."""
    if not (run.adapters or run.spec.quantization):
        return None

    def settle(number: int, layer: nn.Module) -> None:
        if run.adapters:
            run.adapters.merge_into(layer, number, run.mesh.tp)
        if run.spec.quantization:
            quantize(layer, run.mesh.tp)

    return settle
