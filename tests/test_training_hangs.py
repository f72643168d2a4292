"""A rank that hangs does not keep the others waiting: the training ends after hang_timeout_minutes with the rank's name."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist

from megatron_lite.config.load import load_config
from megatron_lite.data.samples import Row, Samples
from megatron_lite.errors import UserError
from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mesh import build_mesh
from megatron_lite.training.engine import Engine
from megatron_lite.training.hang import History, Report
from megatron_lite.training.start import settle
from megatron_lite.training.train import run_training
from tests.training_runs import write_training

SECONDS = 2.0
SECONDS_ON_GPUS = 10.0  # loading libraries for the first step keeps a process silent for longer than 2 s


def report(rank: int, beat: int = 1, **changes: Any) -> Report:
    plain = Report(rank, "box", 100 + rank, beat, 1, 7, "computing", "engine.py line 10", {"world": 4})
    return replace(plain, **changes)


def judged(rounds: list[list[Report]]) -> str | None:
    """The verdict after reports that came in one by one, a second after the other, with a limit of three."""
    history = History()
    for reports in rounds:
        history.take({report.rank: report for report in reports}, 1.0)
    verdict = history.verdict(3.0)
    return verdict and verdict.sentence


def test_ranks_that_get_on_are_left_alone() -> None:
    assert judged([[report(0, beat, moves=beat), report(1, beat)] for beat in range(9)]) is None
    assert judged([[report(0, beat, calls={"world": beat}), report(1, beat)] for beat in range(9)]) is None


def test_a_rank_that_gives_no_sign_of_life_is_named() -> None:
    sentence = judged([[report(0, beat, calls={"world": 5}), report(1)] for beat in range(5)])
    assert sentence is not None
    assert sentence.startswith(
        "rank 1 (process 101 on box), last seen at step 7, computing (engine.py line 10), has not given a sign of life for 3 s; the others"
    )


def test_a_rank_that_lives_but_does_not_come_is_named() -> None:
    sentence = judged([[report(0, beat, calls={"world": 5}), report(1, beat, doing="reading data")] for beat in range(5)])
    assert sentence is not None
    assert sentence.startswith("the other ranks have waited for 3 s for rank 1 (process 101 on box), at step 7, reading data (engine.py line 10); look at")


def test_of_a_chain_of_waiting_ranks_the_last_is_named() -> None:
    calls = [{"0-1": 3, "0-2": 8}, {"0-1": 2, "1-3": 5}, {"0-2": 9, "2-3": 1}, {"1-3": 6, "2-3": 1}]  # 2 waits for 0, and it and 3 wait for 1
    sentence = judged([[report(rank, beat, calls=called) for rank, called in enumerate(calls)] for beat in range(5)])
    assert sentence is not None
    assert sentence.startswith("the other ranks have waited for 3 s for rank 1 (process 101 on box), at")


def test_where_nobody_is_behind_all_are_told() -> None:
    sentence = judged([[report(0, beat), report(1, beat, step=8)] for beat in range(5)])
    assert sentence is not None
    assert "none is behind the others: rank 0 (process 100 on box) at step 7, computing" in sentence
    assert "rank 1 (process 101 on box) at step 8" in sentence
    assert judged([[report(0, beat), report(1, beat, doing="saving")] for beat in range(9)]) is None  # the disk is slow


@pytest.mark.parametrize("changes", [{"doing": ""}, {"moves": 0}], ids=["has ended", "is still starting"])
def test_who_has_ended_or_is_still_starting_is_not_waited_for_in_vain(changes: Mapping[str, Any]) -> None:
    assert judged([[report(0, beat, calls={"world": 5}), report(1, beat, **changes)] for beat in range(9)]) is None


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def loop() -> None:
    while True:
        time.sleep(0.01)


def at_step(number: int, trouble: Callable[[], None]) -> None:
    """The trouble begins in this step, in the middle of computing."""
    step, steps = Engine.step, iter(range(1, 99))

    def troubled(self: Engine, *args: Any, **named: Any) -> object:
        if next(steps) == number:
            trouble()
        return step(self, *args, **named)

    Engine.step = troubled  # pyright: ignore[reportAttributeAccessIssue]


def in_data(trouble: Callable[[], None]) -> None:
    """The trouble begins where the samples of the third step are read."""
    row, rows = Samples.row, iter(range(1, 99))

    def troubled(self: Samples, number: int) -> Row:
        if next(rows) == 5:
            trouble()
        return row(self, number)

    Samples.row = troubled  # in a process of its own


def train(rank: int, layout: Layout, config: Path, spoil: Callable[[], None], on_gpus: bool) -> NoReturn:
    """What a rank of the training does; the last one is spoilt."""

    def give_up(error: UserError) -> NoReturn:
        (config.parent / f"rank{rank}").write_text(str(error))
        os._exit(2)

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    device = torch.device("cuda", rank) if on_gpus else torch.device("cpu")
    os.environ["LOCAL_RANK"] = str(rank)  # by which DeepSpeed finds our GPU
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpus else "gloo", init_method=f"file://{config.parent}/meet", rank=rank, world_size=layout.size)
    if rank == layout.size - 1:
        spoil()
    settings = {"pipe_parallel_size": layout.pp, "model_parallel_size": layout.tp, "hang_timeout_minutes": (SECONDS_ON_GPUS if on_gpus else SECONDS) / 60}
    run_training(settle(load_config([config], settings), build_mesh(layout, rank=rank, device=device)), give_up=give_up)
    os._exit(0)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., list[BaseProcess]]]:
    """Starts a training whose last rank is spoilt; what is left of it is killed."""
    processes: list[BaseProcess] = []

    def start(layout: Layout, spoil: Callable[[], None], *, on_gpus: bool = False) -> list[BaseProcess]:
        config = write_training(tmp_path, train_micro_batch_size_per_gpu=2, eval_interval=100)
        # a GPU that the parent has looked at is lost to its forks
        context = multiprocessing.get_context("spawn") if on_gpus else multiprocessing.get_context("fork")
        processes.extend(context.Process(target=train, args=(rank, layout, config, spoil, on_gpus)) for rank in range(layout.size))
        for process in processes:
            process.start()
        return processes

    yield start
    for process in processes:
        process.kill()
        process.join()


WAITED = "the other ranks have waited for 2 s for rank 1 (process {} on "


@pytest.mark.parametrize(
    ("layout", "spoil", "start", "last"),
    [
        (Layout(dp=2), lambda: at_step(3, stop), "rank 1 (process {} on ", "has not given a sign of life for 2 s; the others wait at step 3; "),
        (Layout(pp=2), lambda: at_step(2, loop), WAITED, "at step 2, computing (test_training_hangs.py"),
        pytest.param(Layout(tp=2), lambda: at_step(2, loop), WAITED, "at step 2, computing (test_training_hangs.py", marks=pytest.mark.slow),
        (Layout(dp=2), lambda: in_data(loop), WAITED, "at step 3, reading data ("),
    ],
    ids=["stopped", "in a loop, behind a pipeline", "in a loop, beside a cut", "reading data"],
)
def test_the_rank_that_hangs_is_named_by_those_that_wait_for_it(
    tmp_path: Path, layout: Layout, spoil: Callable[[], None], start: str, last: str, started: Callable[..., list[BaseProcess]]
) -> None:
    first, culprit = started(layout, spoil)
    first.join(timeout=60)
    assert first.exitcode == 2
    sentence = (tmp_path / "rank0").read_text()
    assert sentence.startswith(start.format(culprit.pid))
    assert last in sentence


@pytest.mark.multigpu
@pytest.mark.parametrize("layout", [Layout(dp=2), Layout(pp=2), Layout(tp=2)], ids=str)
@pytest.mark.parametrize(("trouble", "says"), [(stop, "has not given a sign of life for 10 s"), (loop, "the other ranks have waited for 10 s for rank 1")])
def test_the_rank_that_hangs_is_named_on_gpus_too(
    tmp_path: Path, layout: Layout, trouble: Callable[[], None], says: str, started: Callable[..., list[BaseProcess]]
) -> None:
    first, culprit = started(layout, partial(at_step, 3, trouble), on_gpus=True)
    first.join(timeout=120)
    assert first.exitcode == 2
    sentence = (tmp_path / "rank0").read_text()
    assert f"rank 1 (process {culprit.pid} on " in sentence
    assert says in sentence
