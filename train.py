#!/usr/bin/env python3
"""Trains or fine-tunes a model: ./deepy.py train.py configs/20B.yml configs/finetune.yml"""

import os
import sys
from pathlib import Path

# last, because a top-level evaluate.py must not shadow the `evaluate` package that lm-eval imports
ROOT = str(Path(__file__).resolve().parent)
sys.path[:] = [*(folder for folder in sys.path if folder != ROOT), ROOT]

from launcher.command import Command  # noqa: E402
from launcher.worker import give_up, work  # noqa: E402


def main(command: Command) -> None:
    from megatron_lite.config.load import load_config
    from megatron_lite.inference.live import completer, unlikelihoods
    from megatron_lite.log import set_up_logging
    from megatron_lite.training.live import Uses
    from megatron_lite.training.train import train

    set_up_logging()
    config = load_config(command.configs, command.overrides)
    evaluate = None
    if config.evaluation.eval_tasks:
        from megatron_lite.evaluation.evaluate import evaluate
        from megatron_lite.evaluation.tasks import find_tasks

        if os.environ.get("RANK", "0") == "0":
            find_tasks(config.evaluation)  # what is wrong with them ends the training now, not at its first validation
    train(config, Uses(evaluate, completer(config) if config.generation.sample_interval else None, unlikelihoods), give_up=give_up)


if __name__ == "__main__":
    work(main, script="train")
