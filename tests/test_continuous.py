"""Continuous batching over a paged cache: every prompt gets exactly the text that it gets alone from the plain path."""

from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_lite.errors import CheckpointError, FitError
from megatron_lite.inference import continuous
from megatron_lite.inference.continuous import ContinuousDecoder
from megatron_lite.inference.decoders import Load
from megatron_lite.inference.paged import PAGE, FreePages, PagedCache, page_bytes, pages_for
from megatron_lite.inference.replicas import complete_all
from megatron_lite.inference.request import Completion, Request
from megatron_lite.inference.sample import Rules
from megatron_lite.inference.step import Arrival, Slots, Stepper
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mesh import Mesh, single_mesh
from megatron_lite.parallel.stage import Stage
from tests.models import load, write_random
from tests.runs import BYTES, TOKENIZER, complete, random_prompts, requests, spelling, write_chain
from tests.worlds import in_world

SPEC = replace(BYTES, max_positions=192)
PROMPTS = random_prompts((1, 30, 7, 150, 18, 64, 63, 65, 3))


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return load(write_random(tmp_path_factory.mktemp("model"), SPEC, tp=2), SPEC, single_mesh())


def serve(
    stage: Stage, asked: Sequence[Request], *, spec: ModelSpec = SPEC, rows: int = 4, pages: int = 40, tokens: int = 100, groups: int | None = None
) -> list[Completion]:
    """The completions in the order of their prompts."""
    stepper = Stepper(stage, spec, words=512, pages=pages)
    decoder = ContinuousDecoder(stepper, TOKENIZER, context=spec.max_positions, rows=rows, tokens=tokens, groups=groups)
    found = sorted(decoder.complete(asked), key=lambda completion: completion.request.id)
    assert len(decoder.free) == pages - 1, "every page is given back"
    return found


def told(completions: Sequence[Completion]) -> list[tuple[int, str | None, int, bool, str | None]]:
    """What a user reads of completions, whenever they came."""
    return [(each.request.id, each.text, each.length, each.finished, each.message) for each in completions]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 20}, {"temperature": 1.3, "top_p": 0.9}], ids=str)
def test_prompts_that_share_steps_get_the_text_that_they_get_alone(stage: Stage, sampling: dict[str, float]) -> None:
    asked = requests(PROMPTS, maximum_tokens=25, **sampling)
    assert told(serve(stage, asked)) == told(complete(stage, asked, spec=SPEC))


@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("tokens", [1, 1000])
def test_neither_the_rows_nor_the_prompts_read_at_once_change_the_text(stage: Stage, rows: int, tokens: int) -> None:
    asked = requests(PROMPTS, maximum_tokens=9)
    assert told(serve(stage, asked, rows=rows, tokens=tokens)) == told(complete(stage, asked, spec=SPEC))


def test_rows_of_different_limits_and_rules_live_side_by_side(stage: Stage) -> None:
    kinds = [{"maximum_tokens": 1}, {"maximum_tokens": 40, "temperature": 1.0}, {"maximum_tokens": 7, "temperature": 1.0, "top_k": 3}, {"maximum_tokens": 500}]
    asked = [replace(requests([prompt], **kinds[number % 4])[0], id=number) for number, prompt in enumerate(PROMPTS)]
    assert told(serve(stage, asked)) == told(complete(stage, asked, spec=SPEC))


@pytest.mark.parametrize(("count", "groups"), [(2, 2), (3, 2), (21, 2), (9, 4)])
def test_the_last_prompts_are_served_however_many_rows_there_are(stage: Stage, count: int, groups: int) -> None:
    asked = requests(random_prompts(range(1, count + 1)), maximum_tokens=3)
    assert told(serve(stage, asked, rows=64, groups=groups)) == told(complete(stage, asked, spec=SPEC))


def test_the_longest_rows_have_the_first_slots(stage: Stage) -> None:
    seen: list[list[int]] = []

    class Watched(Stepper):
        def advance(self, slots: Slots, rows: int, rules: Rules) -> Arrival:
            seen.append(slots.lengths[:rows].tolist())
            return super().advance(slots, rows, rules)

    decoder = ContinuousDecoder(Watched(stage, SPEC, words=512, pages=40), TOKENIZER, context=SPEC.max_positions, rows=4, tokens=100)
    list(decoder.complete(requests(PROMPTS, maximum_tokens=9)))
    assert all(lengths == sorted(lengths, reverse=True) for lengths in seen)
    assert max(len(set(lengths)) for lengths in seen) == 4


def test_few_pages_make_prompts_wait_and_change_nothing(stage: Stage) -> None:
    asked = requests(PROMPTS, maximum_tokens=25)
    assert told(serve(stage, asked, pages=4)) == told(complete(stage, asked, spec=SPEC))


@pytest.mark.parametrize("pages", [36, 100], ids=["few pages", "pages enough"])
@pytest.mark.parametrize(("busy", "tokens", "least"), [(40, 100, 2), (5, 100, 1), (40, 5, 1)], ids=["few tokens", "a busy GPU", "no more are read"])
def test_prompts_wait_until_a_sixteenth_of_the_rows_comes_with_them_or_reading_is_worth_it_anyway(
    stage: Stage, pages: int, busy: int, tokens: int, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuous, "WORTH_A_PASS", busy)
    reads: list[int] = []

    class Watched(Stepper):
        def read(self, prompts: Sequence[Sequence[int]], pages: Sequence[Sequence[int]], rules: Rules) -> Arrival:
            if len(decoder.groups[0].rows) >= 32:
                reads.append(len(prompts))
            return super().read(prompts, pages, rules)

    decoder = ContinuousDecoder(Watched(stage, SPEC, words=512, pages=pages), TOKENIZER, context=SPEC.max_positions, rows=45, tokens=tokens)
    asked = [replace(request, sampling=replace(request.sampling, maximum_tokens=3 + request.id)) for request in requests(random_prompts([5] * 59))]
    found = sorted(decoder.complete(asked), key=lambda completion: completion.request.id)
    assert told(found) == told(complete(stage, asked, spec=SPEC))
    assert min(reads[:-1]) == least


def test_a_prompt_that_no_cache_can_hold_is_refused_before_anything_is_computed(stage: Stage) -> None:
    asked = requests(PROMPTS, maximum_tokens=25)
    with pytest.raises(
        FitError, match=r"prompt 4 with its completion needs 3 pages of the cache, and 2 fit in the memory of cpu; use a smaller maximum_tokens"
    ):
        serve(stage, asked, pages=3)


def test_a_prompt_that_fills_the_context_is_answered_with_the_reason(stage: Stage) -> None:
    asked = requests([*random_prompts((192,)), *PROMPTS[:2]], maximum_tokens=3)
    found = serve(stage, asked)
    assert found[0].message == "WARNING: text generation did not start; the prompt fills the whole context"
    assert told(found) == told(complete(stage, asked, spec=SPEC))


def test_a_stop_string_and_an_end_of_text_end_a_row_and_the_others_go_on(tmp_path: Path) -> None:
    saved = write_chain(tmp_path, {**spelling("abcdefg"), **spelling("xyz", then=TOKENIZER.eod), **spelling("12345"), ord("5"): ord("1")})
    chain = load(saved, BYTES, single_mesh())
    asked = requests(["a", "x", "1", "a", "3"], maximum_tokens=20, stop=("fg",))
    found = serve(chain, asked, spec=BYTES, rows=2)
    assert [(each.text, each.finished) for each in found[:2]] == [("bcde", True), ("yz", True)]
    assert told(found) == told(complete(chain, asked, spec=BYTES))


def test_rows_are_told_token_by_token(stage: Stage) -> None:
    decoder = ContinuousDecoder(Stepper(stage, SPEC, words=512, pages=40), TOKENIZER, context=192, rows=4, tokens=100)
    seen: dict[int, list[int]] = {}
    asked = requests(PROMPTS, maximum_tokens=5)
    done = {each.request.id: each for each in decoder.complete(asked, watch=lambda row, tokens: seen.__setitem__(row, list(tokens)))}
    assert {row: TOKENIZER.decode(tokens) for row, tokens in seen.items()} == {row: done[row].text for row in range(len(PROMPTS))}


@pytest.mark.parametrize("changes", [{"parallel_residual": False, "activation": "gelu"}, {"rotary_dim": 0}, {"tied_head": True}], ids=str)
def test_every_kind_of_model_decodes_from_pages(changes: dict[str, object], tmp_path: Path) -> None:
    spec = replace(SPEC, **changes)
    other = load(write_random(tmp_path, spec, tp=1), spec, single_mesh())
    asked = requests(PROMPTS, maximum_tokens=10)
    assert told(serve(other, asked, spec=spec)) == told(complete(other, asked, spec=spec))


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2), Layout(pp=4), Layout(pp=2, tp=2)], ids=str)
@pytest.mark.parametrize("rows", [1, 5])
def test_ranks_that_share_a_model_serve_the_same_text(layout: Layout, rows: int, tmp_path: Path) -> None:
    saved = write_random(tmp_path, SPEC, tp=2)
    asked = requests(PROMPTS, maximum_tokens=9, temperature=0.7)

    def run(mesh: Mesh) -> list[tuple[int, str | None, int, bool, str | None]]:
        return told(serve(load(saved, SPEC, mesh), asked, rows=rows))

    expected = told(complete(load(saved, SPEC, single_mesh()), asked, spec=SPEC))
    assert all(found == expected for found in in_world(layout, run))


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}], ids=str)
def test_a_pipeline_serves_the_same_text_by_both_schedules(settings: dict[str, float], tmp_path: Path) -> None:
    saved = write_random(tmp_path, SPEC, tp=2)
    asked = requests(PROMPTS, maximum_tokens=9, **settings)

    def run(mesh: Mesh) -> list[list[tuple[int, str | None, int, bool, str | None]]]:
        stage = load(saved, SPEC, mesh)
        return [told(serve(stage, asked, groups=Load(192, schedule=schedule).groups(mesh.pp.size))) for schedule in ("in-flight", "naive")]

    expected = told(complete(load(saved, SPEC, single_mesh()), asked, spec=SPEC))
    assert all(found == [expected, expected] for found in in_world(Layout(pp=2), run))


def test_a_naive_schedule_has_all_rows_in_one_group() -> None:
    assert [Load(192, schedule=schedule).groups(4) for schedule in ("in-flight", "naive")] == [4, 1]


def test_the_likeliest_token_is_found_without_gathering_logits(tmp_path: Path) -> None:
    """Among the words only: rows that pad the vocabulary do not count, and what is no number is said to be none."""
    saved = write_random(tmp_path, SPEC, tp=2)
    whole = torch.randn(5, 520, generator=torch.Generator().manual_seed(1))
    whole[0, 515], whole[1, 3], whole[2, 511] = 100.0, torch.nan, 50.0

    def run(mesh: Mesh) -> tuple[list[int], list[int]]:
        stepper = Stepper(load(saved, SPEC, mesh), SPEC, words=512, pages=2)
        mine = whole.chunk(mesh.tp.size, -1)[mesh.tp.index].contiguous()
        greedy = Rules.of(requests(["a"] * 5), device=mesh.device)
        return stepper.likeliest(mine).tolist(), stepper.pick(mine, greedy).tolist()

    expected = [int(row[:512].argmax()) for row in whole]
    expected[1] = -1
    for ranks in (in_world(Layout(tp=2), run), [run(single_mesh())]):
        assert all(found == (expected, expected) for found in ranks)


def test_ranks_whose_rows_only_pad_the_vocabulary_offer_nothing(tmp_path: Path) -> None:
    saved = write_random(tmp_path, SPEC, tp=2)
    whole = torch.randn(5, 520, generator=torch.Generator().manual_seed(4))

    def run(mesh: Mesh) -> list[int]:
        stepper = Stepper(load(saved, SPEC, mesh), SPEC, words=200, pages=2)
        return stepper.likeliest(whole.chunk(mesh.tp.size, -1)[mesh.tp.index].contiguous()).tolist()

    assert in_world(Layout(tp=4), run) == [whole[:, :200].argmax(-1).tolist()] * 4


@pytest.mark.parametrize("layout", [Layout(dp=2), Layout(dp=2, tp=2), Layout(dp=3)], ids=str)
def test_replicas_share_the_prompts_and_one_process_has_all_texts(layout: Layout, tmp_path: Path) -> None:
    saved = write_random(tmp_path, SPEC, tp=2)
    asked = requests(PROMPTS, maximum_tokens=9)

    def run(mesh: Mesh) -> list[tuple[int, str | None, int, bool, str | None]]:
        stepper = Stepper(load(saved, SPEC, mesh), SPEC, words=512, pages=40)
        decoder = ContinuousDecoder(stepper, TOKENIZER, context=SPEC.max_positions, rows=4, tokens=100)
        return told(sorted(complete_all(decoder, asked, mesh), key=lambda completion: completion.request.id))

    ranks = in_world(layout, run)
    assert ranks[0] == told(complete(load(saved, SPEC, single_mesh()), asked, spec=SPEC))
    assert all(len(rank) < len(PROMPTS) for rank in ranks[layout.tp :])


@pytest.mark.parametrize("layout", [Layout(), Layout(pp=2)], ids=str)
def test_a_decoder_serves_on_after_somebody_stopped_listening(layout: Layout, tmp_path: Path) -> None:
    saved = write_random(tmp_path, SPEC, tp=2)
    asked = requests(PROMPTS, maximum_tokens=9)

    def run(mesh: Mesh) -> list[tuple[int, str | None, int, bool, str | None]]:
        decoder = ContinuousDecoder(Stepper(load(saved, SPEC, mesh), SPEC, words=512, pages=40), TOKENIZER, context=192, rows=4, tokens=100)
        interrupted = decoder.complete(asked)
        assert isinstance(interrupted, Generator)
        next(interrupted)
        interrupted.close()
        assert len(decoder.free) == 39
        return told(sorted(decoder.complete(asked), key=lambda completion: completion.request.id))

    expected = told(complete(load(saved, SPEC, single_mesh()), asked, spec=SPEC))
    assert all(found == expected for found in in_world(layout, run))


def test_pages_are_given_out_once_and_the_first_one_never() -> None:
    free = FreePages(5)
    taken = free.take(4)
    assert sorted(taken) == [1, 2, 3, 4]
    assert len(free) == 0
    free.give_back(taken[1:3])
    assert sorted(free.take(2)) == sorted(taken[1:3])
    assert [pages_for(tokens) for tokens in (1, PAGE, PAGE + 1)] == [1, 1, 2]


def test_a_cache_takes_the_bytes_that_its_pages_are_said_to_take() -> None:
    cache = PagedCache.empty([0, *range(2, 2 + SPEC.layers), SPEC.norm_number], SPEC, pages=7, tp=2, dtype=torch.float32, device=torch.device("cpu"))
    held = sum(tensor.nbytes for part in (cache.keys, cache.values) for tensor in part.values())
    assert held == 7 * page_bytes(SPEC, blocks=SPEC.layers, tp=2)


@pytest.mark.parametrize("layout", [Layout(), Layout(pp=2), Layout(tp=2)], ids=str)
def test_the_first_layer_that_computes_no_numbers_is_named(layout: Layout, tmp_path: Path) -> None:
    saved = write_random(tmp_path, SPEC, tp=1)
    path = saved.layer_file(4, 0)
    tensors = torch.load(path)
    tensors["mlp.dense_h_to_4h.weight"][5, 5] = float("inf")
    torch.save(tensors, path)

    def run(mesh: Mesh) -> str:
        with pytest.raises(CheckpointError) as caught:
            serve(load(saved, SPEC, mesh), requests(["A", "bc"]))
        return str(caught.value)

    assert all("the logits of prompt 1 are no numbers (NaN or infinite) after 0 tokens, first behind layer 4:" in said for said in in_world(layout, run))
