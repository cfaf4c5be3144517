"""The programs around the simulation: what they print and draw, and the arithmetic of the calibration."""

import asyncio
import json
import math
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from pathlib import Path

import pytest

from loadtests.adapter_client import AdapterClient
from loadtests.simulate import __main__ as program
from loadtests.simulate import costs as cost_tables
from loadtests.simulate import kv_sharing, validate
from loadtests.simulate.calibrate import (
    AT_ONCE,
    LONG,
    LONG_TOKENS,
    PROMPTS,
    ROWS,
    SHORT,
    Figures,
    Prompts,
    line,
    step_costs,
)
from loadtests.simulate.costs import Transfer
from loadtests.simulate.memory import AdapterMemory
from loadtests.simulate.routers import by_name
from loadtests.simulate.simulation import Cluster, Simulation
from loadtests.simulate.traffic import BASE, Conversation, Turn
from tests.loadtests.commands import SMALL, cells, number, run

SVG = "{http://www.w3.org/2000/svg}"
FEW = ["--vary", "replicas", "2", "4", "--seconds", "6", "--warm-seconds", "2", "--adapters", "50", "--rate", "3"]


def test_the_program_prints_a_row_for_each_router_and_value_and_draws_its_plots(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program.main([*FEW, "--routers", "random,ours", "--out", str(tmp_path), "--name", "few"])
    printed, stated = capsys.readouterr().out.split("\n\n")
    rows = cells(printed)[1:]
    assert [row[:2] for row in rows] == [["2", "random"], ["2", "ours"], ["4", "random"], ["4", "ours"]]
    assert all(0 < number(row[3]) <= 100 for row in rows)
    assert "ASSUMED" in stated
    for drawn in ("goodput", "first", "moved"):
        file = tmp_path / f"few-{drawn}.svg"
        assert file.stat().st_size < 20_000
        names = [text.text for text in ET.parse(file).iter(f"{SVG}text")]
        assert {"random", "ours", "replicas"} <= set(names)


def styles(drawn: Path) -> dict[str, str]:
    """The colour of each line, by its name in the legend."""
    groups = ET.parse(drawn).iter(f"{SVG}g")
    return {each[1].text or "": each.get("class", "") for each in groups if each[1].tag == f"{SVG}text"}


def test_a_router_has_the_same_colour_whichever_others_are_drawn(tmp_path: Path) -> None:
    few = [*FEW, "--out", str(tmp_path), "--adapters", "10"]
    program.main([*few, "--routers", "ours,random", "--name", "two"])
    program.main([*few, "--routers", "least loaded,random,rendezvous,ours", "--name", "four"])
    two, four = styles(tmp_path / "two-first.svg"), styles(tmp_path / "four-moved.svg")
    assert list(four) == ["least loaded", "random", "rendezvous", "ours"]
    assert len(set(four.values())) == 4
    assert two == {"ours": four["ours"], "random": four["random"]}


def test_of_several_seeds_the_median_is_shown_and_the_least_and_the_most(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def printed(*options: str) -> list[str]:
        program.main([*FEW[:3], *FEW[4:], "--routers", "random", "--adapters", "500", "--first-ms", "30", *options])
        return cells(capsys.readouterr().out.split("\n\n")[0])[1]

    each = [printed("--seed", str(seed)) for seed in (3, 4, 5)]
    kept = ["--seed", "3", "--seeds", "3", "--processes", "2", "--keep", str(tmp_path / "runs")]
    together = printed(*kept)
    for column in (2, 4, 12):  # without a range
        assert number(together[column]) == sorted(number(row[column]) for row in each)[1]
    for column in (3, 5, 9):
        low, middle, high = sorted((row[column] for row in each), key=number)
        assert together[column] == f"{middle} ({low}–{high})"
    files = sorted((tmp_path / "runs").iterdir())
    assert len(files) == 3
    before = [file.stat().st_mtime_ns for file in files]
    assert printed(*kept) == together
    assert [file.stat().st_mtime_ns for file in files] == before
    assert printed(*kept, "--zipf", "0.5") != together
    assert len(list((tmp_path / "runs").iterdir())) == 6


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--seeds", "0"], "--seeds must be at least 1, not 0"),
        (["--vary", "colour", "1"], "--vary takes one of replicas"),
        (["--vary", "replicas", "many"], "--vary replicas"),
        (["--routers", "best"], "no router 'best'"),
        (["--seconds", "5", "--warm-seconds", "5"], "--warm-seconds must be below"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        program.options(argv)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("model", kv_sharing.GPU_MODELS, ids=lambda model: model.name)
@pytest.mark.parametrize("bandwidth", [1e9, 1e10, 1e11])
def test_at_the_break_even_fetching_takes_as_long_as_computing(model: kv_sharing.Prompts, bandwidth: float) -> None:
    link = Transfer(0.002, bandwidth)
    tokens = model.break_even(link)
    if math.isinf(tokens):
        assert link.seconds(kv_sharing.LONGEST * model.kv_bytes) > model.compute_seconds(kv_sharing.LONGEST)
        return
    assert link.seconds(tokens * model.kv_bytes) == pytest.approx(model.compute_seconds(tokens))
    assert link.seconds(2 * tokens * model.kv_bytes) < model.compute_seconds(2 * tokens)


def test_the_break_even_is_printed_for_each_model_and_bandwidth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kv_sharing.main(["--costs", "gpu-assumed", "--out", str(tmp_path / "kv.svg")])
    head, *rows = cells(capsys.readouterr().out.strip())
    assert len(rows) == 1 + len(kv_sharing.GPU_MODELS)
    assert len(head) == 4 + len(kv_sharing.LINKS)
    assert ET.parse(tmp_path / "kv.svg").getroot().tag == f"{SVG}svg"


def test_the_calibration_finds_the_costs_that_the_figures_were_made_of() -> None:
    one, prompt_row, decoding_row, adapter_row, adapter = 0.008, 0.0004, 0.0003, 0.0001, 0.0007
    attended, pairs, outside = 2e-7, 3e-8, 0.006

    def prompt(tokens: int) -> float:
        return one + (tokens - 1) * prompt_row

    decoding = {rows: prompt(rows) + rows * decoding_row for rows in ROWS}
    at_once = decoding[AT_ONCE]
    first = {tokens: outside + prompt(tokens) for tokens in PROMPTS[:-1]}
    step, long = PROMPTS[-2:]
    first[long] = outside + long // step * prompt(step) + pairs * long * long / 2
    found, left = step_costs(
        Figures(
            decoding=decoding,
            long_context=at_once + AT_ONCE * attended * (LONG + LONG_TOKENS * 5 / 6 - SHORT),
            one_adapter=at_once + AT_ONCE * adapter_row + adapter,
            adapters=at_once + AT_ONCE * (adapter_row + adapter),
            first=first,
        )
    )
    assert left == pytest.approx(outside)
    assert found.decoding_row_seconds == pytest.approx(decoding_row)
    assert found.adapter_row_seconds == pytest.approx(adapter_row)
    assert found.adapter_seconds == pytest.approx(adapter)
    assert found.attended_seconds == pytest.approx(attended)
    assert found.prompt_attended_seconds == pytest.approx(pairs)
    table = found.table(256)
    assert [table[tokens] for tokens in (1, 16, 100, 256)] == pytest.approx(list(map(prompt, (1, 16, 100, 256))))


def test_figures_that_contradict_each_other_make_no_cost_less_than_nothing() -> None:
    """As of steps that are shorter than what a busy machine adds to some of them."""
    first = dict.fromkeys(PROMPTS, 0.001)
    decoding = {rows: 0.001 if rows == min(ROWS) else 0.1 for rows in ROWS}
    found, left = step_costs(Figures(decoding, long_context=0.0, one_adapter=0.0, adapters=0.0, first=first))
    assert left >= 0
    assert min(seconds for _, seconds in found.by_rows) >= 0
    assert min(found[1:]) >= 0


def test_the_calibration_of_a_server_is_a_table_that_the_simulation_reads(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "costs.json"
    given = ["--model", str(tiny_model), "--rounds", "1", f"--server-args={' '.join(SMALL)}", "--out", str(out)]
    ended = run("-m", "loadtests.simulate.calibrate", *given)
    assert ended.returncode == 0, ended.stderr
    costs = cost_tables.read(out)
    assert costs.measured
    assert costs.beside is None
    assert all(seconds >= 0 for _, seconds in costs.steps.by_rows)  # a tiny step is within the clock's noise
    assert any(seconds > 0 for _, seconds in costs.steps.by_rows)
    assert costs.kv_bytes_per_token == 2 * 2 * 2 * 16 * 2  # two layers of two heads, for K and for V, of two bytes each
    assert costs.read.bytes_per_second > 0
    assert any("1024: " in line for line in costs.conditions)


def test_a_transfer_is_what_two_sizes_took() -> None:
    found = line([(1e6, 0.012), (5e6, 0.020)])
    assert found.seconds(3e6) == pytest.approx(0.016)
    assert line([(1e6, 0.010), (5e6, 0.008)]) == Transfer(0.0, 5e6 / 0.008)


def test_loads_give_way_to_steps_for_as_long_as_their_patience_lasts() -> None:
    waits = cost_tables.Waits(read=2e-6, copy=1e-6, longest_seconds=0.1)
    memory = AdapterMemory(cost_tables.read("smollm2-two-cores")._replace(waits=waits), [5e6])
    memory.ask(0, 1)
    [idle] = memory.advance({0: 1})
    memory = AdapterMemory(memory.costs, [5e6])
    memory.ask(0, 1)
    [busy] = memory.advance({0: 1}, 0.04)
    assert busy.seconds - idle.seconds == pytest.approx(10 * 0.04)
    memory.finish(busy.load)
    [copied] = memory.advance({0: 1}, 0.04)
    assert copied.seconds == pytest.approx(memory.costs.copy.seconds(5e6) + 5 * 0.04)


@pytest.mark.parametrize("continues", [0.0, 0.6])
def test_a_run_that_took_what_the_simulation_takes_deviates_by_nothing(
    continues: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "runs.json"
    given = [str(file), "--talks", "20", "--routers", "rendezvous"]
    costs = cost_tables.read("smollm2-two-cores")
    chosen = validate.options(given)
    simulated = validate.simulate(costs, 2, "rendezvous", validate.chosen_talks(chosen, continues), chosen)
    taken = {"runs": [("rendezvous", continues, [validate.Played(simulated, [], {})])], "conditions": "-"}
    file.write_text(json.dumps({"costs": cost_tables.as_fields(costs), **taken}))
    validate.main(given)
    real, ours, deviation = cells(capsys.readouterr().out.split("\n\n")[0])[1:]
    assert real[3:] == ours[3:]
    reused = number(ours[10])
    assert set(deviation[3:]) == ({"+0.0 %"} if continues else {"+0.0 %", "–"})
    assert 20 < reused < 100 if continues else reused == 0


def test_a_server_finds_the_kv_of_a_conversation_as_the_simulation_does(server: str) -> None:
    turns = [Turn(40, 9, 0.0), Turn(7, 5, 0.0), Turn(30, 3, 0.0)]
    talks = [Conversation(number, BASE, 0.0, turns) for number in range(3)]
    with AdapterClient(server) as client:
        servers = validate.Servers([server], client.base(), [], 16)
    real = asyncio.run(validate.Client(servers, "random", 0, Prompts(49_152, "talks")).play(talks, 2))
    costs = cost_tables.read("smollm2-two-cores")
    outcome = Simulation(Cluster(1, costs, []), by_name("random")).run(iter(talks))
    simulated = map(validate.answer, outcome.requests)

    def lengths(answers: Iterable[validate.Answer]) -> list[tuple[int, ...]]:
        return sorted((each.conversation, each.turn, each.tokens, each.prompt, each.cached) for each in answers)

    assert lengths(real) == lengths(simulated)
    assert [each[2:] for each in lengths(real)[:3]] == [(9, 40, 0), (5, 56, 48), (3, 91, 60)]
