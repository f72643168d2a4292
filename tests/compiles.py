"""Run by tests/test_warm.py in a process of its own: kernels become code of an H200, which takes no GPU; none is launched."""

import sys
from pathlib import Path
from typing import cast

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from megatron_lite.inference.kernels.kernel import Launch, watched
from megatron_lite.inference.warm import warm_up
from megatron_lite.parallel.mesh import single_mesh
from megatron_lite.run import load_stage
from tests.warmed import CONTEXT, ROWS, key, run_of, serve, stepper_of


class Elsewhere:
    """What Triton asks a driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main(folder: Path) -> None:
    """Prints how many kernels are compiled ahead, how many a stage asks for that serves prompts, and how many are compiled then."""
    driver.set_active(cast(DriverBase, Elsewhere()))
    compiled: list[str] = []
    knobs.runtime.jit_post_compile_hook = lambda **told: compiled.append(told["repr"])
    run = run_of(folder, single_mesh())
    warm_up(run, rows=ROWS, context=CONTEXT).join()
    ahead, asked = len(compiled), dict[str, Launch]()
    with watched(lambda launch: asked.setdefault(key(launch), launch)), torch.inference_mode():
        serve(stepper_of(load_stage(run), run), ROWS)
    for launch in asked.values():
        launch.compile()
    print(ahead, len(asked), len(compiled) - ahead)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
