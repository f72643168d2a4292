#!/usr/bin/env python3
"""Fetches what the project does not bring along: tools/download.py eval-data lambada piqa"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1]))  # last, because a top-level evaluate.py must not shadow the `evaluate` package

from megatron_lite.data.download import RemoteFile, fetch_all
from megatron_lite.data.task_data import FOLDER, OTHER_NAMES, TASK_DATA
from megatron_lite.errors import UserError


def main(words: Sequence[str] | None = None) -> int:
    options = parse(words)
    try:
        return options.run(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the next call goes on from here", file=sys.stderr)
        return 130


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    data = commands.add_parser("eval-data", help="questions of evaluation tasks, to evaluate without a network")
    data.add_argument("tasks", nargs="+", choices=sorted({*OTHER_NAMES, *TASK_DATA}), metavar="TASK", help="%(choices)s")
    data.add_argument("--folder", type=Path, default=FOLDER, help="where to put them (default: %(default)s); see eval_data_dir")
    data.set_defaults(run=fetch_eval_data)
    return parser.parse_args(words)


def fetch_eval_data(options: argparse.Namespace) -> int:
    names: list[str] = options.tasks
    tasks = dict.fromkeys(OTHER_NAMES.get(name, name) for name in names)
    fetch_with_bar([file for task in tasks for file in TASK_DATA[task].files], options.folder)
    return 0


def fetch_with_bar(files: Sequence[RemoteFile], folder: Path) -> None:
    with tqdm(total=sum(file.size or 0 for file in files) or None, unit="B", unit_scale=True, desc="fetching", leave=False, mininterval=0.2) as bar:
        paths = fetch_all(files, folder, lambda count: bar.update(count))
    for path, file in zip(paths, files, strict=True):
        print(f"{path}: {path.stat().st_size:,} bytes, sha256 {file.sha256[:12]}…")


if __name__ == "__main__":
    sys.exit(main())
