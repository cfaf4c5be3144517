"""The report of load runs, in Markdown and as one HTML page that needs nothing else."""

from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

from loadtests.bench.report import table
from loadtests.load import plots
from loadtests.load.plots import Line, plot, shown
from loadtests.load.runs import FLOOD, Figures

HEAD = ["answers", "failures", "first token p50, ms", "p99, ms", "between tokens p50, ms", "p99, ms", "tok/s"]
PLOTS: dict[str, dict[str, Callable[[Figures], float | None]]] = {
    "time to the first token, ms": {"p50": lambda of: of.first_p50, "p99": lambda of: of.first_p99},
    "time between tokens, ms": {"p50": lambda of: of.gap_p50, "p99": lambda of: of.gap_p99},
    "tokens a second": {"": lambda of: of.tokens_per_second},
}
STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --faint: #d5d9de; --page: #fff }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page) }
body { max-width: 82rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem }
h2 { font-size: 1.15rem; margin-top: 2rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--faint); white-space: nowrap }
th { white-space: normal; vertical-align: bottom; font-weight: 600 }
th:first-child, td:first-child { text-align: left }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; margin: 1rem 0 }
figure { margin: 0 }
figcaption { font-size: 13px; display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding-left: 3rem }
svg { width: 100%; height: auto; font-size: 11px }
svg.key { width: 28px; height: 8px; vertical-align: middle }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --faint: #3a4048; --page: #15181c }
}
"""


class Result(NamedTuple):
    """One run: of a scenario, or one point of a sweep."""

    what: str  # the scenario, or the value of the sweep's axis in words
    server: str
    figures: Figures
    x: float = 0.0  # in a sweep


class Sweep(NamedTuple):
    """Runs of one scenario with one thing changed."""

    title: str
    axis: str
    results: Sequence[Result]


class Report(NamedTuple):
    title: str
    scenarios: Sequence[Result]
    sweeps: Sequence[Sweep]
    conditions: Sequence[str]


def markdown(report: Report) -> str:
    parts = [f"# {report.title}", "## Scenarios", table(*_scenario_table(report.scenarios))]
    for sweep in report.sweeps:
        parts += [f"## {sweep.title}", table(*_sweep_table(sweep))]
    parts += ["## Conditions", "\n".join(f"- {line}" for line in report.conditions)]
    return "\n\n".join(parts) + "\n"


def html(report: Report) -> str:
    parts = [f"<h1>{escape(report.title)}</h1>", "<h2>Scenarios</h2>", _html(*_scenario_table(report.scenarios))]
    for sweep in report.sweeps:
        drawn = "".join(plot(name, sweep.axis, _lines(sweep, of)) for name, of in PLOTS.items())
        parts += [f"<h2>{escape(sweep.title)}</h2>", f'<div class="plots">{drawn}</div>', _html(*_sweep_table(sweep))]
    conditions = "".join(f"<li>{escape(line)}</li>" for line in report.conditions)
    parts.append(f"<h2>Conditions</h2><ul>{conditions}</ul>")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>{escape(report.title)}</title><style>{STYLE}{plots.STYLE}</style>"
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _lines(sweep: Sweep, kinds: dict[str, Callable[[Figures], float | None]]) -> list[Line]:
    lines = []
    for server in dict.fromkeys(result.server for result in sweep.results):
        for kind, of in kinds.items():
            found = [(result.x, of(result.figures)) for result in sweep.results if result.server == server]
            points = [(x, y) for x, y in found if y is not None]
            if points:
                lines.append(Line(f"{server}, {kind}" if kind else server, points))
    return lines


def _scenario_table(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    head = ["scenario", "server", *HEAD, "besides"]
    return head, [[each.what, each.server, *_cells(each.figures), _others(each.figures)] for each in results]


def _sweep_table(sweep: Sweep) -> tuple[list[str], list[list[str]]]:
    return [sweep.axis, "server", *HEAD], [[each.what, each.server, *_cells(each.figures)] for each in sweep.results]


def _cells(of: Figures) -> list[str]:
    times = (of.first_p50, of.first_p99, of.gap_p50, of.gap_p99)
    return [str(of.answers), str(of.failures), *map(_time, times), f"{of.tokens_per_second:.1f}"]


def _time(milliseconds: float | None) -> str:
    return "–" if milliseconds is None else shown(milliseconds)


def _others(of: Figures) -> str:
    units = {"cached percent": "% of prompts cached", "PUT": "ms an upload", FLOOD: "answers of the flood"}
    return ", ".join(f"{shown(value)} {units[kind]}" for kind, value in of.others.items() if kind in units)


def _html(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in cells) + "</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return f'<div class="wide"><table><thead>{row(head, "th")}</thead><tbody>{body}</tbody></table></div>'
