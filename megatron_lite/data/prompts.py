"""Prompt files: plain text as GPT-NeoX splits it, or JSON lines with settings of their own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from megatron_lite.data.jsonl import read_records
from megatron_lite.errors import DataError


@dataclass(frozen=True)
class Prompt:
    """A text to continue, and what its line sets otherwise than the configuration."""

    text: str
    settings: Mapping[str, object] = field(default_factory=dict)


def read_prompts(path: Path, *, prompt_end: str = "\n") -> list[Prompt]:
    """The prompts of a file: one per JSON line if its name ends in .jsonl, else the parts between prompt_end, stripped, empty ones dropped.

    The text of a JSON line is taken as it stands: spaces at its ends are meant, and "" asks for a text out of nothing.
    """
    prompts = _json_lines(path) if path.suffix == ".jsonl" else _plain(path, prompt_end)
    if not prompts:
        raise DataError(f"{path} (sample_input_file) holds no prompt; write at least one")
    return prompts


def _plain(path: Path, prompt_end: str) -> list[Prompt]:
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise DataError(f"{path} (sample_input_file) cannot be read: {error.strerror}; check the path and its permissions") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path} line {line} is not UTF-8; save the file as UTF-8") from error
    parts = text.split(prompt_end) if prompt_end else [text]
    return [Prompt(part.strip()) for part in parts if part.strip()]


def _json_lines(path: Path) -> list[Prompt]:
    return [_prompt(record, f"{path} line {number}") for number, record in read_records(path)]


def _prompt(record: dict[str, object], where: str) -> Prompt:
    text = record.pop("text", None)
    if not isinstance(text, str):
        raise DataError(f'{where} has no "text" that is a string; write {{"text": "the prompt"}}')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f'{where}: "text" holds half of a surrogate pair at character {error.start + 1}, which is no text; write the character itself'
        ) from error
    record.pop("meta", None)  # data sets carry it; it says nothing about sampling
    for key, value in record.items():
        _check(key, value, where)
    return Prompt(text, record)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


SETTINGS: dict[str, tuple[str, Callable[..., bool]]] = {
    "temperature": ("a number, 0 or more", lambda value: _is_number(value) and 0 <= value < float("inf")),
    "top_k": ("a whole number, 0 or more", lambda value: _is_count(value, 0)),
    "top_p": ("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1),
    "maximum_tokens": ("a whole number, 1 or more", lambda value: _is_count(value, 1)),
    "stop": ("a string or a list of strings, none of them empty", lambda value: _is_text(value) or (isinstance(value, list) and all(map(_is_text, value)))),
    "seed": ("a whole number, 0 or more", lambda value: _is_count(value, 0)),
}


def _check(key: str, value: object, where: str) -> None:
    if key not in SETTINGS:
        nearest = get_close_matches(key, ["text", *SETTINGS], n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"beside text a line may hold {', '.join(SETTINGS)}"
        raise DataError(f"{where} has the unknown key {key}; {hint}")
    needed, accepts = SETTINGS[key]
    if not accepts(value):
        raise DataError(f"{where}: {key} is {value!r}; it must be {needed}")
