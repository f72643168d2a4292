"""How much memory continuous batching takes on a GPU: what is left beside the weights and beside what reading prompts takes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: decoding is by the plain path")

from megatron_lite.errors import FitError
from megatron_lite.inference import decoders
from megatron_lite.inference.captured import exchanging
from megatron_lite.inference.continuous import ContinuousDecoder
from megatron_lite.inference.decoders import Load, continuous_decoder
from megatron_lite.inference.paged import page_bytes, pages_for
from megatron_lite.models.memory import generation_footprint
from megatron_lite.parallel.budget import CAPTURED
from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mesh import single_mesh
from tests.loud import cut
from tests.models import load, write_random
from tests.runs import BYTES, TOKENIZER

SPEC = replace(BYTES, max_positions=1024, dtype="float16")
LEAST = generation_footprint(SPEC, Layout(), 0, rows=1, context=1000)


@pytest.fixture
def decoder_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], ContinuousDecoder]:
    """Makes decoders for 30 rows of up to 1,000 tokens, where the GPU has so many bytes left."""
    stage = cut(load(write_random(tmp_path, SPEC, tp=1), SPEC, single_mesh()), SPEC, single_mesh(), torch.float16)

    def made(free: int) -> ContinuousDecoder:
        monkeypatch.setattr(decoders, "free_memory", lambda device, outside=0: free)
        return continuous_decoder(stage, SPEC, TOKENIZER, Load(SPEC.max_positions, 30, 1000))

    return made


def held(decoder: ContinuousDecoder) -> int:
    return decoder.free.count * page_bytes(SPEC, blocks=SPEC.layers, tp=1)


def test_where_there_is_memory_every_row_has_its_pages(decoder_within: Callable[[int], ContinuousDecoder]) -> None:
    decoder = decoder_within(1 << 33)
    assert (decoder.free.count, decoder.most_tokens) == (1 + 30 * pages_for(1000), decoders.MOST_TOKENS)


def test_what_the_plan_calls_enough_is_enough_for_the_longest_text_and_to_read_it(decoder_within: Callable[[int], ContinuousDecoder]) -> None:
    free = CAPTURED + LEAST.cache + LEAST.activations + 2 * page_bytes(SPEC, blocks=SPEC.layers, tp=1)  # a page is not divided, and one is nobody's
    decoder = decoder_within(free)
    assert decoder.free.count - 1 >= pages_for(1000)
    assert held(decoder) + LEAST.activations + CAPTURED <= free
    assert decoder.most_tokens == 1000


def test_of_much_memory_the_cache_takes_all_but_what_reading_prompts_needs(
    decoder_within: Callable[[int], ContinuousDecoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoders, "page_bytes", lambda spec, *, blocks, tp: 400_000_000)  # as a large model's
    assert decoder_within(100 * 10**9).free.count == (100 * 10**9 - 3 * 2**30) // 400_000_000


def test_what_gpus_exchange_by_is_reckoned_outside_of_the_allocator() -> None:
    """Boxes of 256 rows of packets for every rank; of two ranks also two halves of 2,048 rows."""
    boxes = 2 * 8 * 256 * (SPEC.hidden + 2)
    assert [exchanging(SPEC, ranks) for ranks in (1, 2, 4)] == [0, 2 * boxes + 2 * 2048 * SPEC.hidden * 2, 4 * boxes]


def test_without_memory_for_a_page_beside_reading_the_cache_is_refused(decoder_within: Callable[[int], ContinuousDecoder]) -> None:
    with pytest.raises(FitError, match=r"too little for a cache; spread the model over more GPUs"):
        decoder_within(CAPTURED + LEAST.activations)
