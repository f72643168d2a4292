"""Cards that cannot copy into each other's memory exchange through the host's, and one line says so."""

import pytest

from megatron_lite.parallel.reach import settle_reach


def test_where_no_pair_can_copy_nccl_is_told_to_use_the_memory_of_the_host() -> None:
    environment: dict[str, str] = {}
    line = settle_reach(3, lambda one, other: False, environment)
    assert environment == {"NCCL_P2P_DISABLE": "1"}
    assert line == "the 3 GPUs cannot copy into each other's memory: what they exchange goes through the host's (NCCL_P2P_DISABLE=1)"


def test_where_some_pairs_can_they_go_on_doing_so() -> None:
    environment: dict[str, str] = {}
    line = settle_reach(4, lambda one, other: one // 2 == other // 2, environment)
    assert environment == {}
    assert line == "GPU 0 cannot copy into the memory of GPU 2 (8 of 12 ways): what these exchange goes through the host's"


@pytest.mark.parametrize(("count", "environment"), [(4, {}), (1, {}), (0, {}), (2, {"NCCL_P2P_DISABLE": "0"})])
def test_nothing_is_said_where_all_can_copy_or_somebody_has_decided(count: int, environment: dict[str, str]) -> None:
    before = dict(environment)
    assert settle_reach(count, lambda one, other: not environment, environment) is None
    assert environment == before
