"""Who may import whom: the table of the design, held against every import statement of every module."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENTRY_POINTS = ("deepy", "generate", "evaluate", "train")
PACKAGES = ("launcher", "megatron_lite", "tools")

# What a part may import of ours, beside itself and what everybody may
MAY_IMPORT = {
    "megatron_lite.errors": (),
    "megatron_lite.log": (),
    "megatron_lite.progress": (),
    "megatron_lite.whole": (),
    "megatron_lite.config": (),
    "megatron_lite.parallel": (),
    "megatron_lite.metrics": ("config",),
    "megatron_lite.data": ("config",),
    "megatron_lite.models": ("config", "parallel"),
    "megatron_lite.checkpoint": ("parallel", "models"),
    "megatron_lite.run": ("config", "parallel", "data", "models", "checkpoint"),
    "megatron_lite.inference": ("run", "config", "parallel", "models", "data"),
    "megatron_lite.training": ("run", "config", "parallel", "models", "checkpoint", "data", "metrics"),
    "megatron_lite.evaluation": ("run", "config", "parallel", "models", "checkpoint", "inference", "data", "metrics"),
    "megatron_lite.benchmark": ("run", "config", "parallel", "models", "checkpoint", "inference", "data"),
    "launcher": (
        "config",
        "parallel.layout",
        "models.spec",
        "models.memory",
        "models.training_memory",
        "checkpoint.config_json",
        "checkpoint.find",
        "data.tokenizer",
        "data.prompts",
        "data.jsonl",
        "data.task_data",
    ),
}
MAY_IMPORT = {part: tuple(f"megatron_lite.{name}" for name in names) for part, names in MAY_IMPORT.items()}
MAY_IMPORT |= {"tools": ("megatron_lite",)} | dict.fromkeys(ENTRY_POINTS, ("launcher", "megatron_lite"))

EVERYBODY_MAY_IMPORT = ("megatron_lite.errors", "megatron_lite.log", "megatron_lite.progress", "megatron_lite.whole")

# The only places that may import a heavy library, at the top of a file or in a function
HOMES = {
    "deepspeed": ("megatron_lite.training", "launcher"),
    "lm_eval": ("megatron_lite.evaluation",),
    "pydantic": ("megatron_lite.config",),
    "safetensors": ("megatron_lite.checkpoint",),
    "sentencepiece": ("megatron_lite.data",),
    "tiktoken": ("megatron_lite.data",),
    "tokenizers": ("megatron_lite.data", "tools"),
    "wandb": ("megatron_lite.metrics",),
    "yaml": ("megatron_lite.config", "megatron_lite.evaluation"),  # lm-eval describes its tasks in YAML
}


def source_files() -> list[Path]:
    files = [ROOT / f"{name}.py" for name in ENTRY_POINTS if (ROOT / f"{name}.py").exists()]
    return files + sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in source_files()}


def imports(path: Path) -> Iterator[str]:
    """Full names of all that a file imports, at its top, in functions and for type checkers."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} line {node.lineno}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else str(node.module)


def lies_in(name: str, places: tuple[str, ...]) -> bool:
    return any(name == place or name.startswith(place + ".") for place in places)


def part_of(module: str) -> str:
    return next((part for part in MAY_IMPORT if lies_in(module, (part,))), module)


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"megatron_lite"}))
def test_a_module_imports_only_what_the_table_of_the_design_allows(module: str) -> None:
    part = part_of(module)
    assert part in MAY_IMPORT, f"{module} has no row in the table; decide what it may import"
    itself = () if part == "tools" else (part,)
    ours = {name for name in imports(MODULES[module]) if lies_in(name, (*PACKAGES, *ENTRY_POINTS))}
    refused = sorted(name for name in ours if not lies_in(name, (*MAY_IMPORT[part], *itself, *EVERYBODY_MAY_IMPORT)))
    assert not refused, f"{module} imports {', '.join(refused)}, which the table in this file does not allow"


@pytest.mark.parametrize("library", sorted(HOMES))
def test_a_heavy_library_is_imported_only_at_home(library: str) -> None:
    importers = {module for module, path in MODULES.items() if any(lies_in(name, (library,)) for name in imports(path))}
    assert sorted(module for module in importers if not lies_in(module, HOMES[library])) == []


def test_every_package_file_is_empty_so_a_thing_has_one_import_path() -> None:
    assert [str(path) for path in MODULES.values() if path.name == "__init__.py" and path.stat().st_size] == []


def test_reading_the_command_line_loads_no_heavy_library() -> None:
    question = "import sys, launcher.command; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True, check=True).stdout.split()
    assert sorted({"torch", "numpy", *HOMES} & set(loaded)) == []


def test_imports_are_seen_in_functions_too_and_down_to_the_module(tmp_path: Path) -> None:
    path = tmp_path / "example.py"
    path.write_text("def f():\n    from megatron_lite.models import spec\n    from megatron_lite.models.spec import ModelSpec\n    import torch.nn as nn\n")
    assert list(imports(path)) == ["megatron_lite.models.spec", "megatron_lite.models.spec", "torch.nn"]
