"""What every measurement starts from: processes that have joined, a model of random weights or of a checkpoint, and tokens without a tokenizer."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from megatron_lite.benchmark.table import OURS, Row
from megatron_lite.config.sections import RunConfig
from megatron_lite.data.tokenizer import Tokenizer, load_tokenizer
from megatron_lite.errors import TokenizerError
from megatron_lite.inference.continuous import ContinuousDecoder
from megatron_lite.inference.decoders import Load, continuous_decoder
from megatron_lite.inference.paged import pages_for
from megatron_lite.inference.step import Stepper
from megatron_lite.log import logger
from megatron_lite.models.architecture import Architecture, architecture_named
from megatron_lite.models.spec import DTYPES, DType, ModelSpec, spec_of
from megatron_lite.parallel.budget import hold_to
from megatron_lite.parallel.join import demand_own_gpus, joined_world
from megatron_lite.parallel.layout import Layout, check_cut
from megatron_lite.parallel.mesh import Mesh, build_mesh
from megatron_lite.parallel.quantized import quantize, share_place
from megatron_lite.parallel.stage import Stage
from megatron_lite.run import Run, layout_of, load_stage, prepare


class Numbers:
    """The tokenizer of random weights: the text of a token is its number. The last row of the vocabulary ends a text, and is never chosen."""

    def __init__(self, rows: int) -> None:
        self.vocab_size = rows - 1
        self.eod = rows - 1

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(map(str, tokens))

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        return [self.encode(text) for text in texts]


@dataclass(frozen=True)
class Bench:
    """A model on the processes that were started, without its weights. `run` is the checkpoint that they come from; None for random ones."""

    config: RunConfig
    mesh: Mesh
    architecture: Architecture
    spec: ModelSpec
    tokenizer: Tokenizer
    run: Run | None

    @property
    def weights(self) -> str:
        source = "random weights" if self.run is None else str(self.run.checkpoint)
        return f"{source} in {self.spec.quantization}" if self.spec.quantization else source

    @property
    def ours(self) -> str:
        """Who decodes, as the table names it."""
        is_naive = self.mesh.pp.size > 1 and self.config.generation.pipe_schedule == "naive"
        return f"{OURS}, naive schedule" if is_naive else OURS

    def stage(self) -> Stage:
        return random_stage(self.architecture, self.spec, self.mesh) if self.run is None else load_stage(self.run)


@contextmanager
def open_bench(config: RunConfig, *, vocab: int | None, from_checkpoint: bool) -> Iterator[Bench]:
    """One GPU a process; the layout is the configuration's where that many were started, else one model over all of them."""
    with joined_mesh(config) as mesh:
        if from_checkpoint:
            run = prepare(config, mesh)
            yield Bench(config, mesh, run.architecture, run.spec, run.tokenizer, run)
            return
        rows = vocab or vocabulary(config)
        spec = spec_of(config.model, vocab=-(-rows // mesh.layout.tp) * mesh.layout.tp, dtype=precision(config, mesh.device))
        yield Bench(config, mesh, architecture_named(config.model.family), spec, Numbers(spec.vocab), None)


@contextmanager
def joined_mesh(config: RunConfig) -> Iterator[Mesh]:
    with joined_world() as (rank, world, device):
        demand_own_gpus(device, "a measurement")
        hold_to(config.launcher.gpu_memory_limit, device)
        layout = fitted(config, world)
        spec = spec_of(config.model, vocab=0, dtype="float32")
        check_cut(layout, heads=spec.heads, kv_heads=spec.kv_heads, ffn=spec.ffn, layers=spec.layers)
        yield build_mesh(layout, rank=rank, device=device)


def fitted(config: RunConfig, world: int) -> Layout:
    """The layout that is asked for, in as many replicas as there are processes for, or one model over all of them."""
    asked = replace(layout_of(config, world), dp=1)
    if world % asked.size == 0:
        return layout_of(config, world)
    found = Layout(tp=world)
    logger.info(f"the configuration asks for {asked.pp} x {asked.tp} = {asked.size} processes; {world} started: using {found}")
    return found


def precision(config: RunConfig, device: torch.device) -> DType:
    return DTYPES[config.precision] if device.type == "cuda" else "float32"


def vocabulary(config: RunConfig) -> int:
    """Rows of the embedding, by NeoX's rule."""
    if config.tokenizer.padded_vocab_size:
        return config.tokenizer.padded_vocab_size
    multiple = config.tokenizer.make_vocab_size_divisible_by * config.parallel.model_parallel_size
    try:
        return -(-load_tokenizer(config.tokenizer).vocab_size // multiple) * multiple
    except TokenizerError as error:
        raise TokenizerError(f"{error}; or give --vocab N, the rows of the embedding (50432 for 20B)") from None


@torch.no_grad()
def random_stage(architecture: Architecture, spec: ModelSpec, mesh: Mesh) -> Stage:
    """The layers of this process, drawn on the device: norms are neutral, all else has the size of trained weights."""
    layers: dict[int, nn.Module] = {}
    dtype: torch.dtype = getattr(torch, spec.dtype)
    generator = torch.Generator(device=mesh.device).manual_seed(1)
    plan = architecture.plan(spec, mesh.tp)
    for number in mesh.layout.numbers(spec.layers)[mesh.pp.index]:
        with torch.device("meta"):
            layer = plan[number]().to(dtype).requires_grad_(False)
        layer.to_empty(device=mesh.device)
        for name, parameter in layer.named_parameters():
            if "norm" in name:
                parameter.fill_(0 if name.endswith("bias") else 1)
            else:
                parameter.normal_(std=(2 / (5 * spec.hidden)) ** 0.5, generator=generator)
        if spec.quantization:
            quantize(layer, mesh.tp)
        layers[number] = layer.eval()
    release(mesh.device)  # what drawing and rounding took for a moment
    share_place(layers.values())
    return Stage(layers, mesh, spec.hidden, dtype)


def random_tokens(words: int, count: int, *seed: int) -> list[int]:
    """The same in every process."""
    return np.random.default_rng(seed).integers(1, words, count).tolist()


def serving(stage: Stage, bench: Bench, *, rows: int, tokens: int) -> ContinuousDecoder:
    """What serves `rows` rows of up to `tokens` tokens each: with captured steps on GPUs, with plain ones elsewhere."""
    spec, load = bench.spec, Load(bench.spec.max_positions, rows, tokens, bench.config.generation.pipe_schedule)
    if stage.mesh.device.type == "cuda":
        return continuous_decoder(stage, spec, bench.tokenizer, load)
    stepper = Stepper(stage, spec, words=bench.tokenizer.vocab_size, pages=1 + rows * pages_for(tokens))
    return ContinuousDecoder(stepper, bench.tokenizer, context=load.context, rows=rows, tokens=2048, groups=load.groups(stage.mesh.pp.size))


def most_memory(bench: Bench) -> Iterator[Row]:
    """What the tensors of the fullest GPU took at most, since the count was begun; CPUs keep none."""
    mesh = bench.mesh
    if mesh.device.type != "cuda":
        return
    used, taken = torch.cuda.max_memory_allocated(mesh.device), torch.cuda.max_memory_reserved(mesh.device)
    most = torch.tensor([used, taken], dtype=torch.float64, device=mesh.device) / 1e9
    for axis in (mesh.tp, mesh.pp, mesh.dp):
        most = axis.maximum(most)
    used, taken = most.tolist()
    yield Row(what="most memory of a GPU", by=bench.ours, rate=used, unit="GB", note=f"{taken:.2f} GB with what is kept ready, and CUDA itself beside it")


def release(device: torch.device) -> None:
    """Gives back the memory of what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
