"""What lm-eval asks arrives at the model unchanged, what it answers is kept, and the model is left as it was."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_lite.config.sections import EvaluationSection
from megatron_lite.errors import DataError
from megatron_lite.evaluation.evaluate import evaluate
from megatron_lite.evaluation.results import Report, Results
from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mesh import single_mesh
from tests.harness import ROOT, Model, answers, bundled_model, compare, random_model, through_ours, through_transformers, tokenizer
from tests.models import load

lm_eval = pytest.importorskip("lm_eval")

STOCK = Path(lm_eval.__file__).parent / "tasks"


def section(**values: object) -> EvaluationSection:
    return EvaluationSection.model_validate({"log_samples": True, "bootstrap_iters": 20, **values})


def own_tasks(folder: Path, *, wikitext: Path | None = None) -> Path:
    """A folder of tasks as a user may have one: rolling perplexity, generation until a stop string, and one that breaks."""
    tasks = folder / "tasks"
    tasks.mkdir()
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": each, "answer": "the"}) + "\n" for each in PROMPTS))
    read = f"dataset_path: json\ndataset_name: null\ndataset_kwargs: {{cache_dir: {folder}/cache, data_files: {{test: %s}}}}\ntraining_split: null\n"
    (tasks / "writing.yaml").write_text(
        "task: writing\noutput_type: generate_until\ntest_split: test\ndoc_to_text: '{{prompt}}'\ndoc_to_target: '{{answer}}'\n"
        "generation_kwargs: {until: ['.', ', and'], max_gen_toks: 24}\nmetric_list: [{metric: bypass}]\n" + read % (folder / "prompts.jsonl")
    )
    (tasks / "broken.yaml").write_text(
        "task: broken\noutput_type: loglikelihood\ntest_split: test\ndoc_to_text: '{{prompt}}'\ndoc_to_target: ' {{answer}}'\n"
        "process_results: !function broken.fail\nmetric_list: [{metric: acc}]\n" + read % (folder / "prompts.jsonl")
    )
    (tasks / "broken.py").write_text("def fail(doc, results):\n    raise ValueError('no such judge')\n")
    if wikitext:
        pages = re.split(r"\n(?= = [^=]+ = \n)", wikitext.read_text(encoding="utf-8"))[1:]
        (folder / "pages.jsonl").write_text("".join(json.dumps({"page": page}) + "\n" for page in pages))
        (tasks / "wikitext_here.yaml").write_text(
            f"include: {STOCK}/wikitext/wikitext.yaml\ntask: wikitext_here\nvalidation_split: null\n" + read % (folder / "pages.jsonl")
        )
    return tasks


PROMPTS = ["Once upon a time", "The king said to the queen", "A little boy went", "In the forest there " * 30]


def test_rolling_perplexity_of_wikitext_is_that_of_transformers(shared_data: Path, tmp_path: Path) -> None:
    folder = own_tasks(tmp_path, wikitext=shared_data / "corpora/wikitext-2/test.txt")
    settings = section(eval_tasks=["wikitext_here"], include_path=folder, limit=2)
    model = random_model("parallel residual", tmp_path / "model")
    theirs, ours = through_transformers(model, settings), through_ours(model, settings, Layout(dp=2))
    pairs = list(zip(answers(ours["wikitext_here"], "wikitext_here"), answers(theirs["wikitext_here"], "wikitext_here"), strict=True))
    assert min(-their for _, their in pairs) > 2000
    for mine, their in pairs:
        assert mine == pytest.approx(their, abs=1e-2, rel=1e-6)
    values, expected = (each["wikitext_here"]["results"]["wikitext_here"] for each in (ours, theirs))
    assert values["word_perplexity,none"] == pytest.approx(expected["word_perplexity,none"], rel=1e-5)


def test_what_is_generated_is_what_transformers_generates(tmp_path: Path) -> None:
    settings = section(eval_tasks=["writing"], include_path=own_tasks(tmp_path))
    theirs = through_transformers(bundled_model(), settings)
    written = answers(theirs["writing"], "writing")
    assert len({len(each) for each in written}) > 1
    assert not any("." in each or ", and" in each for each in written)
    for layout in (Layout(), Layout(dp=2), Layout(tp=2)):
        assert answers(through_ours(bundled_model(), settings, layout)["writing"], "writing") == written


@pytest.mark.parametrize("shots", [1, 5])
def test_examples_and_texts_that_are_too_long_arrive_as_in_transformers(shots: int, shared_data: Path, tmp_path: Path) -> None:
    model = random_model("short, tied head", tmp_path)
    settings = section(eval_tasks=["lambada", "piqa"], eval_data_dir=shared_data, num_fewshot=shots, limit=10)
    theirs = through_transformers(model, settings)
    longest = max(len(tokenizer().encode(request[0])) for sample in theirs["lambada_openai"]["samples"]["lambada_openai"] for request in sample["arguments"])
    assert (longest > model.spec.max_positions) == (shots == 5)
    compare(through_ours(model, settings), theirs)


def test_limit_is_kept_and_counted(shared_data: Path) -> None:
    results = through_ours(bundled_model(), section(eval_tasks=["piqa"], eval_data_dir=shared_data, limit=3))["piqa"]
    assert len(results["samples"]["piqa"]) == 3
    assert results["n-samples"]["piqa"] == {"original": 1838, "effective": 3}


def kept_by(model: Model, settings: EvaluationSection, **others: Any) -> tuple[dict[str, float], list[Results]]:
    kept: list[Results] = []
    stage = load(model.layout, model.spec, single_mesh())
    return evaluate(stage, model.spec, tokenizer(), settings, keep=lambda results, seconds: kept.append(results), **others), kept


def test_a_model_in_training_is_left_as_it_was(shared_data: Path) -> None:
    model = bundled_model()
    stage = load(model.layout, model.spec, single_mesh())
    for layer in stage.layers.values():
        layer.train()
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    expected = (random.random(), np.random.rand(), torch.rand(1).item())
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    found = evaluate(stage, model.spec, tokenizer(), section(eval_tasks=["lambada"], eval_data_dir=shared_data, limit=3))
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    assert all(module.training for layer in stage.layers.values() for module in layer.modules())
    assert sorted(found) == ["lambada_openai_acc", "lambada_openai_acc_stderr", "lambada_openai_ppl", "lambada_openai_ppl_stderr"]


def test_cached_answers_are_used_again_and_only_what_is_new_is_asked(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    model, cache = random_model("parallel residual", tmp_path / "model"), tmp_path / "answers.db"
    stage = load(model.layout, model.spec, single_mesh())
    run = type(stage).pass_through
    monkeypatch.setattr(type(stage), "pass_through", lambda self, tokens, visit: asked.append(tokens.shape[1]) or run(self, tokens, visit))

    def once(limit: int) -> dict[str, float]:
        asked.clear()
        return evaluate(stage, model.spec, tokenizer(), section(eval_tasks=["lambada"], eval_data_dir=shared_data, limit=limit), cache=cache)

    first = once(5)
    some = sum(asked)
    assert some > 200
    assert once(5) == first
    assert asked == []
    once(8)
    assert 0 < sum(asked) < 1.2 * some


def test_what_a_finished_task_found_survives_a_failure_in_the_next(shared_data: Path, tmp_path: Path) -> None:
    report = Report(tmp_path / "run_eval_results_now.json", {"config": {"model": "tiny"}})
    model = bundled_model()
    stage = load(model.layout, model.spec, single_mesh())
    settings = section(eval_tasks=["piqa", "broken", "lambada"], eval_data_dir=shared_data, include_path=own_tasks(tmp_path), limit=4)
    with pytest.raises(ValueError, match="no such judge"):
        evaluate(stage, model.spec, tokenizer(), settings, keep=lambda results, seconds: report.add(results, seconds=seconds))
    kept = json.loads(report.path.read_text())
    assert list(kept["results"]) == ["piqa"]
    assert kept["results"]["piqa"]["acc"] == kept["results"]["piqa"]["acc,none"]
    assert kept["config"] == {"model": "tiny"}
    assert [path.name for path in tmp_path.glob("run_*")] == ["run_eval_results_now.json"]


def test_other_commands_do_without_lm_eval_and_its_libraries() -> None:
    question = "import sys, megatron_lite.inference.generate, megatron_lite.inference.score, launcher.run; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    assert [name for name in ("lm_eval", "datasets", "transformers", "accelerate", "wandb", "pandas", "evaluate") if name in loaded] == []


def test_a_task_that_writes_more_than_the_model_can_hold_is_one_sentence(tmp_path: Path) -> None:
    folder = own_tasks(tmp_path)
    (folder / "writing.yaml").write_text((folder / "writing.yaml").read_text().replace("max_gen_toks: 24", "max_gen_toks: 600"))
    with pytest.raises(DataError, match=r"a task asks for 600 new tokens \(max_gen_toks\), but the model has 512 positions; ask for fewer"):
        kept_by(bundled_model(), section(eval_tasks=["writing"], include_path=folder))
