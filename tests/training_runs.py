"""Small trainings as train.py finds them: configuration files, a text of stories for data, NeoX's byte tokenizer."""

import json
import random
from pathlib import Path

import yaml

from megatron_lite.config.load import load_config
from megatron_lite.log import set_up_logging
from megatron_lite.parallel.layout import Layout
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.training.live import Uses
from megatron_lite.training.start import settle
from megatron_lite.training.train import run_training
from tests.training_models import SECTION
from tests.worlds import forked

SMALL_TRAINING: dict[str, object] = {
    **{key: value for key, value in SECTION.model_dump().items() if value is not None},
    "num_layers": 2,
    "gpt_j_residual": True,
    "no_weight_tying": True,
    "tokenizer_type": "CharLevelTokenizer",
    "make_vocab_size_divisible_by": 8,
    "train_batch_size": 4,
    "train_iters": 6,
    "split": "80,10,10",
    "log_interval": 1,
    "eval_interval": 3,
    "eval_iters": 1,
    "warmup": 0.0,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-2}},
    "use_wandb": False,
}


def write_texts(folder: Path) -> Path:
    """Forty documents of random words."""
    chosen = random.Random(0)
    words = ["the", "fox", "went", "into", "wood", "and", "saw", "a", "bird", "that", "sang"]
    texts = [" ".join(chosen.choices(words, k=60)) for _ in range(40)]
    path = folder / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return path


def write_training(folder: Path, **settings: object) -> Path:
    """The configuration file of a training that saves into folder/out; the folder is made where there is none."""
    folder.mkdir(exist_ok=True)
    stated = {**SMALL_TRAINING, "data_path": str(write_texts(folder)), "save": str(folder / "out"), **settings}
    path = folder / "train.yml"
    path.write_text(yaml.safe_dump({key: value for key, value in stated.items() if value is not None}), encoding="utf-8")
    return path


def trained(config: Path, layout: Layout | None = None, uses: Uses | None = None, **overrides: object) -> list[str | int | None]:
    """Runs the training on this layout. Returns on every rank what ended it: nothing, the exit code, or the sentence of its error."""
    layout = layout or Layout()
    sizes = {"pipe_parallel_size": layout.pp, "model_parallel_size": layout.tp}

    def run(mesh: Mesh) -> str | int | None:
        set_up_logging()
        try:
            run_training(settle(load_config([config], {**sizes, **overrides}), mesh), uses or Uses())
        except SystemExit as end:
            return end.code
        except KeyboardInterrupt:
            return 130
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None

    return forked(layout, run)


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def losses(folder: Path) -> dict[int, float]:
    """The loss of every step; of steps that were taken twice, the later one."""
    return {int(line["step"]): line["train/lm_loss"] for line in metrics(folder) if "train/lm_loss" in line}
