"""Every command that the README shows, run in a copy of the project. Some get a few words more: the 20B is made small, and what takes minutes short."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["num_layers=2", "hidden_size=64", "num_attention_heads=4"]
FEW = ["--limit", "8"]
SHORT = ["train_iters=4"]


def commands() -> list[str]:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    """What a fresh clone holds, with the release's tokenizer where configs/20B.yml looks for it, and the questions of LAMBADA and PIQA."""
    copy = tmp_path_factory.mktemp("clone")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    (copy / "20B_checkpoints").mkdir()
    shutil.copy(shared_data / "tokenizers" / "20B_tokenizer.json", copy / "20B_checkpoints")
    for task in ("lambada", "piqa"):
        shutil.copytree(shared_data / task, copy / "data" / task)
    return copy


def run(command: str, project: Path) -> subprocess.CompletedProcess[str]:
    words = command.split() + (SMALL if "20B" in command else []) + (FEW if "evaluate.py" in command else []) + (SHORT if "train.py" in command else [])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(words, cwd=project, input="Once upon a time\n", capture_output=True, text=True, timeout=240, env={**os.environ, "PATH": path})


@pytest.mark.parametrize("command", commands())
def test_the_readme_s_commands_run(command: str, project: Path) -> None:
    done = run(command, project)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    if output := next((word for flag, word in zip(command.split(), command.split()[1:], strict=False) if flag == "-o"), None):
        assert len((project / output).read_text(encoding="utf-8").splitlines()) >= 4


def test_the_demo_is_a_command_of_the_readme(project: Path) -> None:
    demo = subprocess.run(["make", "--dry-run", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "./deepy.py generate.py configs/tiny.yml -i examples/prompts.txt" in demo


def test_the_readme_s_tree_names_what_is_there() -> None:
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## The tree")[1].split("## What was measured")[0]
    for name in (
        "deepy.py",
        "generate.py",
        "evaluate.py",
        "train.py",
        "launcher/",
        "megatron_lite/",
        "tools/",
        "configs/",
        "checkpoints/tiny/",
        "docs/",
        "requirements/",
        "tests/",
    ):
        assert name in tree
        assert (ROOT / name).exists()


def test_the_readme_s_tree_leaves_out_no_package_tool_configuration_or_document() -> None:
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## The tree")[1].split("## What was measured")[0]
    packages = [f"{path.parent.name}/" for path in (ROOT / "megatron_lite").glob("*/__init__.py")]
    files = [path.stem for folder, kind in (("tools", "py"), ("configs", "yml"), ("docs", "md")) for path in (ROOT / folder).glob(f"*.{kind}")]
    assert [name for name in (*packages, *files) if name != "__init__" and name not in tree] == []
