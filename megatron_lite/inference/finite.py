"""Where a model first computes what is no number."""

import torch
from torch import Tensor, nn

from megatron_lite.parallel.stage import Stage

NONE = 1 << 20


@torch.inference_mode()
def first_bad_layer(stage: Stage, tokens: list[int]) -> int | None:
    """The number of the first layer whose output for this text is not finite, on any rank; None where all are, by the plain path. All ranks call this."""
    mesh = stage.mesh
    found = torch.full((), float(NONE), device=mesh.device)

    def visit(number: int, layer: nn.Module, x: Tensor) -> Tensor:
        nonlocal found
        out = layer(x)
        found = torch.minimum(found, torch.where(out.isfinite().all(), NONE, number).float())
        return out

    stage.pass_through(torch.tensor([tokens], device=mesh.device), visit)
    first = mesh.tp.minimum(mesh.pp.minimum(found))
    return None if first >= NONE else int(first)
