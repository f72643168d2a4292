"""Data sets are blended as GPT-NeoX blends them: each sample from the one that lags most, worked out in parallel and equal to the plain loop."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.config.sections import DataSection
from megatron_lite.data.blend import Blend, pick, sample_counts, weights_by_size
from megatron_lite.data.index_writer import token_writer
from megatron_lite.data.packing import Packing
from megatron_lite.data.samples import Row
from megatron_lite.data.sources import TrainingData, open_data
from megatron_lite.data.tokenizer import CharLevelTokenizer
from megatron_lite.errors import ConfigError, DataError


def picked_slowly(weights: Sequence[float], samples: int) -> list[int]:
    """The definition: sample i comes from the data set with the largest weight * i - given, the first of equals; the first sample counts as 1."""
    shares = (np.array(weights) / np.sum(weights)).tolist()
    given = [0] * len(shares)
    chosen = []
    for sample in range(samples):
        lags = [share * max(float(sample), 1.0) - count for share, count in zip(shares, given, strict=True)]
        chosen.append(lags.index(max(lags)))
        given[chosen[-1]] += 1
    return chosen


class Numbered:
    """Samples that say where they come from."""

    def __init__(self, source: int) -> None:
        self.source = source

    def __len__(self) -> int:
        return 1_000_000

    def row(self, number: int) -> Row:
        return Row(np.array([self.source, number]), np.array([self.source, number]))

    def where(self, number: int) -> str:
        return f"{self.source}, sample {number}"


def test_the_first_samples_of_a_blend_by_hand() -> None:
    # Weights .5, .3, .2. At 1 the lags are .5, .3, .2; at 1 again -.5, .3, .2; at 2 0, -.4, .4; at 3 .5, -.1, -.4; at 4 0, .2, -.2; at 5 .5, -.5, 0.
    assert pick([5, 3, 2], 6).chosen.ravel()[:6].tolist() == [0, 1, 2, 0, 1, 0]


@pytest.mark.parametrize("seed", range(12))
def test_a_blend_is_that_of_the_definition(seed: int) -> None:
    random = np.random.default_rng(seed)
    count = [1, 2, 3, 5, 22, 60][seed % 6]
    weights = random.exponential(size=count) ** 2 + 1e-3 if seed < 6 else random.integers(1, 10, count).astype(float)
    assert pick(weights.tolist(), 5000).chosen.ravel()[:5000].tolist() == picked_slowly(weights.tolist(), 5000)


@pytest.mark.parametrize("weights", [[1, 1, 1, 1], [1, 2, 3], [0.969, 0.03, 0.001], [1e-9, 1], [1 / 3, 1 / 3, 1 / 3], [0.25, 0.5, 0.25, 1]])
def test_weights_that_often_tie_make_no_difference(weights: list[float]) -> None:
    assert pick(weights, 4100).chosen.ravel()[:4100].tolist() == picked_slowly(weights, 4100)


def test_every_data_set_gives_its_samples_one_after_the_other() -> None:
    weights = [0.2, 0.5, 0.3]
    blend = Blend([Numbered(source) for source in range(3)], weights, 3000)
    given = [0, 0, 0]
    for number, source in enumerate(picked_slowly(weights, 3000)):
        assert blend.row(number).tokens.tolist() == [source, given[source]]
        given[source] += 1
    assert [blend.where(number) for number in range(3)] == ["1, sample 0", "2, sample 0", "0, sample 0"]


@pytest.mark.parametrize("samples", [1, 7, 100, 1537, 20_000])
def test_no_data_set_is_asked_for_more_than_it_was_prepared_for(samples: int) -> None:
    random = np.random.default_rng(samples)
    for _ in range(10):
        weights = random.exponential(size=8)
        weights /= weights.sum()
        given = np.bincount(pick(weights.tolist(), samples).chosen.ravel()[:samples], minlength=8)
        assert (given <= sample_counts(weights.tolist(), samples)).all()


def test_weights_by_size_as_neox_reckons_them() -> None:
    # Shares .1, .3, .6. With alpha 1: .1 x .9, .3 x .7, .6 x .4 = .09, .21, .24, of .54 in all. With alpha 0: thirds x .9, .7, .4, of 2 in all.
    assert weights_by_size([10, 30, 60], 1.0) == pytest.approx([9 / 54, 21 / 54, 24 / 54])
    assert weights_by_size([10, 30, 60], 0.0) == pytest.approx([0.45, 0.35, 0.2])
    assert weights_by_size([10], 0.3) == [1.0]


def data_set(prefix: Path, documents: int, token: int) -> Path:
    with token_writer(prefix, vocab_size=1000) as writer:
        for _ in range(documents):
            writer.add_sequence([token] * 20)
            writer.end_document()
        writer.finish()
    return prefix


def opened(vocab: int = 512, **settings: object) -> TrainingData:
    return open_data(DataSection.model_validate(settings), Packing(10, 1234), CharLevelTokenizer(), vocab=vocab)


def test_paths_weights_and_purposes_of_the_settings(tmp_path: Path) -> None:
    first, second = data_set(tmp_path / "first", 30, 1), data_set(tmp_path / "second", 10, 2)
    data = opened(train_data_paths=[first, second], train_data_weights=[1, 3], valid_data_paths=[second])
    train, valid = data.source("train", 400), data.source("valid", 5)
    assert train is not None
    assert valid is not None
    assert data.source("test", 5) is None
    assert sum(int(train.row(number).tokens[0] == 2) for number in range(400)) == 300
    assert valid.row(4).tokens.tolist() == [2] * 11
    names = {path.name.partition("_10sl_")[0] for path in tmp_path.glob("*.npy")}  # 400 and 5 samples, their shares, half a percent more
    assert names == {"first_train_0_indexmap_101ns", "second_train_1_indexmap_302ns", "second_valid_0_indexmap_6ns"}


def test_data_sets_are_weighed_by_their_documents_on_demand(tmp_path: Path) -> None:
    paths = [data_set(tmp_path / "first", 30, 1), data_set(tmp_path / "second", 10, 2)]
    data = opened(train_data_paths=paths, train_data_weights=[1, 9], weight_by_num_documents=True)
    assert [part.weight for part in data.parts["train"]] == pytest.approx([0.5, 0.5])  # 3/4 x 1/4 and 1/4 x 3/4
    assert data.samples_per_epoch() == (600 - 1) // 10 + (200 - 1) // 10


def test_one_data_path_is_split(tmp_path: Path) -> None:
    data = opened(data_path=data_set(tmp_path / "mine", 20, 1), split="15,4,1")
    assert [part.sequences for parts in data.parts.values() for part in parts] == [range(15), range(15, 19), range(19, 20)]
    assert data.source("valid", 0) is None
    assert opened(data_path=tmp_path / "mine", split="1").source("valid", 5) is None


def test_an_epoch_has_as_many_samples_as_its_packing_makes_of_it(tmp_path: Path) -> None:
    path = data_set(tmp_path / "mine", 20, 1)  # 20 documents of 20 tokens
    section = DataSection.model_validate({"data_path": path, "split": "1"})
    counts = {}
    for packing in (Packing(9, 0), Packing(39, 0, "pack_until_overflow"), Packing(9, 0, "unpacked"), Packing(9, 0, "unpacked", allow_chopped=False)):
        counts[packing.pack_impl, packing.allow_chopped] = open_data(section, packing, CharLevelTokenizer(), vocab=512).samples_per_epoch()
    assert counts == {("packed", True): 44, ("pack_until_overflow", True): 10, ("unpacked", True): 20, ("unpacked", False): 0}


def test_files_of_texts_and_data_sets_blend(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "2+2=", "completion": "4"}\n' * 9)
    data = opened(train_data_paths=[tmp_path / "a.jsonl", data_set(tmp_path / "mine", 3, 1)])
    train = data.source("train", 40)
    assert train is not None
    learned = sorted({int((train.row(number).labels >= 0).sum()) for number in range(40)})
    assert learned[-1] == 11
    assert learned[0] < 6


@pytest.mark.parametrize(
    ("settings", "kind", "sentence"),
    [
        ({}, ConfigError, "no data to train on: set data_path to a data set or a file of texts, or train_data_paths to several"),
        ({"valid_data_paths": ["mine"]}, ConfigError, "no data to train on"),
        ({"data_path": "mine", "valid_data_paths": ["mine"]}, ConfigError, "data_path and valid_data_paths are both set; data_path is cut by split"),
        ({"train_data_paths": ["mine"], "train_data_weights": [1, 2]}, ConfigError, "train_data_weights has 2 entries, but train_data_paths has 1"),
        ({"train_data_paths": ["mine", "mine"], "train_label_data_paths": ["mine"]}, ConfigError, "train_label_data_paths has 1 entries"),
        ({"train_data_paths": ["mine"], "train_data_weights": [0]}, ConfigError, "train_data_weights are all 0; at least one must be above"),
        ({"train_data_paths": ["mine"] * 256}, ConfigError, "train_data_paths has 256 entries; at most 255 data sets can be blended"),
        ({"data_path": "mine", "split": "0,1"}, DataError, "split 0,1 leaves none of the 3 documents of mine to train on"),
        ({"data_path": "mine", "split": "0,1,1/3"}, DataError, "split"),
        ({"data_path": "yours"}, DataError, "yours.idx does not exist"),
    ],
)
def test_settings_without_sense_get_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict, kind: type[Exception], sentence: str) -> None:
    monkeypatch.chdir(tmp_path)
    data_set(Path("mine"), 3, 1)
    with pytest.raises(kind) as error:
        opened(**settings)
    assert sentence in str(error.value)


def test_labels_of_another_tokenizer_are_refused_before_training(tmp_path: Path) -> None:
    paths = {"train_data_paths": [data_set(tmp_path / "mine", 3, 1)], "train_label_data_paths": [data_set(tmp_path / "labels", 3, 700)]}
    with pytest.raises(DataError, match=r"labels holds the label id 700, but the model's vocabulary ends at 511; it was made with another tokenizer"):
        opened(**paths)  # pyright: ignore[reportArgumentType]


def test_data_of_another_tokenizer_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"mine holds the token id 700, but the model's vocabulary ends at 511; it was made with another tokenizer"):
        opened(data_path=data_set(tmp_path / "mine", 3, 700))
