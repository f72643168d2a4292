"""`./deepy.py evaluate.py` from the command line to the results, and what is left when something goes wrong on the way."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.harness import ROOT

pytest.importorskip("lm_eval")

COMMAND = [sys.executable, str(ROOT / "deepy.py"), "evaluate.py", "configs/tiny.yml"]


def deepy(*words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*COMMAND, *words], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}, check=False, timeout=300)


def test_two_replicas_evaluate_report_and_keep_everything(shared_data: Path, tmp_path: Path) -> None:
    words = [
        f"log_dir={tmp_path}",
        f"eval_cache_dir={tmp_path}/answers",
        "--eval_results_prefix",
        str(tmp_path / "tiny"),
        "--log_samples",
        f"eval_data_dir={shared_data}",
    ]
    ended = deepy("--eval_tasks", "lambada", "piqa", "--limit", "20", *words, WANDB_MODE="offline", WANDB_DIR=str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    table = ended.stdout.splitlines()
    assert re.fullmatch(r"task +documents +shots +metric +value +stderr", table[0])
    assert re.fullmatch(r"lambada_openai +20 of 5,153 +0 +ppl +[\d.]+ +[\d.]+", table[2])
    assert re.fullmatch(r" +acc_norm +0\.\d{4} +0\.\d{4}", table[5])
    assert table[-1] == "LIMITED to the first 20 documents of every task: these numbers compare with nothing"
    assert "lambada is lambada_openai: the version of OpenAI, which published results mean" in ended.stderr
    assert "using data 2 x pipe 1 x model 1" in ended.stderr
    [path] = tmp_path.glob("tiny_eval_results_??-??-????-??-??-??.json")
    kept = json.loads(path.read_text())
    check_results(kept)
    [line] = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if "eval/piqa_acc" in line]
    assert line["eval/piqa_acc_norm"] == kept["results"]["piqa"]["acc_norm,none"]
    [samples] = tmp_path.glob("tiny_eval_samples_*_piqa.jsonl")
    assert len(samples.read_text().splitlines()) == 20
    check_wandb(tmp_path, kept)
    assert [path.name for path in tmp_path.rglob("*.part")] == []


def check_results(kept: dict[str, dict]) -> None:
    lambada = kept["results"]["lambada_openai"]
    assert lambada["ppl"] == lambada["perplexity,none"] > 1
    assert lambada["ppl_stderr"] == lambada["perplexity_stderr,none"]
    assert {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"} <= kept["results"]["piqa"].keys()
    assert kept["n-samples"]["piqa"] == {"original": 1838, "effective": 20}
    assert kept["config"]["limit"] == 20
    assert re.fullmatch(r"[0-9a-f]{64}", kept["config"]["fingerprint"])
    assert kept["config"]["layout"] == "data 2 x pipe 1 x model 1"
    assert kept["config"]["model_args"]["num_layers"] == "8"
    assert kept["versions"] == {"lambada_openai": 1.0, "piqa": 1.0}


def check_wandb(folder: Path, kept: dict[str, dict]) -> None:
    """Reads the run back with wandb's own reader."""
    [run] = (folder / "wandb").glob("offline-run-*")
    wandb = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(run)]
    found = json.loads(subprocess.run(wandb, capture_output=True, text=True, check=True).stdout)
    assert found["project"] == "neox"
    assert found["summary"]["eval/piqa_acc"] == kept["results"]["piqa"]["acc"]
    assert found["summary"]["eval/lambada_openai_ppl"] == pytest.approx(kept["results"]["lambada_openai"]["ppl"])
    assert found["summary"]["eval/piqa_samples"]["nrows"] == 20


def test_a_process_that_dies_in_the_second_task_leaves_the_first_ones_results(shared_data: Path, tmp_path: Path) -> None:
    words = ["--eval_tasks", "piqa", "lambada", "--eval_results_prefix", str(tmp_path / "tiny"), f"eval_data_dir={shared_data}", f"log_dir={tmp_path}"]
    with (tmp_path / "said").open("w+") as said:
        process = subprocess.Popen([*COMMAND, *words, "use_wandb=false", "limit=200"], cwd=ROOT, stdout=said, stderr=said, text=True)
        try:
            wait_for(lambda: "piqa (200 documents) in " in (tmp_path / "said").read_text(), process)
            killed = time.monotonic()
            victim = next(child for child in psutil.Process(process.pid).children(recursive=True) if child.environ().get("RANK") == "1")
            victim.send_signal(signal.SIGKILL)
            assert process.wait(10) != 0
        finally:
            process.kill()
    assert time.monotonic() - killed < 10
    assert "rank 1 was killed by SIGKILL" in (tmp_path / "said").read_text().splitlines()[-1]
    [path] = tmp_path.glob("tiny_eval_results_*")
    assert list(json.loads(path.read_text())["results"]) == ["piqa"]


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    until = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, "it ended early"
        assert time.monotonic() < until
        time.sleep(0.2)


def test_without_data_and_network_nothing_starts_and_the_file_to_get_is_named_at_once(tmp_path: Path) -> None:
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    ended = deepy(
        "--eval_tasks", "lambada", f"eval_data_dir={tmp_path}", HF_ENDPOINT="https://127.0.0.1:9", HF_HOME=str(tmp_path), HTTPS_PROXY="", https_proxy=""
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2  # the time on a machine that has nothing else to do
    assert time.monotonic() - started < 10
    assert ended.returncode == 2
    assert ended.stderr.startswith(
        f"there is no {tmp_path}/lambada/lambada_test.jsonl for the task lambada_openai, and https://127.0.0.1:9 cannot be reached; "
    )
    assert len(ended.stderr.splitlines()) == 1
