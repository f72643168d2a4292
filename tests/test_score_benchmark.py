"""tools/benchmark.py score: the questions it asks are lm-eval's, what it takes for a peer computes what lm-eval's model does, and it ends with a table."""

from pathlib import Path

import pytest
import torch

from megatron_lite.benchmark.scoring import lambada, piqa, score_plainly
from megatron_lite.parallel.mesh import single_mesh
from tests.harness import ROOT, random_model, tokenizer
from tests.models import in_transformers, load
from tools.benchmark import main


@pytest.fixture(autouse=True)
def root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("peer", [[], ["--peer", "1,4"]])
def test_it_ends_with_a_table_of_seconds(peer: list[str], shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "configs/tiny.yml", "model_parallel_size=1", "--data", str(shared_data), "--documents", "6", *peer]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["what", "documents", "seconds", "documents/s", "TFLOP/s"]
    rows = [line.split("  ")[0] for line in lines[1:]]
    expected = (
        [f"{task}, transformers, batch {batch}" for batch in (1, 4) for task in ("LAMBADA", "PIQA")]
        if peer
        else ["LAMBADA, pipe 1 x model 1", "PIQA, pipe 1 x model 1"]
    )
    assert rows[:-1] == expected
    assert all(float(line.split()[-3 if index < len(lines) - 1 else -1]) >= 0 for index, line in enumerate(lines[1:], start=1))


def test_it_asks_what_lm_eval_asks(shared_data: Path) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from megatron_lite.config.sections import EvaluationSection
    from megatron_lite.evaluation.adapter import HarnessModel
    from megatron_lite.evaluation.tasks import find_tasks
    from megatron_lite.evaluation.work import Order, Scoring

    asked: list[Order] = []
    model = HarnessModel(lambda order: asked.append(order) or [], tokenizer(), context=512, seed=0)
    for unit in find_tasks(EvaluationSection.model_validate({"eval_tasks": ["lambada", "piqa"], "eval_data_dir": shared_data})):
        for task in unit.loaded["tasks"].values():
            task.build_all_requests(limit=30)
            instances: list[Instance] = task.instances
            with pytest.raises(ValueError, match="zip"):  # nobody answers here
                model.loglikelihood(instances)
    expected = [lambada(shared_data, tokenizer()).first(30).requests, piqa(shared_data, tokenizer()).first(30).requests]
    assert [list(order.requests) for order in asked if isinstance(order, Scoring)] == expected


def test_the_peer_scores_as_we_do(shared_data: Path, tmp_path: Path) -> None:
    from megatron_lite.inference.score import Scorer

    model = random_model("parallel residual", tmp_path)
    requests = piqa(shared_data, tokenizer()).first(8).requests
    ordered = sorted(requests, key=lambda request: -len(request.context) - len(request.continuation))
    scores = Scorer(load(model.layout, model.spec, single_mesh()), model.spec, words=4096).score(ordered)
    found = score_plainly(in_transformers(model.layout, model.spec), requests, 5, torch.device("cpu"))
    assert [greedy for _, greedy in found] == [score.is_greedy for score in scores]
    torch.testing.assert_close([value for value, _ in found], [score.logprob for score in scores], atol=1e-3, rtol=0)
