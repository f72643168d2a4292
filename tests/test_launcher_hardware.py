"""What the launcher finds out about a machine, asked of a stand-in for nvidia-smi that answers like the real one."""

import os
from importlib.metadata import version
from pathlib import Path

import pytest

from launcher.hardware import Device, Hardware, as_planned, find_hardware, visible_gpus
from megatron_lite.errors import LayoutError

LISTING = "0, GPU-aaaa-1, NVIDIA H100 80GB HBM3, 81000\n1, GPU-bbbb-2, NVIDIA H100 80GB HBM3, 40000\n2, GPU-cccc-3, NVIDIA GB10, [N/A]\n"
H100, HALF, UNKNOWN = (
    Device("NVIDIA H100 80GB HBM3", 81000 << 20, "GPU-aaaa-1"),
    Device("NVIDIA H100 80GB HBM3", 40000 << 20, "GPU-bbbb-2"),
    Device("NVIDIA GB10", None, "GPU-cccc-3"),
)


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Puts a program called nvidia-smi first on the path."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, (H100, HALF, UNKNOWN)),
        ("1,0", (HALF, H100)),
        ("", ()),
        ("-1", ()),
        ("2", (UNKNOWN,)),
        ("GPU-bbbb", (HALF,)),
        ("0,7,1", (H100,)),
        ("MIG-1234", (Device("part of a GPU (MIG)", None, "MIG-1234"),)),
    ],
)
def test_cuda_visible_devices_is_honoured_as_cuda_does(visible: str | None, expected: tuple[Device, ...]) -> None:
    assert visible_gpus(LISTING, visible) == expected


def test_gpus_are_listed_with_name_and_free_memory_if_torch_can_use_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, f"cat <<END\n{LISTING}END")
    hardware = find_hardware({})
    if version("torch").endswith("+cpu"):
        assert hardware.kind == "CPU"
        assert hardware.remark == "3 GPUs found, but the installed torch is a CPU build; install torch for CUDA to use them"
    else:
        assert hardware.devices == (H100, HALF, UNKNOWN)
        assert hardware.found == "3 GPUs found"


def test_gpus_that_differ_keep_the_plans_order_where_cuda_would_count_otherwise() -> None:
    def shown(listing: str, **environment: str) -> dict[str, str]:
        return as_planned(visible_gpus(listing, environment.get("CUDA_VISIBLE_DEVICES")), listing, environment).environment()

    alike = LISTING.partition("\n2")[0]
    assert shown(LISTING) == shown(LISTING, CUDA_DEVICE_ORDER="PCI_BUS_ID", CUDA_VISIBLE_DEVICES="1,0") == {}
    assert shown(alike, CUDA_DEVICE_ORDER="FASTEST_FIRST", CUDA_VISIBLE_DEVICES="1") == {}
    assert shown(LISTING, CUDA_DEVICE_ORDER="FASTEST_FIRST") == {"CUDA_VISIBLE_DEVICES": "GPU-aaaa-1,GPU-bbbb-2,GPU-cccc-3"}
    with pytest.raises(
        LayoutError, match=r"CUDA_DEVICE_ORDER=FASTEST_FIRST counts .* CUDA_VISIBLE_DEVICES=0,1 may mean others .* CUDA_DEVICE_ORDER=PCI_BUS_ID"
    ):
        shown(LISTING, CUDA_DEVICE_ORDER="FASTEST_FIRST", CUDA_VISIBLE_DEVICES="0,1")


def test_a_driver_that_does_not_work_is_remarked_and_cores_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    hardware = find_hardware({})
    assert hardware.kind == "CPU"
    assert hardware.remark == "nvidia-smi says: Failed to initialize NVML: Driver/library version mismatch; no GPU is used"


def test_without_gpus_there_is_a_process_for_every_core_and_memory_for_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # where no nvidia-smi is
    hardware = find_hardware({})
    assert len(hardware) == len(os.sched_getaffinity(0))
    assert hardware.memory is not None
    assert 10**8 < hardware.memory <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert hardware.remark == ""


def test_chosen_gpus_are_shown_to_the_processes_by_their_names() -> None:
    chosen = Hardware("GPU", (H100, HALF, UNKNOWN)).only([2, 0], where="include")
    assert chosen.environment() == {"CUDA_VISIBLE_DEVICES": "GPU-cccc-3,GPU-aaaa-1"}
    assert Hardware("CPU", (Device("CPU core"),)).only([0, 1, 2], where="hosts").environment() == {}
    assert len(Hardware("CPU", (Device("CPU core"),)).only([0, 1, 2], where="hosts")) == 3
    with pytest.raises(LayoutError) as error:
        Hardware("GPU", (H100, HALF)).only([1, 4], where="the hostfile")
    assert str(error.value) == "the hostfile asks for device 4 of this machine, counted from 0; 2 GPUs found, name fewer"
