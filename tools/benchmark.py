#!/usr/bin/env python3
"""Measures this machine and this program on it: tools/benchmark.py decode configs/20B.yml. Several GPUs: start it with torchrun, one process a GPU."""

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[1])
sys.path[:] = [*(folder for folder in sys.path if folder != ROOT), ROOT]  # last: evaluate.py must not shadow the `evaluate` package

from megatron_lite.benchmark.bench import Bench, joined_mesh, open_bench  # noqa: E402
from megatron_lite.benchmark.decode import DecodeOptions, Span, measure_decoding  # noqa: E402
from megatron_lite.benchmark.generate import GenerateOptions, Mixture, measure_generation  # noqa: E402
from megatron_lite.benchmark.load import LoadOptions, measure_loading  # noqa: E402
from megatron_lite.benchmark.plot import draw  # noqa: E402
from megatron_lite.benchmark.prefill import PrefillOptions, measure_prefill  # noqa: E402
from megatron_lite.benchmark.scoring import measure_scoring, told  # noqa: E402
from megatron_lite.benchmark.table import Report, Row, machine_facts, read_report, write_report  # noqa: E402
from megatron_lite.config.load import load_config  # noqa: E402
from megatron_lite.config.sections import RunConfig  # noqa: E402
from megatron_lite.errors import OutputError, UserError  # noqa: E402
from megatron_lite.log import logger, set_up_logging  # noqa: E402
from megatron_lite.parallel.mesh import Mesh  # noqa: E402

Options = argparse.Namespace


def main(words: Sequence[str] | None = None) -> int:
    options = parse(sys.argv[1:] if words is None else words)
    set_up_logging()
    try:
        options.run(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def parse(words: Sequence[str]) -> Options:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    _score_words(commands.add_parser("score", help="LAMBADA and PIQA: seconds of scoring, beside transformers in lm-eval's manner"))
    _decode_words(commands.add_parser("decode", help="one more token for every row: tokens/s, beside the time in which memory is read once"))
    _prefill_words(commands.add_parser("prefill", help="reading prompts: ms and TFLOP/s"))
    _load_words(commands.add_parser("load", help="from files to GPUs: GB/s, cold and from the page cache"))
    _generate_words(commands.add_parser("generate", help="a mixed file of prompts: tokens/s from the first to the last"))
    plot = commands.add_parser("plot", help="draws the figures of decode")
    plot.add_argument("reports", nargs="+", type=Path, metavar="FILE", help="what decode wrote with --json")
    plot.add_argument("--output", "-o", type=Path, required=True, help="an image, such as docs/decode.png (needs matplotlib)")
    plot.set_defaults(run=lambda options: draw([read_report(path) for path in options.reports], options.output))
    options, others = parser.parse_known_args(words)
    if strange := [word for word in others if word.startswith("-") or "=" not in word or not hasattr(options, "settings")]:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if others:
        options.settings += others  # settings may stand between and behind options
    options.words = words
    return options


def _model_words(parser: argparse.ArgumentParser, run: Callable[[Options], None]) -> None:
    parser.add_argument("config", type=Path, help="a YAML such as configs/20B.yml")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that win over the file, such as num_layers=4")
    parser.set_defaults(run=run)


def _score_words(parser: argparse.ArgumentParser) -> None:
    _model_words(parser, score)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with lambada/lambada_test.jsonl and piqa/valid.jsonl (default %(default)s)")
    parser.add_argument("--documents", type=int, help="only the first so many of each task")
    parser.add_argument("--peer", type=counts, default=(), metavar="BATCH,...", help="transformers with random weights at these batch sizes, instead of us")


def _common_words(parser: argparse.ArgumentParser, run: Callable[[Options], None]) -> None:
    _model_words(parser, run)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--peer", choices=("transformers",), help="also measure transformers, after our model was freed")
    parser.add_argument("--vocab", type=positive, help="rows of the embedding (default: the tokenizer's entries, padded as NeoX does)")


def _weights_words(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", action="store_true", help="the weights of the configuration's checkpoint, instead of random ones")
    parser.add_argument(
        "--peer-folder", metavar="FOLDER", help="weights for transformers in Hugging Face's form; its tp_plan takes no others (default: random)"
    )


def _decode_words(parser: argparse.ArgumentParser) -> None:
    _common_words(parser, decode)
    _weights_words(parser)
    parser.add_argument("--batch", type=counts, default=(1, 8, 64), metavar="ROWS,...", help="rows that share a step (default 1,8,64)")
    parser.add_argument("--context", type=positive, default=256, help="tokens that a row has in the middle of the steps (default %(default)s)")
    parser.add_argument("--steps", type=positive, default=64, help="steps whose median is taken (default %(default)s)")
    parser.add_argument("--plain", action="store_true", help="also measure the plain path")
    parser.add_argument("--compile", type=counts, nargs="?", const=(1,), default=(), metavar="ROWS,...", help="transformers compiled as well (default 1 row)")


def _prefill_words(parser: argparse.ArgumentParser) -> None:
    _common_words(parser, prefill)
    _weights_words(parser)
    parser.add_argument("--tokens", type=counts, default=(2048,), metavar="COUNT,...", help="tokens of a prompt (default 2048)")
    parser.add_argument("--batch", type=counts, default=(1,), metavar="ROWS,...", help="prompts that are read at once (default 1)")
    parser.add_argument("--times", type=positive, default=7, help="runs whose median is taken (default %(default)s)")


def _load_words(parser: argparse.ArgumentParser) -> None:
    _common_words(parser, load)
    parser.add_argument("--folder", type=Path, help="the checkpoint (default: the configuration's); random weights are written where there is none")
    parser.add_argument("--format", choices=("neox", "huggingface"), default="neox", help="whose files to write (default %(default)s)")
    parser.add_argument("--file-cut", type=positive, default=2, help="ranks that the files to write are cut for (default %(default)s)")
    parser.add_argument("--workers", type=positive, default=8, help="files written at once (default %(default)s)")
    parser.add_argument("--no-cold", action="store_true", help="only from the page cache")
    parser.add_argument("--times", type=positive, default=3, help="runs from the page cache whose median is taken (default %(default)s)")
    parser.add_argument("--direct-gb", type=float, default=4.0, help="GB that are read past the page cache to know the disk (default %(default)s)")


def _generate_words(parser: argparse.ArgumentParser) -> None:
    _common_words(parser, generate)
    _weights_words(parser)
    parser.add_argument("--prompts", type=positive, default=1000, help="(default %(default)s)")
    parser.add_argument("--lengths", type=span, default=(5, 1500), metavar="LOW-HIGH", help="tokens of a prompt, log-uniform (default 5-1500)")
    parser.add_argument("--new", type=span, default=(16, 256), metavar="LOW-HIGH", help="new tokens, log-uniform (default 16-256)")
    parser.add_argument("--seed", type=int, default=0, help="other prompts (default %(default)s)")
    parser.add_argument("--rows", type=positive, default=128, help="rows that share a step (default %(default)s)")
    parser.add_argument("--peer-prompts", type=positive, default=128, help="prompts that transformers continues, the first ones (default %(default)s)")


def positive(word: str) -> int:
    """A whole number of at least 1; argparse tells the user where it is none."""
    if int(word) < 1:
        raise ValueError
    return int(word)


def counts(word: str) -> tuple[int, ...]:
    return tuple(map(positive, word.split(",")))


def span(word: str) -> tuple[int, int]:
    low, high = map(positive, word.split("-"))
    if low > high:
        raise ValueError
    return low, high


def configuration(options: Options, **more: str) -> RunConfig:
    return load_config([options.config], {**dict(word.split("=", 1) for word in options.settings), **more})


def score(options: Options) -> None:
    table = measure_scoring(configuration(options), options.data, documents=options.documents, peer=options.peer)
    if table:
        print(told(table))


def decode(options: Options) -> None:
    wanted = DecodeOptions(
        batches=options.batch,
        span=Span(options.context, options.steps),
        plain=options.plain,
        peer=options.peer is not None,
        compiled=options.compile if options.peer else (),
        folder=options.peer_folder,
    )
    with opened(options) as bench:
        tell(options, bench.mesh, bench_facts(bench, context=options.context, steps=options.steps), measure_decoding(bench, wanted))


def prefill(options: Options) -> None:
    wanted = PrefillOptions(batches=options.batch, lengths=options.tokens, times=options.times, peer=options.peer is not None, folder=options.peer_folder)
    with opened(options) as bench:
        tell(options, bench.mesh, bench_facts(bench), measure_prefill(bench, wanted))


def generate(options: Options) -> None:
    mixture = Mixture(options.prompts, options.lengths, options.new, options.seed)
    wanted = GenerateOptions(mixture=mixture, rows=options.rows, peer_prompts=options.peer_prompts, peer=options.peer is not None, folder=options.peer_folder)
    with opened(options) as bench:
        tell(options, bench.mesh, bench_facts(bench), measure_generation(bench, wanted))


def load(options: Options) -> None:
    config = configuration(options, **({"load": str(options.folder)} if options.folder else {}))
    wanted = LoadOptions(times=options.times, cold=not options.no_cold, direct_bytes=int(options.direct_gb * 1e9), peer=options.peer is not None)
    with joined_mesh(config) as mesh:
        if options.folder and mesh.is_writer and not (options.folder.exists() and any(options.folder.iterdir())):
            synthesize(options)
        mesh.wait()
        tell(
            options,
            mesh,
            {"model": str(options.config), "layout": str(mesh.layout), "checkpoint": str(config.checkpoint.load)},
            measure_loading(config, mesh, wanted),
        )


def synthesize(options: Options) -> None:
    """Writes the checkpoint by the tool for that, in a process of its own: it forks, which a process that uses a GPU must not."""
    shape = [word for word in options.settings if not word.replace("-", "_").startswith(("pipe_parallel_size", "model_parallel_size", "load="))]
    vocab = ["--vocab", str(options.vocab)] if options.vocab else []
    kind = ["--format", options.format] if options.format != "neox" else ["--model-parallel-size", str(options.file_cut)]
    tool = [sys.executable, str(Path(ROOT, "tools", "synthesize_checkpoint.py")), str(options.config), str(options.folder)]
    done = subprocess.run([*tool, *shape, *kind, *vocab, "--workers", str(options.workers)], stdout=sys.stderr, check=False)
    if done.returncode:
        raise OutputError(f"no checkpoint could be written to {options.folder}, for the reason above; choose another --folder")


def opened(options: Options) -> AbstractContextManager[Bench]:
    return open_bench(configuration(options), vocab=options.vocab, from_checkpoint=options.checkpoint)


def bench_facts(bench: Bench, **more: int) -> dict[str, str | int]:
    return {"model": f"{bench.config.files[0]}, {bench.spec.dtype}, {bench.weights}", "layout": str(bench.mesh.layout), **more}


def tell(options: Options, mesh: Mesh, facts: dict[str, str | int], measured: Iterable[Row]) -> None:
    """Each figure as it comes, in the log, and all of them in a table at the end."""
    rows = []
    for row in measured:
        rows.append(row)
        logger.info(row.sentence)
    if mesh.is_writer:
        command = " ".join(["tools/benchmark.py", *options.words])
        report = Report(command=command, facts={"command": command, **machine_facts(mesh.layout.size), **facts}, rows=rows)
        print(report.as_text())
        if options.json:
            write_report(report, options.json)


if __name__ == "__main__":
    sys.exit(main())
