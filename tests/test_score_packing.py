"""What is packed into a row of tokens, and what log-probabilities come of logits that are cut over the vocabulary."""

from itertools import chain

import pytest
import torch

from megatron_lite.inference.packing import Packed, TokenRequest, common_length, deal, inputs_of, pack
from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mesh import Axis, Mesh
from megatron_lite.parallel.probability import word_scores
from tests.test_score import some_requests, some_text
from tests.worlds import in_world


def packed_texts(packed: Packed) -> dict[int, tuple[int, ...]]:
    """The text that leads to each place of the row, itself included."""
    texts = {}
    for segment in packed.segments:
        places = list(chain.from_iterable(segment.path))
        for place in places[segment.position :]:
            texts[place] = tuple(packed.tokens[each] for each in places[: places.index(place) + 1])
    return texts


def test_a_packed_row_holds_no_padding_and_every_request_reads_behind_its_own_text() -> None:
    requests = some_requests()
    packed = pack(inputs_of(requests, context=64))
    texts = packed_texts(packed)
    assert sorted(texts) == list(range(len(packed.tokens)))
    asked: dict[int, list[tuple[tuple[int, ...], int]]] = {}
    for place, target, owner in zip(packed.places, packed.targets, packed.owners, strict=True):
        asked.setdefault(owner, []).append((texts[place], target))
    for number, request in enumerate(requests):
        text = (request.context + request.continuation)[-65:]
        count = len(request.continuation)
        assert asked[number] == [(text[: len(text) - count + each], token) for each, token in enumerate(request.continuation)]


def test_a_shared_beginning_is_computed_once() -> None:
    context = some_text(40, 1)
    answers = [TokenRequest(context, some_text(5, seed)) for seed in range(2, 6)] + [TokenRequest(context, (token,)) for token in range(4)]
    assert len(pack(inputs_of(answers, context=64)).tokens) == 40 + 4 * 4
    header = some_text(30, 9)
    questions = [TokenRequest(header + some_text(10, question), (answer,)) for question in range(20, 25) for answer in range(4)]
    assert len(pack(inputs_of(questions, context=64)).tokens) == 30 + 5 * 10


def test_batches_are_of_about_equal_work_and_as_many_for_each_replica() -> None:
    inputs = inputs_of([TokenRequest(some_text(10 + seed % 30, seed), (1, 2)) for seed in range(400)], context=64)
    batches = deal(inputs, budget=512, replicas=4)
    assert list(chain.from_iterable(batches)) == inputs
    assert len(batches) % 4 == 0
    sizes = [len(pack(batch).tokens) for batch in batches]
    assert max(sizes) <= 512
    assert max(sizes) - min(sizes) <= 2 * 42


def test_the_length_of_a_common_beginning() -> None:
    assert [common_length((1, 2, 3), other) for other in ((1, 2, 3), (1, 2), (1, 2, 4, 5), (4,), (1, 2, 3, 4))] == [3, 2, 2, 0, 3]


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_rows_that_only_pad_the_vocabulary_have_no_probability(tp: int) -> None:
    logits = torch.randn(7, 24, generator=torch.Generator().manual_seed(0))
    logits[:, 17:] += 100
    targets = torch.tensor([0, 3, 16, 5, 9, 11, 2])
    expected = logits[:, :17].log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)

    def on_every_rank(mesh: Mesh) -> torch.Tensor:
        return word_scores(logits.chunk(tp, -1)[mesh.tp.index].clone(), targets, words=17, tp=mesh.tp)

    for found in in_world(Layout(tp=tp), on_every_rank):
        torch.testing.assert_close(found[:, 0], expected, atol=1e-5, rtol=0)
        assert found[:, 1].bool().tolist() == (logits[:, :17].argmax(-1) == targets).tolist()


@pytest.mark.parametrize("tp", [1, 2])
def test_of_equally_likely_words_only_the_first_is_greedy(tp: int) -> None:
    logits = torch.zeros(4, 8)
    logits[:, [2, 6]] = 3

    def on_every_rank(mesh: Mesh) -> torch.Tensor:
        return word_scores(logits.chunk(tp, -1)[mesh.tp.index].clone(), torch.tensor([2, 6, 1, 2]), words=8, tp=mesh.tp)

    for found in in_world(Layout(tp=tp), on_every_rank):
        assert found[:, 1].tolist() == [1, 0, 0, 1]


def test_half_precision_logits_are_summed_in_fp32() -> None:
    logits = (20 * torch.randn(5, 1000, generator=torch.Generator().manual_seed(0))).half()
    targets = torch.arange(5)
    expected = logits.double().log_softmax(-1)[targets, targets]
    torch.testing.assert_close(word_scores(logits, targets, words=1000, tp=Axis("tp"))[:, 0].double(), expected, atol=1e-4, rtol=0)
