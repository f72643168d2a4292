"""What surrounds a training: its name at Weights & Biases, its folders, its first words."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

from torch import nn

from megatron_lite.config.sections import RunConfig
from megatron_lite.config.show import settings
from megatron_lite.log import logger
from megatron_lite.parallel.quantized import BITS
from megatron_lite.training.engine import Engine
from megatron_lite.training.lora import adapters_of
from megatron_lite.training.save import WHOLE_MODEL, Progress, Retention, Saver
from megatron_lite.training.start import Training

LOGS = Path("logs")


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
        if self.mesh.is_writer:
            shutil.rmtree(self.folder)

    @property
    def kept(self) -> str:
        return "the check is passed, and what it saved is cleared away"


def saver_for(training: Training) -> "Saver | Nowhere":
    """Where the settings want checkpoints."""
    section = training.config.checkpoint
    if section.save is None:
        return Nowhere()
    retention = Retention(section.keep_last_n_checkpoints, section.extra_save_iters or ())
    kind, folder = (Trial, section.save / "check") if training.config.training.check else (Saver, section.save)
    lora, run = training.config.training.lora, training.run
    contents = adapters_of(run, lora) if run and lora else WHOLE_MODEL
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
    return config.checkpoint.save or config.logging.log_dir or LOGS


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
    if not training.data.parts["valid"] and training.config.training.eval_interval is not None:
        logger.info("there are no data to validate on: split leaves no document for it, or valid_data_paths is not set")


def _size(parameter: nn.Parameter) -> int:
    """Its numbers, also where ZeRO 3 has spread them."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
