"""Fills layers from a checkpoint of any cut: each built without memory, then given only the bytes its rank needs, straight on its device."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from megatron_lite.checkpoint.config_json import stated_activation
from megatron_lite.checkpoint.find import CheckpointLayout, check_numbers
from megatron_lite.checkpoint.huggingface import HuggingFaceFolder
from megatron_lite.checkpoint.mesh_transformer import MeshTransformerFolder
from megatron_lite.checkpoint.neox import LayerFiles
from megatron_lite.checkpoint.reader import Mapping, Range, Reader, mappings, range_of
from megatron_lite.checkpoint.sequential import RankFiles
from megatron_lite.checkpoint.source import Shards, Source
from megatron_lite.errors import CheckpointError
from megatron_lite.log import logger
from megatron_lite.models.architecture import Architecture, LayerPlan
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.layout import stage_numbers
from megatron_lite.parallel.mesh import Axis
from megatron_lite.parallel.shards import RankLocal, Rule, Split, drifted, take

Progress = Callable[[int], object]
"""Called with the number of bytes that have arrived."""
Settle = Callable[[int, nn.Module], object]
"""Called with the number of a layer that is filled, and the layer."""


def spec_as_stored(layout: CheckpointLayout, spec: ModelSpec) -> ModelSpec:
    """The spec, but for what the checkpoint itself knows better: the form of GELU that a Hugging Face folder states."""
    return replace(spec, activation=stated_activation(layout.folder, spec)) if layout.format == "huggingface" else spec


def open_source(layout: CheckpointLayout, architecture: Architecture, spec: ModelSpec) -> Source:
    """The reader for the checkpoint's format; spec.vocab is not looked at. Raises CheckpointError for a checkpoint of another model."""
    if layout.format == "huggingface":
        return HuggingFaceFolder(layout, architecture, spec)
    if layout.format == "mesh-transformer":
        return MeshTransformerFolder(layout, spec)
    numbers = stage_numbers(spec.layers, 1)[0]
    wanted = numbers[:-1] if spec.tied_head else numbers
    if layout.format == "neox":
        check_numbers(layout, wanted, layers=spec.layers)
        return LayerFiles(layout)
    source = RankFiles(layout)
    check_numbers(replace(layout, numbers=source.numbers()), wanted, layers=spec.layers)
    return source


def vocabulary_rows(source: Source) -> int:
    """Rows of the stored embedding, padding included."""
    return sum(len(shard) for shard in _stored(source.shards(0), "word_embeddings.weight", source, 0))


def load_layers(
    plan: LayerPlan,
    numbers: Iterable[int],
    source: Source,
    *,
    tp: Axis,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
    settle: Settle | None = None,
) -> dict[int, nn.Module]:
    """The plan's layers with these numbers, filled from the source. Raises CheckpointError for a missing, surplus or misshapen tensor. `settle` may make a
    layer smaller before the next one takes memory."""
    layers: dict[int, nn.Module] = {}
    averaged = False
    with Reader(device) as reader:
        for number in numbers:
            with torch.device("meta"):
                layer = plan[number]().to(dtype).requires_grad_(False)
            tied = _tied_weight(layers, number, layer)
            if tied is not None:
                layer.get_submodule("word_embeddings").weight = tied
            else:
                _allocate(layer, device)
                averaged |= fill(layer, number, source, tp, reader, progress)
            layers[number] = layer.eval()
            if settle is not None:
                reader.wait()
                settle(number, layer)
        reader.wait()
    if averaged:
        logger.info(f"norms or biases that the {source.tp} ranks of the checkpoint should hold alike differ between them, and are averaged")
    return layers


def _allocate(layer: nn.Module, device: torch.device) -> None:
    """Gives a layer that was built on meta its memory. Module.to_empty does the same, but imports half a second of symbolic algebra."""
    for module in layer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            module.register_parameter(name, nn.Parameter(empty, requires_grad=parameter.requires_grad))


@torch.no_grad()
def fill(layer: nn.Module, number: int, source: Source, tp: Axis, reader: Reader, progress: Progress) -> bool:
    """Fills each parameter of the layer with what this rank's place in the cut asks for; what is large has arrived when the reader says so. True where
    copies that should be alike were averaged."""
    stored_number = 0 if number and hasattr(layer, "word_embeddings") else number  # a tied head lies in the embedding's file
    found = matched(layer, stored_number, source, tp.size)
    mapped, averaged = mappings(), False  # of the files that are now open
    for path, (rule, stored, parameter) in found.items():
        module_name, _, name = path.rpartition(".")
        if not _fetch(rule, stored, parameter, tp, reader, mapped, progress):
            averaged |= not isinstance(rule, RankLocal) and drifted(rule, stored, tp.size)
            _hold(layer.get_submodule(module_name), name, take(rule, stored, tp.index, tp.size))
            progress(parameter.nbytes)
    return averaged


def matched(layer: nn.Module, number: int, source: Source, size: int) -> dict[str, tuple[Rule, list[Tensor], Tensor]]:
    """Path -> how it is cut, what is stored of it, and the parameter, which belongs to one of `size` ranks: all that the layer has, and all that the layer
    of this number in the source has. Raises CheckpointError for a missing, surplus or misshapen tensor."""
    shards, wanted = source.shards(number), dict(layer.named_parameters())
    if surplus := sorted(shards.keys() - wanted.keys()):
        raise CheckpointError(
            f"{source.place(number)} holds {', '.join(surplus[:3])}, which layer {number} of this model does not have; is it of another architecture?"
        )
    found: dict[str, tuple[Rule, list[Tensor], Tensor]] = {}
    for path, parameter in wanted.items():
        module_name, _, name = path.rpartition(".")
        rule = cast(dict[str, Rule], layer.get_submodule(module_name).rules)[name]
        stored = _stored(shards, path, source, number)
        _check_shape(rule, stored, parameter, size, f"{source.place(number)}: {path}")
        found[path] = (rule, stored, parameter)
    return found


def _fetch(rule: Rule, stored: list[Tensor], parameter: Tensor, tp: Axis, reader: Reader, mapped: list[Mapping], progress: Progress) -> bool:
    """Has the reader fill a cut matrix from its files, piece by piece; False where the plain way has to do it."""
    if not isinstance(rule, Split) or parameter.dim() != 2:
        return False
    pieces = rule.pieces(stored, tp.index, tp.size)
    ranges = [range_of(piece, mapped) for piece in pieces]
    if not all(ranges) or sum(piece.shape[rule.dim] for piece in pieces) != parameter.shape[rule.dim]:
        return False
    start = 0
    for piece, place in zip(pieces, ranges, strict=True):
        length = piece.shape[rule.dim]
        reader.fetch(cast(Range, place), parameter.narrow(rule.dim, start, length), progress)
        start += length
    return True


def _hold(module: nn.Module, name: str, found: Tensor) -> None:
    """Copies into the parameter; drifted copies that are kept apart (RankLocal) make it larger."""
    parameter = module.get_parameter(name)
    if found.shape != parameter.shape:
        parameter = nn.Parameter(parameter.new_empty(found.shape), requires_grad=parameter.requires_grad)
        module.register_parameter(name, parameter)
    parameter.copy_(found)


def _stored(shards: Shards, path: str, source: Source, number: int) -> list[Tensor]:
    if path not in shards:
        has = ", ".join(sorted(shards)[:3]) or "nothing for this layer"
        raise CheckpointError(f"{source.place(number)} lacks {path} (it has {has}); is it a checkpoint of this architecture?")
    return list(shards[path])


def _check_shape(rule: Rule, stored: list[Tensor], parameter: Tensor, size: int, what: str) -> None:
    if not all(shard.is_floating_point() for shard in stored):
        raise CheckpointError(f"{what} holds {str(stored[0].dtype).removeprefix('torch.')} numbers; weights in float16, bfloat16 or float32 are needed")
    found, wanted = rule.whole(stored[0].shape, len(stored)), rule.whole(parameter.shape, size)
    if found and getattr(rule, "padded", False):
        found = (-(-found[0] // size) * size, *found[1:])
    if found != wanted or any(shard.shape != stored[0].shape for shard in stored):
        shapes = " + ".join(str(list(shard.shape)) for shard in stored)
        raise CheckpointError(f"{what} is {shapes} in the file, which is {list(found)} in all; the configuration needs {list(wanted)}")


def _tied_weight(layers: dict[int, nn.Module], number: int, layer: nn.Module) -> nn.Parameter | None:
    """The embedding's own weight, where the head shares it and both are on this stage."""
    if number and 0 in layers and hasattr(layer, "word_embeddings"):
        return layers[0].get_submodule("word_embeddings").weight  # pyright: ignore[reportReturnType]
    return None
