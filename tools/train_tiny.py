#!/usr/bin/env python3
"""Trains the bundled model on story books with a plain PyTorch loop, and writes it in NeoX's layout. Stays until train.py can do it."""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1]))  # last, because a top-level evaluate.py must not shadow the `evaluate` package

from megatron_lite.checkpoint.write import cut, name_latest, step_folder, write_layer
from megatron_lite.config.load import load_config
from megatron_lite.data.tokenizer import Tokenizer, load_tokenizer
from megatron_lite.models.architecture import architecture_named
from megatron_lite.models.spec import ModelSpec, spec_of
from megatron_lite.parallel.mesh import Axis

HELD_OUT = 40
"""Every chapter with a number that this divides is kept for validation."""


def main(words: Sequence[str] | None = None) -> int:
    options = parse(words)
    config = load_config([options.config])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(config.tokenizer)
    train, valid = read_stories(options.stories, tokenizer)
    multiple = config.tokenizer.make_vocab_size_divisible_by * options.model_parallel_size
    spec = spec_of(config.model, vocab=-(-tokenizer.vocab_size // multiple) * multiple, dtype="float32")
    model = build(architecture_named(config.model.family).plan(spec, Axis("tp")), spec, device, options.dropout)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(train):,} tokens to train on, {len(valid):,} held out")
    best = train_loop(model, train.to(device), valid.to(device), config.model.seq_length, options)
    write(model, best, options)
    return 0


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("stories", type=Path, help="JSON lines with a text each")
    parser.add_argument("folder", type=Path, help="where to write the checkpoint")
    parser.add_argument("--model-parallel-size", type=int, default=2, help="cut of the files")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--noise", type=float, default=0.05, help="share of input tokens replaced by random ones")
    parser.add_argument("--interval", type=int, default=200, help="steps between validations")
    return parser.parse_args(words)


def read_stories(path: Path, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Tokens to train on and tokens of the held-out chapters, each chapter ended by eod."""
    texts = [json.loads(line)["text"] for line in path.open(encoding="utf-8")]
    parts: tuple[list[int], list[int]] = ([], [])
    for number, tokens in enumerate(tokenizer.encode_batch(texts)):
        parts[number % HELD_OUT == 0].extend([*tokens, tokenizer.eod])
    return torch.tensor(parts[0]), torch.tensor(parts[1])


def build(plan: dict, spec: ModelSpec, device: torch.device, dropout: float) -> nn.ModuleDict:
    torch.manual_seed(1234)
    model = nn.ModuleDict({str(number): make() for number, make in plan.items()})
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            writes = name.endswith(("dense.weight", "4h_to_h.weight"))
            nn.init.normal_(parameter, std=2 / spec.layers / math.sqrt(spec.hidden) if writes else math.sqrt(2 / (5 * spec.hidden)))
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    for name, module in model.named_modules():
        if name.endswith((".attention", ".mlp")):
            module.register_forward_hook(lambda module, args, output: F.dropout(output, dropout, module.training))
    return model.to(device)


def loss_of(model: nn.ModuleDict, tokens: Tensor, targets: Tensor) -> Tensor:
    x = tokens
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
        for layer in model.values():
            x = layer(x)
    return F.cross_entropy(x.float().flatten(0, 1), targets.flatten())


def train_loop(model: nn.ModuleDict, train: Tensor, valid: Tensor, length: int, options: argparse.Namespace) -> dict[str, Tensor]:
    """The weights with the lowest validation loss."""
    decayed = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=train.is_cuda)
    best, weights, started = math.inf, {}, time.monotonic()
    generator = torch.Generator().manual_seed(0)
    for step in range(1, options.steps + 1):
        rate = min(step / 100, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / options.steps)))
        for group in optimizer.param_groups:
            group["lr"] = options.lr * rate
        starts = torch.randint(len(train) - length - 1, (options.batch, 1), generator=generator).to(train.device)
        rows = train[starts + torch.arange(length + 1, device=train.device)]
        tokens = rows[:, :-1]
        random = torch.randint_like(tokens, 2, model["0"].get_parameter("word_embeddings.weight").shape[0])
        tokens = random.where(torch.rand(tokens.shape, device=tokens.device) < options.noise, tokens)
        loss = loss_of(model.train(), tokens, rows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % options.interval == 0 or step == options.steps:
            held_out = validate(model.eval(), valid, length)
            print(f"step {step}  loss {loss.item():.4f}  held out {held_out:.4f}  {time.monotonic() - started:.0f} s", flush=True)
            if held_out < best:
                best, weights = held_out, {name: p.detach().clone() for name, p in model.named_parameters()}
    print(f"best held-out loss {best:.4f} nats a token")
    return weights


@torch.no_grad()
def validate(model: nn.ModuleDict, valid: Tensor, length: int) -> float:
    rows = valid[: (len(valid) - 1) // length * length + 1]
    tokens, targets = rows[:-1].view(-1, length), rows[1:].view(-1, length)
    losses = [loss_of(model, a, b).item() * len(a) for a, b in zip(tokens.split(32), targets.split(32), strict=True)]
    return sum(losses) / len(tokens)


def write(model: nn.ModuleDict, weights: dict[str, Tensor], options: argparse.Namespace) -> None:
    model.load_state_dict(weights)
    layout = step_folder(options.folder, options.steps, tp=options.model_parallel_size)
    for number, layer in model.items():
        for part, tensors in enumerate(cut(layer, options.model_parallel_size, torch.float16)):
            write_layer(layout, int(number), part, tensors)
    name_latest(options.folder, layout.tag)


if __name__ == "__main__":
    sys.exit(main())
