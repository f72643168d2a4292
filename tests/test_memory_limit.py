"""gpu-memory-limit: what a process may take of its GPU, in the plan and in the process."""

from pathlib import Path

import pytest
import torch
from torch import nn

from launcher.command import Command
from launcher.hardware import Device, Hardware
from launcher.plan import Plan
from launcher.planner import plan_generation
from launcher.site import find_site
from launcher.train_plan import plan_training
from megatron_lite.config.load import load_config
from megatron_lite.errors import ConfigError, FitError
from megatron_lite.parallel.budget import CAPTURED, free_memory, hold_to
from megatron_lite.parallel.layers import ColumnLinear
from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mesh import Axis
from megatron_lite.parallel.quantized import quantize
from tests.machines import GB

pytestmark = pytest.mark.usefixtures("at_root")
H200S = Hardware("GPU", (Device("NVIDIA H200", 150 * GB),) * 4)


def fitted(name: str, machine: Hardware, **overrides: str) -> Plan:
    config = load_config([Path(f"configs/{name}.yml")], overrides)
    return plan_generation(config, find_site(config, None, machine).hardware, 50257)


@pytest.mark.parametrize(("text", "size"), [("10GB", 10 * GB), ("10", 10 * GB), ("7.5 gb", 7.5 * GB), ("10GiB", 10 * 2**30), ("null", None)])
def test_the_limit_is_said_in_gigabytes(text: str, size: float | None) -> None:
    assert load_config([Path("configs/tiny.yml")], {"gpu_memory_limit": text}).launcher.gpu_memory_limit == size


@pytest.mark.parametrize("text", ["lots", "0GB", "-1", "10MB", "true", "[1]"])
def test_what_is_no_amount_of_memory_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="gpu_memory_limit needs gigabytes, such as 10GB, found"):
        load_config([Path("configs/tiny.yml")], {"gpu_memory_limit": text})


@pytest.mark.parametrize(("name", "layout"), [("gpt-j-4x10GB", Layout(pp=4)), ("gpt-j-2x10GB", Layout(tp=2))])
def test_gpt_j_is_planned_within_10_gb_on_larger_gpus_too(name: str, layout: Layout) -> None:
    plan = fitted(name, H200S)
    assert plan.layout == layout
    assert plan.largest <= 10 * GB
    assert plan.rows >= 4


def test_three_small_cards_make_a_pipeline_because_16_heads_are_not_to_be_cut_in_three() -> None:
    assert fitted("gpt-j-4x10GB", Hardware("GPU", (Device("NVIDIA GeForce RTX 3080", 10 * GB),) * 3)).layout == Layout(pp=3)


def test_what_the_limit_does_not_allow_is_refused_whatever_is_free() -> None:
    with pytest.raises(FitError) as error:
        fitted("gpt-j-2x10GB", H200S, gpu_memory_limit="5GB", pipe_parallel_size="1", model_parallel_size="2", generation_batch_size="1")
    assert str(error.value) == (
        "configs/gpt-j-2x10GB.yml with pipe 1 x model 2 and 1 row at once needs 7.7 GB in a process"
        " (weights 6.1 GB, KV cache 470 MB, activations 143 MB, CUDA itself 1.1 GB); gpu-memory-limit allows 5.0 GB;"
        " here would fit: pipe 1 x model 4 (4.4 GB a process), pipe 2 x model 2 (4.5 GB a process), pipe 4 x model 1 (4.8 GB a process)"
    )


def test_the_limit_holds_for_training_and_for_cpu_processes() -> None:
    config = load_config([Path("configs/tiny.yml"), Path("configs/finetune.yml")], {"gpu_memory_limit": "0.3GB"})
    cores = find_site(config, None, Hardware("CPU", (Device("CPU core"),) * 2, memory=24 * GB)).hardware
    with pytest.raises(FitError, match=r"needs 362 MB in a process \(weights 8 MB, .*, the process itself 268 MB\); gpu-memory-limit allows 300 MB; "):
        plan_training(config, cores, 4096)


def test_a_cpu_knows_no_budget() -> None:
    hold_to(10 * GB, torch.device("cpu"))


@pytest.mark.gpu
def test_a_process_cannot_take_more_than_its_budget() -> None:
    device = torch.device("cuda", 0)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)  # what other tests of this process hold
    most = 2 * 2**30 + CAPTURED
    try:
        hold_to(before + 3 * 2**30, device)
        assert most - 2**20 < free_memory(device) <= most
        kept = torch.empty(2**30, dtype=torch.uint8, device=device)
        assert free_memory(device) <= most - 2**30
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2**30 + 2**28, dtype=torch.uint8, device=device)
        del kept
        torch.cuda.empty_cache()
        hold_to(before + 10 * 2**30, device)
        assert free_memory(device) <= most, "a larger budget does not undo a smaller one"
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


@pytest.mark.gpu
def test_rounding_layer_after_layer_leaves_no_holes_in_the_memory_of_a_gpu() -> None:
    """The matrices of GPT-J: a place of 20 MiB, as the allocator makes them for smaller things, would hold one of 16, and nothing else."""
    device, axis = torch.device("cuda", 0), Axis("tp")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    kept = []
    for _ in range(8):
        layer = nn.ModuleList([ColumnLinear(4096, outputs, tp=axis) for outputs in (12288, 4096, 16384)]).half().to(device).requires_grad_(False)
        quantize(layer, axis)
        kept.append(layer)
        del layer
    torch.cuda.empty_cache()
    lost = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) - before
    assert lost < 8 << 20, f"{lost / 2**20:.0f} MiB"


def test_words_of_a_command_hand_the_limit_on_to_the_processes() -> None:
    command = Command("generate", (Path("configs/tiny.yml"),), {"gpu_memory_limit": "10GB"}, None, False)
    assert command.words() == ["configs/tiny.yml", "gpu_memory_limit=10GB"]
