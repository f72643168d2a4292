"""Results under old and new names, written whole or not at all, and held against published ones."""

from pathlib import Path

import pytest

from megatron_lite.config.load import load_config
from megatron_lite.errors import OutputError
from megatron_lite.evaluation.published import known_model, published_table
from megatron_lite.evaluation.results import Report, Results, as_table, flat, metrics_of, older_name, result_rows
from megatron_lite.models.spec import spec_of
from tests.harness import ROOT


def test_results_that_cannot_be_written_leave_the_old_file_whole(tmp_path: Path) -> None:
    report = Report(tmp_path / "gone" / "results.json", {})
    with pytest.raises(OutputError, match=r"the results .*/gone/results.json cannot be written: No such file or directory; set eval_results_prefix to a place"):
        report.add({"results": {}}, seconds=1)


SOME: Results = {
    "results": {
        "lambada_openai": {"name": "lambada_openai", "alias": "x", "sample_len": 5, "perplexity,none": 4.5, "perplexity_stderr,none": "N/A", "acc,none": 0.5},
        "gsm8k": {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.01},
    }
}


def test_metrics_have_the_names_of_gpt_neox_and_errors_only_where_there_are_some() -> None:
    assert flat(SOME) == {
        "lambada_openai_ppl": 4.5,
        "lambada_openai_acc": 0.5,
        "gsm8k_exact_match_strict-match": 0.25,
        "gsm8k_exact_match_strict-match_stderr": 0.01,
    }
    assert [older_name(key) for key in ("perplexity_stderr,none", "acc_norm,none", "alias")] == ["ppl_stderr", "acc_norm", "alias"]
    assert [metric.error for metric in metrics_of(SOME)] == [None, None, 0.01]


def test_the_published_results_in_the_documentation_are_those_that_ours_are_held_against() -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert page.partition("<!-- published: begin -->\n")[2].partition("<!-- published: end -->")[0] == published_table()


@pytest.mark.parametrize(
    ("name", "model"), [("20B", "GPT-NeoX-20B"), ("pythia/70M", "Pythia-70M"), ("pythia/12B", "Pythia-12B"), ("pythia/1B", None), ("tiny", None)]
)
def test_known_models_are_recognised_by_their_shape(name: str, model: str | None) -> None:
    config = load_config([ROOT / "configs" / f"{name}.yml"], {})
    known = known_model(spec_of(config.model, vocab=1, dtype="float32"))
    assert (known.name if known else None) == model


def test_a_known_models_results_are_shown_beside_the_published_ones_in_standard_errors() -> None:
    config = load_config([ROOT / "configs" / "20B.yml"], {})
    results: Results = {
        "results": {"piqa": {"acc,none": 0.7797, "acc_stderr,none": 0.0098, "acc_norm,none": 0.7786, "acc_norm_stderr,none": "N/A"}, "other": {"f1,none": 0.5}},
        "n-samples": {"piqa": {"effective": 1838, "original": 1838}},
        "n-shot": {"piqa": 0},
    }
    table = as_table(list(result_rows(results, known_model(spec_of(config.model, vocab=1, dtype="float32"))))).splitlines()
    assert table[0].split() == ["task", "documents", "shots", "metric", "value", "stderr", "published", "difference"]
    assert table[2].split() == ["piqa", "1,838", "0", "acc", "0.7797", "0.0098", "0.7748", "+0.5", "stderr"]
    assert table[3].split() == ["acc_norm", "0.7786", "0.7786", "+0.0", "stderr"]
    assert table[4].split() == ["other", "f1", "0.5000"]
