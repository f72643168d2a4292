"""The words of tools/benchmark.py: what each command takes."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

Options = argparse.Namespace
Run = Callable[[Options], None]


def parse(words: Sequence[str], runs: Mapping[str, Run], description: str | None) -> Options:
    """The command, whose `run` is one of runs; `settings` may stand anywhere behind it."""
    parser = argparse.ArgumentParser(description=description)
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    _score_words(commands.add_parser("score", help="LAMBADA and PIQA: seconds of scoring, beside transformers in lm-eval's manner"), runs["score"])
    _decode_words(commands.add_parser("decode", help="one more token for every row: tokens/s, beside the time in which memory is read once"), runs["decode"])
    _prefill_words(commands.add_parser("prefill", help="reading prompts: ms and TFLOP/s"), runs["prefill"])
    _load_words(commands.add_parser("load", help="from files to GPUs: GB/s, cold and from the page cache"), runs["load"])
    _generate_words(commands.add_parser("generate", help="a mixed file of prompts: tokens/s from the first to the last"), runs["generate"])
    plot = commands.add_parser("plot", help="draws the figures of decode")
    plot.add_argument("reports", nargs="+", type=Path, metavar="FILE", help="what decode wrote with --json")
    plot.add_argument("--output", "-o", type=Path, required=True, help="an image, such as docs/decode.png (needs matplotlib)")
    plot.set_defaults(run=runs["plot"])
    options, others = parser.parse_known_args(words)
    if strange := [word for word in others if word.startswith("-") or "=" not in word or not hasattr(options, "settings")]:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if others:
        options.settings += others  # settings may stand between and behind options
    options.words = words
    return options


def _model_words(parser: argparse.ArgumentParser, run: Run) -> None:
    parser.add_argument("config", type=Path, help="a YAML such as configs/20B.yml")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that win over the file, such as num_layers=4")
    parser.set_defaults(run=run)


def _score_words(parser: argparse.ArgumentParser, run: Run) -> None:
    _model_words(parser, run)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with lambada/lambada_test.jsonl and piqa/valid.jsonl (default %(default)s)")
    parser.add_argument("--documents", type=int, help="only the first so many of each task")
    parser.add_argument("--peer", type=counts, default=(), metavar="BATCH,...", help="transformers with random weights at these batch sizes, instead of us")


def _common_words(parser: argparse.ArgumentParser, run: Run) -> None:
    _model_words(parser, run)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--peer", choices=("transformers",), help="also measure transformers, after our model was freed")
    parser.add_argument("--vocab", type=positive, help="rows of the embedding (default: the tokenizer's entries, padded as NeoX does)")


def _weights_words(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", action="store_true", help="the weights of the configuration's checkpoint, instead of random ones")
    parser.add_argument(
        "--peer-folder", metavar="FOLDER", help="weights for transformers in Hugging Face's form; its tp_plan takes no others (default: random)"
    )


def _decode_words(parser: argparse.ArgumentParser, run: Run) -> None:
    _common_words(parser, run)
    _weights_words(parser)
    parser.add_argument("--batch", type=counts, default=(1, 8, 64), metavar="ROWS,...", help="rows that share a step (default 1,8,64)")
    parser.add_argument("--context", type=positive, default=256, help="tokens that a row has in the middle of the steps (default %(default)s)")
    parser.add_argument("--steps", type=positive, default=64, help="steps whose median is taken (default %(default)s)")
    parser.add_argument("--peer-steps", type=positive, help="steps of transformers (default: as many)")
    parser.add_argument("--plain", action="store_true", help="also measure the plain path")
    parser.add_argument("--compile", type=counts, nargs="?", const=(1,), default=(), metavar="ROWS,...", help="transformers compiled as well (default 1 row)")


def _prefill_words(parser: argparse.ArgumentParser, run: Run) -> None:
    _common_words(parser, run)
    _weights_words(parser)
    parser.add_argument("--tokens", type=counts, default=(2048,), metavar="COUNT,...", help="tokens of a prompt (default 2048)")
    parser.add_argument("--batch", type=counts, default=(1,), metavar="ROWS,...", help="prompts that are read at once (default 1)")
    parser.add_argument("--times", type=positive, default=7, help="runs whose median is taken (default %(default)s)")


def _load_words(parser: argparse.ArgumentParser, run: Run) -> None:
    _common_words(parser, run)
    parser.add_argument("--folder", type=Path, help="the checkpoint (default: the configuration's); random weights are written where there is none")
    parser.add_argument("--format", choices=("neox", "huggingface"), default="neox", help="whose files to write (default %(default)s)")
    parser.add_argument("--file-cut", type=positive, default=2, help="ranks that the files to write are cut for (default %(default)s)")
    parser.add_argument("--workers", type=positive, default=8, help="files written at once (default %(default)s)")
    parser.add_argument("--no-cold", action="store_true", help="only from the page cache")
    parser.add_argument("--times", type=positive, default=3, help="runs from the page cache whose median is taken (default %(default)s)")
    parser.add_argument("--direct-gb", type=float, default=4.0, help="GB that are read past the page cache to know the disk (default %(default)s)")


def _generate_words(parser: argparse.ArgumentParser, run: Run) -> None:
    _common_words(parser, run)
    _weights_words(parser)
    parser.add_argument("--prompts", type=positive, default=1000, help="(default %(default)s)")
    parser.add_argument("--lengths", type=span, default=(5, 1500), metavar="LOW-HIGH", help="tokens of a prompt, log-uniform (default 5-1500)")
    parser.add_argument("--new", type=span, default=(16, 256), metavar="LOW-HIGH", help="new tokens, log-uniform (default 16-256)")
    parser.add_argument("--seed", type=int, default=0, help="other prompts (default %(default)s)")
    parser.add_argument("--rows", type=positive, help="rows that share a step (default: as many as generate.py takes)")
    parser.add_argument("--peer-prompts", type=positive, default=128, help="prompts that transformers continues, the first ones (default %(default)s)")


def positive(word: str) -> int:
    """A whole number of at least 1; argparse tells the user where it is none."""
    if int(word) < 1:
        raise ValueError
    return int(word)


def counts(word: str) -> tuple[int, ...]:
    return tuple(map(positive, word.split(",")))


def span(word: str) -> tuple[int, int]:
    low, high = map(positive, word.split("-"))
    if low > high:
        raise ValueError
    return low, high
