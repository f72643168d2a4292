"""Our numbers and those of lm-eval's own model for transformers, on the same weights in fp32: every request, every judgement, in every layout."""

from pathlib import Path

import pytest

from megatron_lite.config.sections import EvaluationSection
from megatron_lite.parallel.layout import Layout
from tests.harness import RANDOM_MODELS, bundled_model, compare, random_model, through_ours, through_transformers

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate", reason="lm-eval's model for transformers needs it")

LAYOUTS = [Layout(), Layout(tp=2), Layout(pp=2), Layout(dp=2)]


def settings(folder: Path, limit: int | None, **others: object) -> EvaluationSection:
    return EvaluationSection.model_validate(
        {"eval_tasks": ["lambada", "piqa"], "eval_data_dir": folder, "limit": limit, "log_samples": True, "bootstrap_iters": 100, **others}
    )


def test_the_bundled_model_scores_as_in_transformers_in_every_layout(shared_data: Path) -> None:
    some = settings(shared_data, 16)
    expected = through_transformers(bundled_model(), some)
    for layout in LAYOUTS:
        compare(through_ours(bundled_model(), some, layout), expected)


@pytest.mark.parametrize("name", RANDOM_MODELS)
def test_random_models_score_as_in_transformers_in_every_layout(name: str, shared_data: Path, tmp_path: Path) -> None:
    model, some = random_model(name, tmp_path), settings(shared_data, 16)
    expected = through_transformers(model, some)
    for layout in LAYOUTS:
        compare(through_ours(model, some, layout), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bundled", *RANDOM_MODELS])
def test_all_of_lambada_and_piqa_score_as_in_transformers_in_every_layout(name: str, shared_data: Path, tmp_path: Path) -> None:
    model, everything = bundled_model() if name == "bundled" else random_model(name, tmp_path), settings(shared_data, None)
    expected = through_transformers(model, everything)
    for layout in LAYOUTS:
        worst = compare(through_ours(model, everything, layout), expected)
        print(f"{name}, {layout}: log-probabilities differ by {worst:.1e} at most")
    for results in expected.values():
        print(name, {key: value for task in results["results"].values() for key, value in task.items() if isinstance(value, float)})
