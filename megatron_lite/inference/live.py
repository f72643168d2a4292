"""Completions and probabilities of a model in the middle of its training, which hands over its layers. All ranks call together."""

from collections.abc import Callable, Sequence
from typing import cast

from megatron_lite.config.sections import RunConfig
from megatron_lite.data.prompts import Prompt, read_prompts
from megatron_lite.data.tokenizer import Tokenizer
from megatron_lite.inference.decode import Decoder
from megatron_lite.inference.generate import as_request, default_sampling
from megatron_lite.inference.packing import TokenRequest
from megatron_lite.inference.request import Codec, Json
from megatron_lite.inference.score import Scorer
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.stage import Stage

Complete = Callable[[Stage, ModelSpec, Tokenizer], list[Json]]


def completer(config: RunConfig) -> Complete:
    """Completes the prompts of sample_input_file, which is read now; where none is set, of num_samples empty ones. Records are those of generate.py."""
    settings, sampling = config.generation, default_sampling(config)
    prompts = [Prompt("")] * settings.num_samples
    if settings.sample_input_file:
        prompts = read_prompts(settings.sample_input_file, prompt_end=settings.prompt_end)

    def complete(stage: Stage, spec: ModelSpec, tokenizer: Tokenizer) -> list[Json]:
        texts = tokenizer.encode_batch([prompt.text for prompt in prompts])
        pairs = enumerate(zip(prompts, texts, strict=True))
        requests = [as_request(number, prompt, tokens or [tokenizer.eod], sampling) for number, (prompt, tokens) in pairs]
        decoder = Decoder(stage, spec, cast(Codec, tokenizer), context=config.model.seq_length, rows=settings.generation_batch_size)
        return [completion.as_record() for completion in sorted(decoder.complete(requests), key=lambda completion: completion.request.id)]

    return complete


def unlikelihoods(stage: Stage, spec: ModelSpec, rows: Sequence[Sequence[int]], words: int) -> list[float]:
    """The negative log-probability of every row of tokens, behind its first token, as tasks are scored; `words` entries of the vocabulary can be meant."""
    requests = [TokenRequest(tuple(row[:1]), tuple(row[1:])) for row in rows]
    return [-score.logprob for score in Scorer(stage, spec, words=words).score(requests)]
