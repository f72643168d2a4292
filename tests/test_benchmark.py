"""tools/benchmark.py at a small size: its rows, and that what it times gives the right answers."""

import json
from pathlib import Path

import pytest
import torch

from megatron_lite.benchmark.scoring import score_plainly
from megatron_lite.inference.packing import TokenRequest
from megatron_lite.inference.score import Scorer
from megatron_lite.parallel.mesh import single_mesh
from tests.models import SMALL, in_transformers, load, write_random
from tools.benchmark import main

ROOT = Path(__file__).parents[1]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "lambada").mkdir()
    (tmp_path / "piqa").mkdir()
    (tmp_path / "lambada" / "lambada_test.jsonl").write_text("".join(json.dumps({"text": f"the king had {n} sons and a daughter"}) + "\n" for n in range(5)))
    question = {"goal": "open the door", "sol1": "turn the handle", "sol2": "eat the handle"}
    (tmp_path / "piqa" / "valid.jsonl").write_text((json.dumps(question) + "\n") * 3)
    return tmp_path


@pytest.mark.parametrize("peer", [None, "2"])
def test_scoring_is_timed_and_told_in_a_table(peer: str | None, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    words = ["score", "--data", str(data), "--documents", "3", *(["--peer", peer] if peer else []), "configs/tiny.yml", "model_parallel_size=1"]
    assert main(words) == 0
    head, lambada, piqa, ceiling = capsys.readouterr().out.splitlines()[-4:]
    assert head.split() == ["what", "documents", "seconds", "documents/s", "TFLOP/s"]
    assert lambada.startswith("LAMBADA, transformers, batch 2" if peer else "LAMBADA, pipe 1 x model 1")
    assert piqa.split(", ")[0] == "PIQA"
    assert ceiling.startswith("8192^3 matrix product")


def test_missing_data_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["score", "--data", str(tmp_path), "configs/tiny.yml"]) == 2
    assert "lambada_test.jsonl cannot be read" in capsys.readouterr().err


def test_the_peer_s_plain_loop_and_our_scorer_give_the_same_probabilities(tmp_path: Path) -> None:
    layout = write_random(tmp_path, SMALL, tp=1)
    generator = torch.Generator().manual_seed(5)
    draw = lambda count: tuple(torch.randint(160, (count,), generator=generator).tolist())  # noqa: E731
    requests = [TokenRequest(draw(3 + n), draw(1 + n % 3)) for n in range(12)]
    model = torch.nn.Module()
    model.forward = in_transformers(layout, SMALL).forward
    plain = {value for value, _ in score_plainly(model, requests, 5, torch.device("cpu"))}
    ours = {score.logprob for score in Scorer(load(layout, SMALL, single_mesh()), SMALL, words=160).score(requests)}
    torch.testing.assert_close(torch.tensor(sorted(ours)), torch.tensor(sorted(plain)).float(), atol=1e-4, rtol=0)
