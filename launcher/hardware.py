"""What this machine has to run processes on: GPUs as nvidia-smi lists them, or else its cores. Asks without torch, which takes seconds to import."""

import os
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from megatron_lite.errors import LayoutError

Kind = Literal["GPU", "CPU", "slot", "process"]
FOUND = {
    "GPU": ("GPU found", "GPUs found"),
    "CPU": ("CPU core found", "CPU cores found"),
    "slot": ("slot in the hostfile", "slots in the hostfile"),
    "process": ("was started", "were started"),
}
MIB = 1 << 20
BUS = "PCI_BUS_ID"
"""CUDA_DEVICE_ORDER as nvidia-smi counts, whose list plans are made of. CUDA by itself puts the fastest first."""
QUERY = ("nvidia-smi", "--query-gpu=index,uuid,name,memory.free", "--format=csv,noheader,nounits")


@dataclass(frozen=True)
class Device:
    """A GPU, or a core or slot for one process. `free` is its own memory in bytes; None where it has none or nobody knows."""

    name: str
    free: int | None = None
    uuid: str = ""


@dataclass(frozen=True)
class Hardware:
    """Devices for one process each. `memory` is what CPU processes share, in bytes; `remark` says why there is less than one might expect.

    `limit` is what a process may take (gpu-memory-limit), whatever is free. `is_choice` where these are not all the devices that a process would see by itself.
    """

    kind: Kind
    devices: tuple[Device, ...]
    memory: int | None = None
    remark: str = ""
    is_choice: bool = False
    limit: int | None = None

    def __len__(self) -> int:
        return len(self.devices)

    @property
    def found(self) -> str:
        one, many = FOUND[self.kind]
        return f"{len(self)} {one if len(self) == 1 else many}"

    @property
    def processes(self) -> str:
        """What as many of a layout are called."""
        return "GPUs" if self.kind == "GPU" else "processes"

    def environment(self) -> dict[str, str]:
        """What shows processes these GPUs alone."""
        return {"CUDA_VISIBLE_DEVICES": ",".join(device.uuid for device in self.devices)} if self.is_choice else {}

    def only(self, numbers: Iterable[int], *, where: str) -> "Hardware":
        """The devices with these numbers. CPU processes are not bound to cores: of them any number may be asked for."""
        numbers = tuple(numbers)
        if numbers == tuple(range(len(self))):
            return self
        if self.kind == "CPU":
            return replace(self, devices=self.devices[:1] * len(numbers))
        if max(numbers) >= len(self):
            raise LayoutError(f"{where} asks for device {max(numbers)} of this machine, counted from 0; {self.found}, name fewer")
        return replace(self, devices=tuple(self.devices[number] for number in numbers), is_choice=True)


def find_hardware(environment: Mapping[str, str] = os.environ) -> Hardware:
    """The visible GPUs of this machine if torch can use them, else its cores."""
    listing, remark = _gpu_listing()
    gpus = visible_gpus(listing, environment.get("CUDA_VISIBLE_DEVICES"))
    if gpus and not _torch_has_cuda():
        gpus, remark = (), f"{len(gpus)} GPUs found, but the installed torch is a CPU build; install torch for CUDA to use them"
    if gpus:
        return as_planned(gpus, listing, environment)
    return Hardware("CPU", (Device("CPU core"),) * len(os.sched_getaffinity(0)), memory=_available_memory(), remark=remark)


def as_planned(gpus: tuple[Device, ...], listing: str, environment: Mapping[str, str]) -> Hardware:
    """These GPUs of nvidia-smi's listing, which processes are to see in the same order although somebody asks CUDA to count GPUs that differ in another."""
    order, visible = environment.get("CUDA_DEVICE_ORDER", BUS), environment.get("CUDA_VISIBLE_DEVICES", "")
    is_reordered = order != BUS and len({gpu.name for gpu in visible_gpus(listing, None)}) > 1
    if is_reordered and any(word.strip().isdecimal() for word in visible.split(",")):
        raise LayoutError(
            f"CUDA_DEVICE_ORDER={order} counts GPUs that differ otherwise than nvidia-smi, so that CUDA_VISIBLE_DEVICES={visible} may mean others than are "
            f"planned for; set CUDA_DEVICE_ORDER={BUS}, or name the GPUs by their UUIDs"
        )
    return Hardware("GPU", gpus, is_choice=is_reordered)


def _gpu_listing() -> tuple[str, str]:
    """What nvidia-smi lists, and a remark if it is there but does not work."""
    try:
        answer = subprocess.run(QUERY, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        return "", ""
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"nvidia-smi does not answer ({error}); no GPU is used"
    if answer.returncode:
        return "", f"nvidia-smi says: {(answer.stdout + answer.stderr).strip().splitlines()[0]}; no GPU is used"
    return answer.stdout, ""


def visible_gpus(listing: str, visible: str | None) -> tuple[Device, ...]:
    """The GPUs of nvidia-smi's listing that CUDA_VISIBLE_DEVICES lets through, in its order: numbers or beginnings of UUIDs, up to the first unknown one."""
    gpus: dict[str, Device] = {}
    for line in listing.splitlines():
        number, uuid, name, free = (cell.strip() for cell in line.split(","))
        gpus[number] = Device(name, int(free) * MIB if free.isdecimal() else None, uuid)
    if visible is None:
        return tuple(gpus.values())
    chosen: list[Device] = []
    for word in (part.strip() for part in visible.split(",")):
        match = gpus.get(word) or next((gpu for gpu in gpus.values() if word and gpu.uuid.startswith(word)), None)
        if word.startswith("MIG-"):
            match = Device("part of a GPU (MIG)", None, word)
        if match is None:
            break
        chosen.append(match)
    return tuple(chosen)


def _torch_has_cuda() -> bool:
    try:
        return not version("torch").endswith("+cpu")
    except PackageNotFoundError:
        return False


def _available_memory() -> int | None:
    """Bytes that new processes can take without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
