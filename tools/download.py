#!/usr/bin/env python3
"""Fetches what the project does not bring along: checkpoints (20B, pythia/70M to pythia/12B, gpt-j-6B, hub:OWNER/NAME) and questions of evaluation tasks.

The same command goes on where it was stopped. Until all is there, the folder is not taken for a checkpoint.
`tools/download.py eval-data lambada piqa` fetches the questions of tasks, to evaluate without a network."""

import argparse
import shlex
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from shutil import disk_usage

sys.path.append(str(Path(__file__).resolve().parents[1]))  # last, because a top-level evaluate.py must not shadow the `evaluate` package

from megatron_lite.checkpoint.find import find_checkpoint
from megatron_lite.checkpoint.unfinished import unfinished
from megatron_lite.data.archive import unpack, zstandard_package
from megatron_lite.data.download import RemoteFile, existing, fetch_all, part_of, size_on_disk
from megatron_lite.data.releases import NAMES, Release, release_named
from megatron_lite.data.task_data import FOLDER, OTHER_NAMES, TASK_DATA
from megatron_lite.errors import DataError, UserError
from megatron_lite.log import set_up_logging
from megatron_lite.progress import Advance, progress, say


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    set_up_logging()
    try:
        return fetch_eval_data(words[1:]) if words[:1] == ["eval-data"] else fetch_checkpoint(words)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", metavar="WHAT", help=f"{', '.join(NAMES)}, or a model of the Hugging Face hub: hub:OWNER/NAME")
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="where to put it (default: where its configuration looks for it)")
    parser.add_argument("--base-url", default="", metavar="URL", help="a folder of another server that offers the same files")
    parser.add_argument("--revision", default="", help="branch, tag or commit on the hub, such as step1000 of Pythia (default: main)")
    parser.add_argument("--list", action="store_true", help="only print the files and their sizes")
    parser.add_argument("--dry-run", action="store_true", help="only print what is there, what is missing, and the room on the disk")
    parser.add_argument("--parallel", type=int, choices=range(1, 33), default=4, metavar="N", help="files fetched at once (default %(default)s)")
    parser.add_argument("--keep-archive", action="store_true", help="store GPT-J's archive too: a new call then goes on within it, and need not begin anew")
    return parser.parse_args(words)


def fetch_checkpoint(words: Sequence[str]) -> int:
    options = parse(words)
    release = release_named(options.what, base_url=options.base_url, revision=options.revision)
    folder: Path = options.folder or release.folder
    try:
        release = release.with_sizes(folder)
    except DataError as error:
        if not options.list:
            raise
        print(f"sizes are not known: {error}", file=sys.stderr)
    missing = release.missing(folder)
    left = sum(max(0, file.about - size_on_disk(part_of(folder / file.name))) for file in missing)
    there = sum(file.about for file in release.all_files) - left
    if options.list:
        say("\n".join(f"{described(file):>22}  {file.name}" for file in release.all_files))
    place = existing(folder)
    print(f"{release.name}: {len(release.all_files)} files, {(there + left) / 1e9:.2f} GB, from {release.source}")
    print(f"{folder}: {left / 1e9:.2f} GB to fetch; {place.resolve()} has {disk_usage(place).free / 1e9:.2f} GB free")
    release.check_place(folder)
    if options.list or options.dry_run:
        return 0
    to_unpack = release.archive if release.archive and release.archive.file in missing else None
    if to_unpack:
        zstandard_package()
    with unfinished(folder, shlex.join(["tools/download.py", *words])), progress("fetching", left) as advance:
        heard = Beyond(advance, there)
        if to_unpack:
            unpack(to_unpack, folder, heard, keep=options.keep_archive)
        fetch_all(release.files, folder, heard, parallel=options.parallel)
    print(find_checkpoint(folder))
    if release.config:
        print(f"now: ./deepy.py generate.py {release.config}{settings(release, folder)} -i examples/prompts.txt")
    return 0


def settings(release: Release, folder: Path) -> str:
    """What the configuration has to be told where the files lie elsewhere than it looks for them."""
    keys = {"tokenizer.json": "vocab_file", "20B_tokenizer.json": "vocab_file", "vocab.json": "vocab_file", "merges.txt": "merge_file"}
    names = [file.name for file in release.files]
    chosen = {keys[name]: name for name in reversed(keys) if name in names}
    words = [f" load={folder}", *(f" {key}={folder / name}" for key, name in chosen.items() if key == "vocab_file" or chosen["vocab_file"] == "vocab.json")]
    return "" if folder == release.folder else "".join(words)


def described(file: RemoteFile) -> str:
    return f"{file.about:,} bytes" if file.size is not None else f"over {file.least:,} bytes" if file.least else "? bytes"


class Beyond:
    """Tells of progress beyond the bytes that an earlier call has fetched, so that speed and time left are those of this one."""

    def __init__(self, advance: Advance, there: int) -> None:
        self.advance, self.there, self.lock = advance, there, threading.Lock()

    def __call__(self, count: int) -> None:
        with self.lock:
            known = min(self.there, count)
            self.there -= known
            self.advance(count - known)


def fetch_eval_data(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="download.py eval-data", description="Fetches questions of evaluation tasks, to evaluate without a network.")
    parser.add_argument("tasks", nargs="+", choices=sorted({*OTHER_NAMES, *TASK_DATA}), metavar="TASK", help="%(choices)s")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to put them (default: %(default)s); see eval_data_dir")
    options = parser.parse_args(words)
    names: list[str] = options.tasks
    tasks = dict.fromkeys(OTHER_NAMES.get(name, name) for name in names)
    files = [file for task in tasks for file in TASK_DATA[task].files]
    with progress("fetching", sum(file.about for file in files)) as advance:
        paths = fetch_all(files, options.folder, advance)
    for path, file in zip(paths, files, strict=True):
        print(f"{path}: {path.stat().st_size:,} bytes, sha256 {(file.sha256 or '?')[:12]}…")
    return 0


if __name__ == "__main__":
    sys.exit(main())
