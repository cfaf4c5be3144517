"""The choice of launch configurations, the cases of the tuner, and the lookup in its tables."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton")

from triton.runtime.errors import OutOfResources

from kernels import paged_attention, silu_mul, tuned
from kernels.tune import tuner
from kernels.tune.choosing import Case, NoRightConfig, choose
from kernels.tune.rows import ModelShape
from kernels.tuned import DEFAULTS, NOT_MEASURED, Tuned, lookup

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = ModelShape(48, 4, 2, 16, 40, 300, torch.float32, DEVICE)
memory = torch.empty(100)  # shared by all launches


def doubled(x: Tensor, config: str) -> Tensor:
    """2x, in memory that is used again, as far as the config is right."""
    if config.startswith("too large"):
        raise OutOfResources(300_000, 232_448, "shared memory")
    if config != "lazy":
        torch.mul(x, 2, out=memory)
    if config == "wrong":
        memory[77] += 0.01
    if config == "nan":
        memory[77] = torch.nan
    return memory[:99] if config == "short" else memory


def seconds(launch: Callable[[], object]) -> float:
    """How long a config takes is written on it, wrong ones being fast."""
    return {"slow": 2.0, "fast": 1.0, "as fast": 1.0}.get(launch.keywords["config"], 0.01)


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


def test_a_fault_of_another_kind_is_not_hidden() -> None:
    with pytest.raises(AttributeError):
        choose(case("slow")._replace(candidates=[None]), seconds)


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
    chosen = choose(adding, lambda launch: 1.0)
    assert (chosen.config, [config for config, _ in chosen.refused]) == (True, [False])


@pytest.mark.parametrize(
    "case",
    list(tuner.all_cases(SMALL, decode=(1, 3), prefill=20, context=30)),
    ids=lambda case: f"{case.kernel}, {case.rows} rows, {case.shape}",
)
def test_every_case_of_the_tuner_takes_its_default_for_right(case: Case) -> None:
    default = DEFAULTS[case.kernel]
    assert choose(case._replace(candidates=[default]), lambda launch: 1.0).config == default


def test_every_kernel_has_cases_and_every_default_is_a_candidate() -> None:
    cases = list(tuner.all_cases(SMALL, decode=(1,), prefill=20, context=30))
    assert {case.kernel for case in cases} == set(DEFAULTS)
    for case in cases:
        assert DEFAULTS[case.kernel] in case.candidates, case.kernel


def test_what_is_printed_is_an_entry_of_the_tables() -> None:
    cases = tuner.all_cases(SMALL, decode=(1, 3), prefill=20, context=30)
    cases = [case for case in cases if case.kernel == "silu_mul"]
    lines, broken = tuner.tune(cases, lambda launch: launch.keywords["config"].block * 1e-9)
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
    assert capsys.readouterr().err.count("doubled") == 2


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
