"""What the data settings describe: the samples to train, validate and test on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from megatron_lite.config.sections import DataSection
from megatron_lite.data.blend import MOST, Blend, normalized, sample_counts, weights_by_size
from megatron_lite.data.corpus import open_corpus
from megatron_lite.data.indexed import Corpus
from megatron_lite.data.packing import Packing, samples_in
from megatron_lite.data.samples import Samples, SampleSource, check_learned, split, usable
from megatron_lite.data.tokenizer import Tokenizer
from megatron_lite.errors import ConfigError, DataError

Purpose = Literal["train", "valid", "test"]
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)
LOOKED_AT = 1 << 22  # tokens at both ends of a data set: most wrong tokenizers show there


class Part(NamedTuple):
    """Some sequences of a data set; `name` is what NeoX calls their use in the names of the maps."""

    corpus: Corpus
    sequences: range
    name: str
    weight: float


@dataclass(frozen=True)
class TrainingData:
    """The opened data sets, and how samples are made of them."""

    parts: Mapping[Purpose, Sequence[Part]]
    packing: Packing
    blended: bool

    def source(self, purpose: Purpose, samples: int) -> SampleSource | None:
        """At least so many samples; None where the settings leave no data for this purpose, or no sample is wanted."""
        parts = self.parts[purpose]
        if not parts or not samples:
            return None
        weights = [part.weight for part in parts]
        counts = sample_counts(weights, samples) if self.blended else [samples]
        sources = [
            Samples(part.corpus, part.sequences, purpose=part.name, count=count, packing=self.packing)
            for part, count in zip(parts, counts, strict=True)
            if count
        ]
        return Blend(sources, [weight for weight in weights if weight], samples) if self.blended else sources[0]

    def samples_per_epoch(self) -> int:
        """Samples in one pass over all data to train on; of pack_until_overflow about so many."""
        return sum(_samples_in(part, self.packing) for part in self.parts["train"])


def _samples_in(part: Part, packing: Packing) -> int:
    sizes = part.corpus.tokens.sizes[part.sequences.start : part.sequences.stop]
    if packing.pack_impl == "packed":
        return samples_in(int(sizes.sum(dtype="int64")), 1, packing.seq_length)
    chosen = usable(part.corpus, part.sequences, packing)
    return int(chosen.sum()) if packing.pack_impl == "unpacked" else max(1, int(sizes[chosen].sum(dtype="int64")) // packing.capacity)


def open_data(section: DataSection, packing: Packing, tokenizer: Tokenizer, *, vocab: int) -> TrainingData:
    """The data sets of data_path or of train_data_paths and its like, for a model with `vocab` ids."""
    named = [f"{purpose}_data_paths" for purpose in PURPOSES if _paths(section, f"{purpose}_data_paths")]
    if section.data_path and named:
        raise ConfigError(f"data_path and {named[0]} are both set; data_path is cut by split, the others are not: keep one kind")
    if section.data_path:
        parts = _split(section, section.data_path, tokenizer)
    elif section.train_data_paths:
        parts: dict[Purpose, list[Part]] = {purpose: _listed(section, purpose, tokenizer) for purpose in PURPOSES}
    else:
        raise ConfigError("no data to train on: set data_path to a data set or a file of texts, or train_data_paths to several")
    for corpus in {id(part.corpus): part.corpus for listed in parts.values() for part in listed}.values():
        _check_vocabulary(corpus, vocab)
    for part in parts["train"]:
        if part.weight:
            check_learned(part.corpus, part.sequences)
    return TrainingData(parts, packing, blended=section.data_path is None)


def _split(section: DataSection, path: Path, tokenizer: Tokenizer) -> dict[Purpose, list[Part]]:
    corpus = open_corpus(path, tokenizer)
    sequences = dict(zip(PURPOSES, split(section.split, len(corpus.tokens)), strict=True))
    if not sequences["train"]:
        raise DataError(f"split {section.split} leaves none of the {len(corpus.tokens):,} documents of {path} to train on")
    return {purpose: [Part(corpus, part, purpose, 1.0)] if part else [] for purpose, part in sequences.items()}


def _listed(section: DataSection, purpose: Purpose, tokenizer: Tokenizer) -> list[Part]:
    paths = _paths(section, f"{purpose}_data_paths")
    labels: Sequence[Path | None] = _paths(section, f"{purpose}_label_data_paths") or [None] * len(paths)
    stated: Sequence[float] = getattr(section, f"{purpose}_data_weights") or [1.0] * len(paths)
    for key, values in ((f"{purpose}_label_data_paths", labels), (f"{purpose}_data_weights", stated)):
        if len(values) != len(paths):
            raise ConfigError(f"{key} has {len(values)} entries, but {purpose}_data_paths has {len(paths)}; give one for each")
    if len(paths) > MOST:
        raise ConfigError(f"{purpose}_data_paths has {len(paths)} entries; at most {MOST} data sets can be blended")
    corpora = [open_corpus(path, tokenizer, labels=label) for path, label in zip(paths, labels, strict=True)]
    if corpora and not sum(stated):
        raise ConfigError(f"{purpose}_data_weights are all 0; at least one must be above")
    weights = weights_by_size([len(corpus.tokens) for corpus in corpora], section.weighted_sampler_alpha) if section.weight_by_num_documents else stated
    shares = normalized(weights)
    return [Part(corpus, range(len(corpus.tokens)), f"{purpose}_{number}", shares[number]) for number, corpus in enumerate(corpora)]


def _paths(section: DataSection, key: str) -> Sequence[Path]:
    return getattr(section, key) or ()


def _check_vocabulary(corpus: Corpus, vocab: int) -> None:
    for kind, dataset in (("token", corpus.tokens), ("label", corpus.labels)):
        if dataset is None:
            continue
        greatest = max(int(dataset.tokens[:LOOKED_AT].max()), int(dataset.tokens[-LOOKED_AT:].max()))
        if greatest >= vocab:
            raise DataError(
                f"{dataset.prefix} holds the {kind} id {greatest}, but the model's vocabulary ends at {vocab - 1}; it was made with another tokenizer"
            )
