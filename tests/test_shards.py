"""The rules of cutting, between every pair of cuts: what is stored for one number of ranks serves any other number exactly."""

from itertools import product

import pytest
import torch
from torch import Tensor

from megatron_lite.parallel.shards import Partial, RankLocal, Replicate, Rule, Split, SplitParts, take

CUTS = (1, 2, 3, 4, 8)
PAIRS = list(product(CUTS, CUTS))
CUTTING: dict[str, Rule] = {
    "rows": Split(0),
    "columns": Split(1),
    "rows of a vocabulary": Split(0, padded=True),
    "two stacked matrices": SplitParts(0, (1, 1)),
    "grouped heads": SplitParts(0, (4, 1, 1)),
    "stacked columns": SplitParts(1, (1, 3)),
}


def numbers(*shape: int) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


@pytest.mark.parametrize(("stored", "wanted"), PAIRS)
@pytest.mark.parametrize("name", CUTTING)
def test_a_cut_made_from_another_cut_is_the_cut_of_the_whole(name: str, stored: int, wanted: int) -> None:
    rule, full = CUTTING[name], numbers(144, 96)
    shards = rule.split(full, stored)
    found = [take(rule, shards, index, wanted) for index in range(wanted)]
    assert all(map(torch.equal, found, rule.split(full, wanted)))
    assert torch.equal(rule.merge(found), full)
    assert rule.whole(found[0].shape, wanted) == tuple(full.shape)


def test_stacked_matrices_are_cut_each_by_itself() -> None:
    first, second = SplitParts(0, (2, 1)).split(torch.tensor([0.0, 1, 2, 3, 10, 11]), 2)
    assert first.tolist() == [0, 1, 10]
    assert second.tolist() == [2, 3, 11]


@pytest.mark.parametrize(("stored", "wanted"), PAIRS)
def test_a_vocabulary_that_does_not_divide_is_filled_up_with_zeros_at_its_end_only(stored: int, wanted: int) -> None:
    rule, full = Split(0, padded=True), numbers(157, 4) + 1
    found = rule.merge([take(rule, rule.split(full, stored), index, wanted) for index in range(wanted)])
    assert torch.equal(found[:157], full)
    assert not found[157:].any()
    assert len(found) % wanted == 0


@pytest.mark.parametrize("rule", [Split(0), Split(1), SplitParts(0, (1, 1)), Replicate(), RankLocal(), Partial()], ids=repr)
def test_the_same_cut_is_the_stored_shard_itself(rule: Rule) -> None:
    shards = [torch.randn(8, 8, dtype=torch.float16) for _ in range(4)]
    assert all(take(rule, shards, index, 4) is shards[index] for index in range(4))


@pytest.mark.parametrize(("stored", "wanted"), [(2, 4), (1, 8), (4, 8), (8, 8)])
def test_finer_cuts_are_views_of_the_stored_shards_and_touch_nothing_else(stored: int, wanted: int) -> None:
    shards = Split(0).split(numbers(16, 4), stored)
    for index in range(wanted):
        shard = shards[index * stored // wanted]
        assert take(Split(0), shards, index, wanted).untyped_storage().data_ptr() == shard.untyped_storage().data_ptr()


@pytest.mark.parametrize(("stored", "wanted"), PAIRS)
@pytest.mark.parametrize("rule", [Replicate(), RankLocal()], ids=repr)
def test_equal_copies_stay_one_copy_at_every_cut(rule: Rule, stored: int, wanted: int) -> None:
    copy = torch.randn(6, dtype=torch.float16)
    assert all(torch.equal(take(rule, [copy.clone() for _ in range(stored)], index, wanted), copy) for index in range(wanted))


@pytest.mark.parametrize(("stored", "wanted"), PAIRS)
def test_drifted_norms_stay_with_the_columns_of_their_rank(stored: int, wanted: int) -> None:
    """Column by column: with 24 columns, the copy that each of them meets is that of the rank which had it."""
    shards = [torch.full((5,), float(rank)) for rank in range(stored)]
    met: list[float] = []
    for index in range(wanted):
        copies = take(RankLocal(), shards, index, wanted)
        copies = copies if copies.dim() == 2 else copies[None]
        columns = 24 // wanted
        met += [float(copies[column * len(copies) // columns, 0]) for column in range(columns)]
    assert met == [float(column * stored // 24) for column in range(24)]


def test_drifted_copies_that_have_to_become_one_are_averaged_in_fp32() -> None:
    near_the_limit = [torch.tensor([61440.0, 1.0], dtype=torch.float16), torch.tensor([40960.0, 2.0], dtype=torch.float16)]
    for found in (Replicate().merge(near_the_limit), RankLocal().merge(near_the_limit), take(Replicate(), near_the_limit, 0, 1)):
        assert found.tolist() == [51200.0, 1.5]
        assert found.dtype == torch.float16


@pytest.mark.parametrize("wanted", [2, 4, 8])
def test_drifted_copies_are_told_apart_as_long_as_ranks_are_only_split(wanted: int) -> None:
    shards = [torch.zeros(3), torch.ones(3)]
    assert [float(take(Replicate(), shards, index, wanted)[0]) for index in range(wanted)] == [0.0] * (wanted // 2) + [1.0] * (wanted // 2)


@pytest.mark.parametrize(("stored", "wanted"), PAIRS)
def test_terms_of_a_sum_keep_their_sum(stored: int, wanted: int) -> None:
    shards = [torch.randint(-50, 50, (7,), generator=torch.Generator().manual_seed(rank)).half() for rank in range(stored)]
    found = [take(Partial(), shards, index, wanted) for index in range(wanted)]
    assert torch.equal(torch.stack(found).sum(0), torch.stack(shards).sum(0))


@pytest.mark.parametrize(("stored", "wanted"), [(stored, wanted) for stored, wanted in PAIRS if wanted % stored == 0])
def test_terms_are_never_divided_but_given_to_one_rank(stored: int, wanted: int) -> None:
    shards = [torch.randn(7).half() for _ in range(stored)]
    found = [take(Partial(), shards, index, wanted) for index in range(wanted)]
    assert all(torch.equal(found[rank * wanted // stored], shard) for rank, shard in enumerate(shards))
    assert sum(bool(term.any()) for term in found) == stored


def test_terms_are_added_in_fp32() -> None:
    terms = [torch.tensor([2048.0]).half(), torch.tensor([1.0]).half(), torch.tensor([1.0]).half()]  # in fp16 2048 + 1 is 2048
    assert Partial().merge(terms).tolist() == [2050.0]
