"""From a configuration to an engine that stands where training begins: new weights, those of a checkpoint, or a training that goes on."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from megatron_lite.checkpoint.load import load_layers, vocabulary_rows
from megatron_lite.config.precision import check_trainable
from megatron_lite.config.sections import RunConfig
from megatron_lite.data.batches import Batches
from megatron_lite.data.packing import Packing
from megatron_lite.data.sources import Purpose, TrainingData, open_data
from megatron_lite.data.tokenizer import Tokenizer, load_tokenizer
from megatron_lite.errors import ConfigError
from megatron_lite.log import logger
from megatron_lite.models.architecture import Architecture, architecture_named
from megatron_lite.models.spec import DType, ModelSpec, spec_of
from megatron_lite.parallel.budget import hold_to
from megatron_lite.parallel.join import demand_own_gpus, joined_world
from megatron_lite.parallel.layout import check_cut
from megatron_lite.parallel.mesh import Mesh, build_mesh
from megatron_lite.parallel.quantized import quantize
from megatron_lite.run import Run, layout_of, prepare
from megatron_lite.training.beginning import Beginning, beginning_of, stored_state, tidy, with_adapters_that_are_there
from megatron_lite.training.engine import Engine, start_engine
from megatron_lite.training.folders import step_of
from megatron_lite.training.fresh import draw_layer
from megatron_lite.training.lora import check_lora, put_adapters
from megatron_lite.training.recipe import Recipe, recipe_of
from megatron_lite.training.resume import read_progress, restore
from megatron_lite.training.save import STATE, Progress
from megatron_lite.training.shared_heads import joined
from megatron_lite.training.stage import TrainedStage, make_trainable
from megatron_lite.training.state import MASTER, write_masters

FORMATS: dict[torch.dtype, DType] = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


@dataclass(frozen=True)
class Training:
    """Everything a training needs. `run` is the checkpoint it begins with, None for new weights; `words` the rows of the vocabulary that mean something."""

    config: RunConfig
    mesh: Mesh
    spec: ModelSpec
    recipe: Recipe
    tokenizer: Tokenizer
    data: TrainingData
    run: Run | None
    beginning: Beginning
    progress: Progress

    @property
    def architecture(self) -> Architecture:
        return architecture_named(self.config.model.family)

    @property
    def tied_head(self) -> int | None:
        return self.spec.head_number if self.spec.tied_head else None

    @property
    def samples(self) -> int:
        """Samples that training sees from its very first step to its last; a step may have taken more of them before it was resumed than it takes now."""
        return self.progress.samples + max(0, self.recipe.steps - self.progress.iteration) * self.recipe.batching.samples

    def batches(self, purpose: Purpose, samples: int) -> Batches | None:
        """The data for this purpose, enough for so many samples."""
        source = self.data.source(purpose, samples)
        unlearned = self.tokenizer.eod if self.config.data.eod_mask_loss else None
        return None if source is None else Batches(source, vocab=self.progress.words, unlearned_after=unlearned)


@contextmanager
def open_training(config: RunConfig) -> Iterator[Training]:
    """Joins the other processes and reads everything but weights. Raises UserError where the parts do not fit together."""
    with joined_world() as (rank, world, device):
        demand_own_gpus(device, "training")
        hold_to(config.launcher.gpu_memory_limit, device)
        layout = layout_of(config, world)
        spec = spec_of(config.model, vocab=0, dtype="float32")
        check_cut(layout, heads=spec.heads, kv_heads=spec.kv_heads, ffn=spec.ffn, layers=spec.layers)
        yield settle(config, build_mesh(layout, rank=rank, device=device))


def settle(config: RunConfig, mesh: Mesh) -> Training:
    """The training of these settings on processes that have joined already."""
    check_trainable(config)
    recipe = recipe_of(config, mesh.layout, device=mesh.device.type)  # its problems come before any work
    config = with_adapters_that_are_there(config)
    tidy(config, mesh)
    beginning = beginning_of(config)
    run = None if beginning == "new weights" else prepare(config, mesh)
    if run and config.training.lora:
        check_lora(config.training.lora, run, mesh.tp.size)
    tokenizer = run.tokenizer if run else load_tokenizer(config.tokenizer)
    rows = vocabulary_rows(run.source) if run else _new_rows(config, tokenizer, mesh.tp.size)
    progress = _progress(run, beginning, recipe, words=rows, with_optimizer=not config.checkpoint.no_load_optim)
    spec = run.spec if run else spec_of(config.model, vocab=rows, dtype="float32")
    packing = Packing(config.model.seq_length, config.training.seed, config.data.pack_impl, config.data.allow_chopped)
    data = open_data(config.data, packing, tokenizer, vocab=progress.words)
    recipe = recipe.lasting(_steps(config, recipe, data), config.training)
    return Training(config, mesh, replace(spec, dtype=FORMATS[recipe.dtype]), recipe, tokenizer, data, run, beginning, progress)


def _new_rows(config: RunConfig, tokenizer: Tokenizer, tp: int) -> int:
    """Rows of a new embedding, by NeoX's rule."""
    section = config.tokenizer
    if section.padded_vocab_size is not None:
        if section.padded_vocab_size < tokenizer.vocab_size or section.padded_vocab_size % tp:
            raise ConfigError(
                f"padded_vocab_size is {section.padded_vocab_size} ({config.where('padded_vocab_size')}); the tokenizer has {tokenizer.vocab_size} "
                f"entries and model-parallel-size is {tp}: a multiple of {tp} from {tokenizer.vocab_size} on is needed"
            )
        return section.padded_vocab_size
    multiple = section.make_vocab_size_divisible_by * tp
    return -(-tokenizer.vocab_size // multiple) * multiple


def _progress(run: Run | None, beginning: Beginning, recipe: Recipe, *, words: int, with_optimizer: bool) -> Progress:
    fresh = Progress(0, 0, 0, 0, words, recipe.optimizer.kind, (), {}, None, None)
    if run is None or beginning != "a training that goes on":
        return fresh
    stored = stored_state(run)
    if with_optimizer or (stored.folder / STATE).exists():
        return read_progress(stored)
    step = step_of(stored.folder) or 0
    return replace(fresh, iteration=step, samples=step * recipe.batching.samples)


def _steps(config: RunConfig, recipe: Recipe, data: TrainingData) -> int:
    if config.training.train_iters:
        return config.training.train_iters
    if config.training.train_epochs:
        return max(1, config.training.train_epochs * data.samples_per_epoch() // recipe.batching.samples)
    raise ConfigError("neither train_iters nor train_epochs is set; say how long to train, for instance train_iters: 1000")


def build_engine(training: Training) -> Engine:
    """This rank's layers in an engine, as the training begins with them."""
    mesh, recipe, run = training.mesh, training.recipe, training.run
    numbers = mesh.layout.numbers(training.spec.layers)[mesh.pp.index]
    layers = _loaded(training, run, numbers, recipe.dtype) if run else _drawn(training, numbers)
    lora, tied = training.config.training.lora, training.tied_head
    if run and lora:
        put_adapters(layers, lora, run.adapters, family=run.spec.family, seed=recipe.seed, tp=mesh.tp)
        tied = None  # what is frozen stays the same at both ends of a pipeline
    elif sum(make_trainable(layer, mesh.tp) for layer in layers.values()):
        logger.info("norms that had drifted apart between the saved ranks are averaged: they train as one from here on")
    engine = start_engine(TrainedStage(layers, recompute=recipe.recompute), mesh, recipe, words=training.progress.words, tied_head=tied)
    if run is not None and training.beginning == "a training that goes on" and not training.config.checkpoint.no_load_optim:
        restore(engine, stored_state(run), training.progress)
    elif run is not None and not lora and recipe.dtype != torch.float32:
        write_masters(engine, lambda number: _in_fp32(training, run, number))  # else they would be what was rounded to half precision
    return engine


def _in_fp32(training: Training, run: Run, number: int) -> Mapping[str, Mapping[str, list[Tensor]]]:
    """A layer's weights as the file has them, read once more by the reader that fills layers: this rank's part, as if all ranks had stored the same."""
    tp = training.mesh.tp
    layer = _loaded(training, run, [number], torch.float32)[number]
    make_trainable(layer, tp)
    found = joined({path: {MASTER: parameter.detach()} for path, parameter in layer.named_parameters()})
    return {path: {MASTER: [tensors[MASTER]] * tp.size} for path, tensors in found.items()}


def _loaded(training: Training, run: Run, numbers: list[int], dtype: torch.dtype) -> dict[int, nn.Module]:
    tp, device = training.mesh.tp, training.mesh.device
    plan = training.architecture.plan(training.spec, tp)
    settle = (lambda _, layer: quantize(layer, tp)) if training.spec.quantization else None
    return load_layers(plan, numbers, run.source, tp=tp, dtype=dtype, device=device, progress=lambda count: None, settle=settle)


def _drawn(training: Training, numbers: list[int]) -> dict[int, nn.Module]:
    """New layers, in the number format of training."""
    mesh, spec = training.mesh, training.spec
    plan = training.architecture.plan(spec, mesh.tp)
    layers: dict[int, nn.Module] = {}
    for number in numbers:
        layer = layers[number] = plan[number]()
        draw_layer(layer, number, model=training.config.model, spec=spec, seed=training.recipe.seed, tp=mesh.tp)
        layer.to(mesh.device, training.recipe.dtype)
    if training.tied_head in layers and 0 in layers:
        layers[spec.head_number].get_submodule("word_embeddings").weight = layers[0].get_submodule("word_embeddings").weight
    return layers
