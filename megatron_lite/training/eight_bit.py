"""Adam with averages in 8 bits, of the package bitsandbytes: 2 bytes a parameter instead of 8. Checkpoints hold the averages as numbers, like Adam's own."""

from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise
from bitsandbytes.optim.adamw import AdamW8bit
from torch import Tensor

BLOCK = 256
"""Numbers that share a scale in bitsandbytes' optimizers."""
NAMES = {"exp_avg": "1", "exp_avg_sq": "2"}
"""Adam's names of its averages, and the ends of those that bitsandbytes gives to their parts."""


class EightBitAdam(AdamW8bit):
    """As bitsandbytes has it. A state of plain Adam is packed at the next step."""

    def step(self, closure: Callable[[], float] | None = None) -> None:
        for place, group in enumerate(self.param_groups):
            for number, parameter in enumerate(group["params"]):
                if "exp_avg" in self.state[parameter]:
                    self._pack(group, parameter, place, number)
        super().step(closure)

    def _pack(self, group: dict[str, Any], parameter: Tensor, place: int, number: int) -> None:
        plain = self.state.pop(parameter)
        self.init_state(group, parameter, place, number)
        state = self.state[parameter]
        state["step"] = int(plain["step"])
        for name, end in NAMES.items():
            values = plain[name].to(parameter.device)
            if state[f"state{end}"].dtype == torch.uint8:
                codes, found = quantize_blockwise(values, code=state[f"qmap{end}"], blocksize=BLOCK)
                state[f"absmax{end}"].copy_(found.absmax)
                values = codes
            state[f"state{end}"].copy_(values)

    def unpack(self) -> None:
        """Makes the state plain Adam's, in host memory, to be saved. The next step packs it as it would after a resume, so both go on alike."""
        for parameter, state in dict(self.state).items():
            if "state1" in state:
                plain = {name: _numbers(state, end).cpu() for name, end in NAMES.items()}
                self.state[parameter] = {**plain, "step": torch.tensor(float(state["step"]))}


def _numbers(state: dict[str, Any], end: str) -> Tensor:
    stored = state[f"state{end}"]
    if stored.dtype != torch.uint8:  # of few numbers
        return stored
    return dequantize_blockwise(stored, absmax=state[f"absmax{end}"], code=state[f"qmap{end}"], blocksize=BLOCK)
