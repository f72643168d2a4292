#!/usr/bin/env python3
"""Trains a byte-level BPE tokenizer on texts, in the form of GPT-NeoX-20B's, and writes it as a tokenizer JSON for HFTokenizer."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # last, because a top-level evaluate.py must not shadow the `evaluate` package

from megatron_lite.data.jsonl import check_writable, read_records
from megatron_lite.errors import ConfigError, DataError, UserError

SPECIAL_TOKENS = ["<|endoftext|>", "<|padding|>"]  # ids 0 and 1, as in the 20B tokenizer
SMALLEST = 256 + len(SPECIAL_TOKENS)


def texts(path: Path) -> Iterator[str]:
    """The "text" of every JSON line if the name ends in .jsonl, else the lines of the file."""
    if path.suffix == ".jsonl":
        for number, record in read_records(path):
            text = record.get("text")
            if not isinstance(text, str):
                raise DataError(f'{path} line {number} has no "text" that is a string')
            yield text
        return
    try:
        with path.open(encoding="utf-8") as lines:
            yield from lines
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check the path and its permissions") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8; save the file as UTF-8") from error


def train(inputs: Sequence[Path], output: Path, *, vocab_size: int) -> None:
    """Writes a tokenizer of at most `vocab_size` entries; the 256 bytes are always among them, so no text is unknown."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    if vocab_size < SMALLEST:
        raise ConfigError(f"--vocab-size {vocab_size} is too small; the 256 bytes and {' and '.join(SPECIAL_TOKENS)} take {SMALLEST}")
    check_writable(output)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((text for path in inputs for text in texts(path)), trainer)
    tokenizer.save(str(output))


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("input", nargs="+", type=Path, help="a .jsonl file with a text per line, or a plain text file")
    parser.add_argument("--vocab-size", type=int, default=50254, help="entries of the vocabulary (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("tokenizer.json"), help="where to write it (default: %(default)s)")
    arguments = parser.parse_args(words)
    try:
        train(arguments.input, arguments.output, vocab_size=arguments.vocab_size)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
