"""Random weights of the size of trained ones, the same for the same seed on every machine, to rehearse and measure with before a download."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from zipfile import ZIP_STORED, ZipFile

import numpy as np
import torch
from torch import Tensor

from megatron_lite.checkpoint.mesh_transformer import Leaf, leaves
from megatron_lite.checkpoint.source import Shards
from megatron_lite.errors import OutputError
from megatron_lite.models.architecture import Architecture
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.layout import stage_numbers
from megatron_lite.parallel.mesh import Axis

PERIOD = 4_194_301
"""A prime number of random values, repeated: no two rows of a matrix are alike, and writing waits for the disk, not for the generator."""
SLIM_SHARDS, SHARD_FILES = 8, 16
"""Of GPT-J's slim checkpoint: a shard for each core of a TPU, and the files of each."""

ShapeMap = Mapping[str, tuple[int, ...]]


def layer_shapes(architecture: Architecture, spec: ModelSpec, number: int, tp: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what each of tp ranks holds of a layer; nothing for a tied head, which has no weights of its own."""
    if number == spec.head_number and spec.tied_head:
        return {}
    with torch.device("meta"):
        layer = architecture.plan(spec, Axis("tp", 0, tuple(range(tp))))[number]()
    return {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}


def random_tensors(shapes: ShapeMap, spec: ModelSpec, *seed: int) -> Iterator[tuple[str, Tensor]]:
    """Tensors that differ from those of every other seed: norms around one, all else around zero."""
    state = np.random.SeedSequence((seed[0] % 2**64, *seed[1:])).generate_state(1)
    generator = torch.Generator().manual_seed(int(state[0]))
    dtype: torch.dtype = getattr(torch, spec.dtype)
    for name, shape in shapes.items():
        if name.endswith("inv_freq"):
            yield name, (spec.rotary_base ** (-torch.arange(0, spec.rotary_dim, 2) / spec.rotary_dim)).to(dtype)
            continue
        some = torch.randn(min(PERIOD, prod(shape)), generator=generator)
        around_one = "norm" in name and not name.endswith(("bias", "offset"))
        some = some.mul_(0.1).add_(1) if around_one else some.mul_((2 / (5 * spec.hidden)) ** 0.5)
        yield name, _repeated(some.to(dtype), prod(shape)).view(shape)


def _repeated(some: Tensor, count: int) -> Tensor:
    """So many numbers, the same ones again and again."""
    whole = torch.empty(count, dtype=some.dtype)
    for piece in whole.split(len(some)):
        piece.copy_(some[: len(piece)])
    return whole


@dataclass
class RandomWeights:
    """A checkpoint that is nowhere, for what reads checkpoints: the whole layers of a model, one at a time."""

    tp = 1
    architecture: Architecture
    spec: ModelSpec
    seed: int

    def shards(self, number: int) -> Shards:
        shapes = layer_shapes(self.architecture, self.spec, number, 1)
        return {name: [tensor] for name, tensor in random_tensors(shapes, self.spec, self.seed, number, 0)}

    def place(self, number: int) -> Path:
        return Path("random weights")


@dataclass(frozen=True)
class SlimShard:
    """One of the shards of mesh-transformer-jax's slim checkpoint of a GPT-J model, with random weights; called, it is written to `folder`."""

    spec: ModelSpec
    shards: int
    seed: int
    folder: Path

    def __call__(self, part: int) -> int:
        """Writes shard `part` and returns how many numbers it holds."""
        place, wanted = self.folder / f"shard_{part}", leaves(self.spec.layers)
        try:
            place.mkdir(parents=True, exist_ok=True)
            for file, chosen in enumerate(np.array_split(np.arange(len(wanted) + 1), SHARD_FILES)):
                with ZipFile(place / f"{file}.npz", "w", ZIP_STORED) as archive:
                    for position, index in enumerate(chosen):
                        array = self._array(wanted[index], part, int(index)) if index < len(wanted) else np.array(0, np.int32)
                        with archive.open(f"arr_{position}.npy", "w", force_zip64=True) as member:
                            np.lib.format.write_array(member, array)
        except OSError as error:
            raise OutputError(f"{place} cannot be written: {error.strerror}; free some space or choose another folder") from None
        return sum(map(prod, (leaf_shape(leaf, self.spec, self.shards) for leaf in wanted)))

    def _array(self, leaf: Leaf, part: int, index: int) -> np.ndarray:
        copy = 0 if "norm" in leaf.name else part  # norms are replicas
        ((_, tensor),) = random_tensors({leaf.name: leaf_shape(leaf, self.spec, self.shards)}, self.spec, self.seed, index, copy)
        return tensor.view(torch.int16).numpy().view("V2")


def leaf_shape(leaf: Leaf, spec: ModelSpec, shards: int) -> tuple[int, ...]:
    """The shape of a leaf in each of so many shards."""
    d, vocab, part, ffn = spec.hidden, spec.vocab // shards, spec.hidden // shards, spec.ffn // shards
    if "norm" in leaf.name:
        return (d,)
    if leaf.layer is None:
        ends = {"embedding_shard": {"w": (vocab, d), "b": (d,)}, "projection_shard": {"w": (d, vocab), "b": (vocab,)}}
        return ends[leaf.module][leaf.name[-1]]
    linears = {"linear_3.w": (part, d), "linear_4.w": (d, ffn), "linear_4.b": (ffn,), "linear_5.w": (ffn, d), "linear_5.b": (d,)}
    return linears.get(leaf.name, (d, part))


def slim_size(spec: ModelSpec, shards: int) -> int:
    """Numbers that such a checkpoint holds in all of its shards."""
    return shards * sum(prod(leaf_shape(leaf, spec, shards)) for leaf in leaves(spec.layers))


def whole_size(architecture: Architecture, spec: ModelSpec) -> int:
    return sum(prod(shape) for number in stage_numbers(spec.layers, 1)[0] for shape in layer_shapes(architecture, spec, number, 1).values())


def rank_state(spec: ModelSpec, step: int, *, pipes: int, tp: int) -> dict[str, object]:
    """What mp_rank files of a pipeline save hold: counters, and no weights."""
    counters = {"global_steps": step, "skipped_steps": 0, "iteration": step, "dp_world_size": 1, "mp_world_size": pipes * tp}
    stated = {
        "num_layers": spec.layers,
        "hidden_size": spec.hidden,
        "num_attention_heads": spec.heads,
        "max_position_embeddings": spec.max_positions,
        "padded_vocab_size": spec.vocab,
        "model_parallel_size": tp,
    }
    return {"module": None, "optimizer": None, **counters, "args": stated}
