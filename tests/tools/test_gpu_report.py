"""The report on a GPU: its floors are the known ones, and a dry run of it on a CPU goes through every section."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tools.gpu_report.clock import Clock, OutOfTime
from tools.gpu_report.floors import Floors, Limits, Shape
from tools.gpu_report.markdown import markdown
from tools.gpu_report.plan import Plan
from tools.gpu_report.programs import apart, kernels
from tools.gpu_report.rows import Goal, Report, Row, Section, percentile, speed
from tools.gpu_report.sections import Task, run_all

ROOT = Path(__file__).parents[2]
QWEN3_8B = Floors(Shape())
SECTIONS = ["correctness", "engine", "decode", "lora", "prefill", "load", "alora", "working_set", "update", "kernels"]
WITH_FLOORS = {
    "decode": ["bs 1", "bs 2", "bs 1, forward pass alone", "bs 2, forward pass alone"],
    "lora": ["2 adapters idle, bs 1", "2×r4, bs 2", "2×r4, bs 2, forward pass alone"],
    "prefill": ["8 tokens", "8 tokens, 1×r4", "16 tokens", "16 tokens, 1×r4"],
    "load": ["r4, until usable", "r8, until usable", "r4, the copy alone", "bs 1 beside loads"],
    "working_set": ["1×: 2 adapters, 8 tokens", "2×: 4 adapters, 8 tokens"],
    "alora": ["LoRA after 32", "aLoRA after 32"],
    "update": ["r4, tensors until usable", "bs 1 beside updates"],
}


@pytest.mark.parametrize(("batch", "floor"), [(1, 5.10), (8, 5.45), (32, 6.66), (64, 8.27), (128, 11.49)])
def test_a_decode_step_of_qwen3_8b_has_the_known_floor(batch: int, floor: float) -> None:
    assert round(QWEN3_8B.decode(batch, 1024), 2) == floor


@pytest.mark.parametrize(("rank", "megabytes", "load"), [(16, 87, 1.75), (64, 349, 6.98)])
def test_an_adapter_has_the_known_size_and_floor_of_its_load(rank: int, megabytes: int, load: float) -> None:
    assert round(QWEN3_8B.adapter_bytes(rank) / 1e6) == megabytes
    assert round(QWEN3_8B.load(rank), 2) == load


@pytest.mark.parametrize(
    ("batch", "adapters", "rank", "percent", "digits"),
    [(1, 1, 16, 0.57, 2), (32, 8, 16, 3.5, 1), (128, 32, 16, 8.1, 1), (1, 1, 64, 2.3, 1)],
)
def test_adapters_have_the_known_least_overhead(
    batch: int, adapters: int, rank: int, percent: float, digits: int
) -> None:
    ratio = QWEN3_8B.decode(batch, 1024, adapters, rank) / QWEN3_8B.decode(batch, 1024)
    assert round(100 * (ratio - 1), digits) == percent


def test_a_prompt_is_bound_by_operations_when_long_and_by_bytes_when_its_context_is_cached() -> None:
    linears = QWEN3_8B.shape.weights - 151936 * 4096
    attention = 4 * 32 * 128 * (2048 * 2049 // 2) * 36
    expected = 2 * (linears * 2048 + 151936 * 4096) + attention
    assert QWEN3_8B.prefill(2048) == pytest.approx(1e3 * expected / 800e12)
    assert QWEN3_8B.prefill(1, 16384) == QWEN3_8B.decode(1, 16385)
    assert QWEN3_8B.prefill(2048) < QWEN3_8B.prefill(2048, rank=16) < 1.01 * QWEN3_8B.prefill(2048)


def test_floors_are_of_the_limits_and_the_width_that_are_given() -> None:
    slower = Floors(Shape(), Limits(memory=1.5e12, host_to_device=25e9), itemsize=4)
    assert slower.decode(8, 1024, 1, 16) == pytest.approx(4 * QWEN3_8B.decode(8, 1024, 1, 16))
    assert slower.load(16) == pytest.approx(4 * QWEN3_8B.load(16))


def test_a_row_has_its_median_its_ratio_to_the_floor_and_its_speed_round_by_round() -> None:
    row = Row(name="x", rounds=[[2.0, 4.0, 3.0], [30.0]], base=[[1.5], [30.0, 15.0]], floor=0.5)
    assert row.median == 3.5
    assert row.ratio == 7.0
    assert row.share == pytest.approx(100 * (0.5 + 0.75) / 2)
    assert speed([[1.0]], [[60.0]]) == 60.0
    assert (percentile(range(1, 101), 0.99), percentile([5.0], 0.1)) == (99, 5.0)


@pytest.mark.parametrize(
    ("goal", "met"),
    [
        (Goal("ms", 5.9, 6.0), True),
        (Goal("ms", 6.1, 6.0), False),
        (Goal("%", 97.0, 97.0, at_least=True), True),
        (Goal("%", 96.9, 97.0, at_least=True), False),
        (Goal("ms", None, 6.0), False),
        (Goal("ms", float("nan"), 6.0), False),
    ],
)
def test_a_goal_is_met_or_missed_and_without_a_value_it_is_missed(goal: Goal, met: bool) -> None:
    assert goal.met is met


def breaks(clock: Clock) -> Iterator[Row]:
    yield Row(name="before", rounds=[[1.0]])
    raise ValueError("a reason | of its own")


def asks_until_late(clock: Clock) -> Iterator[Row]:
    yield Row(name="before", rounds=[[1.0]])
    while True:
        clock.check()


def is_deaf(clock: Clock) -> Iterator[Row]:
    yield Row(name="before", rounds=[[1.0]])
    while True:
        pass


def ends(clock: Clock) -> Iterator[Row]:
    yield Row(name="after", rounds=[[2.0]])


def test_sections_that_break_or_run_out_of_time_keep_their_rows_and_the_others_run() -> None:
    seen = []
    tasks = [Task("a", "A", 1, breaks), Task("b", "B", 1, asks_until_late), Task("c", "C", 8, ends)]
    sections = run_all(tasks, 3.0, lambda so_far: seen.append([section.status for section in so_far]))
    assert [section.status for section in sections] == ["failed", "out of time", "complete"]
    assert sections[0].reason == "ValueError: a reason | of its own"
    assert [row.name for section in sections for row in section.rows] == ["before", "before", "after"]
    assert [section.passed for section in sections] == [False, False, True]
    assert seen[:2] == [["running", "not run", "not run"], ["failed", "not run", "not run"]], "each row can be written"


def test_a_section_that_never_looks_at_the_clock_is_stopped_and_what_has_no_time_left_does_not_run() -> None:
    started = time.monotonic()
    sections = run_all([Task("a", "A", 1, is_deaf), Task("b", "B", 1, ends)], 0.4)
    assert time.monotonic() - started < 5
    assert [(section.status, len(section.rows)) for section in sections] == [("out of time", 1), ("out of time", 0)]


def test_kernel_tests_that_fail_or_take_too_long_are_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    (failed,) = kernels(["tests/no_such_file.py"], Clock.of(60))
    assert "no_such_file.py" in capsys.readouterr().err, "as it is printed"
    assert failed.goal == Goal("exit status", 4, 0)
    assert "no_such_file.py" in failed.note
    (stopped,) = kernels(["tests/kernels"], Clock.of(0.1))
    assert stopped.goal == Goal("exit status", None, 0)
    assert stopped.note.startswith("stopped when its time was used up")


def test_a_part_that_ends_without_a_report_fails_and_one_that_is_stopped_ran_out_of_time() -> None:
    with pytest.raises(RuntimeError, match="status 2 and no report"):
        list(apart("no-such-section", [[]], Clock.of(60)))
    with pytest.raises(OutOfTime, match="was stopped"):
        list(apart("correctness", [["--dry-run"]], Clock.of(0.1)))


def report(*sections: Section, dry_run: bool = False) -> Report:
    return Report(
        dry_run=dry_run,
        date="2026-01-02",
        device="Some GPU",
        driver="1.2",
        versions={},
        model={},
        dtype="bfloat16",
        limits=Limits()._asdict(),
        plan=Plan()._asdict(),
        sections=list(sections),
    )


def cells(text: str, name: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_table_has_a_row_s_figures_its_floor_its_ratio_and_whether_the_goal_is_met() -> None:
    goal = Goal("ms a step", 12.0, 13.5)
    row = Row(name="bs 1", rounds=[[10.0, 12.0, 14.0]], base=[[11.0]], floor=6.0, goal=goal, note="a note")
    broken = Section(name="b", title="B", status="failed", reason="why | so")
    text = markdown(report(Section(name="a", title="A", status="complete", rows=[row]), broken))
    figures = ["12 ms", "10 ms", "14 ms", "6 ms", "2", "11 ms", "91.7 %"]
    assert cells(text, "bs 1") == ["bs 1", *figures, "≤ 13.5 ms a step", "12: met", "a note"]
    assert "Failed: why \\| so" in text
    assert text.startswith("# Rootstock on Some GPU, 2026-01-02")


def test_a_check_that_is_wrong_says_so_and_does_not_pass() -> None:
    rows = [Row(name="x", rounds=[[3.0]], unit="nat", goal=Goal("nat", 3.0, 1.0)), Row(name="y", note="not run")]
    section = Section(name="a", title="A", check=True, status="complete", rows=rows)
    assert not section.passed
    assert cells(markdown(report(section)), "x")[9] == "WRONG"
    section.check = False
    assert section.passed


def test_without_a_gpu_it_says_so_and_ends_with_2() -> None:
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tools.gpu_report"]
    done = subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "no CUDA device" in done.stderr


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, dict[str, Any], str]:
    out = tmp_path_factory.mktemp("report")
    command = [sys.executable, "-m", "tools.gpu_report", "--dry-run", "--out", str(out), "--minutes", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (data,), (text,) = out.glob("*.json"), out.glob("*.md")
    assert data.name.startswith("dry-run-")
    assert text.name.startswith("dry-run-")
    content = data.read_bytes()
    return msgspec.json.decode(content, type=Report), json.loads(content), text.read_text()


def test_a_dry_run_goes_through_every_section_and_every_check_is_right(dry_run: tuple[Report, Any, str]) -> None:
    report, _, text = dry_run
    assert [section.name for section in report.sections] == SECTIONS
    assert {section.status for section in report.sections} == {"complete"}
    assert all(f"## {section.title} (dry run)" in text for section in report.sections)
    checks = [row for section in report.sections if section.check for row in section.rows]
    assert len(checks) > 10
    assert [row.name for row in checks if row.goal is None] == ["adapters, bfloat16", "qwen3, bfloat16"]
    assert "WRONG" not in text


def test_a_dry_run_has_every_row_with_samples_floor_and_ratio_in_both_files(dry_run: tuple[Report, Any, str]) -> None:
    report, data, text = dry_run
    in_json = {section["name"]: {row["name"]: row for row in section["rows"]} for section in data["sections"]}
    for section in report.sections:
        by_name = {row.name: row for row in section.rows}
        for name in WITH_FLOORS.get(section.name, []):
            row = by_name[name]
            assert row.floor is not None, name
            assert row.floor > 0, name
            assert row.ratio is not None, name
            assert in_json[section.name][name]["floor"] == row.floor
            assert in_json[section.name][name]["rounds"] == row.rounds
        for row in section.rows:
            line = cells(text, row.name)
            assert bool(line[1]) == bool(row.samples), row.name
            assert bool(line[4]) == bool(line[5]) == (row.floor is not None), row.name


def test_no_figure_of_a_dry_run_can_be_taken_for_a_gpu_s(dry_run: tuple[Report, Any, str]) -> None:
    report, data, text = dry_run
    assert (report.dry_run, data["device"]) == (True, "no GPU (dry run)")
    assert text.startswith("# DRY RUN: no figure here is a GPU's\n")
    for section in report.sections:
        for row in section.rows:
            line = cells(text, row.name)
            measured = [line[column] for column in (1, 2, 3, 5, 6, 7) if line[column]]
            assert all(cell.endswith("(dry run)") for cell in measured), line
            assert section.check or line[9] in ("", "dry run"), line


def test_twice_what_the_device_holds_is_never_found_there(dry_run: tuple[Report, Any, str]) -> None:
    report, _, _ = dry_run
    (section,) = (section for section in report.sections if section.name == "working_set")
    assert section.rows[1].note == "4 of 4 requests loaded their adapter"
