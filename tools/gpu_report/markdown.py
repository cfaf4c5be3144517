"""The report as Markdown: the conditions of the measurements, and a table for each section."""

from collections.abc import Iterable, Iterator, Sequence

from tools.gpu_report.rows import Goal, Report, Row, Section, percentile

HEAD = ("", "median", "p10", "p90", "floor", "÷ floor", "base, median", "speed beside base", "goal", "verdict", "note")
DRY = "dry run"
DRY_TITLE = "DRY RUN: no figure here is a GPU's"
ABOUT = (
    "A step time is the time between the ends of two engine steps; the host prepares a step while the one before runs. "
    "The forward pass alone is the replay of a step's CUDA graph between two events. The difference is sampling and "
    "the host's work.",
    "Adapters are compared with a base-only batch of the same engine. It runs the graph of the base: the same kernels "
    "as an engine without LoRA. Both are measured in turn in one process.",
    "A floor is bytes over bandwidth, or operations over throughput, by the limits named here, on every device.",
)


def markdown(report: Report) -> str:
    """The whole report."""
    title = f"Rootstock on {report.device}, {report.date}"
    lines = [f"# {DRY_TITLE if report.dry_run else title}", "", *_conditions(report), ""]
    for section in report.sections:
        lines += [*_section(section, dry_run=report.dry_run), ""]
    return "\n".join(lines)


def _conditions(report: Report) -> Iterator[str]:
    if report.dry_run:
        yield (
            f"- A tiny model in Triton's interpreter on a CPU, {report.date}: it shows that the report runs. Floors "
            "are for that model on a GPU with the limits below."
        )
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    yield f"- Device: {report.device}, driver {report.driver}; {versions}; {report.minutes:.1f} minutes."
    model = ", ".join(f"{name} {value}" for name, value in report.model.items())
    yield f"- Model: random weights, {report.dtype}: {model}."
    limits = report.limits
    yield (
        f"- Limits: memory {limits['memory'] / 1e12:.3g} TB/s, host to device {limits['host_to_device'] / 1e9:.3g} "
        f"GB/s, {limits['operations'] / 1e12:.3g} TFLOP/s."
    )
    yield from (f"- {sentence}" for sentence in ABOUT)


def _section(section: Section, *, dry_run: bool) -> Iterator[str]:
    yield f"## {section.title}{f' ({DRY})' if dry_run else ''}"
    yield ""
    reason = f": {_cell(section.reason)}" if section.reason else ""
    yield f"{section.status.capitalize()}{reason} ({section.seconds:.0f} s)."
    if section.rows:
        yield ""
        yield _table(HEAD, (_row(row, section, dry_run=dry_run) for row in section.rows))


def _row(row: Row, section: Section, *, dry_run: bool) -> list[str]:
    samples, unit = row.samples, row.unit
    base = [sample for each in row.base for sample in each]

    def shown(value: float | None) -> str:
        """A figure with its unit. A dry run's figures are marked one by one, since a line may be copied alone."""
        return "" if value is None else f"{_number(value)} {unit}{f' ({DRY})' if dry_run else ''}"

    several = len(samples) > 1
    return [
        _cell(row.name),
        shown(row.median),
        shown(percentile(samples, 0.1)) if several else "",
        shown(percentile(samples, 0.9)) if several else "",
        "" if row.floor is None else f"{_number(row.floor)} {unit}",
        "" if row.ratio is None else f"{_number(row.ratio)}{f' ({DRY})' if dry_run else ''}",
        shown(percentile(base, 0.5)) if base else "",
        "" if row.share is None else f"{row.share:.1f} %{f' ({DRY})' if dry_run else ''}",
        "" if row.goal is None else _goal(row.goal),
        _verdict(row, section, dry_run=dry_run),
        _cell(row.note),
    ]


def _goal(goal: Goal) -> str:
    return f"{'≥' if goal.at_least else '≤'} {_number(goal.bound)} {goal.what}"


def _verdict(row: Row, section: Section, *, dry_run: bool) -> str:
    """Right or wrong for a check, in a dry run too; met or missed for a goal, except in a dry run."""
    if row.goal is None:
        return ""
    if section.check:
        return "right" if row.goal.met else "WRONG"
    if dry_run:
        return DRY
    value = "none" if row.goal.value is None else _number(row.goal.value)
    return f"{value}: {'met' if row.goal.met else 'missed'}"


def _number(value: float) -> str:
    return f"{value:.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])
