#!/usr/bin/env python3
"""Fetches a known data set and turns it into tokens: tools/prepare_data.py enwik8 configs/tiny.yml -d data. Without a name it lists what is known."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # last, because a top-level evaluate.py must not shadow the `evaluate` package

from megatron_lite.data.choose_tokenizer import add_tokenizer_words, chosen_tokenizer
from megatron_lite.data.documents import TextFile
from megatron_lite.data.download import RemoteFile, fetch_all
from megatron_lite.data.known_sets import GPT2_TOKENIZER, KNOWN, Part, obtain
from megatron_lite.data.preprocess import Recipe, preprocess
from megatron_lite.data.tokenizer import Tokenizer
from megatron_lite.errors import UserError
from megatron_lite.log import set_up_logging
from megatron_lite.progress import progress, say


def main(words: Sequence[str] | None = None) -> int:
    options = parse(words)
    set_up_logging()
    if options.name is None:
        say("\n".join(listing(options.data)))
        return 0
    try:
        tokenizer = tokenizer_of(options)
        files = KNOWN[options.name].files
        with progress("fetching", size_of(files), shown=bool(files)) as advance:
            parts = obtain(options.name, options.data, advance)
        say("\n".join(settings(part, options.data / options.name, tokenizer) for part in parts))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the next call goes on from here", file=sys.stderr)
        return 130
    return 0


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="?", choices=KNOWN, metavar="NAME", help="the data set; left out, those that are known are listed")
    add_tokenizer_words(parser)
    parser.add_argument("-d", "--data", type=Path, default=Path("data"), metavar="FOLDER", help="where everything goes (default: %(default)s)")
    return parser.parse_args(words)


def listing(folder: Path) -> Iterator[str]:
    for name, known in KNOWN.items():
        if known.files:
            yield f"{name:18}{size_of(known.files) / 1e6:7,.0f} MB   {known.about}"
    yield "not fetched, but prepared from files that you bring:"
    for name, known in KNOWN.items():
        if not known.files:
            yield f"{name:18}{folder / name}: {known.about}"


def size_of(files: Sequence[RemoteFile]) -> int:
    return sum(file.size or 0 for file in files)


def tokenizer_of(options: argparse.Namespace) -> Tokenizer:
    """What was asked for; GPT-2's, fetched, if nothing was, as in GPT-NeoX."""
    if not options.config and options.vocab_file is None and options.tokenizer_type in (None, "GPT2BPETokenizer"):
        options.tokenizer_type = "GPT2BPETokenizer"
        options.vocab_file, options.merge_file = fetch_all(GPT2_TOKENIZER, options.data)
    return chosen_tokenizer(options)


def settings(part: Part, folder: Path, tokenizer: Tokenizer) -> str:
    """Tokenizes a part; returns the line that makes a configuration use it."""
    (written,) = preprocess([TextFile(path) for path in part.texts], folder / part.name, Recipe(tokenizer, keys=("text",)))
    if part.name in ("train", "valid", "test"):
        return f'"{part.name}-data-paths": ["{written.prefix}"],'
    return f'"data-path": "{written.prefix}",'


if __name__ == "__main__":
    sys.exit(main())
