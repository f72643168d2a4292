"""The memory plan of generation, held against peaks that were measured."""

from pathlib import Path

import pytest

from megatron_lite.config.load import load_config
from megatron_lite.models.memory import generation_footprint
from megatron_lite.models.spec import spec_of
from megatron_lite.parallel.layout import Layout

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("pp", "tp", "rows", "gibibytes"),
    [(1, 1, 1, 38.7), (1, 1, 64, 61.2), (1, 2, 1, 19.4), (1, 2, 64, 30.8), (2, 2, 1, 9.7), (1, 4, 1, 9.7), (1, 4, 64, 16.1)],
)
def test_the_plan_is_near_the_peaks_that_were_measured_on_h200s(pp: int, tp: int, rows: int, gibibytes: float) -> None:
    """Of 20B with prompts of 256 tokens and 64 new ones, by torch's allocator (docs/performance.md)."""
    spec = spec_of(load_config([ROOT / "configs" / "20B.yml"]).model, vocab=50432, dtype="float16")
    largest = max(generation_footprint(spec, Layout(pp=pp, tp=tp), stage, rows=rows, context=320).total for stage in range(pp))
    assert largest / 2**30 == pytest.approx(gibibytes, rel=0.025)
