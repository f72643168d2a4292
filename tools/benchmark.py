#!/usr/bin/env python3
"""Measures this machine and this program on it: tools/benchmark.py decode configs/20B.yml. Several GPUs: start it with torchrun, one process a GPU."""

import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[1])
sys.path[:] = [*(folder for folder in sys.path if folder != ROOT), ROOT]  # last: evaluate.py must not shadow the `evaluate` package

from megatron_lite.benchmark.bench import Bench, joined_mesh, open_bench  # noqa: E402
from megatron_lite.benchmark.decode import DecodeOptions, Span, measure_decoding  # noqa: E402
from megatron_lite.benchmark.generate import GenerateOptions, Mixture, measure_generation  # noqa: E402
from megatron_lite.benchmark.load import LoadOptions, measure_loading  # noqa: E402
from megatron_lite.benchmark.peer import require_transformers  # noqa: E402
from megatron_lite.benchmark.plot import draw  # noqa: E402
from megatron_lite.benchmark.prefill import PrefillOptions, measure_prefill  # noqa: E402
from megatron_lite.benchmark.scoring import measure_scoring, told  # noqa: E402
from megatron_lite.benchmark.table import Report, Row, machine_facts, read_report, write_report  # noqa: E402
from megatron_lite.benchmark.words import Options, parse  # noqa: E402
from megatron_lite.config.load import load_config  # noqa: E402
from megatron_lite.config.sections import RunConfig  # noqa: E402
from megatron_lite.errors import OutputError, UserError  # noqa: E402
from megatron_lite.inference.decoders import MOST_ROWS  # noqa: E402
from megatron_lite.log import logger, set_up_logging  # noqa: E402
from megatron_lite.parallel.mesh import Mesh  # noqa: E402


def main(words: Sequence[str] | None = None) -> int:
    options = parse(sys.argv[1:] if words is None else words, RUNS, __doc__)
    set_up_logging()
    try:
        if getattr(options, "peer", None):
            require_transformers()
        options.run(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def configuration(options: Options, **more: str) -> RunConfig:
    settings = dict(word.split("=", 1) if "=" in word else (word, "") for word in options.settings)
    return load_config([options.config], {**settings, **more})


def score(options: Options) -> None:
    table = measure_scoring(configuration(options), options.data, documents=options.documents, peer=options.peer)
    if table:
        print(told(table))


def decode(options: Options) -> None:
    wanted = DecodeOptions(
        batches=options.batch,
        span=Span(options.context, options.steps),
        peer_span=Span(options.context, options.peer_steps or options.steps),
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
    wanted = GenerateOptions(
        mixture=mixture, rows=options.rows or MOST_ROWS, peer_prompts=options.peer_prompts, peer=options.peer is not None, folder=options.peer_folder
    )
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
    done = subprocess.run([*tool, *shape, *kind, *vocab, "--workers", str(options.workers)], stdout=subprocess.PIPE, text=True, check=False)
    logger.info(done.stdout.strip())
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


def plot(options: Options) -> None:
    draw([read_report(path) for path in options.reports], options.output)


RUNS = {"score": score, "decode": decode, "prefill": prefill, "load": load, "generate": generate, "plot": plot}

if __name__ == "__main__":
    sys.exit(main())
