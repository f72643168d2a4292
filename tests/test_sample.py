"""The rules of sampling, one by one and in their order, on numbers that can be followed by hand."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_lite.inference.request import Request, Sampling
from megatron_lite.inference.rows import uniform_numbers
from megatron_lite.inference.sample import Rules, choose, draw, keep_top_k, keep_top_p

CPU = torch.device("cpu")


def of(*probabilities: float) -> Tensor:
    """Logits of one row with these probabilities."""
    return torch.tensor([probabilities]).log()


def kept(logits: Tensor) -> list[list[int]]:
    """Which tokens of each row are left."""
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


def rules(*settings: Sampling, steps: int = 1, first: int = 0) -> Rules:
    requests = [Request(first + number, "", (1,), sampling) for number, sampling in enumerate(settings)]
    draws = np.array([uniform_numbers(request, steps)[steps - 1] for request in requests])
    return Rules.of(requests, device=CPU).at(torch.from_numpy(draws))


def chosen(logits: Tensor, sampling: Sampling, times: int = 2000) -> Tensor:
    """What many prompts with the same logits choose."""
    return choose(logits.expand(times, -1), rules(*[sampling] * times))


def share(tokens: Tensor, size: int) -> list[float]:
    return (torch.bincount(tokens, minlength=size) / len(tokens)).tolist()


def test_top_k_keeps_the_k_likeliest_and_zero_keeps_all() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0, 3.0]] * 4)
    assert kept(keep_top_k(logits, torch.tensor([1, 2, 0, 9]), most=9)) == [[1], [1, 3], [0, 1, 2, 3], [0, 1, 2, 3]]


def test_ties_with_the_k_th_are_kept() -> None:
    logits = torch.tensor([[5.0, 3.0, 3.0, 3.0, 1.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
    assert kept(keep_top_k(logits, torch.tensor([2, 1]), most=2)) == [[0, 1, 2, 3], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("top_p", "left"),
    [
        (0.0, [0, 1, 2, 3]),
        (0.1, [2]),  # the likeliest stays, however small top_p
        (0.5, [2]),
        (0.51, [0, 2]),  # the one that crosses the threshold stays
        (0.75, [0, 2]),
        (0.8, [0, 2, 3]),
        (0.999, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_top_p_keeps_the_likeliest_until_their_sum_reaches_it(top_p: float, left: list[int]) -> None:
    assert kept(keep_top_p(of(0.25, 0.0625, 0.5, 0.1875), torch.tensor([top_p]))) == [left]


def test_top_p_of_one_drops_nothing_even_where_sums_are_rounded() -> None:
    logits = torch.cat([torch.zeros(1, 1), torch.full((1, 50_000), -40.0)], 1)
    assert len(kept(keep_top_p(logits, torch.tensor([1.0])))[0]) == 50_001


def test_top_p_looks_at_what_top_k_left_and_both_at_what_temperature_made() -> None:
    logits = of(0.4, 0.3, 0.2, 0.1)
    # of the two likeliest the first has 4/7 = 0.57 of the probability, which 0.5 is content with; of all four it has 0.4 only
    assert set(chosen(logits, Sampling(temperature=1, top_k=2, top_p=0.5)).tolist()) == {0}
    assert set(chosen(logits, Sampling(temperature=1, top_p=0.5)).tolist()) == {0, 1}
    # at temperature 0.5 probabilities are squared: 0.53 0.3 0.13 0.03
    assert set(chosen(logits, Sampling(temperature=0.5, top_p=0.5)).tolist()) == {0}
    assert set(chosen(logits, Sampling(temperature=2.0, top_p=0.5)).tolist()) == {0, 1}


def test_what_is_kept_keeps_its_proportions() -> None:
    found = share(chosen(of(0.4, 0.3, 0.2, 0.1), Sampling(temperature=1, top_k=2), times=20_000), 4)
    assert found == pytest.approx([4 / 7, 3 / 7, 0, 0], abs=0.01)


@pytest.mark.parametrize("other", [Sampling(top_k=5), Sampling(top_p=0.5), Sampling(top_k=5, top_p=0.5), Sampling()], ids=str)
def test_temperature_zero_is_greedy_whatever_else_is_set(other: Sampling) -> None:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(choose(logits, rules(*[other] * 6)), logits.argmax(-1))


def test_rows_are_sampled_by_their_own_settings() -> None:
    logits = of(0.4, 0.3, 0.2, 0.1).expand(4000, -1)
    settings = [Sampling(), Sampling(temperature=1, top_k=2), Sampling(temperature=1, top_p=0.75), Sampling(temperature=1)] * 1000
    tokens = choose(logits, rules(*settings))
    assert [set(tokens[row::4].tolist()) for row in range(4)] == [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}]


def test_draws_follow_the_softmax() -> None:
    """Chi-square with 11 degrees of freedom: above 31.3 in one of a thousand experiments."""
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(1)) * 1.5
    expected = logits.double().softmax(-1)[0] * 40_000
    counts = torch.bincount(chosen(logits, Sampling(temperature=1.0), times=40_000), minlength=12)
    assert float(((counts - expected) ** 2 / expected).sum()) < 31.3


def test_draws_at_even_distances_meet_every_token_as_often_as_it_is_likely() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(2)) * 2
    uniform = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    counts = torch.bincount(draw(logits.expand(10_000, -1), uniform), minlength=50)
    assert float((counts - logits.double().softmax(-1)[0] * 10_000).abs().max()) <= 1.0


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_extreme_draws_meet_the_first_and_the_last_possible_token(uniform: float) -> None:
    logits = torch.tensor([[-torch.inf, -torch.inf, 1.0, 0.3, 2.0, -torch.inf, -torch.inf]])
    assert draw(logits, torch.tensor([uniform], dtype=torch.float64)).tolist() == [2 if uniform == 0 else 4]


def test_draws_depend_on_seed_and_prompt_only() -> None:
    one = [rules(Sampling(seed=7), Sampling(seed=7), steps=step).draws for step in range(1, 6)]
    assert [float(rules(Sampling(seed=7), steps=step, first=1).draws[0]) for step in range(1, 6)] == [float(two[1]) for two in one]
    assert all(float(two[0]) != float(two[1]) for two in one)
    assert not torch.equal(rules(Sampling(seed=8), steps=5).draws, one[4][:1])


@pytest.mark.parametrize("seed", [-1, 0, 2**70])
def test_any_whole_number_is_a_seed(seed: int) -> None:
    assert 0 <= float(rules(Sampling(seed=seed)).draws) < 1


def test_settings_beyond_all_bounds_mean_what_they_say() -> None:
    logits = torch.tensor([[3.0, 60000.0, 59000.0, -torch.inf]])
    assert set(chosen(logits, Sampling(temperature=1e-300)).tolist()) == {1}
    assert set(chosen(logits, Sampling(temperature=1e-38)).tolist()) == {1}
    assert set(chosen(logits, Sampling(temperature=1e-38, top_k=10**30, top_p=0.99)).tolist()) == {1}
    assert share(chosen(logits, Sampling(temperature=1e300), times=9000), 4) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0], abs=0.02)


def test_a_batch_that_is_greedy_throughout_draws_nothing() -> None:
    settings: Sequence[Sampling] = [Sampling(top_k=3, top_p=0.5)] * 2
    assert rules(*settings).is_greedy
    assert not rules(settings[0], Sampling(temperature=0.1)).is_greedy
