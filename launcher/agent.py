"""torch.distributed's elastic agent with our log files and a memory for who ended first. The one file here that imports torch, when processes start."""

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from signal import Signals
from typing import cast

from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException, SubprocessContext
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from launcher.ends import failures, is_stopped, stopped
from launcher.failure import error_file, log_file
from launcher.job import LITTLE_GRACE, Job
from launcher.worker import LOG
from megatron_lite.errors import INTERRUPTED, LayoutError

WATCH = 0.1  # seconds between looks at the processes
PATIENCE = 300  # seconds in which all hosts must have come


class LogFiles(LogsSpecs):
    """Rank 0 keeps the terminal; what the others print goes to rankN.log."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folder = folder

    @property
    def root_log_dir(self) -> str:
        return str(self.folder)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        ranks = {local: int(env["RANK"]) for local, env in envs.items()}
        for local, env in envs.items():
            env[LOG] = str(log_file(self.folder, ranks[local]))
            env["TORCHELASTIC_ERROR_FILE"] = str(error_file(self.folder, ranks[local]))
        streams = {local: "" if rank == 0 else str(log_file(self.folder, rank)) for local, rank in ranks.items()}
        return LogsDest(streams, dict(streams), error_files={local: env["TORCHELASTIC_ERROR_FILE"] for local, env in envs.items()})


class Agent(LocalElasticAgent):
    """Ends all processes when one fails. `ends` then holds the exit codes of those that had failed before it ended the others.

    One that was asked to stop and has saved (75) ends all too, but the others have their time: they saved with it, and may have metrics to hand in.
    """

    ends: Mapping[int, int]
    grace: float  # seconds a process has between SIGTERM and SIGKILL

    # elastic declares this method for its subclasses, but hides its type behind a decorator
    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:  # pyright: ignore[reportIncompatibleVariableOverride]
        ends = {worker.global_rank: code for worker in worker_group.workers if (code := _exit_code(worker.id))}
        failed = {rank: code for rank, code in ends.items() if code != INTERRUPTED}
        self.ends = failed or ends
        if failed:
            self.grace = LITTLE_GRACE
        if ends:
            self._shutdown()
        result = super()._monitor_workers(worker_group)  # pyright: ignore[reportCallIssue]
        if not self.ends:  # one may have ended between our look and elastic's
            self.ends = {rank: failure.exitcode for rank, failure in result.failures.items()}
        return result

    def _shutdown(self, death_sig: Signals = Signals.SIGTERM, *rest: object, **more: object) -> None:
        for handler in self._handlers():
            if handler.proc.poll() is None:
                handler.close(death_sig)
        self._wait()
        super()._shutdown(Signals.SIGKILL)  # elastic itself would wait 30 s for a process that does not listen

    def _wait(self) -> None:
        """Until all have ended or had their time, which is little once one has ended without a save: the others may wait for it for ever."""
        until, is_hurried = time.monotonic() + self.grace, False
        while True:
            codes, now = self._codes(), time.monotonic()
            failed = failures(codes)
            if failed and set(self.ends.values()) <= {INTERRUPTED}:
                self.ends = failed
            if not is_hurried and (failed or is_stopped(codes)):
                until, is_hurried = min(until, now + LITTLE_GRACE), True
            if None not in codes.values() or now >= until:
                return
            time.sleep(WATCH)

    def outcome(self, received: Signals) -> Mapping[int, int] | Signals:
        """What became of processes that were asked to stop: those that failed before they were killed, if any."""
        return self.ends or stopped(self._codes(), received)

    def _codes(self) -> dict[int, int | None]:
        """The exit code of every rank here, None while it runs."""
        ranks = [worker.global_rank for worker in self._worker_group.workers]
        return {rank: handler.proc.poll() for rank, handler in zip(ranks, self._handlers(), strict=False)}

    def _handlers(self) -> list[SubprocessHandler]:
        """None while processes are being started."""
        handlers = cast(SubprocessContext, self._pcontext).subprocess_handlers if self._pcontext else {}
        return [handlers[local] for local in sorted(handlers)]


def _exit_code(pid: int) -> int:
    """Exit code of a child (negative: a signal), 0 while it runs. Leaves its end for elastic to collect."""
    try:
        end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # ended well and was collected
        return 0
    if end is None:
        return 0
    return end.si_status if end.si_code == os.CLD_EXITED else -end.si_status


def run_agent(job: Job, entrypoint: str, words: list[str]) -> Mapping[int, int] | Signals:
    """Runs a job's processes on this host. Returns the exit codes of those that failed first, or the signal that ended it all."""
    silent = logging.getLogger("torch.distributed.elastic")
    silent.addHandler(logging.NullHandler())
    silent.propagate = False
    spec = WorkerSpec(
        role=job.name,
        local_world_size=job.processes,
        entrypoint=entrypoint,
        args=tuple(words),
        rdzv_handler=get_rendezvous_handler(_meeting(job)),
        max_restarts=0,
        monitor_interval=WATCH,
    )
    agent = Agent(spec, LogFiles(job.logs))
    agent.grace, agent.ends = job.grace, {}
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(job.signals)
    try:
        agent.run()
    except SignalException as received:
        return agent.outcome(received.sigval)
    except DistError as error:
        if job.meeting is None:
            raise
        where, why = f"{job.meeting.address}:{job.meeting.port}", str(error).partition("\n")[0]
        raise LayoutError(f"the hosts cannot meet at {where} ({why}); set master_addr and master_port to a free port that all of them reach") from None
    return agent.ends


def _meeting(job: Job) -> RendezvousParameters:
    """Where the processes meet: at a free port of this host, or at a port of the first host that all were told."""
    if job.meeting is None:
        return RendezvousParameters("c10d", "localhost:0", job.logs.name, 1, 1, local_addr="localhost")
    hosts = job.meeting.hosts
    return RendezvousParameters("static", f"{job.meeting.address}:{job.meeting.port}", job.meeting.name, hosts, hosts, rank=job.meeting.host, timeout=PATIENCE)
