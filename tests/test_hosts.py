"""Hostfiles and the filters that narrow them."""

import socket
from pathlib import Path

import pytest

from launcher.hosts import Host, find_hostfile, find_hosts, read_hostfile
from launcher.multinode import share
from megatron_lite.config.sections import LauncherSection
from megatron_lite.errors import ConfigError

TWO = "# our machines\nworker-1 slots=4\n\n  worker-2 slots=2  # older\n"


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    path = tmp_path / "hosts"
    path.write_text(TWO)
    return path


def test_a_hostfile_lists_hosts_in_order_with_their_slots(hostfile: Path) -> None:
    assert read_hostfile(hostfile) == (Host("worker-1", (0, 1, 2, 3)), Host("worker-2", (0, 1)))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("worker-1 slots=4\nworker-2 slot=4\n", "line 2 is 'worker-2 slot=4'; a line of a hostfile is NAME slots=N, with N of at least 1"),
        ("worker-1\n", "line 1 is 'worker-1'; a line"),
        ("worker-1 slots=0\n", "line 1 is 'worker-1 slots=0'; a line"),
        ("a slots=4\n\na slots=2\n", "line 3 names a again; give each host one line with all its slots"),
        ("# nobody\n", "names no host; write a line NAME slots=N for each"),
    ],
)
def test_a_line_that_is_no_host_is_told_with_its_number(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_hostfile(path)
    assert str(error.value).startswith(f"{path} {sentence}")


def test_a_missing_hostfile_is_an_error_and_not_a_warning(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"hostfile .*nowhere cannot be read: No such file or directory; check -H, hostfile or DLTS_HOSTFILE"):
        read_hostfile(tmp_path / "nowhere")


def test_the_option_wins_over_the_key_and_the_key_over_the_environment() -> None:
    keyed, plain, env = LauncherSection.model_validate({"hostfile": "key"}), LauncherSection.model_validate({}), {"DLTS_HOSTFILE": "env"}
    assert find_hostfile(Path("option"), keyed, env) == Path("option")
    assert find_hostfile(None, keyed, env) == Path("key")
    assert find_hostfile(None, plain, env) == Path("env")
    assert find_hostfile(None, plain, {}) is None


def test_without_a_hostfile_this_machine_takes_part_with_what_it_has() -> None:
    (host,) = find_hosts(None, LauncherSection.model_validate({}), devices=3)
    assert host == Host("localhost", (0, 1, 2))
    assert host.is_here


def test_this_machine_is_known_by_its_name() -> None:
    assert Host(socket.gethostname(), (0,)).is_here
    assert not Host("worker-1.example", (0,)).is_here


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"include": "worker-2"}, {"worker-2": (0, 1)}),
        ({"include": "worker-1:3,1@worker-2"}, {"worker-1": (3, 1), "worker-2": (0, 1)}),
        ({"exclude": "worker-2"}, {"worker-1": (0, 1, 2, 3)}),
        ({"exclude": "worker-1:0,2"}, {"worker-1": (1, 3), "worker-2": (0, 1)}),
        ({"exclude": "worker-2:0,1"}, {"worker-1": (0, 1, 2, 3)}),
        ({"num_nodes": 1}, {"worker-1": (0, 1, 2, 3)}),
        ({"num_gpus": 2}, {"worker-1": (0, 1), "worker-2": (0, 1)}),
        ({"num_nodes": 1, "num_gpus": 1}, {"worker-1": (0,)}),
    ],
)
def test_filters_narrow_the_hosts(hostfile: Path, keys: dict[str, object], expected: dict[str, tuple[int, ...]]) -> None:
    hosts = find_hosts(hostfile, LauncherSection.model_validate(keys), devices=1)
    assert {host.name: host.devices for host in hosts} == expected


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"include": "worker-3"}, "include names the host 'worker-3', which is not among worker-1, worker-2; write it as in host1@host2:0,2"),
        ({"exclude": "worker-2:5"}, "exclude names device '5' of worker-2, which has 0, 1; write numbers as in worker-2:0,2"),
        ({"include": "worker-2:x"}, "include names device 'x' of worker-2"),
        ({"include": "worker-2:0@worker-2:1"}, "include names worker-2 twice; write its devices together, as in worker-2:0,2"),
        ({"include": "worker-1", "exclude": "worker-2"}, "include and exclude are both set; use one of them"),
        ({"exclude": "worker-1@worker-2"}, "exclude leaves no device on any host; exclude fewer"),
        ({"num_nodes": 3}, "num_nodes is 3, but there are 2 hosts; ask for fewer, or name more in the hostfile"),
        ({"num_gpus": 3}, "num_gpus is 3, but worker-2 has 2; ask for fewer"),
    ],
)
def test_a_filter_that_matches_nothing_is_an_error(hostfile: Path, keys: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        find_hosts(hostfile, LauncherSection.model_validate(keys), devices=1)
    assert str(error.value).startswith(sentence)


def test_the_first_devices_are_shared_out_in_the_order_of_the_hosts() -> None:
    hosts = (Host("a", (0, 1, 2)), Host("b", (3, 4)), Host("c", (0,)))
    assert share(hosts, 6) == hosts
    assert share(hosts, 4) == (Host("a", (0, 1, 2)), Host("b", (3,)))
    assert share(hosts, 2) == (Host("a", (0, 1)),)
