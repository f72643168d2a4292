"""Small runs as generate.py finds them: a configuration file beside a checkpoint, and NeoX's byte tokenizer, whose 512 entries are padded to 520 rows."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from megatron_lite.checkpoint.find import CheckpointLayout, find_checkpoint
from megatron_lite.checkpoint.write import name_latest, step_folder, write_layer
from megatron_lite.data.tokenizer import CharLevelTokenizer
from megatron_lite.inference.decode import Decoder
from megatron_lite.inference.request import Completion, Request, Sampling
from megatron_lite.log import logger
from megatron_lite.models.neox import ARCHITECTURE
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.mesh import Axis
from megatron_lite.parallel.stage import Stage
from tests.models import SMALL, write_random

torch.set_num_threads(1)  # matrices this small are faster on one thread, and much faster on a machine that others use too

BYTES = replace(SMALL, vocab=520)
TOKENIZER = CharLevelTokenizer()
Record = dict[str, object]


def write_run(folder: Path, spec: ModelSpec = BYTES, *, tp: int = 2, **settings: object) -> Path:
    """A random checkpoint, and the configuration file that goes with it."""
    write_random(folder / "checkpoint", spec, tp=tp)
    return write_config(folder, spec, **settings)


def write_config(folder: Path, spec: ModelSpec = BYTES, **settings: object) -> Path:
    """The configuration file of the checkpoint in folder/checkpoint."""
    stated = {
        "load": str(folder / "checkpoint"),
        "tokenizer_type": "CharLevelTokenizer",
        "num_layers": spec.layers,
        "hidden_size": spec.hidden,
        "num_attention_heads": spec.heads,
        "seq_length": spec.max_positions,
        "max_position_embeddings": spec.max_positions,
        "pos_emb": "rotary" if spec.rotary_dim else "none",
        "rotary_pct": spec.rotary_dim / spec.head_dim or 1.0,
        "no_weight_tying": not spec.tied_head,
        "gpt_j_residual": spec.parallel_residual,
        "bias_gelu_fusion": spec.activation == "gelu_tanh",
        "sample_output_file": str(folder / "out.jsonl"),
    }
    path = folder / "config.yml"
    path.write_text(json.dumps({**stated, **settings}))
    return path


def write_chain(folder: Path, successors: Mapping[int, int], *, loud_padding: bool = False) -> CheckpointLayout:
    """A checkpoint of a model whose likeliest next token depends on the last one only: successors[token]. With `loud_padding` it would rather say 512 .. 519,
    which only pad the vocabulary."""
    embedding = torch.randint(2, (BYTES.vocab, BYTES.hidden), generator=torch.Generator().manual_seed(0)).float() * 2 - 1
    head = torch.zeros_like(embedding)
    for token, following in successors.items():
        head[following] += embedding[token]
    shift = torch.zeros(BYTES.hidden)
    if loud_padding:
        shift[0], head[512:, 0] = 10.0, 100.0
    layout = step_folder(folder, 1, tp=1)
    write_layer(layout, 0, 0, {"word_embeddings.weight": embedding})
    for number, make in ARCHITECTURE.plan(BYTES, Axis("tp")).items():
        if 2 <= number < BYTES.norm_number:
            with torch.device("meta"):
                shapes = {name: parameter.shape for name, parameter in make().named_parameters()}
            write_layer(layout, number, 0, {name: torch.zeros(shape) for name, shape in shapes.items()})
    write_layer(layout, BYTES.norm_number, 0, {"norm.weight": torch.ones(BYTES.hidden), "norm.bias": shift})
    write_layer(layout, BYTES.head_number, 0, {"final_linear.weight": head})
    name_latest(folder, layout.tag)
    return find_checkpoint(folder)


def spelling(text: str, *, then: int | None = None) -> dict[int, int]:
    """Successors that continue the first byte of a text with the others, and its last one with `then`. No byte may come twice."""
    tokens = [*text.encode(), *([] if then is None else [then])]
    assert len(set(tokens)) == len(tokens)
    return dict(pairwise(tokens))


def requests(prompts: Iterable[str | Sequence[int]], **sampling: object) -> list[Request]:
    """One request a prompt, given as text or as tokens, all sampled alike."""
    return [
        Request(number, prompt if isinstance(prompt, str) else "", tuple(prompt.encode() if isinstance(prompt, str) else prompt), Sampling(**sampling))  # pyright: ignore[reportArgumentType]
        for number, prompt in enumerate(prompts)
    ]


def complete(stage: Stage, asked: Sequence[Request], *, spec: ModelSpec = BYTES, keep_logits: bool = False, recompute: bool = False) -> list[Completion]:
    """All completions, by the number of their prompts. The context is all the positions the model has."""
    decoder = Decoder(stage, spec, TOKENIZER, context=spec.max_positions, keep_logits=keep_logits, recompute=recompute)
    return sorted(decoder.complete(asked), key=lambda completion: completion.request.id)


def random_prompts(lengths: Iterable[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, 512, (length,), generator=generator).tolist() for length in lengths]


def kept(completion: Completion) -> Tensor:
    """The logits of a completion [tokens vocab]."""
    assert completion.logits is not None
    return torch.tensor(completion.logits)


class Lines(logging.Handler):
    """What is logged while it is in use."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())

    def __enter__(self) -> list[str]:
        logger.addHandler(self)
        self.level_before = logger.level
        logger.setLevel(logging.INFO)
        return self.said

    def __exit__(self, *_: object) -> None:
        logger.removeHandler(self)
        logger.setLevel(self.level_before)


def records(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
