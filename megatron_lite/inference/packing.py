"""Packs what many requests read into few rows of tokens, without padding: a beginning that several share is there once, and each goes on from it."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

Tokens = tuple[int, ...]

LEAST_SHARED = 8
"""Tokens that a common beginning must save, to be worth a segment of its own."""
KEYS_PER_TOKEN = 8
"""So many keys to be attended to count as one token to be computed: long shared beginnings are read often, and what is read takes memory."""


@dataclass(frozen=True)
class TokenRequest:
    """What is the log-probability of `continuation` behind `context`? Both hold at least one token."""

    context: Tokens
    continuation: Tokens


@dataclass(frozen=True)
class Input:
    """Tokens that are sent through the model once, and who reads what it says behind them: numbers of requests, with the continuations that end there."""

    tokens: Tokens
    readers: tuple[tuple[int, Tokens], ...]


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of a packed row. Each sees the parts of the row that are `before`, and its own segment up to itself."""

    start: int
    length: int
    before: tuple[range, ...]

    @property
    def position(self) -> int:
        """Of its first token in the text that it belongs to."""
        return sum(map(len, self.before))

    @property
    def path(self) -> tuple[range, ...]:
        return (*self.before, range(self.start, self.start + self.length))


@dataclass(frozen=True)
class Packed:
    """A row of tokens in segments. After the token `places[i]` comes `targets[i]`, says request `owners[i]`."""

    tokens: list[int]
    segments: list[Segment]
    places: list[int]
    targets: list[int]
    owners: list[int]


def inputs_of(requests: Sequence[TokenRequest], *, context: int) -> list[Input]:
    """What must be computed, in the order in which common beginnings lie together. Text that is too long loses its beginning."""
    readers: dict[Tokens, list[tuple[int, Tokens]]] = defaultdict(list)
    for number, request in enumerate(requests):
        # the last token is only predicted, never read
        readers[(request.context + request.continuation)[-(context + 1) : -1]].append((number, request.continuation))
    return [Input(tokens, tuple(readers[tokens])) for tokens in sorted(readers)]


def deal(inputs: Sequence[Input], *, budget: int, replicas: int) -> list[Sequence[Input]]:
    """The inputs in batches of about equal work, of about `budget` tokens at most, as many for each of the replicas that take turns."""
    work = [_work(len(each.tokens), shared) for each, shared in zip(inputs, _shared(inputs), strict=True)]
    total = sum(work)
    count = replicas * -(-total // (budget * replicas))
    batches: list[list[Input]] = [[] for _ in range(count)]
    done = 0
    for each, cost in zip(inputs, work, strict=True):
        batches[done * count // total].append(each)
        done += cost
    return [batch for batch in batches if batch]


def _work(length: int, shared: int) -> int:
    return length - (shared if shared >= LEAST_SHARED else 0) + length // KEYS_PER_TOKEN


def _shared(inputs: Sequence[Input]) -> list[int]:
    """How many tokens each has in common with the one before it."""
    return [0, *(common_length(one.tokens, other.tokens) for one, other in pairwise(inputs))]


def common_length(one: Tokens, other: Tokens) -> int:
    """How many tokens two texts have in common at their beginnings."""
    return bisect_left(range(1, min(len(one), len(other)) + 1), True, key=lambda count: one[:count] != other[:count])


def pack(inputs: Sequence[Input]) -> Packed:
    """One row with all of the inputs, which must be sorted and different from each other."""
    packed = Packed([], [], [], [], [])
    shared = _shared(inputs)
    branches: list[tuple[range, tuple[range, ...]]] = [(range(len(inputs)), ())]
    while branches:
        numbers, before = branches.pop()
        depth = sum(map(len, before))
        for family in _families(numbers, shared, depth):
            first = inputs[family[0]]
            end = min(shared[family[1] : family[-1] + 1]) if len(family) > 1 else len(first.tokens)
            path = _append(packed, first.tokens[depth:end], before)
            if end == len(first.tokens):
                _read(packed, first, path)
                family = family[1:]
            if family:
                branches.append((family, path))
    return packed


def _families(numbers: range, shared: Sequence[int], depth: int) -> list[range]:
    """Neighbours that have enough in common beyond `depth` tokens, which all of them share."""
    starts = [numbers.start, *(number for number in numbers[1:] if shared[number] < depth + LEAST_SHARED), numbers.stop]
    return [range(start, stop) for start, stop in pairwise(starts)]


def _append(packed: Packed, tokens: Tokens, before: tuple[range, ...]) -> tuple[range, ...]:
    segment = Segment(len(packed.tokens), len(tokens), before)
    packed.tokens.extend(tokens)
    packed.segments.append(segment)
    return segment.path


def _read(packed: Packed, entry: Input, path: tuple[range, ...]) -> None:
    """Notes where the row predicts what the readers of this input ask for."""
    places = list(chain.from_iterable(path))
    for number, continuation in entry.readers:
        packed.places.extend(places[-len(continuation) :])
        packed.targets.extend(continuation)
        packed.owners.extend([number] * len(continuation))
