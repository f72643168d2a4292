"""What can be wrong with a run's files, found before any process starts; the processes look again when they use them."""

import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import cast

from launcher.plan import Demand
from megatron_lite.checkpoint.config_json import check_config
from megatron_lite.checkpoint.find import check_numbers, find_checkpoint
from megatron_lite.config.sections import RunConfig
from megatron_lite.data.jsonl import check_writable
from megatron_lite.data.prompts import Prompt, read_prompts
from megatron_lite.data.task_data import TASK_DATA, data_folder, require, task_names
from megatron_lite.data.tokenizer import load_tokenizer
from megatron_lite.errors import CheckpointError, ConfigError, DataError
from megatron_lite.models.spec import spec_of
from megatron_lite.parallel.layout import stage_numbers

COUNTED = 16
"""Prompts that are counted in tokens to learn how long the longest is."""

Check = Callable[[RunConfig], None]


def check_checkpoint(config: RunConfig) -> None:
    """Whether the checkpoint and every file of it are there, and its names or its config.json tell of the configuration's model."""
    if config.checkpoint.load is None:
        raise CheckpointError("load is not set; it names the folder of the checkpoint to read, write load=FOLDER or set it in a configuration file")
    checkpoint = find_checkpoint(config.checkpoint.load, iteration=config.checkpoint.iteration)
    numbers = stage_numbers(config.model.num_layers, 1)[0]
    if checkpoint.format == "huggingface":
        check_config(checkpoint.folder, spec_of(config.model, vocab=0, dtype="float32"))
    check_numbers(checkpoint, numbers if config.model.no_weight_tying else numbers[:-1], layers=config.model.num_layers)


def check_output(config: RunConfig) -> None:
    """Whether results can be written."""
    output = config.generation_output
    if output is not None:
        check_writable(output, source=config.generation.sample_input_file)


def check_prompts(config: RunConfig) -> None:
    prompts_of(config)


def prompts_of(config: RunConfig) -> list[Prompt]:
    """The texts that are to be continued; one, still unknown, in interactive mode."""
    settings = config.generation
    if config.generation_mode == "interactive":
        return [Prompt("")]
    if config.generation_mode == "unconditional":
        return [Prompt("")] * settings.num_samples
    if settings.sample_input_file is None:
        raise DataError("text_gen_type is input-file, but no sample_input_file is set; give a file of prompts with -i FILE")
    return read_prompts(settings.sample_input_file, prompt_end=settings.prompt_end)


def demand_of(config: RunConfig) -> Demand:
    """How many rows generation can have, and how long the longest will be: of the prompts with the most bytes, some are counted in tokens."""
    prompts, most = prompts_of(config), config.model.seq_length
    if config.generation_mode == "interactive":
        return Demand(1, most)
    new = max(cast(int, prompt.settings.get("maximum_tokens", config.generation.maximum_tokens)) for prompt in prompts)
    longest = sorted((prompt.text for prompt in prompts), key=len)[-COUNTED:]
    return Demand(len(prompts), min(most, new + max(map(len, load_tokenizer(config.tokenizer).encode_batch(longest))) + 1))


def check_tasks(config: RunConfig) -> None:
    """Whether the questions of the tasks can be had, as far as that can be told at once."""
    settings = config.evaluation
    if not settings.eval_tasks:
        raise ConfigError("eval_tasks is not set; name tasks with --eval_tasks, for instance --eval_tasks lambada piqa")
    for name in task_names(settings.eval_tasks):
        if name in TASK_DATA and settings.include_path is None:  # else the name may be one of the user's own tasks
            require(TASK_DATA[name], data_folder(settings.eval_data_dir))


def check_tasks_of_training(config: RunConfig) -> None:
    """The same for tasks that are evaluated while a model is trained."""
    if config.evaluation.eval_tasks:
        check_tasks(config)


def check_results(config: RunConfig) -> None:
    """Whether the results can be written."""
    check_writable(config.evaluation.results_file(time.localtime()))


def check_beginning(config: RunConfig) -> None:
    """Whether the weights that a training begins with are there. It may begin with new ones, and go on later from where it saves."""
    load, save = config.checkpoint.load, config.checkpoint.save
    if load is not None and (config.checkpoint.finetune or load != save or (load / "latest").exists()):
        check_checkpoint(config)


def check_training_data(config: RunConfig) -> None:
    """Whether data to train on are named, and a file of texts is there."""
    paths = [config.data.data_path] if config.data.data_path else list(config.data.train_data_paths or ())
    if not paths:
        raise ConfigError("no data to train on: set data_path to a data set or a file of texts, or train_data_paths to several")
    for path in paths:
        if not path.is_file() and not path.with_name(path.name + ".idx").is_file():
            raise DataError(f"there are no training data {path}: neither a file of texts nor {path.name}.bin with {path.name}.idx")


def needs(package: str, script: str) -> Check:
    """Whether a package that a script is made of is installed: generation needs less than the others."""

    def check(config: RunConfig) -> None:
        if find_spec(package) is None:
            raise ConfigError(f"{script} needs the package {package}; run `pip install -c requirements/constraints.txt -r requirements/requirements.txt`")

    return check


CHECKS: dict[str, tuple[Check, ...]] = {
    "generate": (check_prompts, check_output, check_checkpoint),
    "train": (needs("deepspeed", "train.py"), check_beginning, check_training_data, check_tasks_of_training),
    "evaluate": (needs("lm_eval", "evaluate.py"), check_tasks, check_results, check_checkpoint),
}
