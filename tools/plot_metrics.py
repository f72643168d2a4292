#!/usr/bin/env python3
"""Draws loss and throughput of trainings from their metrics.jsonl: tools/plot_metrics.py RUN [RUN...] [--output curves.png]"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

# last, because a top-level evaluate.py must not shadow the `evaluate` package that lm-eval imports
ROOT = str(Path(__file__).resolve().parents[1])
sys.path[:] = [*(folder for folder in sys.path if folder != ROOT), ROOT]

from megatron_lite.errors import UserError  # noqa: E402
from megatron_lite.metrics.curves import chart, curves_named, read_runs  # noqa: E402
from megatron_lite.metrics.image import SPEED, TRAIN, VALIDATION, draw  # noqa: E402
from megatron_lite.progress import say  # noqa: E402

CHARTS = {TRAIN: "training loss", VALIDATION: "validation loss", SPEED: "tokens/s"}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a training, or its metrics.jsonl")
    parser.add_argument("--output", "-o", type=Path, help="also write an image, such as curves.png (needs matplotlib)")
    given = parser.parse_args(words)
    try:
        runs = read_runs(given.runs)
        width = max(40, min(120, shutil.get_terminal_size((80, 24)).columns - 2))
        shown = {title: curves for metric, title in CHARTS.items() if (curves := curves_named(runs, metric))}
        say("\n\n".join(chart(title, curves, width=width) for title, curves in shown.items()))
        if given.output:
            draw(runs, given.output)
            print(f"\nwritten to {given.output}")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
