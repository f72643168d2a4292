"""Prompts that are read together and steps that rows share find the probabilities of a plain pass, on real text."""

from megatron_lite.inference.step import Stepper
from megatron_lite.parallel.mesh import single_mesh
from tests.harness import bundled_model, tokenizer
from tests.likelihoods import furthest, pages_in_all, play
from tests.models import load


def test_2000_tokens_of_a_play_are_as_likely_by_steps_and_by_reading_as_by_a_plain_pass() -> None:
    model, texts = bundled_model(), play(16, tokenizer())
    stage = load(model.layout, model.spec, single_mesh())
    distances = furthest(stage, Stepper(stage, model.spec, words=tokenizer().vocab_size, pages=pages_in_all(texts)), texts)
    assert max(distances.values()) < 1e-4, distances
