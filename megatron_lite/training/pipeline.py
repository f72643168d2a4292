"""DeepSpeed's PipelineModule with one entry for each stage: which layers those are is decided by stage_numbers alone, as in generation."""

from collections.abc import Callable

from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mesh import Axis
from megatron_lite.training.stage import TrainedStage

Loss = Callable[[Tensor, tuple[Tensor, Tensor, Tensor]], Tensor]


class Ready(LayerSpec):
    """A stage that is there already, where it is ours."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__(nn.Module)
        self.stage = stage

    def build(self, log: bool = False) -> nn.Module:
        return self.stage


class ReadyTied(TiedLayerSpec):
    """A stage that holds the embedding, or the head that shares its weight."""

    def __init__(self, stage: nn.Module, weight: str) -> None:
        super().__init__("embedding", nn.Module, tied_weight_attr=[weight])
        self.stage = stage

    def build(self, log: bool = False) -> nn.Module:
        return self.stage


def pipeline_of(stage: TrainedStage, layout: Layout, pp: Axis, loss: Loss, *, tied_head: int | None) -> PipelineModule:
    """The module for DeepSpeed's pipeline engine. `tied_head` is the number of a head that shares the embedding's weight."""

    def spec(index: int) -> LayerSpec:
        if tied_head is None or index not in (0, pp.size - 1):
            return Ready(stage)
        return ReadyTied(stage, f"layers.{0 if index == 0 else tied_head}.word_embeddings.weight")

    topology = PipeModelDataParallelTopology(num_pp=layout.pp, num_mp=layout.tp, num_dp=layout.dp)
    module = PipelineModule([spec(index) for index in range(pp.size)], topology=topology, loss_fn=loss, partition_method="uniform")
    for name, parameter in stage.named_parameters():
        if tied_head is not None and not name.endswith("word_embeddings.weight"):
            parameter.ds_pipe_replicated = False  # pyright: ignore[reportAttributeAccessIssue]  # DeepSpeed takes the whole stage for tied
    return module
