"""Our model as lm-eval knows models: texts become tokens here, and orders for all ranks."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_lite.data.tokenizer import Tokenizer, beginning_of
from megatron_lite.errors import DataError
from megatron_lite.evaluation.work import Answer, Order, Scoring, Writing
from megatron_lite.inference.packing import TokenRequest
from megatron_lite.inference.request import Request, Sampling
from megatron_lite.inference.score import Score

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

Pair = tuple[tuple[str, str] | None, list[int], list[int]]
"""The texts, for lm-eval's cache, and the tokens of context and continuation."""

MOST_AT_ONCE = 16384  # requests in an order: what is answered survives a failure in the next one, if answers are cached
MOST_NEW_TOKENS = 256  # where a task does not say; as lm-eval's own models do


class HarnessModel(TemplateLM):
    """Gives orders through `give`. To lm-eval it is one process alone: sharing the work among ranks and replicas is ours."""

    tokenizer = None  # lm-eval asks it for chat templates, which these models do not have

    def __init__(self, give: Callable[[Order], Answer], tokenizer: Tokenizer, *, context: int, seed: int) -> None:
        super().__init__()
        self.give = give
        self.text = tokenizer
        self._beginning = beginning_of(tokenizer)
        self.max_length = context
        self.max_gen_toks = MOST_NEW_TOKENS
        self.batch_size = 1  # of no meaning: batches are made of tokens
        self.seed = seed
        self._encoded: dict[str, list[int]] = {}
        self._documents = 0  # that the requests at hand belong to

    @property
    def eot_token_id(self) -> int:
        return self.text.eod

    @property
    def prefix_token_id(self) -> int:
        return self._beginning[0] if self._beginning else self.text.eod

    @property
    def tokenizer_name(self) -> str:
        return type(self.text).__name__

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:
        if add_special_tokens is not None:
            return self.text.encode(string, add_special_tokens=add_special_tokens)
        found = self._encoded.get(string)
        return self._encode([string])[0] if found is None else found

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """As texts that stand alone; where one begins with the text of <s>, that is not put in front of it again."""
        size, twice = len(self._beginning), 2 * self._beginning
        return [tokens[size:] if twice and tokens[: 2 * size] == twice else tokens for tokens in self.text.encode_batch(texts)]

    def loglikelihood(self, requests: "list[Instance]", disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """As lm-eval splits context and continuation, but with all texts encoded beforehand, at once and on all cores."""
        asked = [cast(tuple[str, str], request.args) for request in requests]
        pairs = [(context.rstrip(), context + continuation) for context, continuation in asked]
        texts = list(dict.fromkeys(chain.from_iterable(pairs)))
        self._encoded = dict(zip(texts, self._encode(texts), strict=True))
        try:
            answers: list[tuple[float, bool]] = []
            for first in range(0, len(requests), MOST_AT_ONCE):
                some = requests[first : first + MOST_AT_ONCE]
                self._documents = len({(request.task_name, request.doc_id) for request in some})
                answers += super().loglikelihood(some, disable_tqdm=True)
            return answers
        finally:
            self._encoded = {}

    def _loglikelihood_tokens(self, requests: Sequence[Pair], disable_tqdm: bool = True, **kwargs: object) -> list[tuple[float, bool]]:
        wanted = [TokenRequest(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        scores = cast(list[Score], self.give(Scoring(wanted, self._documents)))
        answers = [(score.logprob, score.is_greedy) for score in scores]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: "list[Instance]", disable_tqdm: bool = True) -> list[float]:
        """Every text from its first token on, in windows of the model's length that do not overlap in what they predict."""
        texts = [str(request.args[0]) for request in requests]
        windows = [self._windows(tokens) for tokens in self.text.encode_batch(texts, add_special_tokens=False)]
        self._documents = len(requests)
        scores = iter(self._loglikelihood_tokens(list(chain.from_iterable(windows))))
        totals = [sum(next(scores)[0] for _ in each) for each in windows]
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def _windows(self, tokens: list[int]) -> list[Pair]:
        rolling = get_rolling_token_windows(tokens, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1)
        return [(None, *make_disjoint_window(window)) for window in rolling]

    def generate_until(self, requests: "list[Instance]", disable_tqdm: bool = True) -> list[str]:
        """Continuations up to the first of the task's stop strings."""
        asked = [cast(tuple[str, dict[str, Any]], request.args) for request in requests]  # Any: a task's own settings
        prompts = self._encode([text for text, _ in asked])
        orders = [self._request(number, text, tokens, options) for number, ((text, options), tokens) in enumerate(zip(asked, prompts, strict=True))]
        texts = cast(list[str], self.give(Writing(orders)))
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _request(self, number: int, text: str, tokens: list[int], options: dict[str, Any]) -> Request:
        """A prompt that is too long loses its beginning, so that there is room for what is to be written."""
        asked = cast(dict[str, Any], normalize_gen_kwargs(options, self.max_gen_toks))
        room = self.max_length - asked["max_gen_toks"]
        if room <= 0:
            raise DataError(
                f"a task asks for {asked['max_gen_toks']} new tokens (max_gen_toks), but the model has {self.max_length} positions; "
                "ask for fewer in the task's generation_kwargs, or leave it out"
            )
        sampling = Sampling(
            temperature=float(asked["temperature"]) if asked["do_sample"] else 0.0,
            top_k=int(asked.get("top_k") or 0),
            top_p=float(asked.get("top_p") or 0.0),
            maximum_tokens=asked["max_gen_toks"],
            stop=tuple(stop for stop in asked["until"] if stop),
            seed=self.seed,
        )
        return Request(number, text, tuple(tokens[-room:]) or (self.eot_token_id,), sampling)
