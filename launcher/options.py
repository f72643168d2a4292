"""The options of deepy's command line, and the parser that knows them. Imports nothing heavy, so that --help answers at once."""

import re
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter, _ArgumentGroup
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from megatron_lite.errors import ConfigError

SCRIPTS = {
    "generate": "write text: from prompts, out of nothing, or in conversation",
    "evaluate": "score a model on tasks of the evaluation harness (also: eval)",
    "train": "train or fine-tune a model",
}
PLAN = "plan"
"""The word that stands in a script's place to ask what a model takes; gpus=2x24GB behind it names another machine."""

DESCRIPTION = "Runs a script with GPT-NeoX configuration files, one process per GPU (per CPU process where there is no GPU).\n\nscripts:\n" + "\n".join(
    f"  {name if name == PLAN else name + '.py':<14} {phrase}"
    for name, phrase in {**SCRIPTS, PLAN: "memory and speed to expect, here or with gpus=2x24GB"}.items()
)
EXAMPLES = """examples:
  ./deepy.py generate.py configs/20B.yml -i prompts.txt -o samples.txt
  ./deepy.py generate -d configs 20B text_generation temperature=0.8 maximum_tokens=200
  ./deepy.py generate.py configs/20B.yml pipe-parallel-size=1 model-parallel-size=2 --dry-run
  ./deepy.py evaluate.py configs/20B.yml --eval_tasks lambada piqa
  ./deepy.py plan configs/20B.yml gpus=2x24GB

Options and settings may stand anywhere, with dashes or underscores. Settings on the command line win over files, later files over earlier ones."""


@dataclass(frozen=True)
class Option:
    """A word such as --eval_tasks or -i, which sets a key of the configuration."""

    key: str
    help: str
    metavar: str | None = None
    kind: type = str
    short: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.short, f"--{self.key}") if self.short else (f"--{self.key}",)


OPTIONS = {
    "text generation": (
        Option("sample_input_file", "file of prompts, plain or JSON lines (.jsonl)", "FILE", Path, short="-i"),
        Option("sample_output_file", "JSON-lines file of results", "FILE", Path, short="-o"),
    ),
    "evaluation": (
        Option("eval_tasks", "tasks of the evaluation harness, wildcards allowed", "TASK", list),
        Option("eval_results_prefix", "begins the name of the result file", "TEXT"),
        Option("num_fewshot", "solved examples before every question", "N", int),
        Option("limit", "documents per task", "N", int),
        Option("include_path", "folder of further task definitions", "DIR", Path),
        Option("log_samples", "write every question with its answer", kind=bool),
    ),
    "training": (Option("check", "two steps, a validation and a save that is cleared away: does all of it work?", kind=bool),),
    "checkpoints and reports": (
        Option("iteration", "step to load, instead of the one that `latest` names", "N", int),
        Option("wandb_group", "group of the run at Weights & Biases", "TEXT"),
        Option("wandb_run_name", "name of the run", "TEXT"),
        Option("wandb_team", "team that owns the run", "TEXT"),
        Option("autotuning", "refused: DeepSpeed's autotuner is not built in", "{tune,run}"),
    ),
}


class OptionParser(ArgumentParser):
    """argparse, with its complaints turned into one sentence, and dashes and underscores taken as one."""

    def parse_words(self, words: Sequence[str]) -> Namespace:
        return self.parse_intermixed_args([_with_underscores(word) if word.startswith("--") else word for word in words])

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"unrecognized arguments: (\S+)", message)
        near = get_close_matches(unknown[1], self._option_string_actions, n=1) if unknown else []
        what = f"unknown option {unknown[1]}" if unknown else message
        raise ConfigError(f"{what}; {f'did you mean {near[0]}?' if near else f'see {self.prog} --help'}")


def _with_underscores(word: str) -> str:
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def option_parser(script: str | None) -> OptionParser:
    """deepy's parser, or that of a script which runs already. Every word without a dash arrives in `words`."""
    parser = OptionParser(
        prog="./deepy.py" if script is None else f"{script}.py",
        usage=f"%(prog)s {'SCRIPT ' if script is None else ''}CONF [CONF ...] [options] [key=value ...]",
        description=DESCRIPTION if script is None else SCRIPTS.get(script),
        epilog=EXAMPLES if script is None else None,
        formatter_class=lambda prog: RawDescriptionHelpFormatter(prog, max_help_position=40, width=120),
        allow_abbrev=False,
        add_help=False,
    )
    _add_words(parser.add_argument_group("words"), script)
    launch = parser.add_argument_group("launching")
    launch.add_argument("-d", "--conf_dir", metavar="DIR", type=Path, help="folder in which CONF is looked up first")
    launch.add_argument("-H", "--hostfile", metavar="FILE", type=Path, help="hosts to run on, a line `NAME slots=N` for each")
    launch.add_argument("--dry-run", "--dry_run", action="store_true", help="print settings, layout and memory per GPU; start nothing")
    launch.add_argument("-h", "--help", action="help", help="print this text")
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for option in options:
            _add_option(group, option)
    return parser


def _add_words(group: _ArgumentGroup, script: str | None) -> None:
    # Only the first takes words; the others are there for --help.
    if script is None:
        group.add_argument("words", nargs="*", metavar="SCRIPT", help="one of the above, or the path of a script of your own; .py may be left off")
    name = "words" if script else "configs"
    group.add_argument(name, nargs="*", metavar="CONF", help="configuration file: a path, or a name inside DIR; .yml may be left off")
    group.add_argument("settings", nargs="*", metavar="key=value", help="any setting of a configuration file")


def _add_option(group: _ArgumentGroup, option: Option) -> None:
    if option.kind is bool:
        group.add_argument(*option.names, dest=option.key, help=option.help, action="store_true", default=None)
    elif option.kind is list:
        group.add_argument(*option.names, dest=option.key, help=option.help, metavar=option.metavar, nargs="+")
    else:
        group.add_argument(*option.names, dest=option.key, help=option.help, metavar=option.metavar, type=option.kind)
