"""What the benchmark says of what it measures: floors, medians, mixtures, tables and curves, by hand-made figures."""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_lite.benchmark.clock import Marks, median_seconds, seconds_a_call
from megatron_lite.benchmark.counts import prefill_operations, step_bytes
from megatron_lite.benchmark.decode import Span
from megatron_lite.benchmark.disk import BLOCK, cached_share, direct_rate, drop
from megatron_lite.benchmark.generate import Mixture
from megatron_lite.benchmark.plot import BEST, FLOOR, best_of_others, curves_of, draw, over_gpus
from megatron_lite.benchmark.table import OURS, Report, Row, duration, number, read_report, write_report
from megatron_lite.config.load import load_config
from megatron_lite.errors import ConfigError, DataError
from megatron_lite.models.spec import ModelSpec, spec_of
from tests.models import SMALL

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def twenty() -> ModelSpec:
    return spec_of(load_config([ROOT / "configs" / "20B.yml"]).model, vocab=50432, dtype="float16")


def test_a_step_of_20b_reads_its_weights_but_the_embedding_and_a_megabyte_a_token(twenty: ModelSpec) -> None:
    assert step_bytes(twenty, 1, batch=0, context=256) == pytest.approx(40.49e9, rel=1e-4)
    row = step_bytes(twenty, 1, batch=1, context=1) - step_bytes(twenty, 1, batch=0, context=1)
    assert row == 44 * 2 * 6144 * 2 == 1_081_344
    assert step_bytes(twenty, 1, batch=64, context=256) - step_bytes(twenty, 1, batch=0, context=256) == 64 * 256 * row


def test_ranks_share_what_a_step_reads(twenty: ModelSpec) -> None:
    whole = step_bytes(twenty, 1, batch=64, context=256)
    assert [step_bytes(twenty, tp, batch=64, context=256) / whole for tp in (2, 4)] == pytest.approx([1 / 2, 1 / 4], rel=1e-3)


def test_weights_in_8_bits_are_half_the_bytes_and_a_scale_a_row(twenty: ModelSpec) -> None:
    head = 50432 * 6144 * 2
    halved = (step_bytes(twenty, 1, batch=0, context=1) - head) / (step_bytes(replace(twenty, quantization="int8"), 1, batch=0, context=1) - head)
    assert halved == pytest.approx(2, rel=2e-3)


def test_few_key_heads_are_repeated_on_every_rank() -> None:
    shared = replace(SMALL, kv_heads=2, family="llama")
    caches = [step_bytes(shared, tp, batch=5, context=7) - step_bytes(shared, tp, batch=0, context=7) for tp in (1, 2, 4)]
    assert [size // (5 * 7 * 4 * 2 * 16 * 4) for size in caches] == [2, 1, 1]


def test_reading_2048_tokens_with_20b_takes_84_teraflop(twenty: ModelSpec) -> None:
    assert prefill_operations(twenty, batch=1, tokens=2048) == pytest.approx(83.9e12, rel=1e-3)
    assert prefill_operations(twenty, batch=4, tokens=2048) == 4 * prefill_operations(twenty, batch=1, tokens=2048)


def test_steps_lie_around_their_context_and_inside_the_model() -> None:
    assert (Span(256, 64).before, Span(256, 64).longest) == (224, 289)
    Span(31, 60).check(SMALL)
    with pytest.raises(
        ConfigError, match=r"60 steps around a context of 40 tokens need positions 10 to 71, and the model has 1 to 64; give other --context or --steps"
    ):
        Span(40, 60).check(SMALL)
    with pytest.raises(ConfigError, match=r"need positions 0 to 9"):
        Span(4, 8).check(SMALL)


def test_times_are_those_of_the_work() -> None:
    marks = Marks(CPU)
    for pause in (0.0, 0.01, 0.03):
        time.sleep(pause)
        marks.mark()
    assert [0.01 <= first < 0.03 <= second for first, second in [marks.seconds()]] == [True]
    pauses = iter([0.2, 0.001, 0.02, 0.001])  # the first run is not counted, and one slow run moves no median
    assert 0.001 <= median_seconds(lambda: time.sleep(next(pauses)), CPU, times=3) < 0.02
    assert 0.002 <= seconds_a_call(lambda index: time.sleep(0.002), CPU, calls=3, times=3) < 0.02


def test_the_same_seed_mixes_the_same_prompts_over_all_orders_of_magnitude() -> None:
    mixture = Mixture(1000, (5, 1500), (16, 256), seed=0)
    asked = mixture.requests(50277)
    assert asked == mixture.requests(50277) != replace(mixture, seed=1).requests(50277)
    lengths, limits = ([len(request.tokens) for request in asked], [request.sampling.maximum_tokens for request in asked])
    assert (min(lengths), max(lengths), min(limits), max(limits)) == (5, pytest.approx(1500, abs=20), 16, pytest.approx(256, abs=3))
    below = [sum(length < 87 for length in lengths), sum(limit < 64 for limit in limits)]  # the geometric means of the ends
    assert below == pytest.approx([500, 500], abs=50)
    assert all(0 < token < 50277 for request in asked for token in request.tokens)
    assert [request.id for request in asked] == list(range(1000))
    assert len({request.tokens for request in asked}) == 1000


@pytest.mark.parametrize(("seconds", "told"), [(12.345, "12.35 s"), (0.0102944, "10.29 ms"), (7.3e-6, "7.3 us"), (0, "0 us")])
def test_durations_have_the_unit_that_fits(seconds: float, told: str) -> None:
    assert duration(seconds) == told


def test_numbers_have_the_digits_of_a_measurement() -> None:
    assert [number(value) for value in (12345.6, 97.24, 4.3249, 0.012345)] == ["12,346", "97.2", "4.32", "0.0123"]


def decoding(by: str, batch: int, rate: float, *, floor: float | None = None) -> Row:
    return Row(what=f"decode, batch {batch}", by=by, rate=rate, unit="tokens/s", seconds=batch / rate, floor=floor, batch=batch)


def report(gpus: int, rows: Sequence[Row]) -> Report:
    return Report(command="x", facts={"machine": f"{gpus} x GPU", "gpus": gpus}, rows=rows)


def test_a_table_is_aligned_and_says_how_far_the_floor_and_the_others_are() -> None:
    rows = [
        Row(what="memory", by="ceiling", rate=4.32, unit="TB/s"),
        decoding(OURS, 1, 100.0, floor=0.0095),
        decoding("transformers", 1, 20.0),
        Row(what="mixed", by=OURS, rate=3000.0, unit="tokens/s", note="1,000 prompts"),
    ]
    assert report(1, rows).as_text().splitlines() == [
        "machine: 1 x GPU",
        "",
        "what             by                      rate   time   floor  of floor  deepy is",
        "memory           ceiling            4.32 TB/s",
        "decode, batch 1  deepy         100.0 tokens/s  10 ms  9.5 ms     95.0%",
        "decode, batch 1  transformers   20.0 tokens/s  50 ms                    5.00 x as fast",
        "mixed            deepy         3,000 tokens/s                                           1,000 prompts",
    ]
    assert rows[1].sentence == "decode, batch 1, deepy: 100.0 tokens/s; 10 ms"


def test_columns_that_hold_nothing_are_left_out() -> None:
    assert report(1, [Row(what="memory", by="ceiling", rate=4.32, unit="TB/s")]).as_text().splitlines()[2] == "what    by            rate"


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = report(2, [decoding(OURS, 8, 700.0, floor=0.01), Row(what="all-reduce", by="NCCL", seconds=8e-6)])
    write_report(written, tmp_path / "a.json")
    assert read_report(tmp_path / "a.json") == written
    (tmp_path / "b.json").write_text(json.dumps({"rows": [1]}))
    with pytest.raises(DataError, match=r"b.json is no report of this benchmark; give files that tools/benchmark.py wrote with --json"):
        read_report(tmp_path / "b.json")
    with pytest.raises(DataError, match=r"c.json cannot be read: No such file"):
        read_report(tmp_path / "c.json")


REPORTS = [
    report(1, [decoding(OURS, 1, 97.0, floor=1 / 105), decoding(OURS, 8, 700.0), decoding("eager", 1, 19.0), decoding("compiled", 1, 81.0)]),
    report(4, [decoding(f"{OURS}, plain path", 1, 500.0), decoding(OURS, 1, 310.0), decoding("eager", 1, 6.0)]),
]


def test_curves_are_those_of_the_reports_with_the_floor_and_the_best_of_the_others() -> None:
    curves = curves_of(REPORTS)
    assert curves[OURS, 1] == {1: 97.0, 8: 700.0}
    assert curves[FLOOR, 1] == {1: pytest.approx(105)}
    assert over_gpus(curves, OURS, 1) == {1: 97.0, 4: 310.0}
    assert best_of_others(curves, 1) == {1: 81.0, 4: 6.0}
    assert next(iter(curves))[0] == OURS
    assert BEST not in {by for by, _ in curves}
    with pytest.raises(DataError, match=r"the reports hold no figures of decoding"):
        curves_of([report(1, [])])


@pytest.mark.parametrize("count", [1, 2])
def test_an_image_of_them_is_written(count: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from matplotlib.image import imread

    draw(REPORTS[:count], tmp_path / "decode.png")
    height, width, _ = imread(tmp_path / "decode.png").shape
    assert (width, height) == (count * 1050 if count == 1 else 1800, 810)


def test_files_are_cold_after_they_were_forgotten_or_are_not_called_so(tmp_path: Path) -> None:
    """A file system that keeps its files in memory forgets nothing, and then the share says so."""
    path = tmp_path / "weights.pt"
    path.write_bytes(b"x" * (3 * BLOCK + 5))
    assert cached_share([path]) == 1
    drop([path])
    left = cached_share([path])
    assert left == 0 or left == pytest.approx(1)
    rate = direct_rate([path], 2 * BLOCK)
    assert rate is None or rate > 1e6
    assert cached_share([path]) == pytest.approx(left, abs=0.01), "reading past the page cache leaves it alone"
    path.read_bytes()
    assert cached_share([path]) == 1
