"""Copies that the ranks of a checkpoint should hold alike, and do not: what becomes of them is said."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lite.checkpoint import load
from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mesh import Axis, Mesh
from tests import models
from tests.runs import BYTES

BIAS = "mlp.dense_4h_to_h.bias"


def told(folder: Path, monkeypatch: pytest.MonkeyPatch, *, parallel: bool = False, drift: float = 0.1, size: int = 1) -> list[str]:
    """What is said when the first of `size` ranks loads what two have saved, of which the second holds another bias in two layers."""
    spec, lines = replace(BYTES, parallel_residual=parallel), list[str]()
    monkeypatch.setattr(load.logger, "info", lines.append)
    layout = models.write_random(folder, spec, tp=2)
    for path in sorted(folder.rglob("layer_*-model_01-*"))[1:3]:
        tensors = torch.load(path, weights_only=True)
        tensors[BIAS] += drift
        torch.save(tensors, path)
    mesh = Mesh(Layout(tp=size), 0, torch.device("cpu"), Axis("pp"), Axis("dp"), Axis("tp", 0, tuple(range(size))))
    models.load(layout, spec, mesh)
    return lines


def test_averaging_copies_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = "norms or biases that the 2 ranks of the checkpoint should hold alike differ between them, and are averaged"
    assert told(tmp_path, monkeypatch) == [expected]


@pytest.mark.parametrize(
    "kind", [{"drift": 0.0}, {"size": 2}, {"size": 4}, {"parallel": True}], ids=["alike", "the same cut", "a finer cut", "what is summed or kept apart"]
)
def test_where_nothing_is_averaged_nothing_is_said(kind: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(tmp_path, monkeypatch, **kind) == []
