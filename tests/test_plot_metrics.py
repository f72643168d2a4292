"""Curves of trainings, in the terminal and as an image."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from megatron_lite.errors import ConfigError, DataError, OutputError
from megatron_lite.metrics.curves import chart, read_runs
from megatron_lite.metrics.image import draw, smoothed
from tools.plot_metrics import main


def write(folder: Path, lines: Sequence[Mapping[str, float]], end: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"time": 1.5, **line}) + "\n" for line in lines) + end)
    return folder


def losses(*values: float, first: int = 1) -> list[dict[str, float]]:
    return [{"step": first + place, "train/lm_loss": value, "runtime/tokens_per_sec": 100.0 * value} for place, value in enumerate(values)]


def test_of_steps_that_were_taken_twice_the_later_count_and_half_a_line_at_the_end_is_passed_over(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", [*losses(5.0, 4.0, 3.0), {"step": 3, "validation/lm_loss": 2.5}, *losses(3.5, 2.0, first=2)], end='{"step": 4, "trai')
    [run] = read_runs([folder])
    assert run.name == "run"
    assert run.curves == {
        "train/lm_loss": {1: 5.0, 2: 3.5, 3: 2.0},
        "runtime/tokens_per_sec": {1: 500.0, 2: 350.0, 3: 200.0},
        "validation/lm_loss": {3: 2.5},
    }


def test_runs_are_told_apart_by_as_much_of_their_paths_as_it_takes(tmp_path: Path) -> None:
    folders = [write(tmp_path / name, losses(1.0)) for name in ("a/out", "b/out")]
    assert [run.name for run in read_runs([folders[0], folders[1] / "metrics.jsonl"])] == ["a/out", "b/out"]
    assert [run.name for run in read_runs(folders[:1])] == ["out"]


def test_a_chart_draws_each_run_with_its_mark_between_the_lowest_and_the_highest_value() -> None:
    drawn = chart("loss", {"down": {1: 4.0, 2: 3.0, 3: 2.0}, "flat": {1: 2.0, 3: 2.0}}, width=16, height=5)
    assert drawn.splitlines() == [
        "loss   • down 2   ○ flat 2",
        "        4 ┤•",
        "          │ •",
        "        3 ┤  •",
        "          │   •",
        "        2 ┤○○○○○",
        "          └─────",
        "           1   3",
    ]


def test_the_fall_of_the_first_steps_does_not_flatten_the_rest() -> None:
    drawn = chart("loss", {"run": {1: 1000.0} | {step: 3.0 - step / 100 for step in range(2, 101)}}, width=61, height=5)
    assert drawn.splitlines()[1].split()[0] == "2.955"  # a column is the mean of two steps


def test_a_smoothed_curve_keeps_its_ends_and_its_mean() -> None:
    curve = {step: float(step % 2) for step in range(1, 401)}
    means = smoothed(curve)
    assert (means[1], means[400]) == (1.0, 0.0)
    assert means[200] == pytest.approx(4 / 9)
    assert smoothed({1: 1.0, 2: 5.0}) == {1: 1.0, 2: 5.0}


def test_the_tool_draws_loss_and_throughput_and_writes_an_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from matplotlib.image import imread

    folders = [write(tmp_path / name, [*losses(5.0, 4.0, value), {"step": 3, "validation/lm_loss": 2.5}]) for name, value in (("a", 3.0), ("b", 2.0))]
    assert main([*map(str, folders), "--output", str(tmp_path / "curves.png")]) == 0
    said = capsys.readouterr().out
    assert "training loss   • a 3   ○ b 2" in said
    assert "tokens/s   • a 300   ○ b 200" in said
    assert "validation loss   • a 2.5   ○ b 2.5" in said
    image = imread(tmp_path / "curves.png")
    assert image.shape == (690, 1800, 4)
    for color in ((0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)):  # both runs are in both halves
        found = abs(image[:, :, :3] * 255 - color).max(-1) < 2
        assert found[:, :1080].sum() > 500
        assert found[:, 1080:].sum() > 500


def test_without_matplotlib_there_are_charts_and_a_sentence_about_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    folder = write(tmp_path / "run", losses(5.0, 4.0))
    assert main([str(folder)]) == 0
    assert "training loss   • run 4" in capsys.readouterr().out
    assert main([str(folder), "-o", "curves.png"]) == 2
    assert capsys.readouterr().err == "an image needs the package matplotlib; run `pip install matplotlib`, or leave out --output for charts in the terminal\n"
    with pytest.raises(ConfigError):
        draw(read_runs([folder]), tmp_path / "curves.png")


def test_an_image_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    runs = read_runs([write(tmp_path / "run", losses(5.0, 4.0))])
    for path in (tmp_path / "nowhere" / "curves.png", tmp_path / "curves.strange"):
        with pytest.raises(OutputError, match=r"cannot be written: .*; name a file such as curves.png in a folder that is there"):
            draw(runs, path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "metrics.jsonl cannot be read: No such file or directory; name the folder of a training"),
        ("", "metrics.jsonl holds no numbers of steps"),
        ('{"time": 1, "eval/piqa_acc": 0.5}\n', "metrics.jsonl holds no numbers of steps"),
        ("weights\n{}\n", "metrics.jsonl line 1 is no JSON object; it is not the metrics.jsonl of a run"),
    ],
)
def test_what_is_no_run_is_told(tmp_path: Path, content: str | None, sentence: str) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(DataError) as found:
        read_runs([tmp_path])
    assert sentence in str(found.value)
