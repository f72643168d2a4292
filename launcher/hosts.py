"""Which machines and devices take part: a hostfile, or this machine alone, narrowed by include, exclude, num_nodes and num_gpus."""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_lite.config.sections import LauncherSection
from megatron_lite.errors import ConfigError

LINE = re.compile(r"(\S+)\s+slots\s*=\s*(\d+)")


@dataclass(frozen=True)
class Host:
    """A machine and the numbers of its devices that take part; a device is a GPU, or a slot for a CPU process."""

    name: str
    devices: tuple[int, ...]

    @property
    def is_here(self) -> bool:
        return self.name in {"localhost", "127.0.0.1", "::1", socket.gethostname(), socket.gethostname().partition(".")[0]}


def find_hostfile(option: Path | None, section: LauncherSection, environment: Mapping[str, str] = os.environ) -> Path | None:
    """-H wins over the key hostfile, which wins over DLTS_HOSTFILE. None means this machine alone: no path is looked at unasked."""
    return option or section.hostfile or (Path(path) if (path := environment.get("DLTS_HOSTFILE")) else None)


def find_hosts(hostfile: Path | None, section: LauncherSection, *, devices: int) -> tuple[Host, ...]:
    """The hosts that take part, in order. `devices` is how many this machine has, for when there is no hostfile."""
    hosts = read_hostfile(hostfile) if hostfile else (Host("localhost", tuple(range(devices))),)
    if section.include and section.exclude:
        raise ConfigError("include and exclude are both set; use one of them")
    if section.include:
        hosts = _included(hosts, _filters("include", section.include, hosts))
    if section.exclude:
        hosts = _excluded(hosts, _filters("exclude", section.exclude, hosts))
    if section.num_nodes > 0:
        hosts = _first_hosts(hosts, section.num_nodes)
    if section.num_gpus is not None:
        hosts = tuple(_first_devices(host, section.num_gpus) for host in hosts)
    return hosts


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """The hosts of a file of lines `NAME slots=N`, with # comments."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"the hostfile {path} cannot be read: {why}; check -H, hostfile or DLTS_HOSTFILE") from None
    hosts: dict[str, Host] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = LINE.fullmatch(text)
        if not match or int(match[2]) == 0:
            raise ConfigError(f"{path} line {number} is {text!r}; a line of a hostfile is NAME slots=N, with N of at least 1")
        if match[1] in hosts:
            raise ConfigError(f"{path} line {number} names {match[1]} again; give each host one line with all its slots")
        hosts[match[1]] = Host(match[1], tuple(range(int(match[2]))))
    if not hosts:
        raise ConfigError(f"{path} names no host; write a line NAME slots=N for each")
    return tuple(hosts.values())


def _filters(key: str, text: str, hosts: tuple[Host, ...]) -> dict[str, tuple[int, ...] | None]:
    """host1@host2:0,2 as {host1: None, host2: (0, 2)}; None stands for all devices."""
    known = {host.name: host for host in hosts}
    filters: dict[str, tuple[int, ...] | None] = {}
    for part in text.split("@"):
        name, colon, numbers = (piece.strip() for piece in part.partition(":"))
        if name not in known:
            raise ConfigError(f"{key} names the host {name!r}, which is not among {', '.join(known)}; write it as in host1@host2:0,2")
        if name in filters:
            raise ConfigError(f"{key} names {name} twice; write its devices together, as in {name}:0,2")
        filters[name] = _devices(key, known[name], numbers) if colon else None
    return filters


def _devices(key: str, host: Host, text: str) -> tuple[int, ...]:
    numbers = [number.strip() for number in text.split(",")]
    for number in numbers:
        if not number.isdecimal() or int(number) not in host.devices:
            found = ", ".join(map(str, host.devices))
            raise ConfigError(f"{key} names device {number!r} of {host.name}, which has {found}; write numbers as in {host.name}:0,2")
    return tuple(dict.fromkeys(map(int, numbers)))


def _included(hosts: tuple[Host, ...], filters: Mapping[str, tuple[int, ...] | None]) -> tuple[Host, ...]:
    return tuple(replace(host, devices=filters[host.name] or host.devices) for host in hosts if host.name in filters)


def _excluded(hosts: tuple[Host, ...], filters: Mapping[str, tuple[int, ...] | None]) -> tuple[Host, ...]:
    left = []
    for host in hosts:
        gone = filters.get(host.name, ())
        devices = () if gone is None else tuple(device for device in host.devices if device not in gone)
        if devices:
            left.append(replace(host, devices=devices))
    if not left:
        raise ConfigError("exclude leaves no device on any host; exclude fewer")
    return tuple(left)


def _first_hosts(hosts: tuple[Host, ...], count: int) -> tuple[Host, ...]:
    if count > len(hosts):
        raise ConfigError(f"num_nodes is {count}, but there are {len(hosts)} hosts; ask for fewer, or name more in the hostfile")
    return hosts[:count]


def _first_devices(host: Host, count: int) -> Host:
    if count > len(host.devices):
        raise ConfigError(f"num_gpus is {count}, but {host.name} has {len(host.devices)}; ask for fewer")
    return replace(host, devices=host.devices[:count])
