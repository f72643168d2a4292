#!/usr/bin/env python3
"""Scores a model on tasks of the evaluation harness: ./deepy.py evaluate.py configs/20B.yml --eval_tasks lambada piqa"""

import os
import sys
from pathlib import Path

# last, because this file must not shadow the `evaluate` package that lm-eval imports
ROOT = str(Path(__file__).resolve().parent)
sys.path[:] = [*(folder for folder in sys.path if folder != ROOT), ROOT]

from launcher.command import Command  # noqa: E402
from launcher.worker import work  # noqa: E402


def main(command: Command) -> None:
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")  # seconds between the lines that a progress bar leaves in a file; read when tqdm is imported
    from megatron_lite.config.load import load_config
    from megatron_lite.evaluation.run import evaluate_run
    from megatron_lite.log import set_up_logging
    from megatron_lite.run import open_run

    set_up_logging()
    with open_run(load_config(command.configs, command.overrides)) as run:
        text = evaluate_run(run)
    if text:
        print(text)


if __name__ == "__main__":
    work(main, script="evaluate")
