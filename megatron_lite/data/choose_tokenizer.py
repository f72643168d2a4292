"""The tokenizer that a command line asks for: by a configuration, or by GPT-NeoX's flags."""

import argparse
from pathlib import Path
from typing import get_args

from megatron_lite.config.load import load_config
from megatron_lite.config.sections import TokenizerSection
from megatron_lite.data.tokenizer import Tokenizer, load_tokenizer
from megatron_lite.errors import ConfigError

TYPES = get_args(TokenizerSection.model_fields["tokenizer_type"].annotation)


def add_tokenizer_words(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="*", type=Path, help="configuration files that name the tokenizer; or use the flags")
    flags = parser.add_argument_group("tokenizer")
    flags.add_argument("-t", "--tokenizer-type", choices=TYPES, metavar="TYPE", help="%(choices)s")
    flags.add_argument("-v", "--vocab-file", type=Path, metavar="FILE")
    flags.add_argument("-m", "--merge-file", type=Path, metavar="FILE")


def chosen_tokenizer(options: argparse.Namespace) -> Tokenizer:
    if options.config and options.tokenizer_type:
        raise ConfigError(f"--tokenizer-type and {options.config[0]} both name a tokenizer; keep one")
    if options.config:
        return load_tokenizer(load_config(options.config).tokenizer)
    if not options.tokenizer_type:
        raise ConfigError("no tokenizer: name a configuration file, or give --tokenizer-type and --vocab-file")
    stated = {key: getattr(options, key) for key in ("tokenizer_type", "vocab_file", "merge_file")}
    return load_tokenizer(TokenizerSection.model_validate(stated))
