"""What is compiled while weights are read is what prompts and steps ask for: no more and no less, as Triton itself tells launches apart."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: there are no kernels to compile")
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from megatron_lite.config.load import load_config
from megatron_lite.inference.captured import SIZES, CapturedStepper
from megatron_lite.inference.kernels.exchange import packets, proven
from megatron_lite.inference.kernels.kernel import Launch, watched
from megatron_lite.inference.kernels.shares import shares_proven
from megatron_lite.inference.likeness import launches, likeness
from megatron_lite.inference.reading import LENGTHS
from megatron_lite.inference.request import Request, Sampling
from megatron_lite.inference.sample import Rules
from megatron_lite.inference.step import Slots
from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.peers import Peers, Shares
from megatron_lite.parallel.stage import Stage
from megatron_lite.run import Run, load_stage, prepare
from tests.runs import BYTES, random_prompts, write_run
from tests.worlds import in_world

ROOT = Path(__file__).resolve().parents[1]
SPEC = replace(BYTES, max_positions=192, layers=3)
CONTEXT, ROWS = 192, 20


@cache
def binder(jitted: Any) -> Callable[..., Any]:
    return create_function_from_signature(jitted.signature, jitted.params, make_backend(GPUTarget("cuda", 90, 32)))


def key(launch: Launch) -> str:
    """By which Triton finds code for a launch."""
    _, kinds, options = binder(launch.kernel.jitted)(*launch.args, **launch.options)
    return f"{launch.kernel.jitted.fn.__name__} {kinds} {options}"


def run_of(folder: Path, mesh: Mesh, **settings: object) -> Run:
    run = prepare(load_config([folder / "config.yml"], settings), mesh)
    return replace(run, spec=replace(run.spec, dtype="float16"))


def told(folder: Path, mesh: Mesh, rows: int, **settings: object) -> tuple[set[str], set[str]]:
    """Keys of what is compiled ahead, and of what a stage launches that serves prompts."""
    run = run_of(folder, mesh, **settings)
    ahead = {key(launch) for launch in launches(likeness(run), run.spec, words=run.tokenizer.vocab_size, rows=rows, context=CONTEXT)}
    asked: set[str] = set()
    with watched(lambda launch: asked.add(key(launch))), torch.inference_mode():
        serve(stepper_of(load_stage(run), run), rows)
    return ahead, asked


def stepper_of(stage: Stage, run: Run) -> CapturedStepper:
    """One whose graphs are gone through instead of captured, and whose ranks exchange by memory."""
    stepper, tp, spec = CapturedStepper(stage, run.spec, words=run.tokenizer.vocab_size, pages=200), stage.mesh.tp, run.spec
    stepper.graphs.capture = lambda begin, finish=lambda out: out: lambda: finish(begin())
    if tp.size > 1 and stepper.stack is not None:
        boxes, turns = torch.zeros(tp.size, dtype=torch.int64), torch.zeros(SIZES[-1] + 1, dtype=torch.int32)
        peers = Peers(tp.index, tp.size, packets(SIZES[-1], spec.hidden), boxes, turns, boxes)
        proven(peers, tp, width=spec.hidden, dtype=stage.dtype)
        shares = Shares(tp.index, tp.size, torch.zeros(2, LENGTHS[-1], spec.hidden, dtype=stage.dtype), boxes, boxes, turns[:1])
        shares_proven(shares, tp)
        stepper.peers, stepper.stack = peers, replace(stepper.stack, peers=peers, shares=shares)
    return stepper


def serve(stepper: CapturedStepper, rows: int) -> None:
    rules = Rules.of([Request(0, "", (1,), Sampling())], device=torch.device("cpu"))
    for lengths in ([37], [64], *([3] * count for count in range(2, rows + 1))):
        stepper.read(random_prompts(lengths), [[number + 1] for number in range(len(lengths))], rules)
    slots = Slots.empty(rows, longest=CONTEXT, device=torch.device("cpu"))
    for count in range(rows, 0, -1):
        slots.fill(torch.ones(count, dtype=torch.long), [3] * count, [[number + 1] for number in range(count)])
        stepper.advance(slots, count, rules)


CASES: list[tuple[dict[str, Any], dict[str, object], Layout, int]] = [
    ({}, {}, Layout(), ROWS),
    ({}, {}, Layout(), 1),
    ({}, {}, Layout(tp=2), ROWS),
    ({}, {"weight_quantization": "int8"}, Layout(), ROWS),
    ({}, {}, Layout(pp=2), 5),
    ({"parallel_residual": False}, {}, Layout(), ROWS),
]


@pytest.mark.parametrize(("kind", "settings", "layout", "rows"), CASES, ids=["20 rows", "1 row", "2 ranks", "int8", "2 stages", "sequential"])
def test_what_is_compiled_ahead_is_what_prompts_and_steps_launch(
    kind: dict[str, Any], settings: dict[str, object], layout: Layout, rows: int, tmp_path: Path
) -> None:
    write_run(tmp_path, replace(SPEC, **kind), tp=2)
    for ahead, asked in in_world(layout, lambda mesh: told(tmp_path, mesh, rows, **settings)):
        assert asked - ahead == set()
        assert ahead - asked == set()
        assert asked


COMPILER = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from megatron_lite.models.architecture import architecture_named
from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mesh import Axis, Mesh
from megatron_lite.parallel.stage import Stage
from tests.test_families import LLAMA
from tests.warmed import CONTEXT, launches, likeness, run_of
mesh = Mesh(Layout(tp=2), 0, torch.device("cpu"), Axis("pp"), Axis("dp"), Axis("tp", 0, (0, 1)))
if len(sys.argv) > 1:
    run = run_of(Path(sys.argv[1]), mesh, **dict(word.split("=") for word in sys.argv[2:]))
    stage, spec = likeness(run), run.spec
else:
    spec, device = replace(LLAMA, dtype="float16"), torch.device("meta")
    with device:
        layers = {number: make().half().requires_grad_(False) for number, make in architecture_named("llama").plan(spec, Axis("tp")).items()}
    stage = Stage(layers, Mesh(Layout(), 0, device, Axis("pp"), Axis("dp"), Axis("tp")), spec.hidden, torch.float16)
assert launches(stage, spec, words=512, rows=20, context=CONTEXT)
print(*{"sympy", "torch._dynamo"} & set(sys.modules))
"""


@pytest.mark.parametrize("settings", [[], ["weight_quantization=int8"], None], ids=["NeoX", "int8", "LLaMA"])
def test_going_through_a_model_does_not_bring_in_torchs_compiler(settings: list[str] | None, tmp_path: Path) -> None:
    """Its import takes longer than reading the weights, which it would keep from Python meanwhile."""
    write_run(tmp_path, SPEC, tp=2)
    words = [] if settings is None else [str(tmp_path), *settings]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILER, *words], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "\n"


@pytest.mark.slow
def test_behind_the_warm_up_nothing_is_left_to_compile(tmp_path: Path) -> None:
    """With the compiler for an H200, which needs no GPU."""
    write_run(tmp_path, SPEC, tp=2)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-W", "ignore", "-m", "tests.compiles", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    ahead, asked, behind = map(int, done.stdout.split())
    assert (ahead, behind) == (asked, 0)
