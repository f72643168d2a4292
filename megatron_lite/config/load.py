"""Configuration files and words of the command line -> one checked RunConfig, or one error that lists everything that is wrong with them."""

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import yaml
from pydantic import ValidationError

from megatron_lite.config.check import broken_rules
from megatron_lite.config.keys import DEEPSPEED, REFUSED, REFUSED_VALUES, RENAMED, WITHOUT_EFFECT
from megatron_lite.config.kinds import Section, is_text, shown, words
from megatron_lite.config.precision import stated_precision, without_other_precisions
from megatron_lite.config.read import Setting, parse_value, plain_key, read_file
from megatron_lite.config.sections import SECTIONS, RunConfig
from megatron_lite.errors import ConfigError

NO_OVERRIDES: Mapping[str, object] = MappingProxyType({})
FIELDS = {key: field for section in SECTIONS.values() for key, field in section.model_fields.items()}
KNOWN = [*FIELDS, *DEEPSPEED, *REFUSED, *WITHOUT_EFFECT, *RENAMED]
REQUIRED = [key for key, field in FIELDS.items() if field.is_required()]


def load_config(files: Sequence[Path], overrides: Mapping[str, object] = NO_OVERRIDES) -> RunConfig:
    """What these files say, later ones winning over earlier ones and overrides over all. Every problem of every file is in the one ConfigError."""
    readings = [read_file(Path(path), source=number) for number, path in enumerate(files)]
    problems = [problem for reading in readings for problem in reading.problems]
    stated = {setting.key: setting for reading in readings for setting in reading.settings}
    for key, value in overrides.items():
        _override(key, value, len(files), stated, problems)
    problems += _refusals(stated)
    sections = _build(stated, problems)
    precision, contradictions = stated_precision(stated)
    problems += contradictions
    if all(reading.whole for reading in readings):
        problems += _missing(stated, files)
        problems += [f"{stated[key].origin}: {rule}" if key in stated else rule for key, rule in broken_rules(sections)]
    if problems:
        raise ConfigError("\n".join(problems))
    deepspeed = {key: setting.value for key, setting in stated.items() if key in DEEPSPEED}
    return RunConfig(
        **cast(Any, sections),
        deepspeed=without_other_precisions(deepspeed, precision),
        precision=precision,
        files=tuple(Path(path) for path in files),
        notes=tuple(_notes(stated)),
        origins={key: setting.origin for key, setting in stated.items()},
    )


def _override(key: str, value: object, source: int, stated: dict[str, Setting], problems: list[str]) -> None:
    """Adds one word of the command line. Text is read as in a file, except that a setting which is text takes it as it stands, unless it begins like YAML."""
    plain = plain_key(key)
    literal = plain in FIELDS and is_text(FIELDS[plain])
    if isinstance(value, str) and not (literal and value != "null" and not value.startswith(("[", "{", '"', "'"))):
        try:
            value = parse_value(value)
        except yaml.YAMLError:
            problems.append(f"command line: {key}={value} is no value that YAML could read; put it in quotes")
            return
    stated[plain] = Setting(plain, value, "command line", source)


def _refusals(stated: Mapping[str, Setting]) -> Iterator[str]:
    """A sentence for every key that is unknown or asks for what is not built."""
    for key, setting in stated.items():
        if key in REFUSED and not REFUSED[key].allows(setting.value):
            yield f"{setting.origin}: {key}: {shown(setting.value)} is refused: {REFUSED[key].reason}"
        elif _refused_value(setting):
            yield f"{setting.origin}: {key}: {shown(setting.value)} is refused: {REFUSED_VALUES[key][setting.value]}"
        elif key not in KNOWN:
            nearest = get_close_matches(key, KNOWN, n=1, cutoff=0.7)
            yield f"{setting.origin}: unknown key '{key}'" + (f"; did you mean '{nearest[0]}'?" if nearest else "; docs/configuration.md lists all keys")


def _refused_value(setting: Setting) -> bool:
    return isinstance(setting.value, str) and setting.value in REFUSED_VALUES.get(setting.key, {})


def _build(stated: Mapping[str, Setting], problems: list[str]) -> dict[str, Section]:
    """The sections that could be built; what is wrong with the others is added to the problems."""
    sections: dict[str, Section] = {}
    for name, section in SECTIONS.items():
        values = {key: stated[key].value for key in section.model_fields if key in stated and not _refused_value(stated[key])}
        try:
            sections[name] = section.model_validate(values)
        except ValidationError as error:
            wrong = {str(part["loc"][0]): part["input"] for part in error.errors() if part["type"] != "missing"}
            problems += [f"{stated[key].origin}: {key} needs {words(FIELDS[key])}, found {shown(found)}" for key, found in wrong.items()]
    return sections


def _missing(stated: Mapping[str, Setting], files: Sequence[Path]) -> Iterator[str]:
    if missing := [key for key in REQUIRED if key not in stated]:
        places = ", ".join(str(path) for path in files) or "no file at all"
        yield f"{', '.join(missing)} must be set, and {places} did not; name the configuration file of a model too, such as configs/20B.yml"


def _notes(stated: Mapping[str, Setting]) -> Iterator[str]:
    for key, setting in stated.items():
        if key in WITHOUT_EFFECT and setting.value != WITHOUT_EFFECT[key].default:
            yield f"{setting.origin}: {key} has no effect here: {WITHOUT_EFFECT[key].reason}"
