"""Every key of NeoX is in exactly one table, with NeoX's default, and in the documentation."""

import ast
import re
from itertools import combinations
from pathlib import Path

import pytest
from pydantic_core import PydanticUndefined

from megatron_lite.config.document import PAGE, tables, with_tables
from megatron_lite.config.keys import DEEPSPEED, REFUSED, REFUSED_VALUES, RENAMED, RESTATED, WITHOUT_EFFECT
from megatron_lite.config.load import FIELDS
from megatron_lite.config.sections import SECTIONS

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT.parent / "shared" / "reference" / "neox.md"
TABLES = {"settings": FIELDS, "DeepSpeed's": DEEPSPEED, "without effect": WITHOUT_EFFECT, "refused": REFUSED, "older": RENAMED | RESTATED}


def neox_defaults() -> dict[str, object]:
    """The options of NeoX and their defaults, from the list in the reference material."""
    if not REFERENCE.is_file():
        pytest.skip(f"{REFERENCE} is not there: NeoX's own list of options is not compared")
    appendix = REFERENCE.read_text(encoding="utf-8").partition("## Appendix A")[2]
    pairs = re.findall(r"`(\w+)`=('[^']*'|[^;\s]+)", appendix)
    return {key: None if key == "git_hash" else ast.literal_eval(value) for key, value in pairs}


def test_a_key_is_in_one_table_only():
    for (one, first), (other, second) in combinations(TABLES.items(), 2):
        assert not first.keys() & second.keys(), f"in {one} and {other}"
    assert len(FIELDS) == sum(len(section.model_fields) for section in SECTIONS.values()), "a key is in two sections"
    assert REFUSED_VALUES.keys() <= FIELDS.keys()
    assert set(RENAMED.values()) <= FIELDS.keys()


def test_every_key_of_neox_has_a_place():
    known = {key for table in TABLES.values() for key in table}
    assert neox_defaults().keys() <= known


def test_what_is_not_neox_own_says_so():
    ours = {key for key, field in FIELDS.items() if (field.description or "").startswith("(ours)")}
    from_older_files = {"mlp_type"}
    assert FIELDS.keys() - neox_defaults().keys() == ours | from_older_files


def test_defaults_are_neox_own():
    theirs = neox_defaults()
    for key in FIELDS.keys() & theirs.keys():
        default = FIELDS[key].default
        written = str(default) if isinstance(default, Path) else default
        assert written is PydanticUndefined or written == theirs[key], key
    for key in WITHOUT_EFFECT.keys() & theirs.keys():
        assert WITHOUT_EFFECT[key].default == theirs[key], key
    for key in REFUSED.keys() & theirs.keys():
        assert REFUSED[key].default == theirs[key], key


def test_every_setting_is_read_somewhere():
    folders = (ROOT / "megatron_lite", ROOT / "launcher")
    code = "\n".join(path.read_text(encoding="utf-8") for folder in folders for path in folder.rglob("*.py") if path.name not in ("sections.py", "keys.py"))
    methods = (ROOT / "megatron_lite" / "config" / "sections.py").read_text(encoding="utf-8")
    code += "\n".join(re.findall(r"(?:self|settings)\.\w+", methods))
    for key in FIELDS:
        purpose = re.sub("^(train|valid|test)_(?=.*data)", "{purpose}_", key)  # all three are read by one line
        assert re.search(rf"\.{key}\b|[\"']{key}[\"']|{re.escape(purpose) if purpose != key else '(?!)'}", code), key


@pytest.mark.parametrize("key", FIELDS)
def test_every_setting_says_what_it_means(key: str):
    assert FIELDS[key].description


def test_the_documentation_is_up_to_date():
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    assert page == with_tables(page), f"run `python -m megatron_lite.config.document` to write the tables of {PAGE} anew"
    assert all(f"| `{key}` |" in tables() for table in TABLES.values() for key in table)
