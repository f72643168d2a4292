"""Configuration files and words of the command line -> one checked RunConfig, or one error that lists everything that is wrong with them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import yaml
from pydantic import ValidationError

from megatron_lite.config.check import broken_rules
from megatron_lite.config.keys import DEEPSPEED, REFUSED, REFUSED_VALUES, RENAMED, RESTATED, WITHOUT_EFFECT
from megatron_lite.config.kinds import Section, group_of, is_text, shown, words
from megatron_lite.config.older import restated
from megatron_lite.config.precision import stated_precision, without_other_precisions
from megatron_lite.config.read import Reading, Setting, parse_value, plain_key, read_file
from megatron_lite.config.sections import SECTIONS, Precision, RunConfig
from megatron_lite.errors import ConfigError

Stated = Mapping[str, Setting]

NO_OVERRIDES: Mapping[str, object] = MappingProxyType({})
FIELDS = {key: field for section in SECTIONS.values() for key, field in section.model_fields.items()}
REQUIRED = [key for key, field in FIELDS.items() if field.is_required()]
KNOWN = [*FIELDS, *DEEPSPEED, *REFUSED, *WITHOUT_EFFECT]


def load_config(files: Sequence[Path], overrides: Mapping[str, object] = NO_OVERRIDES) -> RunConfig:
    """What these files say: later ones win over earlier ones, and overrides over all. Every problem of every file is in the one ConfigError."""
    paths = tuple(Path(path) for path in files)
    readings = [read_file(path, source=number) for number, path in enumerate(paths)]
    stated, problems = _gather(readings, overrides)
    sections, wrong = _build(stated)
    statement, contradictions = stated_precision(stated)
    refusals = [*_refusals(stated)]
    problems += [*refusals, *_strangers(stated), *wrong, *contradictions]
    if all(reading.whole for reading in readings):
        problems += _missing(stated, paths)
        if not refusals:  # what is refused pulls other rules along
            problems += [f"{stated[key].origin}: {rule}" if key in stated else rule for key, rule in broken_rules(sections)]
    if problems:
        raise ConfigError("\n".join(problems))
    if statement is not None:
        stated["precision"] = replace(statement.setting, key="precision", value=statement.precision)
    return _assemble(stated, sections, statement.precision if statement else "fp32", paths)


def _gather(readings: Sequence[Reading], overrides: Mapping[str, object]) -> tuple[dict[str, Setting], list[str]]:
    """The last word on every key, and what is wrong with the files as such."""
    problems = [problem for reading in readings for problem in reading.problems]
    stated = {setting.key: setting for reading in readings for setting in reading.settings}
    for key, value in overrides.items():
        block, *path = key.split(".")
        plain = plain_key(block)
        try:
            parsed = _parsed(value, literal=plain in FIELDS and is_text(FIELDS[plain]))
        except yaml.YAMLError:
            problems.append(f"command line: {key}={value} cannot be read as a value; put quotes around it")
            continue
        whole = _with_leaf(stated[plain].value if plain in stated else None, path, parsed)
        stated[plain] = Setting(plain, whole, "command line", source=len(readings))
    stated, older = restated(stated)
    return stated, problems + older


def _parsed(value: object, *, literal: bool) -> object:
    """A word of the command line, read as in a file; a literal one is taken as it stands, unless it is null or begins like YAML."""
    if not isinstance(value, str) or (literal and value != "null" and not value.startswith(("[", "{", '"', "'"))):
        return value
    return parse_value(value)


def _with_leaf(block: object, path: Sequence[str], leaf: object) -> object:
    """The same block, but for what stands at the end of this path: optimizer.params.lr=1e-5."""
    if not path:
        return leaf
    known = block if isinstance(block, dict) else {}
    return {**known, path[0]: _with_leaf(known.get(path[0]), path[1:], leaf)}


def _assemble(stated: Stated, sections: Mapping[str, Section], precision: Precision, paths: tuple[Path, ...]) -> RunConfig:
    deepspeed = {key: setting.value for key, setting in stated.items() if key in DEEPSPEED}
    return RunConfig(
        **cast(Any, sections),
        deepspeed=without_other_precisions(deepspeed, precision),
        precision=precision,
        files=paths,
        notes=tuple(_notes(stated)),
        origins={key: setting.origin for key, setting in stated.items()},
    )


def _refusals(stated: Stated) -> Iterator[str]:
    """A sentence for every key or value that asks for what is not built."""
    for key, setting in stated.items():
        if key in REFUSED and not REFUSED[key].allows(setting.value):
            yield f"{setting.origin}: {key}: {shown(setting.value)} is refused: {REFUSED[key].reason}"
        elif _value_is_refused(setting):
            yield f"{setting.origin}: {key}: {shown(setting.value)} is refused: {REFUSED_VALUES[key][str(setting.value)]}"


def _value_is_refused(setting: Setting) -> bool:
    return str(setting.value) in REFUSED_VALUES.get(setting.key, {})


def _strangers(stated: Stated) -> Iterator[str]:
    """A sentence for every key that nobody knows."""
    for key, setting in stated.items():
        if key not in KNOWN:
            nearest = get_close_matches(key, [*KNOWN, *RENAMED, *RESTATED], n=1, cutoff=0.7)
            yield f"{setting.origin}: unknown key '{key}'; " + (f"did you mean '{nearest[0]}'?" if nearest else "docs/configuration.md lists every key")


def _build(stated: Stated) -> tuple[dict[str, Section], list[str]]:
    """The sections that can be built, and a sentence for every value of a wrong type in the others."""
    sections: dict[str, Section] = {}
    problems: list[str] = []
    for name, section in SECTIONS.items():
        values = {key: stated[key].value for key in section.model_fields if key in stated and not _value_is_refused(stated[key])}
        try:
            sections[name] = section.model_validate(values)
        except ValidationError as error:
            wrong = dict(_wrong(part["loc"], part["input"]) for part in error.errors() if part["type"] != "missing")
            problems += [f"{stated[key.split('.')[0]].origin}: {key} needs {what}" for key, what in wrong.items()]
    return sections, problems


def _wrong(place: Sequence[int | str], found: object) -> tuple[str, str]:
    """The key at this place, which may lie within the group of settings of another, and what it needs."""
    key, group = str(place[0]), group_of(FIELDS[str(place[0])])
    if group is None or len(place) == 1:
        return key, f"{words(FIELDS[key])}, found {shown(found)}"
    if place[1] not in group.model_fields:
        return key, f"{words(FIELDS[key])}, found {place[1]}"
    return f"{key}.{place[1]}", f"{words(group.model_fields[str(place[1])])}, found {shown(found)}"


def _missing(stated: Stated, paths: Sequence[Path]) -> Iterator[str]:
    if missing := [key for key in REQUIRED if key not in stated]:
        places = ", ".join(map(str, paths)) or "any file"
        are = "is" if len(missing) == 1 else "are"
        yield f"{', '.join(missing)} must be set, and {are} not in {places}; name a model's own configuration file as well, such as configs/20B.yml"


def _notes(stated: Stated) -> Iterator[str]:
    """A line for every key that has no effect here, unless it says what NeoX takes for granted."""
    for key, setting in stated.items():
        if key in WITHOUT_EFFECT and setting.value not in (WITHOUT_EFFECT[key].default, *WITHOUT_EFFECT[key].silent):
            yield f"{setting.origin}: {key} has no effect here: {WITHOUT_EFFECT[key].reason}"
