"""The load report: its arithmetic, its plots, and a run of short scenarios against a server of a tiny model."""

import itertools
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest

from loadtests.api_key import bearer
from loadtests.load import __main__ as load
from loadtests.load.page import Report, Result, Sweep, html, markdown
from loadtests.load.plots import Line, document, logarithmic_ticks, plot, shown, ticks
from loadtests.load.runs import Figures, Scenario, figures
from loadtests.server_process import find_model, running_server
from tests.loadtests.commands import SMALL, cells, number, run

KEY = "of-the-load"


def entry(kind: str, milliseconds: float, at: float, **more: object) -> dict[str, object]:
    return {"kind": kind, "name": "a", "ms": milliseconds, "at": at} | more


ENTRIES = [
    entry("GET", 5, 100.0),
    *(entry("first token", 10.0 * n, 100.0 + n) for n in range(1, 101)),
    entry("per token", 20.0, 150.0, tokens=32),
    entry("per token", 40.0, 210.0, tokens=16),
    entry("POST", 700.0, 100.7),
    entry("POST", 900.0, 210.0, failed="503 engine_died"),
    entry("PUT", 80.0, 120.0),
]


def test_the_figures_of_a_run_are_those_of_its_entries() -> None:
    found = figures(ENTRIES)
    assert (found.answers, found.failures) == (1, 1)
    assert (found.first_p50, found.first_p99) == (500.0, 990.0)
    assert (found.gap_p50, found.gap_p99) == (20.0, 40.0)
    assert found.tokens_per_second == pytest.approx(48 / (210.0 - 99.995), rel=1e-3)
    assert found.others == {"PUT": 80.0}
    assert figures([entry("POST", 1.0, 1.0, failed="no")]).first_p50 is None


def test_of_a_flood_only_the_answers_are_counted() -> None:
    of_flood = [
        entry("first token", 9000.0, 120.0, name="flood"),
        entry("per token", 500.0, 120.0, tokens=32, name="flood"),
        entry("POST", 9900.0, 120.0, name="flood"),
        entry("POST", 10.0, 121.0, failed="429 queue_full", name="flood"),
    ]
    found = figures([*ENTRIES, *of_flood])
    assert found == figures(ENTRIES)._replace(others={"PUT": 80.0, "flood": 1})
    starved = figures(of_flood)
    assert (starved.answers, starved.first_p50, starved.others["flood"]) == (0, None, 1)


@pytest.mark.parametrize("highest", [0.003, 1, 4.9, 5.1, 9.99, 100, 333, 99_999])
def test_an_axis_has_few_round_steps_from_zero_to_above_the_highest_value(highest: float) -> None:
    steps = ticks(highest)
    assert steps[0] == 0
    assert highest <= steps[-1] * (1 + 1e-9)
    assert highest > steps[-2]
    assert 3 <= len(steps) <= 6
    assert len({shown(step) for step in steps}) == len(steps)


def test_a_plot_places_the_points_between_its_axes_and_names_its_lines() -> None:
    drawn = plot(
        "tokens a second", "adapters", [Line("a <b>", [(0, 0.0), (4, 50.0), (32, 100.0)]), Line("c", [(4, 25)])]
    )
    figure = ET.fromstring(drawn)
    places = [(float(dot.get("cx", "")), float(dot.get("cy", ""))) for dot in figure.iter("circle")]
    assert places[0][0] < places[1][0] < places[2][0]
    assert places[1][0] - places[0][0] == pytest.approx(places[2][0] - places[1][0], abs=0.2)
    assert places[1][1] == pytest.approx((places[0][1] + places[2][1]) / 2, abs=0.2)
    assert places[3] == (places[1][0], pytest.approx((places[0][1] + places[1][1]) / 2, abs=0.2))
    assert [span[0].tail for span in figure.iter("span")] == [" a <b>", " c"]


@pytest.mark.parametrize(
    ("lowest", "highest"), [(367, 29_800), (1.05, 122_259), (0.004, 0.005), (200, 200), (10, 1000)]
)
def test_a_logarithmic_axis_has_few_round_steps_around_the_values(lowest: float, highest: float) -> None:
    steps = logarithmic_ticks(lowest, highest)
    assert steps[0] <= lowest < steps[1]
    assert steps[-2] < highest <= steps[-1] or len(steps) == 2
    assert 2 <= len(steps) <= 9
    assert all(1.99 < later / earlier < 10.01 for earlier, later in itertools.pairwise(steps))


def test_on_a_logarithmic_axis_equal_factors_are_equally_far_apart() -> None:
    drawn = ET.fromstring(document("ms", "rate", [Line("a", [(1, 10.0), (2, 100.0), (3, 1000.0)])], logarithmic=True))
    low, middle, high = (float(dot.get("cy", "")) for dot in drawn.iter("{http://www.w3.org/2000/svg}circle"))
    assert low - middle == pytest.approx(middle - high, abs=0.2)
    assert low - middle > 50
    with pytest.raises(ValueError, match="no place for 0"):
        document("ms", "rate", [Line("a", [(1, 0.0), (2, 1.0)])], logarithmic=True)


def test_a_title_that_would_be_cut_off_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 44 characters, not 60"):
        document("x" * 60, "rate", [])


def test_the_page_needs_nothing_from_elsewhere_and_shows_names_as_they_are() -> None:
    result = Result("<steady>", "ours", figures(ENTRIES), 1)
    report = Report("Load", [result], [Sweep("By number", "adapters", [result])], ["Machine: a & b"])
    page = html(report)
    assert "&lt;steady&gt;" in page
    assert "<steady>" not in page
    assert "a &amp; b" in page
    assert page.count("<figure>") == 3
    assert not re.search(r"""(src|href)=|url\(|@import|https?:""", page)
    _, row = cells(markdown(report).split("\n\n")[2])
    assert row == ["<steady>", "ours", "1", "1", "500", "990", "20", "40", "0.4", "80 ms an upload"]


def test_short_scenarios_beside_another_server_give_a_report(server: str, tiny_model: Path, tmp_path: Path) -> None:
    short = ["--seconds", "2", "--users", "2", "--max-tokens", "4", "--adapters", "2", "--model", str(tiny_model)]
    few = ["--scenarios", "burst,replacement,training", "--out", str(tmp_path)]
    ended = run("-m", "loadtests.load", "--url", server, "--beside", server, *short, *few)
    assert ended.returncode == 0, ended.stderr
    written = (tmp_path / "report.md").read_text()
    assert written.strip() == ended.stdout.strip()
    _, _, scenarios, _, by_adapters, _, stated = written.strip().split("\n\n")
    rows = cells(scenarios)[1:]
    assert [row[:2] for row in rows] == [[name, who] for name, who in (("burst", "ours"), ("burst", "beside"))] + [
        ["replacement", "ours"],
        ["training", "ours"],
    ]
    assert [row[:2] for row in cells(by_adapters)[1:]] == [["2", "ours"], ["2", "beside"]]
    for row in (*rows, *cells(by_adapters)[1:]):
        assert int(row[2]) > 0
        assert row[3] == "0"
        assert all(number(cell) >= 0 for cell in row[4:9])
        assert number(row[8]) > 0
    assert all(row[9].endswith("ms an upload") for row in rows[2:])
    assert "2 users at a time" in stated
    assert (tmp_path / "report.html").read_text().count("<svg viewBox") == 3
    assert httpx.get(f"{server}/adapters/load-0").status_code == 404


def test_a_key_is_sent_by_everything_and_said_by_nothing(server: str, tiny_model: Path, tmp_path: Path) -> None:
    short = ["--seconds", "1", "--users", "2", "--max-tokens", "4", "--adapters", "2", "--model", str(tiny_model)]
    few = ["--scenarios", "replacement,pipeline,training,fairness", "--out", str(tmp_path), "--beside", server]
    with running_server(["--model", str(tiny_model), *SMALL], {"ROOTSTOCK_API_KEY": KEY}) as url:
        assert run("-m", "loadtests.load", "--url", url, *short, *few).returncode == 1
        ended = run("-m", "loadtests.load", "--url", url, *short, *few, LOAD_API_KEY=KEY)
    assert ended.returncode == 0, ended.stderr
    report = (tmp_path / "report.md").read_text()
    rows = cells(report.split("\n\n")[2])[1:]
    fair = ["fairness, no flood", "fairness, a tenant floods", "fairness, an adapter is hot"]
    assert [row[0] for row in rows] == ["replacement", "pipeline", "training", *fair]
    assert all(int(row[2]) > 0 and row[3] == "0" for row in rows)
    assert [row[-1].endswith("answers of the flood") for row in rows] == [False] * 4 + [True] * 2
    assert KEY not in report + (tmp_path / "report.html").read_text() + ended.stdout + ended.stderr


def test_the_sweep_of_working_sets_meets_device_memory_for_so_many_adapters(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of Locust's users, who choose by chance, every model of a run is asked once, and then counted."""
    on_device: list[tuple[int, int]] = []

    def ask_each(scenario: Scenario, url: str, seconds: float, models: Sequence[str], scratch: Path) -> Figures:
        assert httpx.get(f"{url}/adapters").status_code == 401, "a server that is started asks for the key"
        [key, _] = scenario.api_keys
        load.warm_up(load.Target("ours", url, models[0], models[1:], key))
        adapters = httpx.get(f"{url}/adapters", headers=bearer(key)).json()["adapters"]
        tiers = [each["tier"] for each in adapters if each["name"] in models]
        on_device.append((len(models), tiers.count("device")))
        return figures(ENTRIES)

    monkeypatch.setattr(load, "run", ask_each)
    sizes = ["--adapters", "3", "--resident", "2", "--working-sets", "0.5", "1", "2", "--scenarios", ""]
    chosen = load.options([*sizes, "--api-key", KEY, "--model", str(tiny_model), f"--server-args={' '.join(SMALL)}"])
    report = load.measure(chosen, find_model(chosen.model), tmp_path)
    assert on_device == [(3, 3), (1, 1), (2, 2), (4, 2)], "of all in ample memory, and of working sets in less"
    swept = report.sweeps[-1]
    assert swept.axis == "working set / device memory"
    assert [(result.what, result.x) for result in swept.results] == [
        ("0.5 (1 adapters)", 0.5),
        ("1 (2 adapters)", 1.0),
        ("2 (4 adapters)", 2.0),
    ]
    assert KEY not in markdown(report)


def test_a_scenario_that_there_is_not_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load.options(["--scenarios", "steady,nothing"])
    assert "no scenario 'nothing'" in capsys.readouterr().err
