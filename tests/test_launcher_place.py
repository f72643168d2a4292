"""A process's place among the others, as SLURM's and Open MPI's variables tell it."""

import pytest

from launcher.place import fill_environment, first_host, is_one_of_several
from megatron_lite.errors import LayoutError

STEP = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "4217", "SLURM_STEP_ID": "0", "SLURM_JOB_NODELIST": "gpu[03-04]"}

MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "7@1"}


def test_a_process_knows_whether_it_is_one_of_several() -> None:
    assert is_one_of_several(STEP)
    assert is_one_of_several(MPI)
    assert not is_one_of_several({**MPI, "OMPI_COMM_WORLD_SIZE": "1"})
    assert is_one_of_several({"RANK": "0", "WORLD_SIZE": "1"})
    assert not is_one_of_several({})
    assert not is_one_of_several({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"})


def test_srun_fills_in_the_ranks_and_the_meeting_place() -> None:
    environment = dict(STEP)
    fill_environment(environment)
    assert {key: environment[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")} == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu03",
    }
    assert 20000 <= int(environment["MASTER_PORT"]) < 32000


def test_mpirun_fills_in_the_ranks_even_where_it_uses_srun() -> None:
    environment = {**STEP, **MPI}
    fill_environment(environment)
    assert [environment[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")] == ["1", "4", "1", "localhost"]
    assert 20000 <= int(environment["MASTER_PORT"]) < 32000


def test_mpirun_on_several_hosts_must_be_told_where_rank_0_is() -> None:
    environment = {**MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    with pytest.raises(LayoutError, match=r"mpirun started 4 processes, 2 of them here, and none knows where rank 0 is; add -x MASTER_ADDR=HOST"):
        fill_environment(environment)
    environment["MASTER_ADDR"] = "gpu03"
    fill_environment(environment)
    assert (environment["RANK"], environment["MASTER_ADDR"]) == ("1", "gpu03")


def test_every_task_derives_the_same_port_and_another_job_another() -> None:
    tasks = [dict(STEP, SLURM_PROCID=str(task)) for task in range(8)]
    for task in tasks:
        fill_environment(task)
    other = dict(STEP, SLURM_JOB_ID="4218")
    fill_environment(other)
    assert len({task["MASTER_PORT"] for task in tasks}) == 1
    assert other["MASTER_PORT"] != tasks[0]["MASTER_PORT"]


def test_the_address_srun_was_called_at_is_used_where_no_list_of_hosts_is() -> None:
    environment = {key: value for key, value in STEP.items() if key != "SLURM_JOB_NODELIST"} | {"SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7"}
    fill_environment(environment)
    assert environment["MASTER_ADDR"] == "10.0.0.7"
    del environment["RANK"], environment["MASTER_ADDR"], environment["SLURM_LAUNCH_NODE_IPADDR"]
    with pytest.raises(LayoutError, match="without SLURM_JOB_NODELIST; set MASTER_ADDR"):
        fill_environment(environment)


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "gpu03"},  # the shell of a batch script
        {**STEP, "SLURM_NTASKS": "1"},
        {**STEP, "RANK": "0", "WORLD_SIZE": "2"},  # deepy or torchrun inside a SLURM job
        {},
    ],
)
def test_a_process_that_srun_did_not_start_among_others_is_left_alone(environment: dict[str, str]) -> None:
    before = dict(environment)
    fill_environment(environment)
    assert environment == before


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu03", "gpu03"),
        ("gpu03,gpu07", "gpu03"),
        ("gpu[03-06,9]", "gpu03"),
        ("gpu[7,9-12]-ib,login", "gpu7-ib"),
        ("a-b-1.site", "a-b-1.site"),
    ],
)
def test_the_first_of_slurms_hosts_is_found(hosts: str, first: str) -> None:
    assert first_host(hosts) == first
