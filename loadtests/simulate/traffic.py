"""Conversations that come: the adapter of each, how long its turns are, and when it begins. A function of a seed."""

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

BASE = -1  # the adapter of a request that has none


def adapter_name(adapter: int) -> str:
    return f"adapter-{adapter}"


def conversation_name(number: int) -> str:
    return f"conversation-{number}"


class Turn(NamedTuple):
    """One request of a conversation."""

    new: int  # tokens of the prompt that no earlier turn has
    answer: int  # tokens
    pause: float  # seconds between the answer before and this request; 0 in the first turn


class Conversation(NamedTuple):
    number: int
    adapter: int
    begins: float
    turns: Sequence[Turn]


class Lengths(NamedTuple):
    """A log-normal distribution of tokens, cut off at `most`."""

    median: float
    sigma: float  # of the logarithm; 0: all are the median
    most: int

    def draw(self, rng: random.Random) -> int:
        return min(self.most, max(1, round(self.median * math.exp(rng.gauss(0.0, self.sigma)))))


class Traffic(NamedTuple):
    """What clients do. The defaults are a chat's."""

    adapters: int = 1000
    zipf: float = 1.0  # exponent of the adapters' popularity
    base_share: float = 0.1  # of the conversations, without an adapter
    requests_per_second: float = 10.0
    seconds: float = 60.0  # conversations begin for so long
    burst: float = 1.0  # squared coefficient of variation of the gaps between conversations; 1: a Poisson process
    prompt: Lengths = Lengths(300, 0.8, 4000)  # the first turn's
    follow_up: Lengths = Lengths(60, 0.8, 1000)  # what each later turn adds
    answer: Lengths = Lengths(120, 0.7, 1000)
    continues: float = 0.5  # probability that a turn follows
    pause_seconds: float = 8.0  # mean of an exponential distribution
    most_turns: int = 8

    @property
    def mean_turns(self) -> float:
        return sum(self.continues**turn for turn in range(self.most_turns))


def conversations(traffic: Traffic, seed: int) -> Iterator[Conversation]:
    """Yield the conversations in the order of their beginnings; the same seed gives the same ones to every router."""
    rng = random.Random(f"traffic {seed}")
    cumulative = list(itertools.accumulate(rank**-traffic.zipf for rank in range(1, traffic.adapters + 1)))
    ranks = range(traffic.adapters)
    # Ranks are dealt to adapters at random, so that an adapter's number says nothing of its popularity.
    names = random.Random(f"names {seed}").sample(ranks, traffic.adapters)
    shape, mean = 1 / traffic.burst, traffic.mean_turns / traffic.requests_per_second
    now = 0.0
    for number in itertools.count():
        now += rng.gammavariate(shape, mean / shape)
        if now >= traffic.seconds:
            return
        adapter = BASE
        if traffic.adapters and rng.random() >= traffic.base_share:
            adapter = names[rng.choices(ranks, cum_weights=cumulative)[0]]
        yield Conversation(number, adapter, now, _turns(traffic, rng))


def popular(traffic: Traffic, seed: int) -> list[int]:
    """Return the adapters, the most popular one first."""
    return random.Random(f"names {seed}").sample(range(traffic.adapters), traffic.adapters)


def _turns(traffic: Traffic, rng: random.Random) -> list[Turn]:
    turns = [Turn(traffic.prompt.draw(rng), traffic.answer.draw(rng), 0.0)]
    while len(turns) < traffic.most_turns and rng.random() < traffic.continues:
        pause = rng.expovariate(1 / traffic.pause_seconds)
        turns.append(Turn(traffic.follow_up.draw(rng), traffic.answer.draw(rng), pause))
    return turns


class Request:
    """A turn that has come, and what became of it. Times are seconds of the simulation."""

    __slots__ = (
        "adapter",
        "answer",
        "arrived",
        "cached",
        "computed",
        "conversation",
        "done_at_step",
        "ended",
        "fetched",
        "first",
        "place",
        "prompt",
        "refused",
        "replica",
        "router",
        "turn",
    )

    def __init__(self, conversation: Conversation, turn: int, arrived: float) -> None:
        turns = conversation.turns
        self.conversation, self.turn, self.arrived = conversation, turn, arrived
        self.adapter = conversation.adapter
        self.prompt = sum(each.new + each.answer for each in turns[:turn]) + turns[turn].new  # tokens
        self.answer = turns[turn].answer  # tokens
        self.router = self.replica = -1
        self.place = 0  # in its replica's line
        self.cached = 0  # tokens of the prompt whose K/V were found, or fetched
        self.fetched = 0  # tokens of those whose K/V came from another replica
        self.computed = 0  # tokens of the prompt, `cached` included
        self.done_at_step = 0  # the step of its replica that computes its last token
        self.first = self.ended = math.nan
        self.refused = False

    @property
    def tokens(self) -> int:
        """Of the prompt and the answer."""
        return self.prompt + self.answer
