#!/usr/bin/env python3
"""Measures this machine and this program on it: tools/benchmark.py score configs/20B.yml --data data. Started by torchrun, ranks become replicas."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[1])
sys.path[:] = [*(folder for folder in sys.path if folder != ROOT), ROOT]  # last: evaluate.py must not shadow the `evaluate` package

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from megatron_lite.config.load import load_config  # noqa: E402
from megatron_lite.data.tokenizer import Tokenizer, load_tokenizer  # noqa: E402
from megatron_lite.errors import DataError, UserError  # noqa: E402
from megatron_lite.inference.packing import TokenRequest  # noqa: E402
from megatron_lite.inference.score import Scorer  # noqa: E402
from megatron_lite.log import set_up_logging  # noqa: E402
from megatron_lite.models.memory import parameters  # noqa: E402
from megatron_lite.models.spec import ModelSpec  # noqa: E402
from megatron_lite.run import Run, load_stage, open_run  # noqa: E402

Row = tuple[str, str, str, str, str]


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


def main(words: Sequence[str] | None = None) -> int:
    options = parse(words)
    set_up_logging()
    try:
        table = options.run(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, (34, 10, 9, 12, 12), strict=True)).rstrip())
    return 0


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    score = commands.add_parser("score", help="LAMBADA and PIQA: seconds of scoring, beside transformers in lm-eval's manner")
    score.add_argument("config", type=Path)
    score.add_argument("settings", nargs="*", metavar="key=value")
    score.add_argument("--data", type=Path, default=Path("data"), help="folder with lambada/lambada_test.jsonl and piqa/valid.jsonl (default %(default)s)")
    score.add_argument("--documents", type=int, help="only the first so many of each task")
    score.add_argument("--peer", metavar="BATCH,...", help="transformers with random weights at these batch sizes, instead of us")
    score.set_defaults(run=measure_scoring)
    return parser.parse_args(words)


def measure_scoring(options: argparse.Namespace) -> list[Row]:
    config = load_config([options.config], dict(word.split("=", 1) for word in options.settings))
    tasks = [task.first(options.documents) for task in (lambada, piqa) for task in [task(options.data, load_tokenizer(config.tokenizer))]]
    header: Row = ("what", "documents", "seconds", "documents/s", "TFLOP/s")
    with open_run(config) as run:
        ceiling = matrix_product(run.mesh.device)
        rows = our_rows(run, tasks) if options.peer is None else peer_rows(run, tasks, [int(batch) for batch in options.peer.split(",")])
        limit: Row = ("8192^3 matrix product", "", "", "", f"{ceiling:.0f}")
        table = [header, *rows, limit]
        return table if run.mesh.is_writer else []


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


def our_rows(run: Run, tasks: Sequence[Task]) -> Iterator[Row]:
    scorer = Scorer(load_stage(run), run.spec, words=run.tokenizer.vocab_size)
    scorer.score(tasks[0].requests[:64])
    for task in tasks:
        run.mesh.wait()
        seconds = clock(lambda task=task: scorer.score(task.requests), run.mesh.device)
        yield row(f"{task.name}, {run.mesh.layout}", task, seconds, run.spec)


def peer_rows(run: Run, tasks: Sequence[Task], batches: Sequence[int]) -> Iterator[Row]:
    model = transformers_model(run)
    for batch in batches:
        for task in tasks:
            score_plainly(model, task.requests[: 2 * batch], batch, run.mesh.device)
            seconds = clock(lambda task=task, batch=batch: score_plainly(model, task.requests, batch, run.mesh.device), run.mesh.device)
            yield row(f"{task.name}, transformers, batch {batch}", task, seconds, run.spec)


def transformers_model(run: Run) -> torch.nn.Module:
    """The same shape with random weights: only its speed matters here."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import AutoConfig

    settings = {"model_type": run.architecture.model_type, **run.architecture.config(run.spec), "vocab_size": run.spec.vocab}
    torch.set_default_dtype(getattr(torch, run.spec.dtype))
    with run.mesh.device:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    torch.set_default_dtype(torch.float32)
    return model.eval()


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


def clock(work: Callable[[], object], device: torch.device) -> float:
    started = time.monotonic()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - started


def matrix_product(device: torch.device, size: int = 8192) -> float:
    """TFLOP/s of a large fp16 product on random data; the median of nine."""
    if device.type != "cuda":
        size = 512
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    clock(lambda: one @ other, device)
    return 2 * size**3 / sorted(clock(lambda: one @ other, device) for _ in range(9))[4] / 1e12


def row(what: str, task: Task, seconds: float, spec: ModelSpec) -> Row:
    flops = 2 * (parameters(spec) - 2 * spec.vocab * spec.hidden) * task.tokens  # of the matrices in the blocks: neither head nor attention counted
    return what, f"{task.documents:,}", f"{seconds:.2f}", f"{task.documents / seconds:,.0f}", f"{flops / seconds / 1e12:.0f}"


if __name__ == "__main__":
    sys.exit(main())
