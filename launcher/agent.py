"""torch.distributed's elastic agent with our log files and a memory for who ended first. The one file here that imports torch, when processes start."""

import logging
import os
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
    """Ends all processes when one fails. `ends` then holds the exit codes of those that had failed before it ended the others."""

    ends: dict[int, int]
    grace: float  # seconds a process has between SIGTERM and SIGKILL

    # elastic declares this method for its subclasses, but hides its type behind a decorator
    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.ends = {worker.global_rank: code for worker in worker_group.workers if (code := _exit_code(worker.id))}
        if self.ends:
            self.grace = LITTLE_GRACE
            self._shutdown()
        result = super()._monitor_workers(worker_group)  # pyright: ignore[reportCallIssue]
        if not self.ends:  # one may have ended between our look and elastic's
            self.ends = {rank: failure.exitcode for rank, failure in result.failures.items()}
        return result

    def _shutdown(self, death_sig: Signals = Signals.SIGTERM, *rest: object, **more: object) -> None:
        if self._pcontext:  # elastic itself would wait 30 s for a process that does not listen
            self._pcontext.close(death_sig, int(self.grace))
        super()._shutdown(death_sig)

    def interrupted(self) -> dict[int, int]:
        """The exit codes of processes that were asked to stop, if all have done so in order; else nothing."""
        group = self._worker_group.workers
        codes = {worker.global_rank: handler.proc.poll() for worker, handler in zip(group, self._handlers(), strict=True)}
        return dict.fromkeys(codes, INTERRUPTED) if set(codes.values()) == {INTERRUPTED} else {}

    def _handlers(self) -> list[SubprocessHandler]:
        context = cast(SubprocessContext, self._pcontext)
        return [context.subprocess_handlers[local] for local in sorted(context.subprocess_handlers)]


def _exit_code(pid: int) -> int:
    """Exit code of a child (negative: a signal), 0 while it runs. Leaves its end for elastic to collect."""
    try:
        end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # ended well and was collected
        return 0
    if end is None:
        return 0
    return end.si_status if end.si_code == os.CLD_EXITED else -end.si_status


def run_agent(job: Job, entrypoint: str, words: list[str]) -> dict[int, int] | Signals:
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
    agent.grace = job.grace
    try:
        agent.run()
    except SignalException as received:
        return agent.interrupted() or received.sigval
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
