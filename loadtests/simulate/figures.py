"""What a run of the simulation says, and its tables and plots."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from loadtests.bench.report import percentile, table
from loadtests.load.plots import Line, document, shown
from loadtests.simulate.simulation import Outcome
from loadtests.simulate.traffic import Request


class Goal(NamedTuple):
    """When a request counts."""

    first_seconds: float  # to the first token, at most
    token_seconds: float  # from token to token, in the mean, at most

    def met(self, request: Request) -> bool:
        return (
            not request.refused
            and first_seconds(request) <= self.first_seconds
            and token_seconds(request) <= self.token_seconds
        )


class Figures(NamedTuple):
    """One run. Of requests that came while it was warm; times in milliseconds."""

    requests: int
    refused: int
    offered: float  # requests a second
    goodput: float  # requests a second that met the goal
    first_p50: float
    first_p99: float
    token_p50: float
    token_p99: float
    tokens_per_second: float
    on_device: float  # share of the requests with an adapter that found it on the device
    copied: float  # bytes a request: host → device
    read: float  # disk → host
    downloaded: float  # store → disk
    reused: float  # share of the prompts' tokens that were not computed
    fetched: float  # share of them whose K/V came from other replicas
    busiest: float  # the time that the busiest replica computed, over the mean

    @property
    def met(self) -> float:
        """The share of the requests that met the goal."""
        return self.goodput / self.offered


def first_seconds(request: Request) -> float:
    return request.first - request.arrived


def token_seconds(request: Request) -> float:
    return (request.ended - request.first) / (request.answer - 1) if request.answer > 1 else 0.0


def figures(outcome: Outcome, goal: Goal, warm: float, until: float) -> Figures:
    """Sum up the requests that came between two times; bytes are of all that came after the first."""
    warmed = [request for request in outcome.requests if request.arrived >= warm]
    requests = [request for request in warmed if request.arrived < until]
    answered = [request for request in requests if not request.refused]
    first = [1000 * first_seconds(request) for request in answered]
    gaps = [1000 * token_seconds(request) for request in answered]
    counted, prompts = outcome.counted, sum(each.prompt for each in answered)
    copied, read, downloaded = (each / len(warmed) for each in counted.moved)
    busy = [replica.busy_seconds for replica in outcome.replicas]
    return Figures(
        requests=len(requests),
        refused=len(requests) - len(answered),
        offered=len(requests) / (until - warm),
        goodput=sum(map(goal.met, answered)) / (until - warm),
        first_p50=statistics.median(first),
        first_p99=percentile(first, 0.99),
        token_p50=statistics.median(gaps),
        token_p99=percentile(gaps, 0.99),
        tokens_per_second=sum(request.answer for request in answered) / (until - warm),
        on_device=counted.hits / max(1, counted.hits + counted.misses),
        copied=copied,
        read=read,
        downloaded=downloaded,
        reused=sum(each.cached for each in answered) / prompts,
        fetched=sum(each.fetched for each in answered) / prompts,
        busiest=max(busy) / statistics.fmean(busy),
    )


HEAD = (
    *("goodput/s", "of offered", "first token p50, ms", "p99, ms", "a token p50, ms", "p99, ms", "on device"),
    *("MB a request to the device", "from disk", "from the store", "prompts reused", "fetched", "busiest"),
)


def cells(of: Figures) -> list[str]:
    times = (of.first_p50, of.first_p99, of.token_p50, of.token_p99)
    return [
        shown(of.goodput),
        f"{of.met:.1%}",
        *map(shown, times),
        f"{of.on_device:.0%}",
        *(shown(each / 1e6) for each in (of.copied, of.read, of.downloaded)),
        f"{of.reused:.0%}",
        f"{of.fetched:.0%}",
        f"{of.busiest:.2f}×",
    ]


class Run(NamedTuple):
    """One router at one value of what is varied."""

    router: str
    value: float
    figures: Figures


def runs_table(axis: str, runs: Sequence[Run]) -> str:
    return table([axis, "router", *HEAD], [[shown(run.value), run.router, *cells(run.figures)] for run in runs])


PLOTS: Mapping[str, tuple[str, Callable[[Figures], float]]] = {
    "goodput": ("requests that met the goal, %", lambda of: 100 * of.met),
    "first": ("first token, 99th percentile, ms", lambda of: of.first_p99),
    "moved": ("adapters moved to the device, MB a request", lambda of: of.copied / 1e6),
}


def plots(axis: str, runs: Sequence[Run]) -> dict[str, str]:
    """Return SVG documents by name: each figure over what is varied, a line for each router."""
    drawn = {}
    for name, (title, of) in PLOTS.items():
        lines = [
            Line(router, [(run.value, of(run.figures)) for run in runs if run.router == router])
            for router in dict.fromkeys(run.router for run in runs)
        ]
        drawn[name] = document(title, axis, lines)
    return drawn
