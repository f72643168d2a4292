#!/usr/bin/env python3
"""Turns texts into a data set for training: JSON lines or plain text, compressed or not; prompts with completions; conversations.

tools/preprocess_data.py configs/tiny.yml --input a.jsonl,b.jsonl.zst,c.txt --output-prefix data/mine --append-eod
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # last, because a top-level evaluate.py must not shadow the `evaluate` package

from megatron_lite.data.choose_tokenizer import add_tokenizer_words, chosen_tokenizer
from megatron_lite.data.documents import TextFile
from megatron_lite.data.forms import Template, plainly, templated
from megatron_lite.data.preprocess import Recipe, Written, preprocess
from megatron_lite.errors import DataError, UserError
from megatron_lite.log import set_up_logging


def main(words: Sequence[str] | None = None) -> int:
    options = parse(words)
    set_up_logging()
    if options.workers:
        os.environ["RAYON_NUM_THREADS"] = str(options.workers)  # the tokenizers library looks at it when it first works
    try:
        files = [TextFile(Path(name.strip())) for name in options.input.split(",") if name.strip()]
        recipe = Recipe(chosen_tokenizer(options), tuple(options.jsonl_keys), options.append_eod, read_template(options.chat_template))
        print(*(line for written in preprocess(files, options.output_prefix, recipe) for line in settings(written)), sep="\n")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_tokenizer_words(parser)
    texts = parser.add_argument_group("texts")
    texts.add_argument("--input", required=True, metavar="FILE[,FILE...]", help=".jsonl or .txt, also .gz, .bz2, .xz and .zst")
    texts.add_argument("--jsonl-keys", nargs="+", default=[], metavar="KEY", help="a data set for each; left out, the first record of a file decides")
    texts.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="how conversations are written: a Jinja template, or a tokenizer_config.json that holds one"
    )
    tokens = parser.add_argument_group("tokens")
    tokens.add_argument("--append-eod", action="store_true", help="end every document with the token between documents (completions always are)")
    tokens.add_argument("--workers", type=int, metavar="N", help="threads of the tokenizers library; left out, one for every core")
    parser.add_argument("--output-prefix", required=True, type=Path, metavar="PREFIX", help="writes PREFIX_KEY_document.bin and .idx")
    for flag in ("--num-docs", "--log-interval", "--dataset-impl"):
        parser.add_argument(flag, help=argparse.SUPPRESS)  # of NeoX's commands, and needless here
    return parser.parse_args(words)


def read_template(path: Path | None) -> Template:
    """How conversations are written: plainly, or as a file says."""
    if path is None:
        return plainly
    try:
        text = path.read_text(encoding="utf-8")
        settings = json.loads(text) if path.suffix == ".json" else {"chat_template": text}
    except (OSError, ValueError) as error:
        raise DataError(f"{path} (--chat-template) cannot be read: {error}") from error
    template = settings.get("chat_template") if isinstance(settings, dict) else None
    if not isinstance(template, str):
        raise DataError(f"{path} (--chat-template) holds no chat_template that is a text; give a file with the Jinja template itself")
    return templated(template, {name: spelled(value) for name, value in settings.items() if name.endswith("_token")})


def spelled(token: object) -> str:
    """A special token's text, which a tokenizer_config.json may wrap in an object."""
    return str(token.get("content", "") if isinstance(token, dict) else token)


def settings(written: Written) -> Iterator[str]:
    """The lines that make a configuration use a data set."""
    if written.labels is None:
        yield f'"data-path": "{written.prefix}",'
    else:
        yield f'"train-data-paths": ["{written.prefix}"],'
        yield f'"train-label-data-paths": ["{written.labels}"],'


if __name__ == "__main__":
    sys.exit(main())
