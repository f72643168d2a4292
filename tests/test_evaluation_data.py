"""Questions that lie on this machine, and what is said when they do not, or are not what they should be."""

import json
import logging
import shutil
import time
from pathlib import Path

import pytest

from megatron_lite.config.sections import EvaluationSection
from megatron_lite.data import hub
from megatron_lite.data.task_data import LAMBADA, PIQA, read_documents, require, task_names
from megatron_lite.errors import ConfigError, DataError
from megatron_lite.evaluation.quiet import quiet_harness
from megatron_lite.evaluation.tasks import Finder, find_tasks
from tests.web import NOWHERE

lm_eval = pytest.importorskip("lm_eval")


def section(**values: object) -> EvaluationSection:
    return EvaluationSection.model_validate(values)


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("deepy"), "handlers", [_Listener(said)])
    return said


class _Listener(logging.Handler):
    def __init__(self, said: list[str]) -> None:
        super().__init__()
        self.said = said

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self.said.append(record.getMessage())


def piqa_folder(folder: Path, documents: list[dict[str, object]], labels: str) -> Path:
    (folder / "piqa").mkdir(exist_ok=True)
    (folder / "piqa/valid.jsonl").write_text("".join(json.dumps(each) + "\n" for each in documents))
    (folder / "piqa/valid-labels.lst").write_text(labels)
    return folder


GOAL: dict[str, object] = {"goal": "boil an egg", "sol1": "in water", "sol2": "in sand"}


def test_the_published_files_are_recognised_and_read_in_lm_evals_shape(shared_data: Path, warnings: list[str]) -> None:
    assert require(LAMBADA, shared_data)
    assert require(PIQA, shared_data)
    [(split, texts)] = read_documents(LAMBADA, shared_data).items()
    assert (split, len(texts), list(texts[0])) == ("test", 5153, ["text"])
    questions = read_documents(PIQA, shared_data)["validation"]
    assert len(questions) == 1838
    assert sum(question["label"] == 1 for question in questions) == 928
    merged = [json.loads(line) for line in (shared_data / "piqa/piqa_valid_merged.jsonl").open(encoding="utf-8")]
    assert questions == [{key: each[key] for key in ("goal", "sol1", "sol2", "label")} for each in merged]
    assert warnings == []


def test_another_file_is_used_and_said_to_compare_with_nothing(tmp_path: Path, warnings: list[str]) -> None:
    (tmp_path / "lambada").mkdir()
    (tmp_path / "lambada/lambada_test.jsonl").write_text('{"text": "two words"}\n')
    assert read_documents(LAMBADA, tmp_path) == {"test": [{"text": "two words"}]}
    [said] = warnings
    assert said.startswith(f"{tmp_path}/lambada/lambada_test.jsonl is not the file behind the published results (sha256 ")
    assert said.endswith("instead of 4aa8d02cd17c…; 1 documents, published are 5,153): scores cannot be compared with them")


def test_a_truncated_file_is_one_sentence(shared_data: Path, tmp_path: Path) -> None:
    (tmp_path / "lambada").mkdir()
    whole = (shared_data / "lambada/lambada_test.jsonl").read_bytes()
    (tmp_path / "lambada/lambada_test.jsonl").write_bytes(whole[:100_000])
    with pytest.raises(DataError, match=r"lambada_test.jsonl line \d+ is not JSON: .*; every line must hold one whole JSON object$"):
        read_documents(LAMBADA, tmp_path)
    shutil.copytree(shared_data / "piqa", tmp_path / "piqa", copy_function=shutil.copyfile)
    (tmp_path / "piqa/valid-labels.lst").write_text("0\n1\n")
    with pytest.raises(
        DataError, match=r"valid-labels.lst must hold a 0 or 1 for each of the 1,838 lines of .*valid.jsonl, but holds 2 lines; fetch both files again"
    ):
        read_documents(PIQA, tmp_path)


@pytest.mark.parametrize(
    ("documents", "labels", "message"),
    [
        ([GOAL], "2\n", "must hold a 0 or 1 for each of the 1 lines"),
        ([{**GOAL, "sol2": None}], "0\n", r"valid.jsonl line 1 has no sol2; fetch the file again"),
        ([], "", r"valid.jsonl is empty; fetch the file again"),
    ],
)
def test_questions_without_answers_are_one_sentence(documents: list[dict[str, object]], labels: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_documents(PIQA, piqa_folder(tmp_path, documents, labels))


def test_half_of_a_tasks_files_is_one_sentence(tmp_path: Path) -> None:
    (piqa_folder(tmp_path, [GOAL], "0") / "piqa/valid-labels.lst").unlink()
    with pytest.raises(DataError, match=r"the data of piqa is incomplete: there is no .*/piqa/valid-labels.lst; `tools/download.py eval-data piqa --folder "):
        require(PIQA, tmp_path)


@pytest.mark.usefixtures("no_network")
def test_without_data_and_network_it_takes_a_moment_to_say_which_file_to_put_where(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(DataError) as error:
        find_tasks(section(eval_tasks=("lambada",), eval_data_dir=tmp_path))
    assert time.monotonic() - started < 2
    assert str(error.value) == (
        f"there is no {tmp_path}/lambada/lambada_test.jsonl for the task lambada_openai, and {NOWHERE} cannot be reached; `tools/download.py eval-data lambada "
        f"--folder {tmp_path}` fetches it where there is a network, or set eval_data_dir to the folder that has lambada/lambada_test.jsonl"
    )


@pytest.mark.usefixtures("no_network")
def test_a_copy_in_the_cache_of_the_hubs_library_is_as_good(tmp_path: Path) -> None:
    (tmp_path / "cache/datasets/baber___piqa/default").mkdir(parents=True)
    assert not require(PIQA, tmp_path)


def test_the_hub_is_not_asked_where_that_is_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in hub.OFFLINE:
        monkeypatch.delenv(name, raising=False)
    for name in hub.PROXIES:
        monkeypatch.setenv(name, "http://proxy")
    hub.is_reachable.cache_clear()
    assert hub.is_reachable()  # behind a proxy only trying tells
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.is_reachable.cache_clear()
    assert not hub.is_reachable()
    hub.is_reachable.cache_clear()


def test_names_of_the_old_harness_are_todays() -> None:
    assert task_names(["lambada", "piqa", "lambada_openai", "piqa"]) == ["lambada_openai", "piqa"]


def test_a_folder_of_own_tasks_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"include_path .*/gone is no folder; name the one that holds your task definitions"):
        find_tasks(section(eval_tasks=("piqa",), include_path=tmp_path / "gone"))


def test_prompts_are_those_of_the_installed_lm_eval(shared_data: Path) -> None:
    lambada, piqa = find_tasks(section(eval_tasks=("lambada", "piqa"), eval_data_dir=shared_data))
    assert (lambada.documents, piqa.documents) == (5153, 1838)
    text = read_documents(LAMBADA, shared_data)["test"][7]["text"]
    assert isinstance(text, str)
    task = lambada.loaded["tasks"]["lambada_openai"]
    assert task.doc_to_text(task.eval_docs[7]) == text.rpartition(" ")[0]
    assert task.doc_to_target(task.eval_docs[7]) == " " + text.rpartition(" ")[2]
    task = piqa.loaded["tasks"]["piqa"]
    assert task.doc_to_text(task.eval_docs[0]) == f"Question: {task.eval_docs[0]['goal']}\nAnswer:"


def test_examples_without_training_data_are_drawn_from_the_questions_and_that_is_said(shared_data: Path, tmp_path: Path, warnings: list[str]) -> None:
    find_tasks(section(eval_tasks=["piqa"], eval_data_dir=shared_data, num_fewshot=2))
    assert warnings == [f"piqa: examples are drawn from the questions themselves, for lack of training data in {shared_data}; scores cannot be compared"]
    warnings.clear()
    folder = piqa_folder(tmp_path, [GOAL], "0")
    (folder / "piqa/train.jsonl").write_text(3 * (json.dumps({"goal": "cut", "sol1": "with a knife", "sol2": "with a nose"}) + "\n"))
    (folder / "piqa/train-labels.lst").write_text("0\n0\n0\n")
    [piqa] = find_tasks(section(eval_tasks=("piqa",), eval_data_dir=folder, num_fewshot=1))
    task = piqa.loaded["tasks"]["piqa"]
    assert task.fewshot_context(task.eval_docs[0], 1).startswith("Question: cut\nAnswer: with a knife\n\nQuestion: boil an egg\nAnswer:")
    assert not any("examples are drawn" in each for each in warnings)


def test_names_wildcards_and_groups_are_those_of_lm_eval_and_the_nearest_are_named(tmp_path: Path, shared_data: Path) -> None:
    """On a part of lm-eval's tasks, for to read the index of all takes ten seconds and more."""
    for name in ("lambada", "wmdp"):
        shutil.copytree(Path(lm_eval.__file__).parent / "tasks" / name, tmp_path / name)
    with quiet_harness():
        finder = Finder(section(eval_tasks=["piqa"], eval_data_dir=shared_data, include_path=tmp_path))
        assert dict(finder.specs("lambada_openai")) == {"lambada_openai": "lambada_openai"}  # a task of the user's own folder wins over the one we know
        assert isinstance(dict(finder.specs("piqa"))["piqa"], dict)
        assert dict(finder.specs("wmdp")) == {"wmdp": "wmdp"}  # a group is evaluated whole
        assert dict(finder.specs("wmdp*")).keys() == {"wmdp_bio", "wmdp_chem", "wmdp_cyber"}  # and once
        with pytest.raises(ConfigError, match=r"lm-eval \d.* has no task wmdp_bo; did you mean wmdp_bio or .*\?"):
            list(finder.specs("wmdp_bo"))
        with pytest.raises(ConfigError, match=r"has no task qqqqqqqqq\*; `lm-eval ls tasks` lists them all"):
            list(finder.specs("qqqqqqqqq*"))


@pytest.mark.slow
def test_all_of_lm_evals_tasks_are_known(shared_data: Path) -> None:
    with quiet_harness():
        finder = Finder(section(eval_tasks=["hellaswagg"], eval_data_dir=shared_data))
        assert dict(finder.specs("mmlu")) == {"mmlu": "mmlu"}
        some = dict(finder.specs("lambada_openai*"))
        assert isinstance(some["lambada_openai"], dict)  # the questions that are here, also by a wildcard
        assert {"lambada_openai_cloze_yaml", "lambada_openai_mt_de"} <= some.keys()
        with pytest.raises(ConfigError, match=r"has no task hellaswagg; did you mean hellaswag or "):
            list(finder.specs("hellaswagg"))
