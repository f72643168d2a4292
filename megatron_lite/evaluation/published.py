"""Published results of known models, to hold our own against. docs/evaluation.md shows this table."""

from dataclasses import dataclass

from megatron_lite.models.spec import ModelSpec


@dataclass(frozen=True)
class Published:
    """What a source reports; `error` is its standard error, where it states one."""

    task: str
    metric: str
    value: float
    error: float | None
    source: str


@dataclass(frozen=True)
class KnownModel:
    """A model by the numbers that tell it from others: layers, hidden size, heads."""

    name: str
    shape: tuple[int, int, int]
    results: tuple[Published, ...]


NEOX_CARD = "model card of GPT-NeoX-20B, figures of the paper"
NEOX_TP2 = "minimal-gpt-neox-20b, the original files on 2 GPUs"
PYTHIA = "EleutherAI/pythia, evals of pythia v0"
GPTJ = "mesh-transformer-jax, README"
ERRORS_TP2 = {"lambada_openai acc": 0.0062, "lambada_openai ppl": 0.076, "piqa acc": 0.0097, "piqa acc_norm": 0.0097}


def _rows(source: str, values: dict[str, float], errors: dict[str, float] | None = None) -> tuple[Published, ...]:
    rows = ((*key.split(), value, (errors or {}).get(key)) for key, value in values.items())
    return tuple(Published(task, metric, value, error, source) for task, metric, value, error in rows)


KNOWN = (
    KnownModel(
        "GPT-NeoX-20B",
        (44, 6144, 64),
        _rows(
            NEOX_TP2,
            {
                "lambada_openai acc": 0.7211,
                "lambada_openai ppl": 3.6760,
                "piqa acc": 0.7748,
                "piqa acc_norm": 0.7786,
                "hellaswag acc": 0.5351,
                "hellaswag acc_norm": 0.7140,
                "winogrande acc": 0.6598,
                "anli_r1 acc": 0.3270,
                "anli_r2 acc": 0.3410,
                "anli_r3 acc": 0.3567,
                "wsc acc": 0.5096,
            },
            ERRORS_TP2
            | {"hellaswag acc": 0.0050, "hellaswag acc_norm": 0.0045, "winogrande acc": 0.0133, "wsc acc": 0.049}
            | dict.fromkeys(("anli_r1 acc", "anli_r2 acc", "anli_r3 acc"), 0.015),
        )
        + _rows(
            NEOX_CARD,
            {"lambada_openai acc": 0.720, "piqa acc": 0.779, "sciq acc": 0.928, "triviaqa acc": 0.259, "arc_challenge acc": 0.380},
            {"lambada_openai acc": 0.006, "piqa acc": 0.010, "sciq acc": 0.008, "triviaqa acc": 0.004, "arc_challenge acc": 0.014},
        ),
    ),
    KnownModel(
        "GPT-J-6B",
        (28, 4096, 16),
        _rows(GPTJ, {"lambada_openai acc": 0.697, "lambada_openai ppl": 3.99, "hellaswag acc_norm": 0.661, "winogrande acc": 0.653})
        + _rows(NEOX_CARD, {"piqa acc": 0.752}),
    ),
    KnownModel(
        "Pythia-70M",
        (6, 512, 8),
        _rows(PYTHIA, {"lambada_openai acc": 0.2393, "lambada_openai ppl": 98.155, "piqa acc": 0.5930, "piqa acc_norm": 0.5974}),
    ),
    KnownModel(
        "Pythia-12B",
        (36, 5120, 40),
        _rows(PYTHIA, {"lambada_openai acc": 0.7046, "lambada_openai ppl": 3.919, "piqa acc": 0.7661, "piqa acc_norm": 0.7699}),
    ),
)


def known_model(spec: ModelSpec) -> KnownModel | None:
    """The known model of this shape. Models that were trained on from one of them have its shape as well."""
    return next((model for model in KNOWN if model.shape == (spec.layers, spec.hidden, spec.heads)), None)


def published(model: KnownModel | None, task: str, metric: str) -> Published | None:
    """The first of the results that are known of this metric."""
    return next((row for row in (model.results if model else ()) if (row.task, row.metric) == (task, metric)), None)


def difference(value: float, error: float | None, row: Published) -> float | None:
    """How far a result lies from a published one, in standard errors of our own, or else of the published one."""
    unit = error or row.error
    return (value - row.value) / unit if unit else None


def published_table() -> str:
    """All that is known, in Markdown, for docs/evaluation.md."""
    lines = ["| model | task | metric | published | standard error | source |", "|---|---|---|---|---|---|"]
    for model in KNOWN:
        for row in model.results:
            lines.append(f"| {model.name} | {row.task} | {row.metric} | {row.value} | {row.error or ''} | {row.source} |")
    return "\n".join(lines) + "\n"
