#!/usr/bin/env python3
"""Converts a checkpoint: any format and cut to NeoX layer files of any cut, or to a Hugging Face folder; low-rank adapters can be merged into it."""

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[1])
sys.path[:] = [*(folder for folder in sys.path if folder != ROOT), ROOT]  # last: evaluate.py must not shadow the `evaluate` package

import torch  # noqa: E402

from megatron_lite.benchmark.words import positive  # noqa: E402
from megatron_lite.checkpoint.adapters import Adapters, read_adapters  # noqa: E402
from megatron_lite.checkpoint.config_json import stated_spec  # noqa: E402
from megatron_lite.checkpoint.convert import Model, refuse_filled, refuse_mixture, to_huggingface, to_neox  # noqa: E402
from megatron_lite.checkpoint.find import CheckpointLayout, check_numbers, find_checkpoint  # noqa: E402
from megatron_lite.checkpoint.load import load_layers, open_source, spec_as_stored, vocabulary_rows  # noqa: E402
from megatron_lite.config.load import load_config  # noqa: E402
from megatron_lite.config.sections import RunConfig  # noqa: E402
from megatron_lite.errors import ConfigError, UserError  # noqa: E402
from megatron_lite.log import set_up_logging  # noqa: E402
from megatron_lite.models.architecture import Architecture, architecture_named  # noqa: E402
from megatron_lite.models.memory import parameters  # noqa: E402
from megatron_lite.models.spec import BYTES, ModelSpec, spec_of  # noqa: E402
from megatron_lite.parallel.layout import Layout, check_cut, stage_numbers  # noqa: E402
from megatron_lite.parallel.mesh import single_mesh  # noqa: E402
from megatron_lite.progress import progress  # noqa: E402


def main(words: Sequence[str] | None = None) -> int:
    options = parse(words)
    set_up_logging()
    try:
        convert(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing is kept of a conversion that is not complete, and the same command begins it anew", file=sys.stderr)
        return 130
    return 0


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "source", metavar="FROM", type=Path, help="folder of NeoX layer files, of a pipe-parallel-size-0 save, of Hugging Face, or of mesh-transformer-jax"
    )
    parser.add_argument("target", metavar="TO", type=Path, help="folder to write")
    parser.add_argument("--to", choices=("neox", "huggingface"), required=True)
    parser.add_argument("--config", type=Path, help="the model's YAML; a Hugging Face folder describes itself")
    parser.add_argument("--model-parallel-size", type=positive, default=1, help="cut of the layer files (default %(default)s)")
    parser.add_argument("--dtype", choices=tuple(BYTES), help="number format to write (default: that of the folder's first block)")
    parser.add_argument("--iteration", type=int, help="step to read, instead of the one that `latest` names")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer JSON to put beside the weights (default: the YAML's vocab_file)")
    parser.add_argument("--lora", metavar="FOLDER", type=Path, help="merge these low-rank adapters, of a training with lora or in PEFT's format")
    parser.add_argument("--verify", action="store_true", help="compare the logits of a few tokens through both, in fp32")
    return parser.parse_args(words)


def convert(options: argparse.Namespace) -> None:
    layout = find_checkpoint(options.source, iteration=options.iteration)
    (refuse_mixture if options.to == "neox" else refuse_filled)(options.target)
    if options.tokenizer and not options.tokenizer.is_file():
        raise ConfigError(f"--tokenizer {options.tokenizer} is no file; name the tokenizer's JSON, or leave it out to take the YAML's vocab_file")
    config = load_config([options.config]) if options.config else None
    spec = spec_of_source(layout, config)
    check_cut(Layout(tp=options.model_parallel_size), heads=spec.heads, kv_heads=spec.kv_heads, ffn=spec.ffn, layers=spec.layers)
    numbers = stage_numbers(spec.layers, 1)[0]
    check_numbers(layout, numbers[:-1] if spec.tied_head else numbers, layers=spec.layers)
    architecture = architecture_named(spec.family)
    source = open_source(layout, architecture, spec)
    rows = vocabulary_rows(source)
    first = next(iter(source.shards(2).values()))[0].dtype  # of a block: the embedding may have been summed in fp32
    dtype: torch.dtype = getattr(torch, options.dtype) if options.dtype else first
    tp = options.model_parallel_size if options.to == "neox" else 1
    adapters = read_adapters(options.lora, architecture, spec, source) if options.lora else None
    model = Model(source, architecture, replace(spec, vocab=rows), adapters)
    with progress("converting", parameters(replace(spec, vocab=-(-rows // tp) * tp)) * dtype.itemsize) as advance:
        if options.to == "neox":
            step = int(layout.tag.removeprefix("global_step")) if layout.tag.removeprefix("global_step").isdigit() else 0
            averaged = to_neox(model, options.target, tp=tp, step=step, dtype=dtype, progress=advance)
        else:
            averaged = to_huggingface(model, options.target, dtype=dtype, extra={}, progress=advance)
            if lacking := copy_tokenizer(tokenizer_files(options, config), options.target):
                print(f"no tokenizer goes along: {lacking} is not there; name its file with --tokenizer, or put it into {options.target}", file=sys.stderr)
    added = f" with the adapters of {adapters.folder}" if adapters else ""
    print(f"{layout}{added} -> {find_checkpoint(options.target)}")
    if averaged:
        print(f"{len(averaged)} tensors ({averaged[0]}, ...) differed between the saved ranks and are averaged: this format knows one for all of them")
    if options.verify:
        difference = (logits(layout, architecture, spec, adapters) - logits(find_checkpoint(options.target), architecture, spec)).abs().max().item()
        print(f"largest difference of logits over 32 tokens, in fp32: {difference:.2e}")


def spec_of_source(layout: CheckpointLayout, config: RunConfig | None) -> ModelSpec:
    if config is not None:
        return spec_as_stored(layout, spec_of(config.model, vocab=0, dtype="float32"))
    if layout.format == "huggingface":
        return stated_spec(layout.folder, dtype="float32")
    raise ConfigError(f"{layout} does not say how many heads the model has, nor the form of its blocks; give its YAML with --config")


def tokenizer_files(options: argparse.Namespace, config: RunConfig | None) -> dict[str, Path | None]:
    """The names that transformers looks for -> where the files lie, if they do."""
    if options.tokenizer or config is None:
        path: Path = options.tokenizer or options.source / "tokenizer.json"
        beside = {} if options.tokenizer else {name: options.source / name for name in ("tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model")}
        return {"tokenizer.json" if path.suffix == ".json" else path.name: path, **beside}
    vocabulary, merges = config.tokenizer.vocab_file, config.tokenizer.merge_file
    if merges:
        return {"vocab.json": vocabulary, "merges.txt": merges}
    return {vocabulary.name if vocabulary.suffix == ".model" else "tokenizer.json": vocabulary} if vocabulary else {}


def copy_tokenizer(files: dict[str, Path | None], folder: Path) -> Path | None:
    """Copies those that are there; where there is none, returns the one that was looked for first."""
    paths = {name: path for name, path in files.items() if path is not None}
    found = {name: path for name, path in paths.items() if path.is_file()}
    for name, path in found.items():
        shutil.copy(path, folder / name)
    return None if found else next(iter(paths.values()), None)


@torch.inference_mode()
def logits(layout: CheckpointLayout, architecture: Architecture, spec: ModelSpec, adapters: Adapters | None = None) -> torch.Tensor:
    """Logits of 32 tokens from the whole model in fp32, with these adapters."""
    source, mesh = open_source(layout, architecture, spec), single_mesh()
    rows = vocabulary_rows(source)
    plan = architecture.plan(replace(spec, vocab=rows), mesh.tp)
    layers = load_layers(plan, stage_numbers(spec.layers, 1)[0], source, tp=mesh.tp, dtype=torch.float32, device=mesh.device, progress=lambda count: None)
    x = torch.randint(min(rows, 1000), (1, 32), generator=torch.Generator().manual_seed(0))
    for number, layer in layers.items():
        if adapters:
            adapters.merge_into(layer, number, mesh.tp)
        x = layer(x)
    return x[..., : min(rows, 1000)]


if __name__ == "__main__":
    sys.exit(main())
