"""What a training begins with: new weights, those of a checkpoint, or a training that goes on; and that it overwrites no other one."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from megatron_lite.checkpoint.adapters import find_adapters
from megatron_lite.checkpoint.find import CheckpointLayout
from megatron_lite.config.sections import RunConfig
from megatron_lite.errors import CheckpointError, ConfigError
from megatron_lite.log import logger
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.run import Run
from megatron_lite.training.folders import hold, recover, step_of

Beginning = Literal["new weights", "weights of a checkpoint", "a training that goes on"]


def goes_on_from(config: RunConfig) -> tuple[str, Path | None]:
    """The setting that names the folder of a training that goes on, and the folder."""
    return ("lora_load", config.checkpoint.lora_load) if config.training.lora else ("load", config.checkpoint.load)


def tidy(config: RunConfig, mesh: Mesh) -> None:
    """Clears up after a killed run, and keeps a new one from overwriting an old one."""
    key, load = goes_on_from(config)
    save = config.checkpoint.save
    if save is None:
        return
    if mesh.is_writer:
        hold(save)
        recover(save)
    mesh.wait()  # whether the folder is there: one that is quick may have made it before another looks
    steps = sorted(step for path in save.glob("global_step*") if (step := step_of(path)) is not None)
    same = load is not None and load.resolve() == save.resolve()
    if steps and (not same or config.checkpoint.finetune):
        raise CheckpointError(
            f"save names {save}, which holds checkpoints already (the last is global_step{steps[-1]}); to go on from there say {key}={save} finetune=false, "
            "else choose another folder"
        )


def beginning_of(config: RunConfig) -> Beginning:
    """Raises ConfigError where the settings contradict each other."""
    if config.training.lora:
        return _beginning_of_adapters(config)
    load, save = config.checkpoint.load, config.checkpoint.save
    if config.checkpoint.lora_load:
        raise ConfigError(
            f"lora_load ({config.where('lora_load')}) names adapters, but lora is not set, so that all weights would train; set lora to train the adapters "
            "further, or make one checkpoint of both with tools/convert.py --lora"
        )
    if load is None:
        return "new weights"
    if config.checkpoint.finetune:
        return "weights of a checkpoint"
    if load == save and config.checkpoint.iteration is None and not (load / "latest").exists():
        logger.info(f"{load} holds no checkpoint yet: training starts with new weights")
        return "new weights"
    return "a training that goes on"


def _beginning_of_adapters(config: RunConfig) -> Beginning:
    section = config.checkpoint
    if section.load is None:
        raise ConfigError(f"lora ({config.where('lora')}) trains what is added to the weights of a checkpoint, and load is not set; name the checkpoint")
    return "weights of a checkpoint" if section.lora_load is None or section.finetune else "a training that goes on"


def with_adapters_that_are_there(config: RunConfig) -> RunConfig:
    """The settings, without a lora_load that is where adapters are yet to be saved: the same command begins, and later goes on."""
    section = config.checkpoint
    if section.lora_load is None or section.lora_load != section.save or (section.lora_load / "latest").exists():
        return config
    logger.info(f"{section.lora_load} holds no adapters yet: training starts with new ones")
    return replace(config, checkpoint=section.model_copy(update={"lora_load": None}))


def stored_state(run: Run) -> CheckpointLayout:
    """The checkpoint with the state of the training that may go on."""
    return find_adapters(run.adapters.folder) if run.adapters else run.checkpoint
