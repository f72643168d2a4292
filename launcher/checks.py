"""What can be wrong with a run's files, found before any process starts; the processes look again when they use them."""

from collections.abc import Callable
from pathlib import Path

from megatron_lite.checkpoint.find import check_numbers, find_checkpoint
from megatron_lite.config.sections import RunConfig
from megatron_lite.data.jsonl import check_writable
from megatron_lite.data.prompts import read_prompts
from megatron_lite.errors import CheckpointError, ConfigError, DataError
from megatron_lite.parallel.layout import stage_numbers

Check = Callable[[RunConfig], None]


def check_checkpoint(config: RunConfig) -> None:
    """Whether the checkpoint and every layer file of it are there."""
    if config.checkpoint.load is None:
        raise CheckpointError("load is not set; it names the folder of the checkpoint to read, write load=FOLDER or set it in a configuration file")
    checkpoint = find_checkpoint(config.checkpoint.load, iteration=config.checkpoint.iteration)
    numbers = stage_numbers(config.model.num_layers, 1)[0]
    check_numbers(checkpoint, numbers if config.model.no_weight_tying else numbers[:-1], layers=config.model.num_layers)


def check_output(config: RunConfig) -> None:
    """Whether results can be written."""
    output = generation_output(config)
    if output is not None:
        check_writable(output, source=config.generation.sample_input_file)


def check_prompts(config: RunConfig) -> None:
    count_prompts(config)


def generation_mode(config: RunConfig) -> str:
    """text_gen_type, or what NeoX derives where it is silent."""
    return config.generation.text_gen_type or ("input-file" if config.generation.sample_input_file else "unconditional")


def generation_output(config: RunConfig) -> Path | None:
    """The file that generation writes to, if it writes to one."""
    settings = config.generation
    if generation_mode(config) == "interactive":
        return None
    return settings.sample_output_file or Path(f"{settings.sample_input_file or 'samples'}.output.jsonl")


def count_prompts(config: RunConfig) -> int:
    """How many texts are to be generated."""
    settings = config.generation
    if generation_mode(config) == "interactive":
        return 1
    if generation_mode(config) == "unconditional":
        return settings.num_samples
    if settings.sample_input_file is None:
        raise DataError("text_gen_type is input-file, but no sample_input_file is set; give a file of prompts with -i FILE")
    return len(read_prompts(settings.sample_input_file, prompt_end=settings.prompt_end))


def check_tasks(config: RunConfig) -> None:
    if not config.evaluation.eval_tasks:
        raise ConfigError("eval_tasks is not set; name tasks with --eval_tasks, for instance --eval_tasks lambada piqa")


CHECKS: dict[str, tuple[Check, ...]] = {
    "generate": (check_prompts, check_output, check_checkpoint),
    "evaluate": (check_tasks, check_checkpoint),
}
