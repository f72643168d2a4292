#!/usr/bin/env python3
"""Generates text: ./deepy.py generate.py configs/20B.yml -i prompts.txt -o sample_outputs.txt"""

import sys
from pathlib import Path

# last, because a top-level evaluate.py must not shadow the `evaluate` package that lm-eval imports
ROOT = str(Path(__file__).resolve().parent)
sys.path[:] = [*(folder for folder in sys.path if folder != ROOT), ROOT]

from launcher.command import Command  # noqa: E402
from launcher.worker import work  # noqa: E402


def main(command: Command) -> None:
    from megatron_lite.config.load import load_config
    from megatron_lite.inference.generate import generate
    from megatron_lite.log import set_up_logging
    from megatron_lite.run import open_run

    set_up_logging()
    with open_run(load_config(command.configs, command.overrides)) as run:
        generate(run)


if __name__ == "__main__":
    work(main, script="generate")
