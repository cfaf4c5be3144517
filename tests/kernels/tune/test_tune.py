"""The choice of launch configurations, the cases of the tuner, and the lookup in its tables."""

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton")

from triton.runtime.errors import OutOfResources

from kernels import paged_attention, silu_mul, tuned
from kernels.tune import tuner
from kernels.tune.choosing import Case, DeviceBroken, NoRightConfig, choose, pruned
from kernels.tune.rows import ModelShape
from kernels.tuned import DEFAULTS, NOT_MEASURED, Tuned, lookup

ROOT = Path(__file__).parents[3]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = ModelShape(48, 4, 2, 16, 40, 300, torch.float32, DEVICE)
memory = torch.empty(100)  # shared by all launches


def doubled(x: Tensor, config: str) -> Tensor:
    """2x, in memory that is used again, as far as the config is right."""
    if config.startswith("breaks"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if config.startswith("too large"):
        raise OutOfResources(300_000, 232_448, "shared memory")
    if config != "lazy":
        torch.mul(x, 2, out=memory)
    if config == "wrong":
        memory[77] += 0.01
    if config == "nan":
        memory[77] = torch.nan
    return memory[:99] if config == "short" else memory


def seconds(launches: Sequence[Callable[[], object]]) -> float:
    """How long a config takes is written on it, wrong ones being fast."""
    return sum({"slow": 2.0, "fast": 1.0, "as fast": 1.0}.get(each.keywords["config"], 0.01) for each in launches)


def case(*candidates: str) -> Case:
    def prepare(seed: int) -> tuple[Tensor]:
        return (torch.randn(100, generator=torch.Generator().manual_seed(seed)),)

    return Case("doubled", 100, "n=1", candidates, prepare, doubled, lambda x: x * 2, (), 1e-6, 1e-6)


@pytest.mark.parametrize("wrong", ["wrong", "nan", "short"])
def test_a_fast_config_with_wrong_numbers_is_refused(wrong: str) -> None:
    chosen = choose(case("slow", wrong, "fast"), seconds)
    assert (chosen.config, chosen.seconds, chosen.slowest_seconds, chosen.timed) == ("fast", 1.0, 2.0, 2)
    [(refused, fault)] = chosen.refused
    assert refused == wrong
    assert ("1 of 100 numbers" in fault) == (wrong != "short")


def test_a_config_that_does_nothing_is_found_out_though_memory_holds_the_last_ones_answer() -> None:
    chosen = choose(case("slow", "lazy"), seconds)
    assert chosen.config == "slow"
    assert [config for config, _ in chosen.refused] == ["lazy"]


def test_a_launch_that_needs_more_than_there_is_is_passed_over_by_name() -> None:
    chosen = choose(case("too large", "slow", "too large for timing"), seconds)
    assert chosen.config == "slow"
    assert [config for config, _ in chosen.refused] == ["too large", "too large for timing"]
    assert all("shared memory" in fault for _, fault in chosen.refused)


def test_any_fault_of_a_candidate_refuses_it_by_its_name_and_the_others_are_tried() -> None:
    chosen = choose(case("slow")._replace(candidates=[None, "slow", "breaks"]), seconds)
    assert chosen.config == "slow"
    assert [fault.partition(":")[0] for _, fault in chosen.refused] == ["does not launch"] * 2
    assert "AttributeError" in chosen.refused[0][1]
    assert "illegal memory access" in chosen.refused[1][1]


def test_a_device_that_fails_for_good_ends_the_search_with_the_candidate_that_broke_it(capsys) -> None:
    def alive() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(DeviceBroken, match="breaks it broke the device"):
        choose(case("slow", "breaks it", "fast"), seconds, alive=alive)
    lines, broken = tuner.tune([case("slow"), case("breaks"), case("slow")], seconds, alive=alive)
    assert (len(lines), broken) == (1, True)
    assert "run the other kernels in a new process" in capsys.readouterr().err


def test_after_the_time_nothing_more_is_tried_and_what_was_not_compiled_in_time_is_passed_over() -> None:
    chosen = choose(case("wrong", "slow", "fast"), seconds, until=time.monotonic() - 1)
    assert chosen.config == "slow", "the first that is right"
    assert chosen.refused[-1] == ("fast", "not tried: the time was used up")
    chosen = choose(case("slow", "fast"), seconds, ready=lambda index: index == 0)
    assert chosen.refused == (("fast", "not tried: its compilation took too long"),)


def test_a_config_is_judged_at_all_shapes_of_a_case() -> None:
    """At each its numbers must be right, and its time is the sum."""

    def prepare(seed: int) -> tuple[Tensor]:
        return (torch.arange(100.0) + seed,)

    several = case("slow", "fast")._replace(others=(prepare, prepare))
    assert choose(several, seconds).seconds == 3.0

    def only_the_first(x: Tensor, config: str) -> Tensor:
        return x * 2 if config == "slow" or x[0] < 0 else x * 3

    def first(seed: int) -> tuple[Tensor]:
        return (-1 - torch.rand(100, generator=torch.Generator().manual_seed(seed)),)

    found = choose(several._replace(prepare=first, launch=only_the_first), seconds)
    assert (found.config, len(found.refused)) == ("slow", 1)


def test_what_a_step_reads_from_memory_is_timed_on_copies_that_no_cache_holds() -> None:
    counts: list[int] = []

    def count(launches: Sequence[Callable[[], object]]) -> float:
        counts.append(len(launches))
        assert len({each.args[0].data_ptr() for each in launches}) == len(launches)
        return float(len(launches))

    assert choose(case("slow")._replace(cold=True), count).seconds == 1.0
    assert choose(case("slow"), count).seconds == 1.0
    assert counts == [16, 1]


def test_at_most_so_many_candidates_are_kept_at_even_distances_with_the_default_first() -> None:
    assert pruned(list(range(100)), 50, 5) == [50, 0, 24, 49, 75]
    assert pruned([3, 1, 2], 1, 20) == [1, 3, 2]
    assert pruned([1], 1, 20) == [1]


def test_of_equally_fast_configs_the_first_is_chosen() -> None:
    assert choose(case("slow", "fast", "as fast"), seconds).config == "fast"
    assert choose(case("as fast", "fast", "slow"), seconds).config == "as fast"


def test_if_no_config_is_right_the_error_names_the_kernel_and_every_fault() -> None:
    with pytest.raises(NoRightConfig, match=r"(?s)doubled \(n=1, 100 rows\).*wrong: output 0.*too large: does not"):
        choose(case("wrong", "too large"), seconds)


def test_what_a_kernel_writes_in_place_is_compared_as_well() -> None:
    def add(x: Tensor, y: Tensor, config: bool = True) -> None:
        x.add_(y if config else 0)

    def prepare(seed: int) -> tuple[Tensor, ...]:
        return tuple(torch.randn(2, 9, generator=torch.Generator().manual_seed(seed)))

    adding = Case("add", 1, "n=9", [False, True], prepare, add, add, (0,), 0, 0)
    chosen = choose(adding, lambda launches: 1.0)
    assert (chosen.config, [config for config, _ in chosen.refused]) == (True, [False])


@pytest.mark.parametrize(
    "case",
    list(tuner.all_cases(SMALL, decode=(1, 3), prefill=20, context=30)),
    ids=lambda case: f"{case.kernel}, {case.rows} rows, {case.shape}",
)
def test_every_case_of_the_tuner_takes_its_default_for_right(case: Case) -> None:
    default = DEFAULTS[case.kernel]
    small = case._replace(candidates=[default], cold=False)
    assert choose(small, lambda launches: 1.0).config == default


def test_every_kernel_has_cases_and_every_default_is_a_candidate() -> None:
    cases = list(tuner.all_cases(SMALL, decode=(1,), prefill=20, context=30))
    assert {case.kernel for case in cases} == set(DEFAULTS)
    for case in cases:
        assert DEFAULTS[case.kernel] in case.candidates, case.kernel


def test_what_is_printed_is_an_entry_of_the_tables() -> None:
    cases = tuner.all_cases(SMALL, decode=(1, 3), prefill=20, context=30)
    cases = [case for case in cases if case.kernel == "silu_mul"]
    lines, broken = tuner.tune(cases, lambda launches: launches[0].keywords["config"].block * 1e-9)
    text = "\n".join(tuner.paste("GPU", "torch 2", lines))
    table: dict[str, Any] = eval("{" + text + "}", {"Tuned": Tuned, "SiluMulConfig": silu_mul.SiluMulConfig})
    assert not broken
    assert [tuned.rows for tuned in table["GPU"]["silu_mul"]] == [1, 3, 20]
    found = lookup("GPU", "silu_mul", 3, tables=table)
    assert found.config == silu_mul.SiluMulConfig(256, 1)
    assert found.measurement == "0.3 µs, slowest of 8 2.0; n=40"


def test_a_kernel_that_is_never_right_does_not_keep_others_from_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    lines, broken = tuner.tune([case("wrong"), case("wrong", "fast")], seconds)
    assert broken
    assert [line for _, line in lines] == ['Tuned(100, fast, "1000000.0 µs, slowest of 1 1000000.0; n=1"),']
    told = capsys.readouterr()
    assert told.err.count("doubled") == 2
    assert told.out == 'doubled: Tuned(100, fast, "1000000.0 µs, slowest of 1 1000000.0; n=1"),\n', "as it is found"


def test_cases_that_the_time_is_not_enough_for_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    lines, broken = tuner.tune([case("slow"), case("fast")], seconds, until=-math.inf)
    assert (lines, broken) == ([], False)
    assert capsys.readouterr().err.count("not measured: doubled, n=1, 100 rows: out of time") == 2


def run(arguments: Sequence[str], cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    outside = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    outside |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True, check=False)


QUICKLY = """
import runpy, sys
from tests.kernels.quick_interpreter import quicken_the_interpreter

quicken_the_interpreter()
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def test_it_measures_tiny_shapes_in_the_interpreter_and_prints_a_table(tmp_path: Path) -> None:
    arguments = ["-c", QUICKLY, "kernels.tune", "--tiny", "--candidates", "2", "silu_mul", "decode shrink"]
    done = run(arguments, tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    found, table = done.stdout.split('    "tiny shapes, launched once": {')
    assert found.count("silu_mul: Tuned(") == 3
    assert found.count("decode shrink: Tuned(") == 4, "two batches of two ranks"
    assert '        "decode shrink": (' in table


COMPILE = """
import sys, time
from functools import partial
from pathlib import Path
from triton.backends.compiler import GPUTarget
from kernels.tune.compiling import Ahead
from kernels.tune.rows import ModelShape
from kernels.tune.tuner import chosen_cases

if __name__ == "__main__":
    shape = ModelShape(256, 4, 2, 64, 512, 300)
    make = partial(chosen_cases, ("silu_mul",), 2, True)
    ahead = Ahead(make, shape, 3, GPUTarget("cuda", 90, 32), 2)
    assert all(ahead.ready(case, index, time.monotonic() + 120) for case in range(3) for index in range(2))
    assert not any(ahead._compiled[case][0].result() for case in range(3)), ahead._compiled[0][0].result()
    ahead.drop(0)
    ahead.close()
"""


def test_candidates_are_compiled_ahead_without_a_gpu_into_the_cache_that_launches_look_in(tmp_path: Path) -> None:
    """What the pool compiled, a process that launches the same kernels for the same GPU finds."""
    program, cache = tmp_path / "program.py", tmp_path / "cache"
    program.write_text(COMPILE)
    done = run([str(program)], cache)
    assert done.returncode == 0, done.stderr
    compiled = set(cache.rglob("*.cubin"))
    assert len(compiled) == 2, "one for each configuration: the rows do not matter"
    program.write_text(LAUNCH)
    assert run([str(program)], cache).stdout == "launched\n"
    assert set(cache.rglob("*.cubin")) == compiled


LAUNCH = """
from kernels.tune.rows import ModelShape
from kernels.tune.tuner import chosen_cases
from tests.kernels.pretend_gpu import PretendGpu

PretendGpu.install()
for case in chosen_cases(("silu_mul",), 2, True, ModelShape(256, 4, 2, 64, 512, 300, device="cpu")):
    for config in case.candidates:
        case.launch(*case.prepare(0), config=config)
print("launched")
"""


def test_a_lookup_takes_the_entry_that_the_rows_fit_and_the_last_one_beyond() -> None:
    small, large = Tuned(8, "small", "1 µs"), Tuned(64, "large", "2 µs")
    tables = {"GPU": {"silu_mul": (small, large)}}
    found = [lookup("GPU", "silu_mul", rows, tables=tables) for rows in (1, 8, 9, 64, 65)]
    assert found == [small, small, large, large, large]


def test_what_was_not_measured_says_so() -> None:
    for kernel, default in DEFAULTS.items():
        assert lookup("another GPU", kernel, 5) == Tuned(5, default, NOT_MEASURED)
    with pytest.raises(KeyError):
        lookup("another GPU", "no kernel", 5)


def test_every_table_is_of_known_kernels_in_rising_order_and_says_what_was_measured() -> None:
    for gpu, table in tuned.TABLES.items():
        assert set(table) <= set(DEFAULTS), gpu
        for kernel, entries in table.items():
            assert [entry.rows for entry in entries] == sorted({entry.rows for entry in entries}), (gpu, kernel)
            assert all("µs" in entry.measurement for entry in entries), (gpu, kernel)


def test_an_unknown_kernel_is_said_to_be_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert tuner.main(["silu_mul", "silumul"]) == 2
    assert "no kernel is named silumul" in capsys.readouterr().err


@pytest.mark.skipif(DEVICE == "cuda", reason="is about machines without a GPU")
def test_without_a_gpu_there_is_nothing_to_measure(capsys: pytest.CaptureFixture[str]) -> None:
    assert tuner.main([]) == 1
    assert capsys.readouterr() == ("", "there is no CUDA device to measure\n")


def test_attention_in_float32_has_tiles_of_its_own_whatever_was_measured_in_bfloat16() -> None:
    tables = {"GPU": {"paged_prefill": (Tuned(8, "measured", "1 µs"),), "silu_mul": (Tuned(8, "measured", "1 µs"),)}}
    found = [lookup("GPU", name, 5, torch.float32, tables) for name in ("paged_prefill", "paged_decode", "silu_mul")]
    assert [each.config for each in found] == [
        paged_attention.FLOAT32_PREFILL,
        paged_attention.FLOAT32_DECODE,
        "measured",
    ]
    assert found[0].measurement == NOT_MEASURED
    assert lookup("GPU", "paged_prefill", 5, torch.bfloat16, tables).config == "measured"
