"""Every command of tools/benchmark.py with a small model on the CPU: what it prints, what it writes, and that transformers is measured beside it."""

import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_lite.benchmark.bench import Bench, Numbers, random_stage, serving
from megatron_lite.benchmark.decode import DecodeOptions, Span, measure_decoding, step_seconds
from megatron_lite.benchmark.generate import GenerateOptions, Mixture, measure_generation
from megatron_lite.benchmark.load import LoadOptions, measure_loading
from megatron_lite.config.load import load_config
from megatron_lite.errors import ConfigError, FitError
from megatron_lite.models.architecture import architecture_named
from megatron_lite.models.neox import ARCHITECTURE
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mailbox import wait_quietly
from megatron_lite.parallel.mesh import Mesh, single_mesh
from tests.models import SMALL, logits
from tests.runs import write_run
from tests.test_families import GPTJ, LLAMA
from tests.worlds import in_world
from tools.benchmark import main

ROOT = Path(__file__).resolve().parents[1]
TINY = ["configs/tiny.yml", "num_layers=1", "hidden_size=64", "num_attention_heads=4"]
HEADS = ("command: ", "machine: ", "versions: ", "model: ", "layout: ")


@pytest.fixture(autouse=True)
def root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def table(capsys: pytest.CaptureFixture[str], *words: str) -> list[list[str]]:
    """The cells of what a command prints, without its header."""
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith(HEADS)] == lines[: len(HEADS)]
    titles = lines.index("") + 1
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines[titles + 1 :]]


def peer() -> list[str]:
    pytest.importorskip("transformers", reason="transformers is not installed")
    return ["--peer", "transformers"]


def test_decoding_is_told_with_its_floor_and_the_plain_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = table(capsys, "decode", *TINY, "--batch", "1,3", "--context", "40", "--steps", "6", "--plain", "--json", str(tmp_path / "decode.json"))
    assert [row[:2] for row in rows] == [
        ["memory, read only", "ceiling"],
        ["matrix product 512^3, float32", "ceiling"],
        ["matrix product 512^3, float32, lasting", "ceiling"],
        *[[f"decode, batch {batch}", by] for by in ("deepy", "deepy, plain path") for batch in (1, 3)],
    ]
    written = json.loads((tmp_path / "decode.json").read_text())
    one, three = written["rows"][3:5]
    assert three["rate"] == pytest.approx(3 / three["seconds"])
    assert one["floor"] < three["floor"]
    assert (written["facts"]["gpus"], written["facts"]["context"], written["facts"]["layout"]) == (1, 40, "pipe 1 x model 1")


def test_weights_in_8_bits_are_measured_against_their_own_floor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["decode", *TINY, "--batch", "1", "--context", "40", "--steps", "6", "--json"]
    table(capsys, *words, str(tmp_path / "whole.json"))
    table(capsys, *words, str(tmp_path / "int8.json"), "weight-quantization=int8")
    whole, small = (json.loads((tmp_path / name).read_text()) for name in ("whole.json", "int8.json"))
    assert small["facts"]["model"] == "configs/tiny.yml, float32, random weights in int8"
    bytes_read = [report["rows"][3]["floor"] * report["rows"][0]["rate"] for report in (whole, small)]
    assert bytes_read[1] < bytes_read[0]


def test_prefill_is_told_for_every_length(capsys: pytest.CaptureFixture[str]) -> None:
    rows = table(capsys, "prefill", *TINY, "--tokens", "64,30", "--batch", "2", "--times", "2")
    assert [row[:2] for row in rows[3:]] == [["prefill of 2 x 64", "deepy"], ["prefill of 2 x 30", "deepy"]]


def test_a_mixed_file_is_told_with_its_share_of_a_full_batch(capsys: pytest.CaptureFixture[str]) -> None:
    rows = table(capsys, "generate", *TINY, "--prompts", "12", "--lengths", "3-60", "--new", "2-9", "--rows", "4")
    assert [row[0] for row in rows[3:]] == ["compile and capture up to 4 rows", "decode, batch 4", "mixed prompts"]
    assert re.fullmatch(r"12 prompts of \d+ tokens, \d+ new ones; \d+% of decoding 4 rows", rows[-1][-1])


def test_loading_writes_a_checkpoint_where_there_is_none_and_reads_it_cold_and_warm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["load", *TINY, "--folder", str(tmp_path / "made"), "--workers", "1", "--times", "1", "--direct-gb", "0.001"]
    rows = table(capsys, *words)
    assert [row[0] for row in rows] == [
        "copy from pinned memory to one device",
        "reading past the page cache (O_DIRECT)",
        "load, cold",
        "load, files in the page cache",
    ]
    made = sorted(path.name for path in (tmp_path / "made" / "global_step150000").iterdir())
    assert made[:2] == ["layer_00-model_00-model_states.pt", "layer_00-model_01-model_states.pt"]
    assert [row[0] for row in table(capsys, *words, "--no-cold")][2:] == ["load, files in the page cache"]


@pytest.mark.slow
def test_transformers_is_measured_beside_us(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = table(capsys, "decode", *TINY, *peer(), "--batch", "2", "--context", "40", "--steps", "6", "--compile", "1")
    assert [row[1] for row in rows[3:]] == ["deepy", "transformers, eager", "transformers, static cache and torch.compile"]
    assert rows[4][-1].endswith(" x as fast")
    rows = table(capsys, "prefill", *TINY, *peer(), "--tokens", "64", "--times", "2")
    assert [row[1] for row in rows[3:]] == ["deepy", "transformers"]
    rows = table(capsys, "generate", *TINY, *peer(), "--prompts", "6", "--lengths", "3-60", "--new", "2-9", "--rows", "4", "--peer-prompts", "3")
    assert rows[-1][1] == "transformers"
    assert "the first 3 prompts of" in rows[-1][-1]
    rows = table(capsys, "load", *TINY, *peer(), "--folder", str(tmp_path / "made"), "--format", "huggingface", "--times", "1", "--direct-gb", "0.001")
    assert [row[:2] for row in rows[2:]] == [
        ["load, cold", "deepy"],
        ["load, files in the page cache", "deepy"],
        ["load, files in the page cache", "transformers"],
        ["load, cold", "transformers"],
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["decode", *TINY, "--context", "600"], "64 steps around a context of 600 tokens need positions 568 to 633, and the model has 1 to 512"),
        (["prefill", *TINY], "prompts of 2048 tokens were asked for, and the model has 512 positions; give other --tokens"),
        (["generate", *TINY], "prompts and their texts have up to 1756 tokens, and the model 512 positions; give other --lengths or --new"),
        (["decode", *TINY, "vocab_file=nowhere.json"], "or give --vocab N, the rows of the embedding (50432 for 20B)"),
        (["load", *TINY, "load=nowhere"], "there is no checkpoint folder nowhere"),
        (["decode", *TINY, "num_layer=3"], "num_layer"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_a_word_that_is_no_setting_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["decode", *TINY, "--contxt", "5"])
    assert "unrecognized arguments: --contxt" in capsys.readouterr().err


def bench(mesh: Mesh) -> Bench:
    return Bench(load_config([ROOT / "configs" / "tiny.yml"]), mesh, ARCHITECTURE, SMALL, Numbers(SMALL.vocab), None)


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2)], ids=str)
def test_ranks_that_share_a_model_measure_it_together(layout: Layout) -> None:
    options = DecodeOptions(batches=(1, 3), span=Span(20, 4), peer_span=Span(20, 4), plain=True, peer=False, compiled=(), folder=None)
    found = in_world(layout, lambda mesh: [(row.what, row.by) for row in measure_decoding(bench(mesh), options)])
    assert found[0] == found[1]
    assert (("all-reduce of 64 x 64", "GLOO, 16 KiB") in found[0]) == (layout.tp > 1)
    assert {(f"decode, batch {batch}", by) for batch in (1, 3) for by in ("deepy", "deepy, plain path")} < set(found[0])


@pytest.mark.parametrize(("schedule", "by"), [("in-flight", "deepy"), ("naive", "deepy, naive schedule")])
def test_a_pipeline_is_measured_by_either_schedule(schedule: str, by: str) -> None:
    """By the naive one, as by the plain path, all rows go through the stages in turn, and so do the bytes that are read for them."""
    options = DecodeOptions(batches=(1, 3), span=Span(20, 4), peer_span=Span(20, 4), plain=True, peer=False, compiled=(), folder=None)

    def run(mesh: Mesh) -> dict[tuple[str, str], float | None]:
        mine = replace(bench(mesh), config=load_config([ROOT / "configs" / "tiny.yml"], {"pipe_schedule": schedule}))
        return {(row.what, row.by): row.floor for row in measure_decoding(mine, options)}

    for floors in in_world(Layout(pp=2), run):
        one, three = (floors[f"decode, batch {batch}", by] for batch in (1, 3))
        plain_one, plain_three = (floors[f"decode, batch {batch}", "deepy, plain path"] for batch in (1, 3))
        assert (one, three == plain_three) == (plain_one, schedule == "naive")
        assert (one or 0) < (three or 0)


def test_more_rows_than_a_step_takes_are_refused() -> None:
    mine = bench(single_mesh())
    decoder = serving(mine.stage(), mine, rows=2, tokens=40)
    with pytest.raises(ConfigError, match=r"3 rows were asked for, and 2 share a step at most; use a smaller --batch"):
        step_seconds(decoder, 3, Span(20, 4))
    with pytest.raises(FitError, match=r"2 rows of 66 tokens need 4 pages of the cache, and 2 fit; use a smaller --batch"):
        step_seconds(decoder, 2, Span(61, 8))


def test_replicas_share_the_prompts() -> None:
    options = GenerateOptions(mixture=Mixture(9, (3, 20), (2, 9), seed=0), rows=2, peer_prompts=1, peer=False, folder=None)
    tokens = sum(request.sampling.maximum_tokens for request in options.mixture.requests(SMALL.vocab - 1))
    for rows in in_world(Layout(dp=2), lambda mesh: list(measure_generation(bench(mesh), options))):
        assert (rows[-1].rate or 0) * (rows[-1].seconds or 0) == pytest.approx(tokens)


@pytest.mark.parametrize("spec", [SMALL, GPTJ, LLAMA], ids=lambda spec: spec.family)
def test_norms_of_random_weights_are_neutral_and_all_else_is_drawn(spec: ModelSpec) -> None:
    stage = random_stage(architecture_named(spec.family), spec, single_mesh())
    parameters = {f"{number} {name}": parameter for number, layer in stage.layers.items() for name, parameter in layer.named_parameters()}
    norms = {name for name in parameters if "norm" in name}
    assert {name.rpartition(".")[2]: set(parameters[name].unique().tolist()) for name in norms} == (
        {"scale": {1.0}} if spec.family == "llama" else {"weight": {1.0}, "bias": {0.0}}
    )
    assert all(0.5 < parameters[name].std() / (2 / (5 * spec.hidden)) ** 0.5 < 1.5 for name in parameters.keys() - norms)


def test_random_weights_give_finite_logits_and_never_the_last_row_of_the_vocabulary() -> None:
    stage = random_stage(ARCHITECTURE, SMALL, single_mesh())
    found = logits(stage, torch.arange(40).view(2, 20), SMALL.vocab)
    assert found.isfinite().all()
    assert found.std() > 0.01
    numbers = Numbers(SMALL.vocab)
    assert numbers.vocab_size == numbers.eod == SMALL.vocab - 1
    assert numbers.encode(numbers.decode([3, 1, 4])) == [3, 1, 4] == numbers.encode_batch(["3 1 4"])[0]


def test_without_transformers_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("transformers", "accelerate"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["decode", *TINY, "--peer", "transformers"]) == 2
    assert "--peer needs the package(s) transformers, accelerate; run `pip install transformers accelerate`" in capsys.readouterr().err


def test_ranks_load_their_parts_together_and_wait_for_each_other(tmp_path: Path) -> None:
    config = load_config([write_run(tmp_path)])
    options = LoadOptions(times=1, cold=True, direct_bytes=1 << 20, peer=False)
    started = time.monotonic()

    def run(mesh: Mesh) -> tuple[list[str], float]:
        rows = [row.what for row in measure_loading(config, mesh, options)]
        time.sleep(0.5 * mesh.rank)
        wait_quietly(mesh)
        return rows, time.monotonic() - started

    (rows, first), (others, second) = in_world(Layout(tp=2), run)
    assert rows[2:] == others[2:] == ["load, cold", "load, files in the page cache"]
    assert first == pytest.approx(second, abs=0.2), "the first rank waited for the second"
