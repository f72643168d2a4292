"""transformers, measured beside us: the same shapes and random weights, in the same run. It is imported here only, and only when it is asked for."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from megatron_lite.benchmark.bench import Bench, release
from megatron_lite.benchmark.clock import Marks, seconds_of
from megatron_lite.errors import ConfigError
from megatron_lite.models.architecture import Architecture
from megatron_lite.models.spec import ModelSpec
from megatron_lite.parallel.mailbox import wait_quietly
from megatron_lite.parallel.mesh import Mesh

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "transformers"
BALANCED, PLANNED = f'{NAME}, device_map="balanced"', f'{NAME}, tp_plan="auto"'


@dataclass
class Peer:
    """A model of transformers. `model` is None on ranks that only wait for the first one, where what it is asked takes no time and gives nothing, and when
    it was let go, so that the next one has room whoever still holds this."""

    name: str
    mesh: Mesh
    model: "PreTrainedModel | None"

    def step_seconds(self, prompts: Sequence[Sequence[int]], *, steps: int, static: bool) -> list[float]:
        """Of every step of `generate` behind the first, whose time is that of reading the prompts."""
        if self.model is None:
            return []
        return generate_marked(self.model, self._tensor(prompts), new=steps + 1, static=static).seconds()

    @torch.inference_mode()
    def prefill_seconds(self, prompts: Sequence[Sequence[int]]) -> float:
        """Until the logits behind the last tokens are there; 0 on a rank that waits."""
        if self.model is None:
            return 0.0
        tokens, model = self._tensor(prompts), self.model
        return seconds_of(lambda: model(tokens, logits_to_keep=1, use_cache=True).logits.argmax(-1), self.mesh.device)

    def generate_seconds(self, batches: Sequence[Sequence[tuple[Sequence[int], int]]]) -> float:
        """Of continuing prompts, given with how many tokens they want: a batch is padded on the left and runs until its last row has what it wants."""
        if self.model is None:
            return 0.0
        model, started = self.model, time.perf_counter()
        for batch in batches:
            longest = max(len(tokens) for tokens, _ in batch)
            padded = self._tensor([[0] * (longest - len(tokens)) + list(tokens) for tokens, _ in batch])
            seen = self._tensor([[0] * (longest - len(tokens)) + [1] * len(tokens) for tokens, _ in batch])
            generate_marked(model, padded, new=max(new for _, new in batch), static=False, attention_mask=seen)
        return time.perf_counter() - started

    def _tensor(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(rows, device=self.mesh.device)


def generate_marked(model: "PreTrainedModel", tokens: Tensor, *, new: int, static: bool, **more: Tensor) -> Marks:
    """Greedy continuation by transformers' own loop, marked after every token."""
    marks = Marks(tokens.device)

    def criterion(found: Tensor, scores: object, **_: object) -> Tensor:
        marks.mark()
        return torch.zeros(len(found), dtype=torch.bool, device=found.device)

    settings: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, **({"cache_implementation": "static"} if static else {})}
    mask = more.get("attention_mask", torch.ones_like(tokens))
    model.generate(tokens, attention_mask=mask, stopping_criteria=[criterion], **settings)  # pyright: ignore[reportCallIssue]
    if tokens.device.type == "cuda":
        torch.cuda.synchronize(tokens.device)
    return marks


def peers(bench: Bench, folder: str | None) -> Iterator[Peer]:
    """Every way in which transformers runs the model on these GPUs. `folder` has the weights in Hugging Face's form; None for random ones."""
    for name in manners(bench.mesh):
        if name == PLANNED and folder is None:
            continue  # transformers cuts only what it reads from files
        if bench.mesh.layout.dp > 1:
            raise ConfigError("transformers is measured beside one model over all GPUs, not beside replicas; give model_parallel_size=GPUS or leave out --peer")
        takes_part = bench.mesh.is_writer or name == PLANNED
        peer = Peer(name, bench.mesh, _model(bench, name, folder) if takes_part else None)
        yield peer
        peer.model = None
        release(bench.mesh.device)
        wait_quietly(bench.mesh)


def manners(mesh: Mesh) -> list[str]:
    return [NAME] if mesh.layout.size == 1 else [PLANNED, BALANCED]


def _model(bench: Bench, name: str, folder: str | None) -> "PreTrainedModel":
    if folder is not None:
        return _ready(loaded(folder, bench.mesh, name, getattr(torch, bench.spec.dtype)))
    model = random_model(bench.architecture, bench.spec, bench.mesh.device)
    return _ready(_spread(model) if name == BALANCED and bench.mesh.device.type == "cuda" else model)


def require_transformers() -> None:
    """Raises ConfigError where it is not installed, before anything is measured."""
    missing = [name for name in (NAME, "accelerate") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"--peer needs the package(s) {', '.join(missing)}; run `pip install {' '.join(missing)}`, or leave out --peer")


def import_transformers(architecture: Architecture, spec: ModelSpec) -> None:
    """All that it imports for a model, so that no measurement includes it."""
    random_model(architecture, spec, torch.device("meta"))


def random_model(architecture: Architecture, spec: ModelSpec, device: torch.device) -> "PreTrainedModel":
    """transformers' model of the same shape with weights that it draws itself."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import AutoConfig

    settings = {"model_type": architecture.model_type, **architecture.config(spec), "vocab_size": spec.vocab}
    with _default_dtype(getattr(torch, spec.dtype)), device:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).eval()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _spread(model: "PreTrainedModel") -> "PreTrainedModel":
    """What from_pretrained does for device_map="balanced", with weights that are there."""
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = list(getattr(model, "_no_split_modules", None) or [])
    room = get_balanced_memory(model, no_split_module_classes=whole)
    places = infer_auto_device_map(model, max_memory=room, no_split_module_classes=whole)
    return cast("PreTrainedModel", dispatch_model(model, places))


def loaded(folder: str, mesh: Mesh, name: str, dtype: torch.dtype) -> "PreTrainedModel":
    """from_pretrained of a Hugging Face folder, in the manner of that name."""
    from transformers import AutoModelForCausalLM

    if not (Path(folder) / "config.json").exists():
        raise ConfigError(f"{folder} is no Hugging Face folder, which transformers needs; write one with tools/synthesize_checkpoint.py --format huggingface")
    how: dict[str, Any] = {"device_map": {"": str(mesh.device)}}
    if name == BALANCED and mesh.device.type == "cuda":
        how = {"device_map": "balanced"}
    if name == PLANNED:
        from transformers.distributed.configuration_utils import DistributedConfig

        how = {"distributed_config": DistributedConfig(tp_plan="auto")}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, **how)


def _ready(model: "PreTrainedModel") -> "PreTrainedModel":
    """In a state to be timed: no token ends a text, and nothing is said about it."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if model.generation_config is not None:
        model.generation_config.eos_token_id = None
    return model.eval()
