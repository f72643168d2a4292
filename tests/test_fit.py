"""From configuration and machine to a layout that runs, on machines that are handed in as values."""

from pathlib import Path

import pytest

from launcher.hardware import Device, Hardware
from launcher.plan import Demand, Plan
from launcher.planner import Planner, plan_generation, plan_settings
from launcher.replicas import with_replicas
from launcher.train_plan import plan_training
from megatron_lite.config.load import load_config
from megatron_lite.errors import FitError, LayoutError
from megatron_lite.parallel.layout import Layout
from tests.machines import GB, TOKENS, cores, gpus

pytestmark = pytest.mark.usefixtures("at_root")


def plan(name: str, hardware: Hardware, prompts: int | None = None, **overrides: str) -> Plan:
    return plan_generation(load_config([Path(f"configs/{name}.yml")], overrides), hardware, TOKENS, demand=Demand(prompts, 2048) if prompts else None)


def refusal(name: str, hardware: Hardware, **overrides: str) -> str:
    with pytest.raises((LayoutError, FitError)) as error:
        plan(name, hardware, None, **overrides)
    return str(error.value)


def test_enough_devices_get_what_the_configuration_asks_for() -> None:
    fitted = plan("20B", gpus(8, 80))
    assert (fitted.layout, fitted.rows, fitted.notes) == (Layout(pp=4, tp=2), 16, ())


def test_20b_on_two_gpus_is_fitted_and_one_line_says_so() -> None:
    fitted = plan("20B", gpus(2, 80))
    assert fitted.layout == Layout(tp=2)
    assert fitted.notes == ("configs/20B.yml asks for 4 x 2 = 8 GPUs; 2 found: using pipe 1 x model 2",)


@pytest.mark.parametrize(
    ("count", "layout"), [(1, Layout()), (2, Layout(tp=2)), (3, Layout(pp=3)), (4, Layout(tp=4)), (6, Layout(pp=3, tp=2)), (7, Layout(pp=7))]
)
def test_a_smaller_machine_is_used_whole_and_by_tensor_parallelism_where_the_heads_allow(count: int, layout: Layout) -> None:
    assert plan("20B", gpus(count, 84)).layout == layout


def test_cores_are_spoken_of_as_cores() -> None:
    assert plan("tiny", cores(1)).notes == ("configs/tiny.yml asks for 1 x 2 = 2 processes; 1 CPU core found: using pipe 1 x model 1",)
    assert plan("20B", cores(2, 200)).notes[0] == "configs/20B.yml asks for 4 x 2 = 8 processes; 2 CPU cores found: using pipe 1 x model 2"


def test_pipe_parallel_size_0_is_one_stage_and_is_handed_on_as_0() -> None:
    config = load_config([Path("configs/tiny.yml")], {"pipe_parallel_size": "0", "model_parallel_size": "1"})
    fitted = plan_generation(config, cores(2), TOKENS)
    assert fitted.layout == Layout()
    assert plan_settings(fitted, config) == {"pipe_parallel_size": 0, "model_parallel_size": 1}


def test_sizes_on_the_command_line_are_honoured_on_more_devices_than_they_need() -> None:
    fitted = plan("20B", gpus(4, 84), pipe_parallel_size="1", model_parallel_size="1")
    assert (fitted.layout, fitted.notes) == (Layout(), ())


def test_one_size_on_the_command_line_is_kept_while_the_other_is_fitted() -> None:
    assert plan("20B", gpus(4, 80), pipe_parallel_size="2").layout == Layout(pp=2, tp=2)
    assert plan("20B", gpus(4, 80), model_parallel_size="1").layout == Layout(pp=4, tp=1)


def test_sizes_on_the_command_line_are_refused_and_not_changed_where_gpus_are_missing() -> None:
    assert refusal("20B", gpus(2, 80), pipe_parallel_size="2", model_parallel_size="2") == (
        "pipe-parallel-size=2 model-parallel-size=2 on the command line: pipe 2 x model 2 needs 4 GPUs; 2 GPUs found;"
        " ask for fewer, or leave the sizes out to have them fitted"
    )
    assert refusal("20B", gpus(2, 80), model_parallel_size="4").startswith(
        "model-parallel-size=4 on the command line: pipe 4 x model 4 needs 16 GPUs; 2 GPUs found"
    )


def test_sizes_on_the_command_line_are_honoured_on_fewer_cores() -> None:
    fitted = plan("tiny", cores(2), pipe_parallel_size="2", model_parallel_size="2")
    assert (fitted.layout, fitted.notes) == (Layout(pp=2, tp=2), ())
    assert plan("tiny", cores(1), model_parallel_size="4").layout == Layout(tp=4)


@pytest.mark.parametrize("hardware", [gpus(8, 80), cores(2)])
def test_a_size_that_does_not_divide_the_heads_is_refused(hardware: Hardware) -> None:
    sentence = "model-parallel-size 3 does not divide the 8 attention heads; use one of 1, 2, 4, 8"
    assert refusal("tiny", hardware, model_parallel_size="3") == sentence


def test_more_stages_than_layers_are_refused() -> None:
    assert refusal("tiny", cores(2), pipe_parallel_size="9") == "pipe-parallel-size 9 is more than the 8 layers of the model; use at most 8"


def test_the_figures_of_20b_are_those_of_the_release() -> None:
    """Weights 41.1 GB in fp16 and 2.21 GB of keys and values for a row of 2048 tokens."""
    (footprint,) = plan("20B", gpus(1, 80), generation_batch_size="1").stages
    assert footprint.weights == pytest.approx(41.1 * GB, rel=0.002)
    assert footprint.cache == 2048 * 1_081_344


def test_the_room_in_a_cache_that_rows_share_is_told_and_the_rows_stay_as_many() -> None:
    """On GPUs short rows leave room for others, and those that find none wait."""
    for asked in ({}, {"generation_batch_size": "16"}):
        fitted = plan("20B", gpus(1, 80), None, **asked)
        assert (fitted.layout, fitted.rows) == (Layout(), 14)
        assert fitted.notes[1] == (
            "pipe 1 x model 1 needs 83.3 GB on GPU 0 (weights 41.1 GB, KV cache 35.4 GB, activations 5.6 GB, CUDA itself 1.1 GB);"
            " 80.0 GB are free there: using a cache for 14 rows of 2048 tokens instead of 16, which shorter rows share"
        )
        assert "generation_batch_size" not in plan_settings(fitted, load_config([Path("configs/20B.yml")]))


@pytest.mark.parametrize("plain", ["return_logits", "recompute"])
def test_fewer_rows_than_the_default_are_used_where_every_row_has_memory_of_its_own_and_told_to_the_processes(plain: str) -> None:
    fitted = plan("20B", gpus(1, 80), None, **{plain: "true"})
    assert (fitted.layout, fitted.rows) == (Layout(), 8)
    assert fitted.notes[1].endswith("80.0 GB are free there: using 8 rows at once instead of 16 (generation_batch_size)")
    assert plan_settings(fitted, load_config([Path("configs/20B.yml")]))["generation_batch_size"] == 8


@pytest.mark.parametrize(("memory", "room"), [(43.0, 0), (44.9, 1), (80.0, 14), (141.0, 38)])
def test_room_is_for_rows_of_full_length_beside_weights_and_what_reading_them_takes(memory: float, room: int) -> None:
    """20B takes 41.1 GB, CUDA 1.1 GB, and every row of 2048 tokens 2.2 GB for its keys and values and 0.35 GB to be read."""
    config = load_config([Path("configs/20B.yml")])
    assert Planner(config, gpus(1, memory), TOKENS).room(Layout()) == room


def test_only_as_many_rows_are_reckoned_as_there_are_prompts() -> None:
    fitted = plan("20B", gpus(1, 60), prompts=5)
    assert (fitted.rows, fitted.notes[1:]) == (5, ())


def test_a_layout_of_the_configuration_that_does_not_fit_gives_way_to_one_that_does() -> None:
    fitted = plan("pythia/6.9B", gpus(4, 8), generation_batch_size="16")
    assert fitted.layout == Layout(tp=4)
    assert fitted.notes == (
        "pipe 1 x model 2 needs 18.8 GB on GPU 0 (weights 6.9 GB, KV cache 8.6 GB, activations 2.3 GB, CUDA itself 1.1 GB);"
        " 8.0 GB are free there: using pipe 1 x model 4 (7.8 GB a process), a cache for 9 rows of 2048 tokens instead of 16, which shorter rows share",
    )
    assert plan("20B", gpus(4, 24)).notes == ("configs/20B.yml asks for 4 x 2 = 8 GPUs; 4 found: using pipe 1 x model 4",)


def test_a_layout_of_the_command_line_that_does_not_fit_is_refused_with_those_that_would() -> None:
    sentence = refusal("20B", gpus(4, 44), pipe_parallel_size="1", model_parallel_size="1", generation_batch_size="16")
    assert sentence == (
        "configs/20B.yml with pipe 1 x model 1 and 1 row at once needs 44.7 GB on GPU 0"
        " (weights 41.1 GB, KV cache 2.2 GB, activations 353 MB, CUDA itself 1.1 GB); 44.0 GB are free there;"
        " here would fit: pipe 1 x model 2 (42.8 GB a process), pipe 3 x model 1 (33.0 GB a process),"
        " pipe 1 x model 4 (22.5 GB a process), pipe 2 x model 2 (23.6 GB a process)"
    )


def test_rows_of_the_command_line_are_refused_with_the_number_that_would_fit() -> None:
    sentence = refusal("20B", gpus(2, 24), generation_batch_size="16", return_logits="true")
    assert sentence.endswith("here would fit with generation_batch_size=1: pipe 1 x model 2 (23.0 GB a process), pipe 2 x model 1 (23.1 GB a process)")
    assert plan("20B", gpus(2, 24), generation_batch_size="16").rows == 1


def test_where_no_layout_fits_the_number_of_gpus_that_would_is_told() -> None:
    sentence = refusal("20B", gpus(2, 16))
    assert sentence.startswith("configs/20B.yml with pipe 1 x model 2 and 1 row at once needs 23.0 GB on GPU 0 (weights 20.6 GB, KV cache 1.1 GB, ")
    assert sentence.endswith(
        "no layout fits on what is here (2 GPUs found); weight_quantization=int8 would (pipe 1 x model 2 with 3 rows at once: 15.8 GB a process);"
        " 4 such GPUs would do (pipe 1 x model 4: 15.5 GB on each)"
    )


def test_every_gpu_is_looked_at_and_not_only_the_first() -> None:
    uneven = Hardware("GPU", (Device("A", 80 * GB), Device("B", 2 * GB)))
    assert "on GPU 1 (" in refusal("20B", uneven, model_parallel_size="2", pipe_parallel_size="1")


def test_cpu_processes_share_memory_and_compute_in_fp32() -> None:
    sentence = refusal("20B", cores(2, 24))
    assert "needs 88.0 GB on CPU in float32 (weights 82.2 GB, " in sentence
    assert sentence.endswith("24.0 GB of memory are free; no layout changes that; it takes a machine with more memory, or GPUs")


def test_a_gpu_of_which_nobody_knows_the_memory_is_not_refused() -> None:
    assert plan("20B", Hardware("GPU", (Device("part of a GPU (MIG)"),) * 2)).layout == Layout(tp=2)


def test_the_vocabulary_is_padded_for_the_cut() -> None:
    one, two = (plan("20B", gpus(2, 84), pipe_parallel_size="1", model_parallel_size=size).stages[0] for size in "12")
    padding = 50432 - 50304  # multiples of 256 and of 128
    assert one.weights - 2 * two.weights == -padding * 2 * 6144 * 2 - 44 * 6 * 6144 * 2 - 2 * 6144 * 2  # and norms and row biases are on both


def test_training_takes_all_gpus_as_replicas_and_is_never_fitted() -> None:
    config = load_config([Path("configs/20B.yml")])
    assert plan_training(config, gpus(16, 40), TOKENS).layout == Layout(pp=4, dp=2, tp=2)
    with pytest.raises(LayoutError) as error:
        plan_training(config, gpus(2, 80), TOKENS)
    assert str(error.value) == (
        "configs/20B.yml: pipe 4 x model 2 needs 8 GPUs; 2 GPUs found; training needs that number or a multiple of it, set num_gpus or the sizes"
    )
    with pytest.raises(LayoutError, match="12 GPUs found; training needs that number or a multiple"):
        plan_training(config, gpus(12, 80), TOKENS)


@pytest.mark.parametrize(("count", "prompts", "replicas"), [(4, 1000, 4), (4, 40, 3), (4, 16, 1), (5, 1000, 5), (1, 1000, 1)])
def test_prompts_of_which_there_are_many_are_shared_by_replicas(count: int, prompts: int, replicas: int) -> None:
    one = plan("20B", gpus(count, 141), prompts, pipe_parallel_size="1", model_parallel_size="1")
    shared = with_replicas(one, Demand(prompts, 2048))
    assert shared.layout == Layout(dp=replicas)
    assert shared.notes == ((f"{replicas} replicas share the prompts",) if replicas > 1 else ())


def test_replicas_take_whole_layouts_and_cores_have_none() -> None:
    halves = plan("20B", gpus(5, 80), 1000, pipe_parallel_size="1", model_parallel_size="2")
    assert with_replicas(halves, Demand(1000, 2048)).layout == Layout(dp=2, tp=2)
    slow = plan("pythia/70M", cores(4), 1000, pipe_parallel_size="1", model_parallel_size="1")
    assert with_replicas(slow, Demand(1000, 2048)).layout == Layout()
