"""What surrounds a training: its name at Weights & Biases, its folders, its first words."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

from torch import nn

from megatron_lite.checkpoint.merged import merged_in
from megatron_lite.config.sections import LoggingSection, RunConfig
from megatron_lite.config.show import settings
from megatron_lite.log import logger
from megatron_lite.metrics.metrics import FILE, Metrics, forget, open_metrics
from megatron_lite.parallel.quantized import BITS
from megatron_lite.training.beginning import goes_on_from
from megatron_lite.training.engine import Engine
from megatron_lite.training.folders import step_of
from megatron_lite.training.lora import adapters_of
from megatron_lite.training.samples import FILE as SAMPLES
from megatron_lite.training.save import Progress, Retention, Saver, WholeModel
from megatron_lite.training.start import Training

LOGS = Path("logs")
CHECK = "check"
"""The folder in that of a training where a check of it keeps everything."""


class Nowhere:
    """Saves nothing, because nobody asked for it."""

    kept = "nothing is saved, because save is not set"

    def save(self, engine: Engine, progress: Progress) -> None: ...
    def check(self) -> None: ...
    def wait(self) -> None: ...
    def close(self) -> None: ...


class Trial(Saver):
    """Saves into a folder that is removed at the end."""

    def close(self) -> None:
        self.mesh.wait()

    @property
    def kept(self) -> str:
        return "the check is passed, and what it saved is cleared away"


def saver_for(training: Training) -> "Saver | Nowhere":
    """Where the settings want checkpoints."""
    section = training.config.checkpoint
    if section.save is None:
        return Nowhere()
    retention = Retention(section.keep_last_n_checkpoints, section.extra_save_iters or ())
    kind, folder = (Trial, section.save / CHECK) if training.config.training.check else (Saver, section.save)
    lora, run = training.config.training.lora, training.run
    contents = adapters_of(run, lora) if run and lora else WholeModel(merged_in(run.source) if run else ())
    return kind(folder, training.mesh, retention, configs=training.config.files, contents=contents, with_optimizer=not section.no_save_optim)


def identify(training: Training) -> Training:
    """The training with an id at Weights & Biases: that of the training that goes on, or a new one."""
    name = training.progress.wandb_id or os.environ.get("WANDB_RUN_ID") or uuid4().hex[:8]
    os.environ["WANDB_RUN_ID"] = name
    os.environ.setdefault("WANDB_RESUME", "allow")
    return replace(training, progress=replace(training.progress, wandb_id=name))


def told(config: RunConfig) -> dict[str, object]:
    """The settings of a run, for whoever looks at it later."""
    return {key: value for key, value, _ in settings(config)}


def metrics_folder(config: RunConfig) -> Path:
    """Beside the checkpoints, where there are any."""
    folder = config.checkpoint.save or config.logging.log_dir or LOGS
    return folder / CHECK if config.training.check else folder


def metrics_section(config: RunConfig) -> LoggingSection:
    """Where numbers go beside the folder: those of a check nowhere, for the real run's curves would begin with them."""
    return config.logging.model_copy(update={"use_wandb": False, "tensorboard_dir": None}) if config.training.check else config.logging


@contextmanager
def numbers(training: Training) -> Iterator[Metrics]:
    """Where this training reports to. Steps that it takes again leave the files of the run that it goes on with; a check leaves no file at all."""
    config, is_writer, done = training.config, training.mesh.is_writer, training.progress.iteration
    folder = metrics_folder(config)
    made = [path for path in (folder, *folder.parents) if not path.exists()] if config.training.check else []
    if is_writer and config.checkpoint.save:  # other folders are for whatever runs there are
        for name in (FILE, SAMPLES):
            forget(folder / name, after=done)
    try:
        with open_metrics(metrics_section(config), told(config), folder=folder, is_writer=is_writer, after=done or None) as metrics:
            yield metrics
    finally:
        if is_writer and config.training.check:
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):
                for path in made[1:]:
                    path.rmdir()


def on_disk(config: RunConfig) -> str:
    """What a training that is cut off leaves behind, and what it takes to go on from there."""
    save, (key, load) = config.checkpoint.save, goes_on_from(config)
    if save is None or config.training.check:
        return "nothing is saved, because " + ("save is not set" if save is None else "this is a check")
    steps = [step for path in save.glob("global_step*") if (step := step_of(path)) is not None]
    if not steps:
        return f"no step is saved in {save} yet, and nothing is left of this training; ended with SIGTERM (kill) it saves first"
    same = load is not None and load.resolve() == save.resolve() and not config.checkpoint.finetune
    how = "the same command goes on from there" if same else f"{key}={save} finetune=false goes on from there"
    return f"the last step that is saved is {max(steps)}, in {save / f'global_step{max(steps)}'}: {how}"


def announce(training: Training, engine: Engine) -> None:
    """What is trained, how, and from where on."""
    recipe, progress, mesh = training.recipe, training.progress, training.mesh
    count = sum(_size(parameter) for parameter in engine.stage.parameters() if parameter.requires_grad)
    batching, lora = recipe.batching, training.config.training.lora
    logger.info(
        f"{training.beginning}{f' ({training.run.checkpoint})' if training.run else ''}: steps {progress.iteration + 1} to {recipe.steps} on {mesh.layout}, "
        f"{str(recipe.dtype).removeprefix('torch.')}, ZeRO {recipe.zero_stage}, {count:,} parameters in this process"
    )
    logger.info(
        f"a step is {batching.samples} samples of {training.config.model.seq_length} tokens: {batching.micro} at once x {batching.accumulation} x "
        f"{batching.replicas} data-parallel; {recipe.optimizer.kind}, lr {recipe.schedule.peak:g} {recipe.schedule.style}"
    )
    if lora:
        frozen = sum(_size(parameter) for name, parameter in engine.stage.named_parameters() if not name.endswith(BITS)) - count
        begun = f"those in {training.run.adapters.folder}" if training.run and training.run.adapters else "new ones"
        held = f", their matrices in {training.spec.quantization}" if training.spec.quantization else ""
        logger.info(
            f"low-rank adapters of rank {lora.rank}, alpha {lora.alpha:g} on {', '.join(lora.targets)} ({begun}); {frozen:,} parameters are frozen{held}"
        )
    _miss_data(training)


def _miss_data(training: Training) -> None:
    """Says for what there are no data, though the settings ask for it."""
    section, parts = training.config.training, training.data.parts
    missing = "there are no data to {} on: split leaves no document for it, or {}_data_paths is not set"
    if section.do_valid is not False and section.eval_interval is not None and not parts["valid"]:
        logger.info(missing.format("validate", "valid"))
    if section.do_test and not parts["test"]:
        logger.info(missing.format("test", "test"))


def _size(parameter: nn.Parameter) -> int:
    """Its numbers, also where ZeRO 3 has spread them."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
