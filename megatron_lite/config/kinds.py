"""The kinds of values that settings take, each with the words that an error message and the documentation use for it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo


@dataclass(frozen=True)
class Words:
    """How to say what a value must be: "a whole number of at least 1"."""

    phrase: str
    is_text: bool = False


def _no_boolean(value: object) -> object:
    if isinstance(value, bool):  # python counts with them: true would pass as 1
        raise ValueError("true and false are no numbers")
    return value


def _as_sequence(value: object) -> object:
    return (value,) if isinstance(value, str | int | float) else value


def _as_bytes(value: object) -> object:
    """10 and 10GB are ten times 10^9 bytes, 10GiB ten times 2^30."""
    match = MEMORY.fullmatch(str(value).strip())
    if isinstance(value, bool) or not match or not float(match[1]):
        raise ValueError("no amount of memory")
    return int(float(match[1]) * (2**30 if match[2].lower() == "gib" else 10**9))


MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*(GB|GiB|)", re.IGNORECASE)
NotBoolean = BeforeValidator(_no_boolean)
Count = Annotated[int, Field(ge=1), NotBoolean, Words("a whole number of at least 1")]
Size = Annotated[int, Field(ge=0), NotBoolean, Words("a whole number of at least 0")]
Whole = Annotated[int, NotBoolean, Words("a whole number")]
Positive = Annotated[float, Field(gt=0), NotBoolean, Words("a number above 0")]
Amount = Annotated[float, Field(ge=0), NotBoolean, Words("a number of at least 0")]
Share = Annotated[float, Field(ge=0, le=1), NotBoolean, Words("a number from 0 to 1")]
Memory = Annotated[int, BeforeValidator(_as_bytes), Words("gigabytes, such as 10GB")]
Texts = Annotated[tuple[str, ...], BeforeValidator(_as_sequence), Words("a text or a list of texts", is_text=True)]
Prefixes = Annotated[tuple[Path, ...], BeforeValidator(_as_sequence), Words("a path or a list of paths", is_text=True)]
Counts = Annotated[tuple[Count, ...], Words("a list of whole numbers of at least 1")]
Sizes = Annotated[tuple[Size, ...], Words("a list of whole numbers")]
Amounts = Annotated[tuple[Amount, ...], Words("a list of numbers of at least 0")]

PLAIN: dict[object, Words] = {
    bool: Words("true or false"),
    str: Words("a text", is_text=True),
    Path: Words("a path", is_text=True),
}


class Section(BaseModel):
    """A group of settings: frozen, no key that is not declared, numbers written as text taken as numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), coerce_numbers_to_str=True, allow_inf_nan=False)


def words(field: FieldInfo) -> str:
    """What this field needs, in words."""
    return _of_field(field).phrase


def is_text(field: FieldInfo) -> bool:
    """Whether this field takes texts or paths."""
    return _of_field(field).is_text


def _of_field(field: FieldInfo) -> Words:
    return next((mark for mark in field.metadata if isinstance(mark, Words)), None) or _words(field.annotation)


def _words(annotation: Any) -> Words:
    if get_origin(annotation) in (Union, UnionType):
        return _words(next(part for part in get_args(annotation) if part is not NoneType))
    if get_origin(annotation) is Annotated:
        return next(mark for mark in annotation.__metadata__ if isinstance(mark, Words))
    if get_origin(annotation) is Literal:
        choices = ", ".join(str(choice) for choice in get_args(annotation))
        return Words(f"one of {choices}")
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return Words(f"a mapping with no other keys than {', '.join(annotation.model_fields)}")
    return PLAIN[annotation]


def group_of(field: FieldInfo) -> type[Section] | None:
    """The group of settings that this field takes, if it takes one."""
    return next((part for part in get_args(field.annotation) if isinstance(part, type) and issubclass(part, Section)), None)


def shown(value: object) -> str:
    """A value as it would be written in a configuration file."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Section):
        return shown(value.model_dump())
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {shown(part)}" for name, part in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(shown(part) for part in value) + "]"
    return repr(value) if isinstance(value, str) else str(value)
