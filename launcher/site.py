"""Where a run takes place: the hosts that take part and the devices they have together."""

from dataclasses import dataclass, replace
from pathlib import Path

from launcher.hardware import Device, Hardware, find_hardware
from launcher.hosts import Host, find_hostfile, find_hosts
from megatron_lite.config.sections import RunConfig


@dataclass(frozen=True)
class Site:
    """Hosts, and their devices in the order of ranks. Other hosts are taken to be like this one, which they can be asked about only later."""

    hosts: tuple[Host, ...]
    hardware: Hardware
    is_local: bool


def find_site(config: RunConfig, hostfile: Path | None, machine: Hardware | None = None) -> Site:
    """The site that hostfile and configuration describe. `machine` is this machine's hardware, where that is known already."""
    machine = replace(machine or find_hardware(), limit=config.launcher.gpu_memory_limit)
    path = find_hostfile(hostfile, config.launcher)
    hosts = find_hosts(path, config.launcher, devices=len(machine))
    if len(hosts) == 1 and hosts[0].is_here and not config.launcher.force_multi:
        return Site(hosts, machine.only(hosts[0].devices, where=str(path or "include")), is_local=True)
    slots = sum(len(host.devices) for host in hosts)
    if machine.kind == "GPU":
        smallest = min(machine.devices, key=lambda device: device.free or 0)
        return Site(hosts, replace(machine, devices=(smallest,) * slots), is_local=False)
    return Site(hosts, Hardware("slot", (Device("slot"),) * slots, limit=machine.limit), is_local=False)
