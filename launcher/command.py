"""What a command line asks for: a script, configuration files and settings. Imports nothing heavy, so that --help answers at once."""

import json
import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from launcher.options import OPTIONS, PLAN, SCRIPTS, option_parser
from megatron_lite.errors import ConfigError

ALIASES = {"eval": "evaluate"}
SUFFIXES = (".yml", ".yaml", ".json")
SETTING = re.compile(r"[A-Za-z][\w.-]*=")


@dataclass(frozen=True)
class Command:
    """What was asked for. `overrides` are the settings of the command line under NeoX's key names; texts among them are still YAML."""

    script: str
    configs: tuple[Path, ...]
    overrides: Mapping[str, object]
    hostfile: Path | None
    dry_run: bool

    def words(self) -> list[str]:
        """Words that say the same to the script itself, whatever folder its configuration files were looked up in."""
        return [*map(str, self.configs), *(f"{key}={_written(value)}" for key, value in self.overrides.items())]


def _written(value: object) -> str:
    return str(value) if isinstance(value, str | Path) else json.dumps(value)


def parse_command(words: Sequence[str], *, script: str | None = None) -> Command:
    """The command in these words. The first one names the script, unless `script` says which one is running already."""
    given = option_parser(script).parse_words(words)
    tasks, strays = _tasks(given)
    loose = sorted([*given.words, *strays], key=list(words).index)  # a later file wins over an earlier one
    plain = [word for word in loose if not SETTING.match(word)]
    settings = [word for word in loose if SETTING.match(word)]
    if script is None:
        script = _script(plain.pop(0) if plain else None)
    if not plain:
        raise ConfigError(f"no configuration file is named; write for instance ./deepy.py {script if script == PLAN else f'{script}.py'} configs/20B.yml")
    return Command(
        script=script,
        configs=tuple(find_config(word, given.conf_dir) for word in plain),
        overrides=_overrides(settings, given, tasks),
        hostfile=given.hostfile,
        dry_run=given.dry_run,
    )


def _script(word: str | None) -> str:
    """The name of one of our scripts, or the path of somebody's own."""
    if word is None:
        raise ConfigError(f"no script is named; write for instance ./deepy.py generate.py configs/20B.yml (scripts: {', '.join(SCRIPTS)})")
    if word == PLAN:
        return PLAN
    path = Path(word)
    name = ALIASES.get(path.stem, path.stem)
    if name in SCRIPTS and path.parent == Path() and path.suffix in ("", ".py"):
        return name
    for own in (path, path.with_name(path.name + ".py")):
        if own.suffix == ".py" and own.is_file():
            return str(own)
    near = get_close_matches(path.stem, [*SCRIPTS, *ALIASES], n=2) or list(SCRIPTS)
    raise ConfigError(f"there is no script {word}; did you mean {' or '.join(f'{name}.py' for name in near)}?")


def _tasks(given: Namespace) -> tuple[list[str] | None, list[str]]:
    """What follows --eval_tasks, parted into tasks and the configuration files and settings that came behind them."""
    if given.eval_tasks is None:
        return None, []
    strays = [word for word in given.eval_tasks if SETTING.match(word) or _is_config(word, given.conf_dir)]
    tasks = [task for word in given.eval_tasks if word not in strays for task in word.split(",") if task]
    if not tasks:
        raise ConfigError("--eval_tasks names no task; write for instance --eval_tasks lambada piqa")
    return tasks, strays


def _is_config(word: str, folder: Path | None) -> bool:
    return word.endswith(SUFFIXES) or any(path.is_file() for path in _candidates(word, folder))


def _candidates(word: str, folder: Path | None) -> list[Path]:
    name = word if word.endswith(SUFFIXES) else f"{word}.yml"
    return [Path(name)] if folder is None else [folder / name, Path(name)]


def find_config(word: str, folder: Path | None) -> Path:
    """The configuration file of this name, looked for in `folder` first."""
    candidates = _candidates(word, folder)
    for path in candidates:
        if path.is_file():
            return path
    wanted = candidates[0]
    near = _near(wanted)
    where = f"there is no configuration file {' or '.join(map(str, candidates))}"
    raise ConfigError(f"{where}; did you mean {' or '.join(near)}?" if near else f"{where}; check the path, or name its folder with -d DIR")


def _near(wanted: Path) -> list[str]:
    """Up to three configuration files with names like the wanted one, from its folder and the folders in it."""
    stems = {path.stem.lower(): str(path) for pattern in ("*/*.yml", "*.yml") for path in wanted.parent.glob(pattern)}
    return [stems[stem] for stem in get_close_matches(wanted.stem.lower(), stems, n=3)]


def _overrides(settings: Sequence[str], given: Namespace, tasks: list[str] | None) -> dict[str, object]:
    overrides: dict[str, object] = {}
    for word in settings:
        key, _, value = word.partition("=")
        if _key(key) in overrides:
            raise ConfigError(f"{_key(key)} is set twice on the command line, to {overrides[_key(key)]} and to {value}; leave one of them out")
        overrides[_key(key)] = value
    for option in (option for options in OPTIONS.values() for option in options):
        value = tasks if option.key == "eval_tasks" else getattr(given, option.key)
        if value is None:
            continue
        if option.key in overrides:
            raise ConfigError(f"{option.key} is set twice on the command line, by {option.names[0]} and by {option.key}=; leave one of them out")
        # what stands behind an option is meant as it is, and must not be read as YAML
        overrides[option.key] = json.dumps(value, ensure_ascii=False) if option.kind is str else value
    return overrides


def _key(word: str) -> str:
    return word.replace("-", "_")
