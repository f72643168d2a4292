"""NeoX's learning rates, at steps where they can be worked out by hand."""

import math

import pytest

from megatron_lite.config.sections import TrainingSection
from megatron_lite.training.schedule import Schedule, Style, schedule_of


@pytest.mark.parametrize(
    ("style", "rates"),
    [
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.0, 0.5, 1.0, 0.5, 0.1, 0.1]),
        ("cosine", [0.0, 0.5, 1.0, 0.55, 0.1, 0.1]),
        ("exponential", [0.0, 0.5, 1.0, math.exp(-0.3465), math.exp(-0.693), math.exp(-0.693)]),
    ],
)
def test_rates_rise_in_the_warmup_fall_until_the_end_and_stay(style: Style, rates: list[float]) -> None:
    schedule = Schedule(peak=1.0, floor=0.1, style=style, warmup=2, end=12)
    assert [schedule(done) for done in (0, 1, 2, 7, 12, 1000)] == pytest.approx(rates)


def test_without_a_warmup_the_first_step_has_the_full_rate() -> None:
    assert Schedule(peak=3e-4, floor=0.0, style="cosine", warmup=0, end=10)(0) == 3e-4


@pytest.mark.parametrize(
    ("settings", "warmup", "end"),
    [({}, 1.0, 100), ({"lr_decay_iters": 50, "warmup": 0.1}, 5.0, 50), ({"lr_decay_fraction": 0.8, "warmup": 0.25}, 20.0, 80)],
)
def test_warmup_is_a_share_of_the_steps_of_the_decay(settings: dict[str, object], warmup: float, end: int) -> None:
    schedule = schedule_of(TrainingSection.model_validate(settings), peak=1.0, steps=100)
    assert (schedule.warmup, schedule.end) == (warmup, end)
