"""A fresh machine gets what it needs by one command, at exact versions, and nothing of ours shadows a library."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / "requirements"

# The packages of libraries that are not called like the module they bring
PACKAGE_OF = {"lm_eval": "lm-eval", "yaml": "pyyaml"}
OPTIONAL = {"accelerate", "bitsandbytes", "matplotlib", "tensorboard", "tiktoken", "transformers", "zstandard"}  # a sentence says how to install them
BROUGHT_BY_TORCH = {"triton"}  # by its CUDA builds, at the version they need; nothing imports it without a GPU


def requirements(name: str) -> dict[str, Requirement]:
    """Package -> requirement of a file and of those that it includes."""
    found: dict[str, Requirement] = {}
    for line in (REQUIREMENTS / name).read_text().splitlines():
        if line.startswith("-r "):
            found |= requirements(line.removeprefix("-r "))
        elif line and not line.startswith("#"):
            requirement = Requirement(line)
            found[canonicalize_name(requirement.name)] = requirement
    return found


PINS = requirements("constraints.txt")


def run(*words: str, folder: Path = ROOT) -> str:
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True).stdout


def libraries() -> set[str]:
    """Top-level names of everything that our packages import and that is neither ours nor Python's."""
    found: set[str] = set()
    for path in (path for package in ("launcher", "megatron_lite") for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            found |= {name.partition(".")[0] for name in names}
    return found - set(sys.stdlib_module_names) - {"launcher", "megatron_lite"}


def test_every_library_that_is_imported_is_required() -> None:
    needed = {canonicalize_name(PACKAGE_OF.get(name, name)) for name in libraries()} - OPTIONAL - BROUGHT_BY_TORCH
    assert sorted(needed - requirements("requirements.txt").keys()) == []


@pytest.mark.parametrize("name", ["generate.txt", "requirements.txt", "requirements-dev.txt"])
def test_every_required_range_contains_the_version_that_is_pinned(name: str) -> None:
    for package, requirement in requirements(name).items():
        (pin,) = PINS[package].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version, prereleases=True), f"{requirement} and {PINS[package]}"


def test_pins_name_no_build_so_a_cuda_machine_gets_the_cuda_build() -> None:
    assert str(PINS["torch"]) == "torch==2.13.0"
    assert [str(pin) for pin in PINS.values() if "+" in str(pin)] == []


def test_the_packages_are_found_from_everywhere_and_the_project_root_is_not_on_the_path(tmp_path: Path) -> None:
    (tmp_path / "ask.py").write_text(
        "import importlib.util, sys, launcher, megatron_lite, tools\n"
        "print(*sys.path, sep='\\n')\n"
        "print(*[name for name in ('deepy', 'generate', 'tests') if importlib.util.find_spec(name)], sep='\\n')\n"
    )
    lines = run(sys.executable, str(tmp_path / "ask.py"), folder=tmp_path).splitlines()
    assert str(ROOT) not in lines
    assert not {"deepy", "generate", "tests"} & set(lines)


def test_an_evaluate_script_of_ours_does_not_shadow_the_evaluate_library(tmp_path: Path) -> None:
    question = "import importlib.util; spec = importlib.util.find_spec('evaluate'); print(spec.origin if spec else 'none')"
    origin = run(sys.executable, "-c", question, folder=tmp_path).strip()
    assert Path(origin).parent != ROOT


def test_the_two_commands_are_what_the_readme_says() -> None:
    assert "./deepy.py generate.py configs/tiny.yml -i examples/prompts.txt" in run("make", "--no-print-directory", "-n", "demo")
    assert re.search(r"pytest -n auto --dist loadfile$", run("make", "--no-print-directory", "-n", "test").strip())


def test_make_sizes_lists_every_python_file_and_marks_those_beyond_the_budget() -> None:
    lines = run("make", "--no-print-directory", "sizes", "BUDGET=20").splitlines()
    sizes = {words[1]: (int(words[0]), " ".join(words[2:])) for words in map(str.split, lines)}
    assert sizes["./megatron_lite/errors.py"] == (len((ROOT / "megatron_lite/errors.py").read_text().splitlines()), "over 20")
    assert sizes["./megatron_lite/__init__.py"] == (0, "")


def test_continuous_integration_runs_the_test_command_of_the_readme() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "make test"


def test_the_licence_is_apache_2() -> None:
    assert "Apache License\n                           Version 2.0, January 2004" in (ROOT / "LICENSE").read_text()
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text()
