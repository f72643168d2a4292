"""Pipelines whose stages differ in size: told by pipe-stage-layers or dealt to unequal GPUs; the cut changes nothing that is computed."""

from pathlib import Path

import pytest

from launcher.cards import hardware_named
from launcher.deal import shares
from launcher.hardware import Device, Hardware
from launcher.plan import Plan
from launcher.planner import plan_generation, plan_settings
from launcher.train_plan import plan_training
from megatron_lite.config.load import load_config
from megatron_lite.errors import ConfigError, LayoutError
from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.run import layout_of, load_stage, prepare
from tests.runs import BYTES, complete, random_prompts, requests, write_run
from tests.training_runs import losses, trained, write_training
from tests.worlds import in_world

ROOT = Path(__file__).resolve().parents[1]
GB = 10**9
CUTS = [Layout(pp=2, blocks=(1, 3)), Layout(pp=2, blocks=(3, 1)), Layout(pp=3, blocks=(1, 1, 2)), Layout(pp=3, tp=2, blocks=(1, 2, 1))]


def test_blocks_are_numbered_through_and_the_ends_lie_at_the_ends() -> None:
    assert Layout(pp=3, blocks=(1, 3, 2)).numbers(6) == [[0, 2], [3, 4, 5], [6, 7, 9, 10]]
    assert str(Layout(pp=3, blocks=(10, 20, 14))) == "pipe 3 (10 + 20 + 14 blocks) x model 1"
    assert Layout(pp=2).numbers(3) == [[0, 2, 3], [4, 6, 7]]


def test_blocks_that_are_no_way_to_deal_the_layers_are_refused() -> None:
    with pytest.raises(LayoutError) as error:
        Layout(pp=3, blocks=(10, 20, 15)).numbers(44)
    assert str(error.value) == "10 + 20 + 15 blocks (pipe-stage-layers) are no way to deal 44 to the 3 stages of pipe-parallel-size"


@pytest.mark.parametrize(
    ("stages", "blocks", "sentence"),
    [
        ("3", "[10, 20, 15]", "pipe_stage_layers [10, 20, 15] are 45 blocks in all; the model has 44 (num_layers)"),
        ("2", "[10, 20, 14]", "pipe_stage_layers has 3 numbers ([10, 20, 14]); pipe_parallel_size is 2, one for each stage is needed"),
        ("2", "[44, 0]", "pipe_stage_layers needs a list of whole numbers of at least 1, found 0"),
    ],
)
def test_settings_that_do_not_add_up_are_refused_with_the_numbers(stages: str, blocks: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config([ROOT / "configs" / "20B.yml"], {"pipe_parallel_size": stages, "pipe_stage_layers": blocks})
    assert sentence in str(error.value)


def test_every_cut_generates_the_same_text(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    asked = requests(random_prompts([3, 9, 20, 1]), maximum_tokens=12)

    def texts(mesh: Mesh) -> list[str | None]:
        settings = {"pipe_parallel_size": mesh.layout.pp, "pipe_stage_layers": list(mesh.layout.blocks) or None, "model_parallel_size": mesh.layout.tp}
        stated = load_config([config], settings)
        assert layout_of(stated, mesh.layout.size) == mesh.layout
        return [completion.text for completion in complete(load_stage(prepare(stated, mesh)), asked, spec=BYTES)]

    (expected,) = in_world(Layout(), texts)
    assert len({*expected}) > 1
    for cut in CUTS:
        assert in_world(cut, texts) == [expected] * cut.size


def test_training_and_its_checkpoints_do_not_depend_on_the_cut(tmp_path: Path) -> None:
    """Three steps at one cut, the others at another, against all steps in one process."""
    for name in ("alone", "cut"):
        (tmp_path / name).mkdir()
    alone, cut = (write_training(tmp_path / name, num_layers=4, checkpoint_factor=3, eval_interval=None) for name in ("alone", "cut"))
    assert trained(alone) == [None]
    assert trained(cut, CUTS[0], pipe_stage_layers="[1, 3]", exit_interval="3") == [None, None]
    assert trained(cut, CUTS[2], pipe_stage_layers="[1, 1, 2]", load=str(tmp_path / "cut" / "out")) == [None] * 3
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)


def fitted(name: str, hardware: Hardware, **settings: str) -> Plan:
    return plan_generation(load_config([ROOT / "configs" / f"{name}.yml"], {"generation_batch_size": "1", **settings}), hardware, 50277)


def cards(**free: float) -> Hardware:
    """GPUs by name, with gigabytes free."""
    return Hardware("GPU", tuple(Device(name.replace("_", " "), int(size * GB)) for name, size in free.items()))


PIPE = {"pipe_parallel_size": "3", "model_parallel_size": "1"}


def test_unequal_cards_get_blocks_in_proportion_to_their_bandwidth() -> None:
    plan = fitted("gpt-j-6B", hardware_named("RTX3090+2xRTX3060"), **PIPE)
    assert plan.layout.blocks == (16, 6, 6)  # of 28, by 936, 360 and 360 GB/s
    assert plan.notes[-1] == "the GPUs differ (RTX 3090, RTX 3060): blocks are dealt to them by speed and memory, pipe-stage-layers=[16, 6, 6]"
    config = load_config([ROOT / "configs" / "gpt-j-6B.yml"], PIPE)
    assert plan_settings(plan, config) == {"pipe_parallel_size": 3, "model_parallel_size": 1, "pipe_stage_layers": [16, 6, 6]}


def test_a_fast_card_gets_no_more_than_it_has_room_for() -> None:
    plan = fitted("20B", cards(RTX_3080=10, RTX_3090=24, RTX_A6000=48), **PIPE)
    small, middle, large = plan.layout.blocks
    assert small < 10  # by bandwidth alone it would be 14
    assert middle > large  # whose memory is slower
    assert plan.shortage() is None


def test_cards_that_nobody_knows_get_blocks_by_their_memory() -> None:
    assert fitted("20B", cards(one=12, two=24, three=24), **PIPE).layout.blocks == (9, 18, 17)


def test_equal_cards_of_which_one_is_half_taken_give_it_fewer_blocks_only_where_it_must() -> None:
    taken = Hardware("GPU", tuple(Device("RTX 3090", int(free * GB)) for free in (25, 25, 13)))
    assert fitted("gpt-j-6B", taken, **PIPE).layout.blocks == ()
    first, second, third = fitted("20B", taken, **PIPE).layout.blocks
    assert first - second in (0, 1)
    assert third < 14  # of 44


def test_told_blocks_are_kept_where_the_number_of_stages_is() -> None:
    told = {"pipe_parallel_size": "3", "model_parallel_size": "1", "pipe_stage_layers": "[10, 20, 14]"}
    plan = fitted("20B", Hardware("GPU", (Device("H100", 80 * GB),) * 3), **told)
    assert (plan.layout, plan.notes) == (Layout(pp=3, blocks=(10, 20, 14)), ())
    small, middle, _ = (stage.weights for stage in plan.stages)
    assert middle - small == pytest.approx((10 * 906 - 620) * 1e6, rel=0.01)


def test_blocks_of_a_file_give_way_with_the_stages_where_gpus_are_missing(tmp_path: Path) -> None:
    (tmp_path / "cut.yml").write_text("pipe_parallel_size: 3\nmodel_parallel_size: 1\npipe_stage_layers: [10, 20, 14]\n")
    base = ROOT / "configs" / "20B.yml"
    config = load_config([base, tmp_path / "cut.yml"], {"generation_batch_size": "1"})
    plan = plan_generation(config, Hardware("GPU", (Device("H100", 80 * GB),) * 2), 50277)
    assert plan.layout == Layout(tp=2)
    settings = plan_settings(plan, config)
    assert settings == {"pipe_parallel_size": 1, "model_parallel_size": 2, "pipe_stage_layers": None}
    assert load_config([base, tmp_path / "cut.yml"], {key: "null" if value is None else str(value) for key, value in settings.items()})


def test_training_deals_blocks_by_what_cards_compute() -> None:
    config = load_config([ROOT / "configs" / "pythia" / "1B.yml", ROOT / "configs" / "finetune.yml"], {"pipe_parallel_size": "2", "model_parallel_size": "1"})
    plan = plan_training(config, hardware_named("H100+A100"), 50277, anyway=True)
    assert plan.layout.blocks == (12, 4)  # of 16, by 989 and 312 TFLOP/s


def test_shares_end_together_as_far_as_whole_blocks_allow() -> None:
    assert shares(28, [936, 760, 360], [28, 28, 28]) == [13, 10, 5]
    assert shares(10, [1, 1, 1], [10, 10, 10]) == [4, 3, 3]
    assert shares(10, [1, 1, 1], [2, 10, 10]) == [2, 4, 4]
    assert sum(shares(10, [1, 1], [2, 3])) == 10
