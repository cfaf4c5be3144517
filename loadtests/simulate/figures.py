"""What a run of the simulation says, and its tables and plots."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from loadtests.bench.report import percentile, table
from loadtests.load.plots import Line, document, shown
from loadtests.simulate import routers
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


class Column(NamedTuple):
    """One figure of a table; with a range, several seeds show its median, and the least and the most of it."""

    name: str
    of: Callable[[Figures], float]
    shown: Callable[[float], str]
    ranged: bool = False

    def cell(self, seeds: Sequence[Figures]) -> str:
        values = [self.of(figures) for figures in seeds]
        middle = self.shown(statistics.median(values))
        if not self.ranged or len(values) == 1:
            return middle
        return f"{middle} ({self.shown(min(values))}–{self.shown(max(values))})"


COLUMNS = (
    Column("goodput/s", lambda of: of.goodput, shown),
    Column("of offered", lambda of: of.met, "{:.1%}".format, ranged=True),
    Column("first token p50, ms", lambda of: of.first_p50, shown),
    Column("p99, ms", lambda of: of.first_p99, shown, ranged=True),
    Column("a token p50, ms", lambda of: of.token_p50, shown),
    Column("p99, ms", lambda of: of.token_p99, shown),
    Column("on device", lambda of: of.on_device, "{:.0%}".format),
    Column("MB a request to the device", lambda of: of.copied / 1e6, shown, ranged=True),
    Column("from disk", lambda of: of.read / 1e6, shown),
    Column("from the store", lambda of: of.downloaded / 1e6, shown),
    Column("prompts reused", lambda of: of.reused, "{:.0%}".format),
    Column("fetched", lambda of: of.fetched, "{:.0%}".format),
    Column("busiest", lambda of: of.busiest, "{:.2f}×".format),
)


class Run(NamedTuple):
    """One router at one value of what is varied."""

    router: str
    value: float
    seeds: Sequence[Figures]  # of each seed


def runs_table(axis: str, runs: Sequence[Run]) -> str:
    head = [axis, "router", *(column.name for column in COLUMNS)]
    return table(
        head, [[shown(run.value), run.router, *(column.cell(run.seeds) for column in COLUMNS)] for run in runs]
    )


class Plot(NamedTuple):
    """One figure over what is varied; of several seeds the median."""

    title: str
    of: Callable[[Figures], float]
    logarithmic: bool = False


PLOTS: Mapping[str, Plot] = {
    "goodput": Plot("requests that met the goal, %", lambda of: 100 * of.met),
    "first": Plot("first token, 99th percentile, ms", lambda of: of.first_p99, logarithmic=True),
    "moved": Plot("adapters moved to the device, MB a request", lambda of: of.copied / 1e6),
}


def plots(axis: str, runs: Sequence[Run]) -> dict[str, str]:
    """Return SVG documents by name: each figure over what is varied. A router looks the same in all plots."""
    drawn = {}
    for name, plot in PLOTS.items():
        lines = []
        for router in dict.fromkeys(run.router for run in runs):
            points = [(run.value, statistics.median(map(plot.of, run.seeds))) for run in runs if run.router == router]
            lines.append(Line(router, points, routers.NAMES.index(router)))
        drawn[name] = document(plot.title, axis, lines, logarithmic=plot.logarithmic)
    return drawn
