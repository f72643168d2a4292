"""One pipeline stage: the layers this process holds, and a forward pass in which every rank gets the same answer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_lite.parallel.mesh import Mesh

Visit = Callable[[int, nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Stage:
    """Layers by their number, in order, all on `mesh.device` with `dtype`; hidden states between stages are [b s hidden]."""

    layers: Mapping[int, nn.Module]
    mesh: Mesh
    hidden: int
    dtype: torch.dtype

    def run(self, tokens: Tensor, visit: Visit, *, finish: Callable[[Tensor], Tensor], answer: Tensor) -> Tensor:
        """Sends tokens [b s] through the pipeline: `visit(number, layer, x)` applies each layer, `finish` turns the last stage's output into an answer of
        the shape and dtype of `answer`, which every rank returns."""
        x = self.pass_through(tokens, visit)
        if x is not None:
            # cards of one axis may round differently: the first one decides for all
            answer = self.mesh.tp.share(finish(x).to(answer.dtype).contiguous(), source=0)
        return self.mesh.pp.share(answer, source=self.mesh.pp.size - 1)

    def pass_through(self, tokens: Tensor, visit: Visit) -> Tensor | None:
        """What comes out of the last layer, on the last stage. The others hand on what they have and return None: they may take up the next batch while this
        one is further down the pipeline."""
        pp = self.mesh.pp
        x = tokens
        if not pp.is_first:
            x = pp.receive(torch.empty(*tokens.shape, self.hidden, dtype=self.dtype, device=self.mesh.device), source=pp.index - 1)
        for number, layer in self.layers.items():
            x = visit(number, layer, x)
        if pp.is_last:
            return x
        pp.send(x, to=pp.index + 1)
        return None
