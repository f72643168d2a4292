"""What was set, by whom, for people: the rows that --dry-run prints."""

from collections.abc import Iterator

from megatron_lite.config.kinds import shown
from megatron_lite.config.sections import SECTIONS, RunConfig

# Shown also where nobody set them.
ALWAYS = {
    "pipe_parallel_size",
    "model_parallel_size",
    "precision",
    "load",
    "tokenizer_type",
    "vocab_file",
    "maximum_tokens",
    "temperature",
    "top_k",
    "top_p",
    "generation_batch_size",
    "seed",
}


def settings(config: RunConfig) -> Iterator[tuple[str, str, str]]:
    """(key, value, who set it) of every setting that is not at its default, of the most important ones in any case, and of DeepSpeed's keys."""
    for name, section in SECTIONS.items():
        for key, field in section.model_fields.items():
            value = config.precision if key == "precision" else getattr(getattr(config, name), key)
            if key in ALWAYS or field.is_required() or value != field.default:
                yield key, _cell(value), config.where(key)
    for key, value in config.deepspeed.items():
        yield key, _cell(value), config.where(key)


def _cell(value: object) -> str:
    """A value, in quotes only where they say more, as around a line break."""
    return value if isinstance(value, str) and value.strip() and value.isprintable() else shown(value)
