"""Processes that share a GPU carry what they exchange through the host's memory, and write what processes on GPUs of their own write."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_lite.inference.continuous import ContinuousDecoder
from megatron_lite.inference.step import Stepper
from megatron_lite.parallel.join import most_on_one
from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mesh import Axis, Mesh
from tests.models import load, write_random
from tests.runs import BYTES, TOKENIZER, complete, random_prompts, requests
from tests.worlds import in_world

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ranks exchange lies elsewhere than what they compute with, as it does on shared GPUs."""
    monkeypatch.setattr(Axis, "_there", lambda axis, x: x.clone())


def test_the_fullest_gpu_decides_how_many_share_one() -> None:
    assert most_on_one(["GPU-a", "GPU-b", "GPU-c"]) == 1
    assert most_on_one(["GPU-a", "GPU-b", "GPU-a", "GPU-a"]) == 3


@pytest.mark.usefixtures("far")
def test_everything_that_an_axis_does_leaves_its_result_with_the_ranks() -> None:
    def all_of_it(mesh: Mesh) -> list[list[float]]:
        axis, mine = mesh.tp, torch.tensor([mesh.rank + 1.0, -mesh.rank])
        later = axis.share_later(mine.clone(), source=1)
        assert later.keeps_host_waiting
        later.wait()
        handed = torch.empty(2)
        if axis.is_first:
            axis.send(mine, to=1)
            axis.send_later(mine * 2, to=1).wait()
        else:
            handed = axis.receive(torch.empty(2), source=0) + axis.receive(torch.empty(2), source=0)
        assert later.target is not None
        found: list[Tensor] = [axis.sum(mine), axis.sum_in_place(mine.clone()), axis.maximum(mine), axis.minimum(mine), axis.gather(mine)]
        return [each.tolist() for each in (*found, axis.share(mine.clone(), source=0), later.target, handed)]

    first, second = in_world(Layout(tp=2), all_of_it)
    shared = [[3.0, -1.0], [3.0, -1.0], [2.0, 0.0], [1.0, -1.0], [1.0, 0.0, 2.0, -1.0], [1.0, 0.0], [2.0, -1.0]]
    assert first[:-1] == second[:-1] == shared
    assert second[-1] == [3.0, 0.0]


@pytest.mark.usefixtures("far")
def test_stages_that_exchange_through_the_host_write_the_same(tmp_path: Path) -> None:
    saved = write_random(tmp_path, BYTES, tp=2)
    asked = requests(random_prompts((1, 30, 7, 18, 40)), maximum_tokens=12)

    def texts(mesh: Mesh) -> dict[int, str | None]:
        stepper = Stepper(load(saved, BYTES, mesh), BYTES, words=512, pages=12)
        decoder = ContinuousDecoder(stepper, TOKENIZER, context=BYTES.max_positions, rows=4, tokens=100, groups=2)
        return {completion.request.id: completion.text for completion in decoder.complete(asked)}

    (alone,) = in_world(Layout(), lambda mesh: {each.request.id: each.text for each in complete(load(saved, BYTES, mesh), asked, spec=BYTES)})
    assert in_world(Layout(pp=2, tp=2), texts) == [alone] * 4


@pytest.mark.gpu
@pytest.mark.parametrize("cut", [(2, 1), (1, 2), (2, 2)], ids=["pipe", "model", "both"])
def test_more_processes_than_gpus_write_the_same(cut: tuple[int, int], tmp_path: Path) -> None:
    many = tmp_path / "many.jsonl"
    words = [f"pipe_parallel_size={cut[0]}", f"model_parallel_size={cut[1]}"]
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={cut[0] * cut[1] * torch.cuda.device_count()}"]
    said = run(*start, "generate.py", "-o", many, *words).stderr
    assert "share a GPU" in said
    run("generate.py", "-o", tmp_path / "one.jsonl")
    assert written(many) == written(tmp_path / "one.jsonl")


@pytest.mark.gpu
def test_training_refuses_to_share() -> None:
    count = torch.cuda.device_count() + 1
    ended = run("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "train.py", "train_micro_batch_size_per_gpu=1", fails=True)
    assert "training needs a GPU for every process; here several share one: start fewer of them" in ended.stderr


def run(*words: str | Path, fails: bool = False) -> subprocess.CompletedProcess[str]:
    """A script with the bundled model in fp32."""
    scripts = [index for index, word in enumerate(words) if str(word).endswith(".py")]
    before, behind = words[: scripts[0] + 1], words[scripts[0] + 1 :]
    asked = ["-i", "examples/prompts.txt", "maximum_tokens=20"] if "generate.py" in words else []
    command = [sys.executable, *map(str, before), "configs/tiny.yml", *asked, "precision=fp32", "fp16=null", *map(str, behind)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert (ended.returncode != 0) == fails, ended.stderr
    return ended


def written(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]
