"""One YAML or JSON file of NeoX's dialect -> its settings, each with its file and line, and the problems of the file in sentences."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from yaml.constructor import ConstructorError

from megatron_lite.config.keys import RENAMED

TIMESTAMP = "tag:yaml.org,2002:timestamp"
FLOAT = "tag:yaml.org,2002:float"


class NeoXLoader(yaml.SafeLoader):
    """PyYAML's safe loader that also takes 1e-8 for a number, as YAML 1.2 and JSON do, and no text for a date."""


NeoXLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != TIMESTAMP] for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
NeoXLoader.add_implicit_resolver(FLOAT, re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+.0123456789"))


@dataclass(frozen=True)
class Setting:
    """A key, written with underscores, its value, who set it ("configs/20B.yml line 12"), and the number of that source; later sources win."""

    key: str
    value: object
    origin: str
    source: int


@dataclass(frozen=True)
class Reading:
    """What a file says, and what is wrong with it."""

    settings: tuple[Setting, ...] = ()
    problems: tuple[str, ...] = ()
    whole: bool = True


def plain_key(written: str) -> str:
    """The one spelling of a key: underscores, and the present name."""
    key = written.replace("-", "_")
    return RENAMED.get(key, key)


def parse_value(text: str) -> object:
    """A value as it would stand behind a key in a file. Raises yaml.YAMLError."""
    return yaml.load(text, NeoXLoader)


def read_file(path: Path, *, source: int) -> Reading:
    """The settings of one file; `source` is its number among all files."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return _unreadable(f"{path}: no such configuration file")
    except OSError as error:
        return _unreadable(f"{path}: the configuration file cannot be read: {error.strerror}")
    except UnicodeDecodeError:
        return _unreadable(f"{path}: the configuration file is not UTF-8 text")
    if path.suffix == ".json":
        text = text.replace("\t", " ")  # allowed between JSON's tokens, and never inside its strings
    return _read_text(text, path, source)


def _unreadable(problem: str) -> Reading:
    return Reading(problems=(problem,), whole=False)


def _read_text(text: str, path: Path, source: int) -> Reading:
    try:
        loader = NeoXLoader(text)
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            return _unreadable(f'{path}: a configuration is a mapping of keys to values, {{ "num_layers": 44, ... }}; found {_kind(root)}')
        settings = [
            Setting(plain_key(_written(name)), loader.construct_object(value, deep=True), f"{path} line {_line(name)}", source) for name, value in root.value
        ]
        return Reading(tuple(settings), tuple(_duplicates(root, path)))
    except yaml.YAMLError as error:
        return _unreadable(_syntax_problem(error, path))
    except RecursionError:
        return _unreadable(f"{path}: not valid YAML: its brackets are nested too deeply")


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _written(name: yaml.Node) -> str:
    return str(name.value) if isinstance(name, yaml.ScalarNode) else "[...]"


def _kind(root: yaml.Node | None) -> str:
    if root is None:
        return "nothing"
    return "a list" if isinstance(root, yaml.SequenceNode) else "a single value"


def _duplicates(node: yaml.Node, path: Path, place: str = "") -> Iterator[str]:
    """A sentence for every key that a mapping states twice, at the top in any spelling, below as it is written."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, yaml.Node] = {}
    for name, value in node.value:
        key = _written(name) if place else plain_key(_written(name))
        first = seen.setdefault(key, name)
        if first is not name:
            yield _twice(f"{place}{key}", first, name, path)
        yield from _duplicates(value, path, f"{place}{key}.")


def _twice(key: str, first: yaml.Node, second: yaml.Node, path: Path) -> str:
    lines = f"lines {_line(first)} and {_line(second)}" if _line(first) != _line(second) else f"line {_line(first)}"
    spelling = f" (as '{_written(first)}' and as '{_written(second)}')" if _written(first) != _written(second) else ""
    return f"{path} {lines}: '{key}' is stated twice{spelling}; keep one"


def _syntax_problem(error: yaml.YAMLError, path: Path) -> str:
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    if not isinstance(error, yaml.MarkedYAMLError) or mark is None:
        return f"{path}: not valid YAML: {str(error).splitlines()[0]}"
    problem = (error.problem or "").replace("'<scalar>'", "another value")
    if "\\t" in problem:
        hint = "; use spaces instead of tabs"
    else:
        hint = "" if isinstance(error, ConstructorError) else "; look for a missing comma, quote or bracket there or in the lines before"
    return f"{path} line {mark.line + 1}: not valid YAML: {problem}{hint}"
