"""Which place among the processes this one has: RANK and its kin as torchrun and deepy set them, filled in where mpirun or SLURM's srun started us."""

import os
import re
import zlib
from collections.abc import Mapping, MutableMapping

from megatron_lite.errors import LayoutError

FIRST_PORT, PORTS = 20000, 12000  # below the range that systems hand out on their own


def fill_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT from Open MPI's or SLURM's variables, if nobody set RANK and this is one of several."""
    if "RANK" in environment:
        return
    if _started_by_mpirun(environment) > 1:  # before SLURM's, for mpirun may itself use srun
        environment.update(_place_in_mpi(environment))
    elif _tasks(environment) > 1:
        environment.update(_place_in_step(environment))


def _place_in_mpi(environment: Mapping[str, str]) -> dict[str, str]:
    size, here = environment["OMPI_COMM_WORLD_SIZE"], environment.get("OMPI_COMM_WORLD_LOCAL_SIZE")
    if size != here and "MASTER_ADDR" not in environment:
        raise LayoutError(
            f"mpirun started {size} processes, {here} of them here, and none knows where rank 0 is; add -x MASTER_ADDR=HOST, or start deepy.py -H"
        )
    name = environment.get("PMIX_NAMESPACE") or environment.get("OMPI_MCA_ess_base_jobid") or ""  # of the job, alike in all its processes
    return {
        "RANK": environment["OMPI_COMM_WORLD_RANK"],
        "WORLD_SIZE": size,
        "LOCAL_RANK": environment["OMPI_COMM_WORLD_LOCAL_RANK"],
        "MASTER_ADDR": environment.get("MASTER_ADDR") or "localhost",
        "MASTER_PORT": environment.get("MASTER_PORT") or str(FIRST_PORT + zlib.crc32(name.encode()) % PORTS),
    }


def _place_in_step(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(_tasks(environment)),
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or _first_address(environment),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(_port(environment)),
    }


def is_one_of_several(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun, mpirun or srun started this process among others."""
    return "RANK" in environment or _started_by_mpirun(environment) > 1 or _tasks(environment) > 1


def _started_by_mpirun(environment: Mapping[str, str]) -> int:
    """How many processes Open MPI started together with this one."""
    return int(environment.get("OMPI_COMM_WORLD_SIZE", "1"))


def _tasks(environment: Mapping[str, str]) -> int:
    """Tasks of the step if srun started this process. The shell of a batch script has a SLURM_PROCID too, but it is not one of several."""
    if "SLURM_PROCID" not in environment or not ("SLURM_STEP_ID" in environment or "SLURM_STEP_NUM_TASKS" in environment):
        return 1
    return int(environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS") or 1)


def _first_address(environment: Mapping[str, str]) -> str:
    """Where rank 0 runs: the first host of the step. The address srun was called at may be a login node."""
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    address = first_host(hosts) if hosts else environment.get("SLURM_LAUNCH_NODE_IPADDR")
    if not address:
        raise LayoutError("SLURM started several tasks without SLURM_JOB_NODELIST; set MASTER_ADDR to the host of the first task")
    return address


def first_host(hosts: str) -> str:
    """The first host of a list as SLURM writes it: gpu[003-006,9]-ib,login becomes gpu003-ib."""
    match = re.match(r"([^,\[]*)(?:\[(\w+)[^\]]*\])?([^,\[]*)", hosts)
    return "".join(part or "" for part in match.groups()) if match else hosts


def _port(environment: Mapping[str, str]) -> int:
    """A port that every task of a step derives alike, and two jobs on one machine seldom share."""
    job, step = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return FIRST_PORT + (job + step) % PORTS
