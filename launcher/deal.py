"""How many blocks each pipeline stage gets where GPUs differ: as many as suit their speeds, and no more than they have room for."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from launcher.cards import Card, card_named
from launcher.hardware import Device, Hardware
from megatron_lite.parallel.layout import Layout, evenly


@dataclass(frozen=True)
class Dealer:
    """Deals blocks. `needs` are the bytes that a stage of a layout takes of each of its GPUs, `speed` is what counts of a card."""

    hardware: Hardware
    layers: int
    needs: Callable[[Layout, int], int]
    speed: Callable[[Card], float]

    def deal(self, layout: Layout) -> Layout:
        """The layout with blocks for its stages; as it is where they are told already, where the GPUs are alike, or where even numbers suit them."""
        devices = self.hardware.devices[: layout.size]
        alike = len({(device.name, device.free) for device in devices}) == 1
        if self.hardware.kind != "GPU" or layout.pp == 1 or layout.blocks or alike or len(devices) < layout.size:
            return layout
        stages = [devices[stage * layout.dp * layout.tp : (stage + 1) * layout.dp * layout.tp] for stage in range(layout.pp)]
        weights = self._weights(stages)
        rooms = [self._room(layout, stage, stages[stage]) for stage in range(layout.pp)]
        blocks = tuple(shares(self.layers, weights, rooms))
        return layout if blocks == evenly(self.layers, layout.pp) else replace(layout, blocks=blocks)

    def _weights(self, stages: Sequence[Sequence[Device]]) -> list[float]:
        """How fast a stage is: as its slowest card, or where cards are not known as the one with the least memory."""
        devices = [device for stage in stages for device in stage]
        if len({device.name for device in devices}) == 1:
            return [1.0] * len(stages)
        cards = {device.name: card_named(device.name) for device in devices}
        known = {name: self.speed(card) for name, card in cards.items() if card}
        return [min(known[device.name] if len(known) == len(cards) else float(device.free or 0) for device in stage) or 1.0 for stage in stages]

    def _room(self, layout: Layout, stage: int, devices: Sequence[Device]) -> int:
        """The most blocks that the stage has memory for."""
        free = min((device.free for device in devices if device.free is not None), default=None)
        bounds = [bound for bound in (free, self.hardware.limit) if bound is not None]
        if not bounds:
            return self.layers

        def taken(blocks: int) -> int:
            others = list(evenly(self.layers - blocks, layout.pp - 1))
            return self.needs(replace(layout, blocks=(*others[:stage], blocks, *others[stage:])), stage)

        return bisect_right(range(1, self.layers - layout.pp + 2), min(bounds), key=taken)


def shares(blocks: int, weights: Sequence[float], rooms: Sequence[int]) -> list[int]:
    """So many blocks in shares such that the slowest is done as early as can be; what there is no room for goes where it delays least."""
    counts = [1] * len(weights)
    for _ in range(blocks - len(weights)):
        roomy = [stage for stage, count in enumerate(counts) if count < rooms[stage]] or range(len(weights))
        counts[min(roomy, key=lambda stage: (counts[stage] + 1) / weights[stage])] += 1
    return counts


def what_was_dealt(asked: Layout, dealt: Layout, hardware: Hardware) -> str | None:
    """A line, where blocks were dealt that nobody told."""
    if dealt == asked:
        return None
    names = ", ".join(dict.fromkeys(device.name for device in hardware.devices[: dealt.size]))
    blocks = ", ".join(map(str, dealt.blocks))
    return f"the GPUs differ ({names}): blocks are dealt to them by speed and memory, pipe-stage-layers=[{blocks}]"
