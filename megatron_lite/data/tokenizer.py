"""Text to tokens and back, for every tokenizer_type of NeoX, by the libraries; each is imported only when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from megatron_lite.config.sections import TokenizerSection
from megatron_lite.errors import TokenizerError

if TYPE_CHECKING:
    import sentencepiece
    import tiktoken
    import tokenizers

# The token between documents: NeoX and GPT-2 spell it the first way, LLaMA 3 the second, sentencepiece models the third.
END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>")


class Tokenizer(Protocol):
    """What the rest of the program knows of a tokenizer. `eod` is the token between documents, which also ends a completion. Special tokens are those
    that some add around a text that stands alone, such as LLaMA's <s>."""

    vocab_size: int
    eod: int

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, tokens: Sequence[int]) -> str: ...
    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]: ...


class LibraryTokenizer:
    """Whatever the tokenizers library can hold: a tokenizer JSON, or GPT-2's vocabulary and merges."""

    def __init__(self, inner: tokenizers.Tokenizer, source: Path) -> None:
        self._inner = inner
        self.vocab_size = inner.get_vocab_size(with_added_tokens=True)
        known = [token for name in END_OF_DOCUMENT if (token := inner.token_to_id(name)) is not None]
        if not known:
            raise TokenizerError(f"{source} (vocab_file) has no end-of-document token; it needs one of {', '.join(END_OF_DOCUMENT)}")
        self.eod = known[0]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self._inner.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, tokens: Sequence[int]) -> str:
        return self._inner.decode(list(tokens))

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        return [encoding.ids for encoding in self._inner.encode_batch(list(texts), add_special_tokens=add_special_tokens)]


class SentencePieceTokenizer:
    """A sentencepiece model."""

    def __init__(self, inner: sentencepiece.SentencePieceProcessor, source: Path) -> None:
        self._inner = inner
        self.vocab_size = inner.GetPieceSize()
        known = [token for name in END_OF_DOCUMENT if (token := inner.PieceToId(name)) != inner.unk_id()]
        if not known:
            raise TokenizerError(f"{source} (vocab_file) has no end-of-document piece; it needs one of {', '.join(END_OF_DOCUMENT)}")
        self.eod = known[0]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self._inner.EncodeAsIds(text)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._inner.DecodeIds(list(tokens))

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        return [self.encode(text) for text in texts]


class TiktokenTokenizer:
    """One of tiktoken's encodings."""

    def __init__(self, inner: tiktoken.Encoding) -> None:
        self._inner = inner
        self.vocab_size = inner.n_vocab
        self.eod = inner.eot_token

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self._inner.encode(text, allowed_special="all")

    def decode(self, tokens: Sequence[int]) -> str:
        return self._inner.decode(list(tokens))

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        return self._inner.encode_batch(list(texts), allowed_special="all")


class CharLevelTokenizer:
    """The bytes of UTF-8, in NeoX's vocabulary of 512 with 0 between documents; ids that are no byte have no text."""

    vocab_size = 512
    eod = 0

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode("utf-8", errors="replace")

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        return [self.encode(text) for text in texts]


def beginning_of(tokenizer: Tokenizer) -> list[int]:
    """The special tokens in front of a text: LLaMA's <s>, of most tokenizers none."""
    bare, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    return next(whole[:place] for place in range(len(whole) + 1) if whole[place : place + len(bare)] == bare)


def load_tokenizer(section: TokenizerSection) -> Tokenizer:
    """The tokenizer that tokenizer_type, vocab_file and merge_file describe."""
    return LOADERS[section.tokenizer_type](section)


def _load_json(section: TokenizerSection) -> Tokenizer:
    import tokenizers

    path = _file(section, section.vocab_file, "vocab_file", "tokenizer.json")
    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise TokenizerError(f"{path} (vocab_file) is no JSON of the tokenizers library, such as 20B_tokenizer.json: {error}") from error
    return LibraryTokenizer(inner, path)


def _load_bpe(section: TokenizerSection) -> Tokenizer:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    vocab = _file(section, section.vocab_file, "vocab_file", "vocab.json")
    merges = _file(section, section.merge_file, "merge_file", "merges.txt")
    try:
        inner = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:  # the library raises bare Exceptions
        raise TokenizerError(f"{vocab} (vocab_file) and {merges} (merge_file) are not GPT-2's vocab.json and merges.txt: {error}") from error
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([name for name in END_OF_DOCUMENT if inner.token_to_id(name) is not None])
    return LibraryTokenizer(inner, vocab)


def _load_sentencepiece(section: TokenizerSection) -> Tokenizer:
    import sentencepiece

    path = _file(section, section.vocab_file, "vocab_file", "tokenizer.model")
    try:
        inner = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise TokenizerError(f"{path} (vocab_file) is no sentencepiece model: {error}") from error
    return SentencePieceTokenizer(inner, path)


def _load_tiktoken(section: TokenizerSection) -> Tokenizer:
    try:
        import tiktoken
    except ImportError as error:
        raise TokenizerError("tokenizer_type TiktokenTokenizer needs the tiktoken package, which is not installed; run: pip install tiktoken") from error
    name = str(section.vocab_file or "")
    if name not in tiktoken.list_encoding_names():
        raise TokenizerError(f"vocab_file {name or '(not set)'} is no encoding of tiktoken; use one of {', '.join(tiktoken.list_encoding_names())}")
    try:
        return TiktokenTokenizer(tiktoken.get_encoding(name))
    except OSError as error:
        raise TokenizerError(
            f"tiktoken has no copy of the encoding {name} (vocab_file) and could not download it: {error}; "
            "without a network, set TIKTOKEN_CACHE_DIR to the cache folder of a machine that has it"
        ) from error


LOADERS: dict[str, Callable[[TokenizerSection], Tokenizer]] = {
    "HFTokenizer": _load_json,
    "GPT2BPETokenizer": _load_bpe,
    "HFGPT2Tokenizer": _load_bpe,
    "SPMTokenizer": _load_sentencepiece,
    "CharLevelTokenizer": lambda section: CharLevelTokenizer(),
    "TiktokenTokenizer": _load_tiktoken,
}


def _file(section: TokenizerSection, value: Path | None, key: str, usual_name: str) -> Path:
    """The file that a key names; a folder stands for the file that usually lies in it."""
    if value is None:
        raise TokenizerError(f"tokenizer_type {section.tokenizer_type} needs {key}; add it to the YAML or write {key}=PATH on the command line")
    path = Path(value)
    path = path / usual_name if path.is_dir() else path
    if not path.is_file():
        raise TokenizerError(f"{path} ({key}) does not exist; put the file of the {section.tokenizer_type} there or write {key}=PATH on the command line")
    return path
