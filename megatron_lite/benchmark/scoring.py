"""LAMBADA and PIQA: the seconds of scoring, beside transformers in the manner of lm-eval."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from megatron_lite.benchmark.ceilings import matrix_product
from megatron_lite.benchmark.clock import seconds_of
from megatron_lite.benchmark.peer import random_model
from megatron_lite.config.sections import RunConfig
from megatron_lite.data.tokenizer import Tokenizer, load_tokenizer
from megatron_lite.errors import DataError
from megatron_lite.inference.packing import TokenRequest
from megatron_lite.inference.score import Scorer
from megatron_lite.models.memory import parameters
from megatron_lite.models.spec import ModelSpec
from megatron_lite.run import Run, load_stage, open_run

Line = tuple[str, str, str, str, str]


@dataclass(frozen=True)
class Task:
    """A task's documents as token requests, in the order of the file; `each` requests belong to one document."""

    name: str
    requests: list[TokenRequest]
    each: int

    def first(self, documents: int | None) -> "Task":
        return self if documents is None else Task(self.name, self.requests[: documents * self.each], self.each)

    @property
    def documents(self) -> int:
        return len(self.requests) // self.each

    @property
    def tokens(self) -> int:
        return sum(len(request.context) + len(request.continuation) - 1 for request in self.requests)


def measure_scoring(config: RunConfig, data: Path, *, documents: int | None, peer: Sequence[int]) -> list[Line]:
    """A table, on the writer. `peer` are batches of transformers that are measured instead of us."""
    tasks = [make(data, load_tokenizer(config.tokenizer)).first(documents) for make in (lambada, piqa)]
    header: Line = ("what", "documents", "seconds", "documents/s", "TFLOP/s")
    with open_run(config) as run:
        ceiling = matrix_product(run.mesh.device, torch.float16 if run.mesh.device.type == "cuda" else torch.float32)
        rows = peer_rows(run, tasks, peer) if peer else our_rows(run, tasks)
        limit: Line = ("8192^3 matrix product", "", "", "", f"{ceiling / 1e12:.0f}")
        table = [header, *rows, limit]
        return table if run.mesh.is_writer else []


def told(table: Sequence[Line]) -> str:
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, (34, 10, 9, 12, 12), strict=True)).rstrip() for row in table)


def lambada(folder: Path, tokenizer: Tokenizer) -> Task:
    """lambada_openai as lm-eval asks it: all words but the last, then the last."""
    texts = [str(json.loads(line)["text"]) for line in _lines(folder / "lambada" / "lambada_test.jsonl")]
    pairs = [(context, " " + word) for context, _, word in (text.rpartition(" ") for text in texts)]
    return Task("LAMBADA", _requests(pairs, tokenizer), 1)


def piqa(folder: Path, tokenizer: Tokenizer) -> Task:
    """piqa as lm-eval asks it: a question and two answers."""
    documents = [json.loads(line) for line in _lines(folder / "piqa" / "valid.jsonl")]
    pairs = [(f"Question: {document['goal']}\nAnswer:", f" {document[key]}") for document in documents for key in ("sol1", "sol2")]
    return Task("PIQA", _requests(pairs, tokenizer), 2)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; tools/download.py eval-data fetches it") from None


def _requests(pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer) -> list[TokenRequest]:
    contexts = tokenizer.encode_batch([context for context, _ in pairs])
    wholes = tokenizer.encode_batch([context + continuation for context, continuation in pairs])
    return [TokenRequest(tuple(whole[: len(context)]), tuple(whole[len(context) :])) for context, whole in zip(contexts, wholes, strict=True)]


def our_rows(run: Run, tasks: Sequence[Task]) -> Iterator[Line]:
    scorer = Scorer(load_stage(run), run.spec, words=run.tokenizer.vocab_size)
    scorer.score(tasks[0].requests[:64])
    for task in tasks:
        run.mesh.wait()
        seconds = seconds_of(lambda task=task: scorer.score(task.requests), run.mesh.device)
        yield row(f"{task.name}, {run.mesh.layout}", task, seconds, run.spec)


def peer_rows(run: Run, tasks: Sequence[Task], batches: Sequence[int]) -> Iterator[Line]:
    model = random_model(run.architecture, run.spec, run.mesh.device)
    for batch in batches:
        for task in tasks:
            score_plainly(model, task.requests[: 2 * batch], batch, run.mesh.device)
            seconds = seconds_of(lambda task=task, batch=batch: score_plainly(model, task.requests, batch, run.mesh.device), run.mesh.device)
            yield row(f"{task.name}, transformers, batch {batch}", task, seconds, run.spec)


@torch.inference_mode()
def score_plainly(model: torch.nn.Module, requests: Sequence[TokenRequest], batch: int, device: torch.device) -> list[tuple[float, bool]]:
    """What lm-eval's HFLM does: longest first, padded on the right, logits of all positions, a few waits for the GPU a request."""
    ordered = sorted(requests, key=lambda request: -len(request.context) - len(request.continuation))
    answers = []
    for first in range(0, len(ordered), batch):
        part = ordered[first : first + batch]
        inputs = [(request.context + request.continuation)[:-1] for request in part]
        longest = max(map(len, inputs))
        tokens = torch.tensor([[*each, *[0] * (longest - len(each))] for each in inputs], device=device)
        logprobs = F.log_softmax(model(tokens).logits, dim=-1)
        for request, each, mine in zip(part, inputs, logprobs, strict=True):
            rows = mine[len(each) - len(request.continuation) : len(each)]
            targets = torch.tensor(request.continuation, device=device)
            greedy = bool((rows.argmax(-1) == targets).all())
            answers.append((float(rows.gather(-1, targets.unsqueeze(-1)).sum()), greedy))
    return answers


def row(what: str, task: Task, seconds: float, spec: ModelSpec) -> Line:
    flops = 2 * (parameters(spec) - 2 * spec.vocab * spec.hidden) * task.tokens  # of the matrices in the blocks: neither head nor attention counted
    return what, f"{task.documents:,}", f"{seconds:.2f}", f"{task.documents / seconds:,.0f}", f"{flops / seconds / 1e12:.0f}"
