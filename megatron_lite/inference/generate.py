"""What `generate.py` does: prompts from a file, from nothing or from the terminal; completions to a file of JSON lines or to the terminal."""

import io
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from megatron_lite.config.sections import RunConfig
from megatron_lite.data.jsonl import RecordWriter, check_writable
from megatron_lite.data.prompts import Prompt, read_prompts
from megatron_lite.errors import ConfigError, DataError
from megatron_lite.inference.decode import Decoder
from megatron_lite.inference.decoders import MOST_ROWS, Completer, Load, decoder_for, prepare_for
from megatron_lite.inference.interactive import converse
from megatron_lite.inference.replicas import complete_all
from megatron_lite.inference.request import Codec, Completion, Request, Sampling
from megatron_lite.log import logger
from megatron_lite.progress import progress, say
from megatron_lite.run import Run, load_stage

SHOWN = 5
"""Completions that are also printed, so that a first run shows its text."""


def generate(run: Run) -> None:
    """Generates as the configuration says. Everything that can be wrong with prompts and output is found before weights are read."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character does not end the run
    sampling, output = default_sampling(run.config), run.config.generation_output
    if output is None:
        converse(run, sampling, lambda: _decoder(run, Load(run.config.model.seq_length, rows=1, schedule=run.config.generation.pipe_schedule)))
        return
    if run.mesh.is_writer:
        check_writable(output, source=run.config.generation.sample_input_file)
    requests = read_requests(run, run.config.generation_mode, sampling)
    with closing(_decoder(run, _load_of(run, requests))) as decoder:
        _write_all(run, decoder, requests, output)


def default_sampling(config: RunConfig) -> Sampling:
    """How tokens are chosen where a prompt does not say otherwise."""
    settings = config.generation
    if "" in settings.stop:
        raise ConfigError(f"{config.where('stop')}: stop holds an empty text, which every text would end with at once; take it out")
    return Sampling(settings.temperature, settings.top_k, settings.top_p, settings.maximum_tokens, settings.stop, config.training.seed)


def _load_of(run: Run, requests: Sequence[Request]) -> Load:
    """Where nobody says how many prompts are generated together, a GPU takes as many as it can."""
    context, rows = run.config.model.seq_length, run.config.generation.generation_batch_size
    longest = max((min(len(request.tokens) + request.sampling.maximum_tokens, context) for request in requests), default=1)
    is_said = run.config.where("generation_batch_size") != "default" or run.mesh.device.type != "cuda"
    return Load(context, rows if is_said else min(MOST_ROWS, len(requests)), longest, run.config.generation.pipe_schedule)


def _decoder(run: Run, load: Load) -> Completer:
    settings, tokenizer = run.config.generation, cast(Codec, run.tokenizer)
    is_plain = settings.return_logits or settings.recompute
    if not is_plain:
        prepare_for(run, load)
    stage = load_stage(run)
    if is_plain:
        return Decoder(
            stage,
            run.spec,
            tokenizer,
            context=load.context,
            rows=settings.generation_batch_size,
            keep_logits=settings.return_logits,
            recompute=settings.recompute,
        )
    return decoder_for(stage, run.spec, tokenizer, load)


def read_requests(run: Run, mode: str, sampling: Sampling) -> list[Request]:
    """The prompts as tokens; raises DataError for one that is longer than the model's context."""
    settings, context = run.config.generation, run.config.model.seq_length
    if mode == "unconditional":
        prompts = [Prompt("")] * settings.num_samples
    elif settings.sample_input_file is None:
        raise DataError("text_gen_type is input-file, but no sample_input_file is set; give a file of prompts with -i FILE")
    else:
        prompts = read_prompts(settings.sample_input_file, prompt_end=settings.prompt_end)
    encoded = [tokens or [run.tokenizer.eod] for tokens in run.tokenizer.encode_batch([prompt.text for prompt in prompts])]
    for number, tokens in enumerate(encoded, start=1):
        if len(tokens) > context:
            where = f"prompt {number} of {settings.sample_input_file}"
            raise DataError(f"{where} has {len(tokens)} tokens; the model's context is {context} (seq_length); shorten it")
    if longest := sum(len(tokens) >= context / 2 for tokens in encoded):
        logger.warning(f"{longest} of {len(encoded)} prompts fill half of the context of {context} tokens or more; their completions end where it ends")
    return [as_request(number, prompt, tokens, sampling) for number, (prompt, tokens) in enumerate(zip(prompts, encoded, strict=True))]


def as_request(number: int, prompt: Prompt, tokens: Sequence[int], sampling: Sampling) -> Request:
    """A prompt's own settings win over the configuration's."""
    own: dict[str, Any] = dict(prompt.settings)
    if "stop" in own:
        own["stop"] = (own["stop"],) if isinstance(own["stop"], str) else tuple(own["stop"])
    return Request(number, prompt.text, tuple(tokens), replace(sampling, **own))


def _write_all(run: Run, decoder: Completer, requests: list[Request], output: Path) -> None:
    """One record a prompt, in the order of the prompts, each written as soon as it and those before it are there."""
    completions = in_order(complete_all(decoder, requests, run.mesh))
    if not run.mesh.is_writer:
        for _ in completions:
            pass
        return
    started, count, tokens = time.monotonic(), 0, 0
    with RecordWriter(output) as records, progress("generating", len(requests), unit="prompts") as advance:
        for completion in completions:
            records.write(completion.as_record())
            count, tokens = count + 1, tokens + completion.length
            advance(1)
            if count <= SHOWN:
                say(_shown(completion))
    seconds = time.monotonic() - started
    memory = f"; {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on this GPU" if run.mesh.device.type == "cuda" else ""
    logger.info(f"{count} prompt{'s' * (count != 1)}, {tokens} tokens in {seconds:.1f} s: {tokens / seconds:.1f} tokens/s{memory}; written to {output}")


def in_order(completions: Iterator[Completion]) -> Iterator[Completion]:
    """Completions by their number, each held back only until those before it are there."""
    waiting: dict[int, Completion] = {}
    following = 0
    for completion in completions:
        waiting[completion.request.id] = completion
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def _shown(completion: Completion) -> str:
    return f"\n[{completion.request.id + 1}] {completion.request.text}▏{completion.text or completion.message or ''}"
