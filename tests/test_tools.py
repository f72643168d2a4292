"""The tools run from any folder, installed or not."""

from pathlib import Path

import pytest

TOOLS = sorted(path for path in (Path(__file__).resolve().parents[1] / "tools").glob("*.py") if path.name != "__init__.py")


@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.stem)
def test_a_tool_finds_the_project_beside_it_and_puts_it_last(tool: Path) -> None:
    lines = tool.read_text(encoding="utf-8").splitlines()
    makes_path = [number for number, line in enumerate(lines) if line.startswith(("sys.path.append(", "sys.path[:] = "))]
    imports = [number for number, line in enumerate(lines) if line.startswith("from megatron_lite.")]
    assert makes_path, "it cannot be run without being installed; put the project's folder last on sys.path as the other tools do"
    assert makes_path[0] < imports[0]
    assert lines[0] == "#!/usr/bin/env python3"
    assert tool.stat().st_mode & 0o111, "it is not executable"
