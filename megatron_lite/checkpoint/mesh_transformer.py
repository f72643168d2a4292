"""GPT-J's own checkpoints, as mesh-transformer-jax writes them: step_N/shard_M/P.npz, the leaves of a tree of parameters in alphabetical order."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import numpy as np
import torch
from torch import Tensor

from megatron_lite.checkpoint.find import CheckpointLayout
from megatron_lite.checkpoint.source import Shards
from megatron_lite.checkpoint.unopened import unopened
from megatron_lite.errors import CheckpointError
from megatron_lite.models.spec import ModelSpec
from megatron_lite.models.weights import ByHead

EMBEDDING, PROJECTION = "embedding_shard", "projection_shard"
LINEAR = ("b", "w")
NORM = ("offset", "scale")
BLOCK = (
    *((f"linear{number}", "w") for number in ("", "_1", "_2", "_3")),  # queries, values, keys, attention's output
    *((f"linear{number}", kind) for number in ("_4", "_5") for kind in LINEAR),
    *(("replicated_layer_norm", kind) for kind in NORM),
)
ENDS = 6
"""Leaves of the embedding and the projection together. A last one is the number of the step."""


@dataclass(frozen=True)
class Leaf:
    """A tensor of the tree: `module` is embedding_shard, layer_N or projection_shard, `layer` its N."""

    module: str
    name: str

    @property
    def layer(self) -> int | None:
        return int(self.module.removeprefix("layer_")) if self.module.startswith("layer_") else None


def leaves(layers: int) -> list[Leaf]:
    """All leaves in the order of the files: modules are sorted as words, so that layer_10 stands before layer_2."""
    blocks = [Leaf(module, f"{name}.{kind}") for module in sorted(f"layer_{number}" for number in range(layers)) for name, kind in BLOCK]
    first = [Leaf(EMBEDDING, f"linear.{kind}") for kind in LINEAR]
    last = [Leaf(PROJECTION, f"linear.{kind}") for kind in LINEAR] + [Leaf(PROJECTION, f"replicated_layer_norm.{kind}") for kind in NORM]
    return [*first, *blocks, *last]


def layer_count(stored: int) -> int:
    """Layers of the model whose slim checkpoint has so many leaves in every shard; 0 if it is none."""
    return (stored - ENDS - 1) // len(BLOCK) if stored > ENDS and (stored - ENDS - 1) % len(BLOCK) == 0 else 0


class MeshTransformerFolder:
    """A checkpoint of GPT-J, read layer by layer under our names. Its shards are a tensor-parallel cut; its matrices are [inputs, outputs]."""

    def __init__(self, layout: CheckpointLayout, spec: ModelSpec) -> None:
        self.folder, self.tp, self.spec = layout.folder, layout.tp, spec
        if spec.family != "gptj":
            raise CheckpointError(f"{self.folder} is of mesh-transformer-jax, which trained GPT-J; the configuration describes a {spec.family} model")
        if spec.heads % self.tp:
            raise CheckpointError(f"{self.folder} has {self.tp} shards, which do not divide num_attention_heads {spec.heads}; is it the right configuration?")
        self.places = [_places(layout, part, leaves(spec.layers)) for part in range(self.tp)]

    def shards(self, number: int) -> Shards:
        if number == 0:
            # every shard adds a bias of its own to the embedding of every word
            shift = torch.stack([bias.float() for bias in self._parts(EMBEDDING, "linear.b")]).sum(0)
            return {"word_embeddings.weight": [part + shift for part in self._parts(EMBEDDING, "linear.w")]}
        if number == self.spec.norm_number:
            return self._norm(PROJECTION, "norm")
        if number == self.spec.head_number:
            weight = [part.T for part in self._parts(PROJECTION, "linear.w")]
            return {"final_linear.weight": weight, "final_linear.bias": self._parts(PROJECTION, "linear.b")}
        return self._block(f"layer_{number - 2}")

    def _block(self, module: str) -> Shards:
        query, value, key = ([part.T for part in self._parts(module, f"{name}.w")] for name in ("linear", "linear_1", "linear_2"))
        fused = ByHead(("query", "key", "value"), self.spec.heads // self.tp)
        return {
            **self._norm(module, "input_layernorm"),
            "attention.query_key_value.weight": [fused.assemble(parts) for parts in zip(query, key, value, strict=True)],
            "attention.dense.weight": [part.T for part in self._parts(module, "linear_3.w")],
            "mlp.dense_h_to_4h.weight": [part.T for part in self._parts(module, "linear_4.w")],
            "mlp.dense_h_to_4h.bias": self._parts(module, "linear_4.b"),
            "mlp.dense_4h_to_h.weight": [part.T for part in self._parts(module, "linear_5.w")],
            # terms of a sum, which is not to be rounded to bfloat16
            "mlp.dense_4h_to_h.bias": [part.float() for part in self._parts(module, "linear_5.b")],
        }

    def _norm(self, module: str, name: str) -> dict[str, list[Tensor]]:
        """Replicas, of which the first is taken, as everybody's conversions do."""
        kinds = {"weight": "scale", "bias": "offset"}
        return {f"{name}.{ours}": [self._part(0, Leaf(module, f"replicated_layer_norm.{theirs}"))] * self.tp for ours, theirs in kinds.items()}

    def _parts(self, module: str, name: str) -> list[Tensor]:
        return [self._part(part, Leaf(module, name)) for part in range(self.tp)]

    def _part(self, part: int, leaf: Leaf) -> Tensor:
        return read_array(*self.places[part][leaf])

    def place(self, number: int) -> Path:
        return self.folder


def _places(layout: CheckpointLayout, part: int, wanted: list[Leaf]) -> dict[Leaf, tuple[Path, ZipInfo]]:
    """File and member of every leaf of a shard. What stands before the parameters is the optimizer's."""
    stored = list(shard_arrays(layout, part))
    if len(stored) <= len(wanted) or (layer_count(len(stored)) and len(stored) != len(wanted) + 1):
        such = f", as in a model of {layer_count(len(stored))} layers" if layer_count(len(stored)) else ""
        raise CheckpointError(
            f"{layout.shard(part)} holds {len(stored)} arrays{such}; {(len(wanted) - ENDS) // len(BLOCK)} layers (num_layers) have {len(wanted) + 1}: "
            "is it the right configuration, and the download complete?"
        )
    return dict(zip(wanted, stored[-len(wanted) - 1 : -1], strict=True))


def shard_arrays(layout: CheckpointLayout, part: int) -> Iterator[tuple[Path, ZipInfo]]:
    """All arrays of a shard, in the order of the tree; no data are read."""
    for path in layout.array_files(part):
        try:
            with ZipFile(path) as archive:
                members = {member.filename: member for member in archive.infolist()}
        except (BadZipFile, OSError) as error:
            raise unopened(path, error) from None
        for number in range(len(members)):
            if f"arr_{number}.npy" not in members:
                raise CheckpointError(f"{path} holds {', '.join(sorted(members)[:3])}, but no arr_{number}; mesh-transformer-jax numbers its arrays")
            yield path, members[f"arr_{number}.npy"]


def read_array(path: Path, member: ZipInfo) -> Tensor:
    """An array of an npz file: mapped, not read, where it is not compressed. bfloat16 is a kind of two bytes that numpy has no name for."""
    try:
        array = _mapped(path, member) if member.compress_type == ZIP_STORED else _unpacked(path, member)
    except (OSError, ValueError, BadZipFile) as error:
        raise CheckpointError(f"{path}: {member.filename} is truncated or damaged ({error}); fetch the file again") from None
    if array.dtype == np.dtype("V2"):
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    if array.dtype.kind not in "fiu":
        raise CheckpointError(f"{path}: {member.filename} holds {array.dtype}; numbers are needed")
    return torch.from_numpy(array)


def _mapped(path: Path, member: ZipInfo) -> np.ndarray:
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)
        name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
        file.seek(member.header_offset + 30 + name + extra)
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, in_fortran_order, dtype = read_header(file)
        # "c" maps privately: torch wants memory that may be written, and the file must not be
        return np.memmap(path, dtype, "c", file.tell(), shape, "F" if in_fortran_order else "C")


def _unpacked(path: Path, member: ZipInfo) -> np.ndarray:
    with ZipFile(path) as archive, archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)
