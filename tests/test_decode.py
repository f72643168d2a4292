"""Decoding, number by number: with a cache, in ragged batches, on every layout, it gives what a whole forward pass of one row gives."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_lite.errors import CheckpointError
from megatron_lite.inference.request import Completion, Request
from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mesh import Mesh, single_mesh
from megatron_lite.parallel.stage import Stage
from tests.models import load, logits, write_random
from tests.runs import BYTES, complete, kept, random_prompts, requests
from tests.worlds import in_world

LAYOUTS = [Layout(pp=pp, tp=tp) for pp, tp in ((1, 1), (1, 2), (2, 1), (2, 2))]
SPECS = {
    "20B-like": BYTES,
    "sequential residual, erf": replace(BYTES, parallel_residual=False, activation="gelu"),
    "tied head": replace(BYTES, tied_head=True),
    "no positions": replace(BYTES, rotary_dim=0),
}
RAGGED = random_prompts((1, 30, 7, 60, 18))


def tokens_of(completion: Completion) -> list[int]:
    """The greedy tokens that a completion's logits stand for."""
    return kept(completion)[:, :512].argmax(-1).tolist()


def whole_pass(stage: Stage, request: Request, generated: list[int]) -> Tensor:
    """Logits at the positions whose next tokens were generated, from one pass over the whole text."""
    text = torch.tensor([[*request.tokens, *generated]])
    return logits(stage, text, 520)[0, len(request.tokens) - 1 : -1]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_token_from_the_cache_has_the_logits_of_a_whole_pass_on_every_rank(layout: Layout, tmp_path: Path) -> None:
    saved = {name: write_random(tmp_path / name, spec, tp=2) for name, spec in SPECS.items()}

    def decode(mesh: Mesh) -> dict[str, list[tuple[Tensor, Tensor]]]:
        answers = {}
        for name, spec in SPECS.items():
            stage = load(saved[name], spec, mesh)
            done = complete(stage, requests(RAGGED, maximum_tokens=12), spec=spec, keep_logits=True)
            answers[name] = [(kept(completion), whole_pass(stage, completion.request, tokens_of(completion))) for completion in done]
        return answers

    ranks = in_world(layout, decode)
    for name in SPECS:
        for row, (found, expected) in enumerate(ranks[0][name]):
            assert len(found) == min(12, 64 - len(RAGGED[row]))
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0, msg=lambda text, name=name, row=row: f"{name}, row {row}: {text}")
            assert all(torch.equal(rank[name][row][0], found) for rank in ranks)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return load(write_random(tmp_path_factory.mktemp("model"), BYTES, tp=2), BYTES, single_mesh())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_ragged_batch_gives_each_row_what_it_gets_alone(stage: Stage, temperature: float) -> None:
    asked = requests(RAGGED, maximum_tokens=25, temperature=temperature)
    together = complete(stage, asked, keep_logits=True)
    for request, found in zip(asked, together, strict=True):
        [alone] = complete(stage, [request], keep_logits=True)
        assert (found.text, found.length, found.finished) == (alone.text, alone.length, alone.finished)
        torch.testing.assert_close(kept(found), kept(alone), atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_recomputing_everything_gives_the_same_text(stage: Stage, temperature: float) -> None:
    asked = requests(RAGGED, maximum_tokens=25, temperature=temperature)
    for found, expected in zip(complete(stage, asked, recompute=True, keep_logits=True), complete(stage, asked, keep_logits=True), strict=True):
        assert (found.text, found.length) == (expected.text, expected.length)
        torch.testing.assert_close(kept(found), kept(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_row_at_the_end_of_the_context_does_not_end_its_neighbours(stage: Stage, recompute: bool) -> None:
    asked = requests(random_prompts((60, 2)), maximum_tokens=64)
    full, long = complete(stage, asked, recompute=recompute)
    assert (full.length, long.length) == (4, 62)
    assert long.text == complete(stage, asked[1:])[0].text


def test_no_text_is_longer_than_the_context_or_its_limit(stage: Stage) -> None:
    asked = [*requests([[65] * 50], maximum_tokens=100), *requests([[65] * 3], maximum_tokens=5)]
    assert [completion.length for completion in complete(stage, [asked[0], replace(asked[1], id=1)])] == [14, 5]


def test_a_prompt_as_long_as_the_context_gets_a_message_and_its_neighbour_a_text(stage: Stage) -> None:
    full, short = complete(stage, requests([[65] * 64, [65] * 2], maximum_tokens=3))
    assert full.text is None
    assert (full.length, full.finished) == (0, False)
    assert full.message == "WARNING: text generation did not start; the prompt fills the whole context"
    assert (short.length, short.message) == (3, None)


def test_one_seed_gives_one_text_whatever_the_layout(tmp_path: Path) -> None:
    saved = write_random(tmp_path, BYTES, tp=2)
    asked = requests(RAGGED, temperature=1.0, top_k=200, top_p=0.95, maximum_tokens=20, seed=11)

    def texts(mesh: Mesh) -> list[str | None]:
        return [completion.text for completion in complete(load(saved, BYTES, mesh), asked)]

    [expected] = in_world(Layout(), texts)
    assert len(set(expected)) == len(asked)
    for layout in (Layout(tp=2), Layout(tp=4), Layout(pp=2), Layout(pp=2, tp=2)):
        assert in_world(layout, texts) == [expected] * layout.size, str(layout)


def test_one_seed_gives_one_text_whatever_the_batch_and_order(stage: Stage) -> None:
    asked = requests(RAGGED, temperature=1.0, maximum_tokens=20)
    expected = [completion.text for completion in complete(stage, asked)]
    pairs = [*complete(stage, [asked[4], asked[0]]), *complete(stage, [asked[3], asked[1], asked[2]])]
    assert [completion.text for completion in sorted(pairs, key=lambda found: found.request.id)] == expected
    other = [completion.text for completion in complete(stage, requests(RAGGED, temperature=1.0, maximum_tokens=20, seed=4))]
    assert all(one != two for one, two in zip(expected, other, strict=True))


def test_rows_of_one_batch_may_be_sampled_differently(stage: Stage) -> None:
    greedy, drawn = requests([[65, 66], [65, 66]], maximum_tokens=20)
    drawn = replace(drawn, sampling=replace(drawn.sampling, temperature=1.0))
    first, second = complete(stage, [greedy, drawn])
    assert first.text == complete(stage, [greedy])[0].text
    assert second.text == complete(stage, [drawn])[0].text
    assert first.text != second.text


def test_logits_that_are_kept_belong_to_the_tokens_and_are_numbers(stage: Stage) -> None:
    [found] = complete(stage, requests([[65, 66]], maximum_tokens=9), keep_logits=True)
    values = kept(found)
    assert values.shape == (9, 520)
    assert bool(values.isfinite().all())
    assert bytes(token for token in tokens_of(found) if token < 256).decode(errors="replace") == found.text


def test_a_damaged_weight_is_an_error_and_never_a_text(tmp_path: Path) -> None:
    saved = write_random(tmp_path, BYTES, tp=1)
    path = saved.layer_file(3, 0)
    tensors = torch.load(path)
    tensors["mlp.dense_h_to_4h.weight"][5, 5] = float("nan")
    torch.save(tensors, path)
    for temperature in (0.0, 1.0):
        with pytest.raises(
            CheckpointError, match=r"the logits of prompt 1 are no numbers \(NaN or infinite\) after 0 tokens, first behind layer 3: the weights"
        ):
            complete(load(saved, BYTES, single_mesh()), requests(["A"], temperature=temperature))
