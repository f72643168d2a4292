"""The probabilities of continuations: packed, shared, cut and dealt in every way, against a whole forward pass of each text by itself."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from megatron_lite.checkpoint.find import CheckpointLayout
from megatron_lite.errors import DataError
from megatron_lite.inference import score as scoring
from megatron_lite.inference.packing import TokenRequest, inputs_of, pack
from megatron_lite.inference.score import Score, Scorer
from megatron_lite.inference.segments import PlainSegments, has_flash, segmented
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mesh import Mesh
from tests.models import SMALL, in_transformers, load, write_random
from tests.worlds import in_world

LAYOUTS = [Layout(pp=pp, dp=dp, tp=tp) for pp, dp, tp in ((1, 1, 1), (1, 1, 2), (2, 1, 1), (1, 2, 1), (1, 3, 1), (2, 1, 2), (1, 2, 2))]


def some_text(length: int, seed: int, vocab: int = 160) -> tuple[int, ...]:
    return tuple(torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def some_requests() -> list[TokenRequest]:
    """Texts of their own, questions with several answers under one long heading, answers of one token, twins, and texts that are longer than the model."""
    heading = some_text(20, 1)
    requests = [TokenRequest(some_text(length, 10 + length), some_text(1 + length % 3, 50 + length)) for length in (1, 2, 5, 9, 17, 33, 40)]
    for question in range(4):
        context = heading + some_text(9 + question, 100 + question)
        requests += [TokenRequest(context, some_text(1 + answer, 200 + answer)) for answer in range(4)]
        requests += [TokenRequest(context, (answer,)) for answer in range(3)]
    requests += [TokenRequest(heading[:9], heading[9:12]), TokenRequest(heading[:9], heading[9:12])]
    requests += [TokenRequest(some_text(70, 7), some_text(3, 8)), TokenRequest(some_text(3, 9), some_text(64, 10))]
    return requests


def expected_scores(model: nn.Module, requests: Sequence[TokenRequest], *, context: int) -> list[Score]:
    """Each text alone through transformers' model: log-softmax in fp32, the argmax of every position."""
    scores = []
    for request in requests:
        text = (request.context + request.continuation)[-(context + 1) :]
        with torch.no_grad():
            logits = model(torch.tensor([text[:-1]])).logits[0, -len(request.continuation) :]
        targets = torch.tensor(request.continuation)
        found = logits.float().log_softmax(-1).gather(-1, targets.unsqueeze(-1))
        scores.append(Score(float(found.double().sum()), bool((logits.argmax(-1) == targets).all())))
    return scores


def assert_same(found: Sequence[Score], expected: Sequence[Score], tolerance: float = 1e-3) -> None:
    torch.testing.assert_close([each.logprob for each in found], [each.logprob for each in expected], atol=tolerance, rtol=0)
    assert [each.is_greedy for each in found] == [each.is_greedy for each in expected]


def score(
    layout: CheckpointLayout, requests: Sequence[TokenRequest], tokens: int = 100, mesh: Layout | None = None, spec: ModelSpec = SMALL
) -> list[list[Score]]:
    def on_every_rank(place: Mesh) -> list[Score]:
        stage = load(layout, spec, place)
        return Scorer(stage, spec_as_loaded(spec, place.tp.size), words=spec.vocab, tokens=tokens).score(requests)

    return in_world(mesh or Layout(), on_every_rank)


def spec_as_loaded(spec: ModelSpec, tp: int) -> ModelSpec:
    return replace(spec, vocab=-(-spec.vocab // tp) * tp)


@pytest.mark.parametrize("mesh", LAYOUTS, ids=str)
def test_every_layout_gives_every_rank_the_scores_of_transformers(mesh: Layout, tmp_path: Path) -> None:
    layout, requests = write_random(tmp_path, SMALL, tp=2), some_requests()
    expected = expected_scores(in_transformers(layout, SMALL), requests, context=SMALL.max_positions)
    assert torch.tensor([each.logprob for each in expected]).std() > 3  # a model that says nothing agrees with everything
    for found in score(layout, requests, mesh=mesh):
        assert_same(found, expected)


def greedy_text(model: nn.Module, context: tuple[int, ...], count: int) -> tuple[int, ...]:
    text = context
    for _ in range(count):
        with torch.no_grad():
            text += (int(model(torch.tensor([text])).logits[0, -1].argmax()),)
    return text[len(context) :]


def test_what_greedy_decoding_writes_is_greedy_and_nothing_else(tmp_path: Path) -> None:
    layout = write_random(tmp_path, SMALL, tp=1)
    model = in_transformers(layout, SMALL)
    context = some_text(12, 3)
    text = greedy_text(model, context, 5)
    other = (*text[:4], (text[4] + 1) % 160)
    [found] = score(layout, [TokenRequest(context, text), TokenRequest(context, other), TokenRequest(context, text[:2])])
    assert [each.is_greedy for each in found] == [True, False, True]


def test_scores_do_not_depend_on_what_else_is_in_the_batch(tmp_path: Path) -> None:
    layout, requests = write_random(tmp_path, SMALL, tp=1), some_requests()
    [together] = score(layout, requests, tokens=100_000)
    for tokens in (1, 64, 300):
        assert_same(score(layout, requests, tokens=tokens)[0], together, 2e-5)
    alone = [score(layout, [request])[0][0] for request in requests]
    assert_same(alone, together, 2e-5)
    backwards = score(layout, requests[::-1], tokens=300)[0][::-1]
    assert_same(backwards, together, 2e-5)


def test_no_requests_have_no_scores_and_fewer_than_replicas_are_scored_too(tmp_path: Path) -> None:
    layout = write_random(tmp_path, SMALL, tp=1)
    assert score(layout, [], mesh=Layout(dp=2)) == [[], []]
    one = some_requests()[:1]
    expected = expected_scores(in_transformers(layout, SMALL), one, context=64)
    for found in score(layout, one, mesh=Layout(dp=3)):
        assert_same(found, expected)


def test_ranks_with_unlike_memory_agree_on_the_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = write_random(tmp_path, SMALL, tp=2)

    def budgets(mesh: Mesh) -> int:
        monkeypatch.setattr(scoring, "tokens_at_once", lambda spec, tp, device: 300 - 10 * mesh.rank)
        return Scorer(load(saved, SMALL, mesh), SMALL, words=157).tokens

    assert in_world(Layout(dp=2, tp=2), budgets) == [270] * 4


def test_few_logits_at_a_time_give_the_same_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, requests = write_random(tmp_path, SMALL, tp=2), some_requests()
    [at_once] = score(layout, requests)
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 160 * 3)
    for found in score(layout, requests, mesh=Layout(tp=2)):
        assert_same(found, at_once, 2e-5)


def test_a_vocabulary_that_was_padded_for_the_cut_scores_as_before(tmp_path: Path) -> None:
    spec = replace(SMALL, vocab=157)
    layout = write_random(tmp_path, spec, tp=1)
    requests = [TokenRequest(some_text(20, seed, 157), some_text(3, seed + 50, 157)) for seed in range(6)]
    expected = expected_scores(in_transformers(layout, spec), requests, context=64)
    for found in score(layout, requests, mesh=Layout(tp=4), spec=spec):
        assert_same(found, expected)


def test_requests_that_cannot_be_scored_are_one_sentence(tmp_path: Path) -> None:
    layout = write_random(tmp_path, SMALL, tp=1)
    with pytest.raises(DataError, match="has an empty context or continuation; both need at least one token"):
        score(layout, [TokenRequest((1,), ())])
    with pytest.raises(DataError, match=r"a continuation of 65 tokens is to be scored, but the model has 64 positions \(max_position_embeddings\)"):
        score(layout, [TokenRequest((1,), some_text(65, 0))])


def test_without_a_gpu_the_plain_attention_serves() -> None:
    assert not has_flash(torch.float16, 96, torch.device("cpu"))
    segments = pack(inputs_of(some_requests(), context=64)).segments
    assert isinstance(segmented(segments, SMALL, dtype=torch.float32, device=torch.device("cpu")), PlainSegments)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2)])
def test_flash_attention_over_segments_equals_the_plain_one(heads: int, kv_heads: int) -> None:
    device = torch.device("cuda")
    assert has_flash(torch.float16, 96, device), "this GPU or this version of torch has no attention over segments of any length"
    segments = pack(inputs_of(some_requests(), context=64)).segments
    count = sum(segment.length for segment in segments)
    generator = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn(1, count, each, 96, generator=generator, device=device, dtype=torch.float16).transpose(1, 2) for each in (heads, kv_heads, kv_heads)
    )
    spec = replace(SMALL, head_dim=96)
    plain = PlainSegments.of(segments, device).mix(query.float(), key.float(), value.float())
    flash = segmented(segments, spec, dtype=torch.float16, device=device)
    assert not isinstance(flash, PlainSegments)
    torch.testing.assert_close(flash.mix(query, key, value).float(), plain, atol=5e-3, rtol=5e-3)
    assert torch.equal(flash.positions, PlainSegments.of(segments, device).positions)
