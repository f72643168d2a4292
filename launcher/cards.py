"""GPUs by name: memory, bandwidth and speed as their makers state them, for plans of machines that are not here."""

import re
from dataclasses import dataclass

from launcher.hardware import MIB, Device, Hardware
from megatron_lite.errors import ConfigError

MOST = 4096
GPUS = re.compile(r"(?:(\d+)\s*x\s*)?(.+)", re.IGNORECASE)
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(GB|GiB|G)", re.IGNORECASE)


@dataclass(frozen=True)
class Card:
    """`mib` of memory as nvidia-smi shows it, GB/s to it, and dense TFLOP/s of matrix products in half precision with sums in fp32."""

    name: str
    mib: int
    bandwidth: int
    teraflops: float


CARDS = (  # the first one all of whose words are in a name is meant
    Card("B200", 183_359, 8000, 2250),
    Card("H200", 143_771, 4800, 989),
    Card("H100 NVL", 95_830, 3900, 835),
    Card("H100 PCIe", 81_559, 2039, 756),
    Card("H100", 81_559, 3350, 989),
    Card("A100 40GB", 40_960, 1555, 312),
    Card("A100", 81_920, 2039, 312),
    Card("L40S", 46_068, 864, 362),
    Card("L40", 46_068, 864, 181),
    Card("L4", 23_034, 300, 121),
    Card("A40", 46_068, 696, 150),
    Card("A30", 24_576, 933, 165),
    Card("A10G", 23_028, 600, 70),
    Card("A10", 23_028, 600, 125),
    Card("RTX 6000 Ada", 49_140, 960, 364),
    Card("RTX A6000", 49_140, 768, 155),
    Card("RTX A5000", 24_564, 768, 111),
    Card("RTX 5090", 32_607, 1792, 210),
    Card("RTX 4090", 24_564, 1008, 165),
    Card("RTX 4080", 16_376, 717, 97),
    Card("RTX 3090 Ti", 24_564, 1008, 80),
    Card("RTX 3090", 24_576, 936, 71),
    Card("RTX 3080", 10_240, 760, 60),
    Card("RTX 3060", 12_288, 360, 25),
    Card("RTX 2080 Ti", 11_264, 616, 54),
    Card("Titan RTX", 24_576, 672, 65),
    Card("V100 16GB", 16_384, 900, 112),
    Card("V100", 32_768, 900, 112),
    Card("T4", 15_360, 320, 65),
)


def card_named(name: str) -> Card | None:
    """The card that a name such as nvidia-smi's means, if we know it. RTX3090, rtx-3090 and NVIDIA GeForce RTX 3090 are one."""
    words = _words(name)
    return next((card for card in CARDS if _words(card.name) <= words), None)


def _words(name: str) -> set[str]:
    apart = re.sub(r"(rtx|titan|geforce|tesla)", r"\1 ", name.lower())
    return set(re.split(r"[\s_-]+", apart.strip()))


def hardware_named(text: str) -> Hardware:
    """`2x24GB`, `8xH100`, `RTX 3090` or `RTX3090+2xRTX3060` as so many empty GPUs."""
    return Hardware("GPU", tuple(device for part in text.split("+") for device in _cards_named(part, text)))


def _cards_named(part: str, text: str) -> tuple[Device, ...]:
    match = GPUS.fullmatch(part.strip())
    count, name = (int(match[1] or 1), match[2].strip()) if match else (0, "")
    size = SIZE.fullmatch(name)
    if not 0 < count <= MOST or (size and not float(size[1])):
        raise ConfigError(f"gpus is {text!r}; write a number of GPUs and their memory or name, such as gpus=2x24GB or gpus=8xH100")
    if size:
        unit = 2**30 if size[2].lower() == "gib" else 10**9
        return (Device(f"{size[1]} {'GiB' if unit == 2**30 else 'GB'}", int(float(size[1]) * unit)),) * count
    card = card_named(name)
    if card is None:
        known = ", ".join(card.name for card in CARDS)
        raise ConfigError(f"gpus is {text!r}, and {name} is no card that is known here ({known}); give its memory instead, as in gpus={count}x24GB")
    return (Device(card.name, card.mib * MIB),) * count
