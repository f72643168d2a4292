"""Writes the tables of docs/configuration.md from the settings themselves: python -m megatron_lite.config.document"""

from collections.abc import Iterable
from pathlib import Path

from pydantic.fields import FieldInfo

from megatron_lite.config.keys import DEEPSPEED, REFUSED, REFUSED_VALUES, RENAMED, RESTATED, WITHOUT_EFFECT
from megatron_lite.config.kinds import shown, words
from megatron_lite.config.sections import SECTIONS

PAGE = Path("docs/configuration.md")
BEGIN, END = "<!-- tables: begin -->\n", "<!-- tables: end -->\n"


def tables() -> str:
    """Every key in one of the four tables, in Markdown."""
    return "\n".join([*_ours(), *_handed_over(), *_older(), *_idle(), *_refused()]) + "\n"


def with_tables(page: str) -> str:
    """The page with its tables as they are now."""
    head, _, rest = page.partition(BEGIN)
    return head + BEGIN + tables() + END + rest.partition(END)[2]


def _ours() -> Iterable[str]:
    yield "## Settings\n"
    for name, section in SECTIONS.items():
        yield f"### `config.{name}`\n"
        yield f"{section.__doc__}\n"
        yield from _table(
            "key | default | needs | meaning", ((f"`{key}`", _default(field), words(field), field.description) for key, field in section.model_fields.items())
        )


def _default(field: FieldInfo) -> str:
    return "**required**" if field.is_required() else f"`{shown(field.default)}`"


def _handed_over() -> Iterable[str]:
    yield "## Keys that are handed to DeepSpeed\n"
    yield from _table("key | what DeepSpeed does with it", ((f"`{key}`", meaning) for key, meaning in DEEPSPEED.items()))


def _older() -> Iterable[str]:
    yield "## Older names\n"
    rows = [*((older, f"`{key}`") for older, key in RENAMED.items()), *RESTATED.items()]
    yield from _table("key | read as", ((f"`{older}`", meaning) for older, meaning in rows))


def _idle() -> Iterable[str]:
    yield "## Keys without effect\n"
    rows = ((f"`{key}`", f"`{shown(idle.default)}`", idle.reason) for key, idle in WITHOUT_EFFECT.items())
    yield from _table("key | NeoX's default | why it has no effect", rows)


def _refused() -> Iterable[str]:
    yield "## Keys and values that are refused\n"
    keys = ((f"`{key}`", f"anything but `{shown(refusal.default)}`", refusal.reason) for key, refusal in REFUSED.items())
    values = ((f"`{key}`", f"`{value}`", reason) for key, reasons in REFUSED_VALUES.items() for value, reason in reasons.items())
    yield from _table("key | refused value | why", [*keys, *values])


def _table(heads: str, rows: Iterable[Iterable[object]]) -> Iterable[str]:
    yield f"| {heads} |"
    yield "|" + "---|" * len(heads.split("|"))
    for row in rows:
        yield "| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |"
    yield ""


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
