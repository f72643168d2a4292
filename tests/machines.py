"""Machines that are handed in as values, for plans of what runs on them."""

from launcher.hardware import Device, Hardware

TOKENS = 50277
"""Entries of 20B's tokenizer."""
GB = 10**9


def gpus(count: int, free: float, name: str = "NVIDIA H200") -> Hardware:
    """GPUs with so many GB free on each."""
    return Hardware("GPU", (Device(name, int(free * GB)),) * count)


def cores(count: int, memory: float = 24) -> Hardware:
    """CPU cores with so many GB of memory together."""
    return Hardware("CPU", (Device("CPU core"),) * count, memory=int(memory * GB))
