"""Where a text ends: at stop strings wherever they lie in the tokens, at the end of text, at its limit; and what is never part of it."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_lite.config.load import load_config
from megatron_lite.inference.decode import Decoder
from megatron_lite.inference.request import Completion, Request, Sampling
from megatron_lite.parallel.mesh import single_mesh
from megatron_lite.run import load_stage, open_run
from tests.models import load
from tests.runs import BYTES, complete, kept, requests, spelling, write_chain

ROOT = Path(__file__).resolve().parents[1]
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
END = 0  # the byte tokenizer's end of text


def continued(folder: Path, spelled: str, *, then: int | None = END, prompt: str | None = None, **sampling: object) -> Completion:
    """What a model says after the first character if it spells this text."""
    stage = load(write_chain(folder, spelling(spelled, then=then)), BYTES, single_mesh())
    [found] = complete(stage, requests([spelled[0] if prompt is None else prompt], **sampling))
    return found


def test_the_end_of_text_ends_it_and_is_not_part_of_it(tmp_path: Path) -> None:
    found = continued(tmp_path, ALPHABET)
    assert (found.text, found.length, found.finished, found.message) == (ALPHABET[1:], 25, True, None)


def test_the_limit_ends_it_unfinished(tmp_path: Path) -> None:
    found = continued(tmp_path, ALPHABET, maximum_tokens=10)
    assert (found.text, found.length, found.finished) == ("bcdefghijk", 10, False)


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (("f",), "bcde"),
        (("fgh",), "bcde"),  # across three tokens
        (("x", "jk", "gh"), "bcdef"),  # the first to come, not the first in the list
        (("ghi", "fghi"), "bcde"),  # of two that end together the longer one
        (("abc",), ALPHABET[1:]),  # the prompt is no part of it
        (("yz",), ALPHABET[1:24]),  # at the very end
        (("zz", "A"), ALPHABET[1:]),
    ],
)
def test_a_text_ends_before_the_first_stop_string(stop: tuple[str, ...], text: str, tmp_path: Path) -> None:
    found = continued(tmp_path, ALPHABET, stop=stop)
    assert (found.text, found.length, found.finished) == (text, len(text), True)


def test_a_stop_string_with_the_last_token_allowed_still_finishes_the_text(tmp_path: Path) -> None:
    found = continued(tmp_path, ALPHABET, stop=("fg",), maximum_tokens=6)
    assert (found.text, found.finished) == ("bcde", True)


def test_a_stop_string_may_be_longer_than_the_window_that_is_looked_at_first(tmp_path: Path) -> None:
    found = continued(tmp_path, ALPHABET, stop=(ALPHABET[2:],))
    assert (found.text, found.length) == ("b", 1)


@pytest.mark.parametrize("stop", [("b",), ("bcd", "b")])
def test_a_stop_string_at_the_very_start_leaves_no_text_and_says_so(stop: tuple[str, ...], tmp_path: Path) -> None:
    found = continued(tmp_path, ALPHABET, stop=stop)
    assert (found.text, found.length, found.finished) == (None, 0, True)
    assert found.message == "WARNING: text generation did not start; the model ended the text at once"


def test_a_model_that_ends_at_once_says_so(tmp_path: Path) -> None:
    found = continued(tmp_path, "a")
    assert (found.text, found.length, found.finished) == (None, 0, True)
    assert found.message == "WARNING: text generation did not start; the model ended the text at once"


def test_characters_of_several_tokens_are_whole_and_may_stop_a_text(tmp_path: Path) -> None:
    assert continued(tmp_path / "1", "a€b").text == "€b"
    assert continued(tmp_path / "2", "a€b", stop=("b",)).text == "€"
    assert continued(tmp_path / "3", "a€bc", stop=("€b",)).text is None
    assert continued(tmp_path / "4", "ax€b", stop=("€",)).text == "x"


def test_tokens_without_text_do_not_hide_a_stop_string(tmp_path: Path) -> None:
    silent = [ord("x"), ord("a"), *range(300, 340), ord("b"), ord("c"), END]  # ids from 256 on have no text in the byte tokenizer
    stage = load(write_chain(tmp_path, dict(pairwise(silent))), BYTES, single_mesh())
    [found, stopped] = complete(stage, [*requests(["x"]), replace(requests(["x"], stop=("ab",))[0], id=1)])
    assert (found.text, found.length) == ("abc", 43)
    assert stopped.text is None


def test_rows_of_one_batch_end_each_in_its_own_place(tmp_path: Path) -> None:
    stage = load(write_chain(tmp_path, spelling(ALPHABET, then=END)), BYTES, single_mesh())
    asked = [*requests(["a", "t", "h", "y"], stop=("pq", "mn"))]
    asked[3] = replace(asked[3], sampling=replace(asked[3].sampling, maximum_tokens=1))
    assert [(found.text, found.finished) for found in complete(stage, asked)] == [
        ("bcdefghijkl", True),
        ("uvwxyz", True),
        ("ijkl", True),
        ("z", False),
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_only_pad_the_vocabulary_are_never_chosen_even_with_the_largest_logits(temperature: float, tmp_path: Path) -> None:
    stage = load(write_chain(tmp_path, spelling(ALPHABET, then=END), loud_padding=True), BYTES, single_mesh())
    [found] = complete(stage, requests(["a"], temperature=temperature, top_k=0), keep_logits=True)
    assert found.text == ALPHABET[1:]
    assert bool((kept(found).argmax(-1) >= 512).all())


def test_stop_strings_that_begin_or_end_inside_of_a_token_cut_the_text_exactly() -> None:
    """With the bundled model, whose tokens are pieces of words."""
    with open_run(load_config([ROOT / "configs" / "tiny.yml"], {"load": str(ROOT / "checkpoints/tiny"), **vocabulary(), **alone()})) as run:
        decoder = Decoder(load_stage(run), run.spec, run.tokenizer, context=512)
        prompt = "Once upon a time"
        whole = next(decoder.complete([Request(0, prompt, tuple(run.tokenizer.encode(prompt)), Sampling(maximum_tokens=30))]))
        assert whole.text is not None
        stops = [whole.text[start : start + size] for start, size in ((2, 1), (5, 9), (17, 4), (20, 13), (31, 2))]
        asked = [Request(number, prompt, whole.request.tokens, Sampling(maximum_tokens=30, stop=(stop,))) for number, stop in enumerate(stops)]
        for found in decoder.complete(asked):
            expected = whole.text[: whole.text.index(stops[found.request.id])]
            assert (found.text, found.finished) == (expected or None, True)
            needed = run.tokenizer.encode(prompt + expected)
            assert abs(len(needed) - len(whole.request.tokens) - found.length) <= 2  # pieces at the cut may be written in more tokens than were


def vocabulary() -> dict[str, object]:
    return {"vocab_file": str(ROOT / "checkpoints/tiny/tokenizer.json")}


def alone() -> dict[str, object]:
    return {"pipe_parallel_size": 1, "model_parallel_size": 1}
