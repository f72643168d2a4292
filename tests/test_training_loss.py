"""The loss over a cut vocabulary, its gradient, and the weights that training starts with."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.config.sections import Initializer
from megatron_lite.models.neox import ARCHITECTURE
from megatron_lite.parallel.cross_entropy import Loss, cross_entropy
from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mesh import Axis, Mesh
from megatron_lite.training.engine import Step
from megatron_lite.training.fresh import draw_layer
from megatron_lite.training.recipe import Batching
from megatron_lite.training.stage import make_trainable, named_rules
from tests.models import SMALL
from tests.training_models import SECTION, batches_for, engine_for, recipe_for
from tests.worlds import forked, in_world

LOGITS = torch.randn(6, 12, generator=torch.Generator().manual_seed(0)) * 5
LABELS = torch.tensor([0, 3, 5, 6, 9, 9])
WORDS = 10  # the last two rows only fill up


def _cut_loss(mesh: Mesh) -> tuple[Tensor, Tensor]:
    logits = LOGITS.chunk(mesh.tp.size, -1)[mesh.tp.index].clone().requires_grad_()
    losses = cross_entropy(logits, LABELS, words=WORDS, tp=mesh.tp)
    (losses * torch.arange(6)).sum().backward()
    assert logits.grad is not None
    return losses.detach(), logits.grad


@pytest.mark.parametrize("size", [1, 2, 4])
def test_loss_and_gradient_of_a_cut_vocabulary_are_those_of_the_whole(size: int) -> None:
    whole = LOGITS[:, :WORDS].clone().requires_grad_()
    losses = F.cross_entropy(whole, LABELS, reduction="none")
    (losses * torch.arange(6)).sum().backward()
    assert whole.grad is not None
    parts = in_world(Layout(tp=size), _cut_loss)
    for mine, _ in parts:
        torch.testing.assert_close(mine, losses.detach())
    torch.testing.assert_close(torch.cat([gradient for _, gradient in parts], -1), F.pad(whole.grad, (0, 2)))


def test_the_loss_is_the_sum_over_what_is_learned_shared_out_among_so_many() -> None:
    loss, learned = Loss(WORDS, Axis("tp")), torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    expected = F.cross_entropy(LOGITS[[0, 2], :WORDS], LABELS[[0, 2]], reduction="sum") / 5
    torch.testing.assert_close(loss(LOGITS, (LABELS, learned, torch.tensor(5.0))), expected)
    assert loss(LOGITS, (LABELS, torch.zeros(6), torch.tensor(1.0))) == 0


@pytest.mark.parametrize("layout", [Layout(), Layout(pp=2), Layout(tp=2)], ids=str)
def test_a_micro_batch_of_which_nothing_is_learned_changes_nothing(layout: Layout) -> None:
    def stepped(mesh: Mesh) -> tuple[Step, Step, float]:
        recipe = replace(recipe_for(mesh.layout), batching=Batching(micro=2, accumulation=2, replicas=1))
        engine = engine_for(SMALL, mesh, recipe)
        first = next(batches_for(engine))
        masked = replace(first, loss_mask=torch.zeros_like(first.loss_mask))
        alone, nothing = engine.validate(iter([first]), 1), engine.validate(iter([masked]), 1)
        half = engine.step(iter([first, masked]), rate=0.0)
        none = engine.step(iter([masked, masked]), rate=0.0)
        assert half.loss == pytest.approx(alone, abs=1e-6)
        return half, none, nothing

    for half, none, nothing in forked(layout, stepped):
        assert half.applied
        assert none.applied
        assert half.gradient_norm > 0
        assert (none.loss, none.gradient_norm, nothing) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("method", ["small_init", "orthogonal"])
def test_new_weights_are_the_same_at_every_cut(method: Initializer) -> None:
    model = SECTION.model_copy(update={"init_method": method, "output_layer_init_method": "wang_init"})

    def drawn(axis: Axis) -> dict[str, Tensor]:
        layer = ARCHITECTURE.plan(SMALL, axis)[3]()
        draw_layer(layer, 3, model=model, spec=SMALL, seed=5, tp=axis)
        return {path: parameter.detach() for path, parameter, _ in named_rules(layer)}

    whole, halves = drawn(Axis("tp")), [drawn(Axis("tp", index, (0, 1))) for index in range(2)]
    rules = {path: rule for path, _, rule in named_rules(ARCHITECTURE.plan(SMALL, Axis("tp"))[3]())}
    for path, tensor in whole.items():
        assert torch.equal(rules[path].merge([half[path] for half in halves]), tensor)
    assert not torch.equal(whole["attention.dense.weight"], whole["attention.query_key_value.weight"][:64])


@pytest.mark.parametrize(
    ("method", "std"), [("normal", 0.1), ("scaled_normal", 0.1 / 8**0.5), ("small_init", (2 / 320) ** 0.5), ("wang_init", 2 / 4 / 8), ("xavier_normal", 0.0883)]
)
def test_new_weights_have_the_spread_of_their_method(method: Initializer, std: float) -> None:
    model = SECTION.model_copy(update={"init_method": method})
    layer = ARCHITECTURE.plan(SMALL, Axis("tp"))[3]()
    draw_layer(layer, 3, model=model, spec=SMALL, seed=5, tp=Axis("tp"))
    assert layer.get_parameter("attention.query_key_value.weight").std().item() == pytest.approx(std, rel=0.03)
    assert layer.get_parameter("attention.query_key_value.bias").abs().sum() == 0
    assert layer.get_parameter("input_layernorm.weight").sum() == 64


def test_only_the_first_rank_trains_its_term_of_a_bias() -> None:
    def trained(mesh: Mesh) -> list[str]:
        layer = ARCHITECTURE.plan(SMALL, mesh.tp)[2]()
        make_trainable(layer, mesh.tp)
        return [name for name, parameter in layer.named_parameters() if not parameter.requires_grad]

    assert in_world(Layout(tp=2), trained) == [[], ["attention.dense.bias", "mlp.dense_4h_to_h.bias"]]


def test_norms_that_drifted_apart_are_averaged_when_training_starts() -> None:
    def averaged(mesh: Mesh) -> tuple[bool, Tensor]:
        layer = ARCHITECTURE.plan(SMALL, mesh.tp)[2]()
        with torch.no_grad():
            layer.get_parameter("input_layernorm.weight").fill_(1.0 + mesh.tp.index)
        return make_trainable(layer, mesh.tp), layer.get_parameter("input_layernorm.weight").detach()

    for changed, weight in in_world(Layout(tp=2), averaged):
        assert changed
        assert torch.equal(weight, torch.full((64,), 1.5))
