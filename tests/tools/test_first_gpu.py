"""The scripts of the first half hour with a GPU: dry runs go through every step, and every command is parsed."""

import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from kernels.tune import tuner
from tools.first_gpu import __main__ as scripts
from tools.first_gpu import churn, micro, profile
from tools.first_gpu.steps import Step, python, run_steps
from tools.gpu_report import __main__ as report

ROOT = Path(__file__).parents[2]


def test_a_step_that_fails_hangs_or_is_not_there_does_not_stop_the_next_one(tmp_path: Path, capsys) -> None:
    steps = [
        Step("fails", 30, python("-c", "print('before it fails'); raise SystemExit(3)")),
        Step("hangs", 2, python("-c", "import subprocess, sys; print('a child', flush=True); "
                                "subprocess.run([sys.executable, '-c', 'import time; time.sleep(100)'])")),
        Step("is not there", 30, ["no-such-program"]),
        Step("works", 30, python("-c", "import os; print(os.environ['OF_THE_STEP'])"), {"OF_THE_STEP": "its own"}),
    ]  # fmt: skip
    started = time.monotonic()
    ended = run_steps(steps, tmp_path, 60)
    assert time.monotonic() - started < 30
    assert [each.status for each in ended] == [
        "failed with status 3",
        "stopped at its time limit",
        "skipped: there is no no-such-program here",
        "ok",
    ]
    assert (tmp_path / "hangs.log").read_text() == "a child\n", "what it printed before it was stopped is kept"
    assert (tmp_path / "works.log").read_text() == "its own\n"
    assert "before it fails" in capsys.readouterr().err
    assert (tmp_path / "steps.txt").read_text().count("\n") == 4


HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in NAMES:
            raise ModuleNotFoundError(f"no module is named {name}", name=name)

NAMES = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Hidden())
import kernels.tune.tuner, kernels.tune.compiling
from tools.first_gpu import churn, micro, profile
from tools.gpu_report import __main__, bench, checks, decoding, moving, programs, prompts
import tests.conftest, tests.kernels.conftest
"""


def test_the_programs_need_no_package_but_those_that_are_named() -> None:
    """What the service needs besides them is hidden: a machine with a GPU has no reason to have it."""
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    every = [*requirements["dependencies"], *requirements["optional-dependencies"]["dev"]]
    names = {re.split(r"[^\w-]", each)[0] for each in every} - {*scripts.NEEDED, *scripts.FOR_TESTS}
    assert {"starlette", "boto3", "pyzmq", "openai"} <= names
    brought = {"jinja2", "huggingface_hub", "httpx", "accelerate", "pyyaml"}  # by transformers and PEFT
    modules = {"pyzmq": "zmq", "python-multipart": "python_multipart"}
    if_installed = {"boto3"}  # accelerate asks whether it is installed, and imports it then
    hidden = {modules.get(name, name.replace("-", "_")) for name in names - brought - if_installed}
    done = subprocess.run(
        [sys.executable, "-c", HIDE, ",".join(hidden)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_without_time_the_rest_is_skipped(tmp_path: Path) -> None:
    steps = [Step("slow", 100, python("-c", "import time; time.sleep(100)")), Step("next", 10, python("-c", "1"))]
    assert [each.status for each in run_steps(steps, tmp_path, 1.0)] == [
        "stopped at its time limit",
        "skipped: no time was left",
    ]


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize("name", scripts.SCRIPTS)
def test_every_program_takes_the_options_that_it_is_given(name: str, dry: bool, tmp_path: Path) -> None:
    parsers = {
        "tools.gpu_report": report.options,
        "tools.first_gpu.profile": profile.options,
        "tools.first_gpu.micro": micro.options,
        "tools.first_gpu.churn": churn.options,
        "kernels.tune": tuner.options,
    }
    steps = scripts.SCRIPTS[name](tmp_path, dry)
    assert len({step.name for step in steps}) == len(steps), "each has a file of its own"
    parsed = 0
    for step in steps:
        command = list(step.command)
        if "-m" not in command:
            continue
        assert command[command.index("-m") - 2 :][:2] == [sys.executable, "-u"]
        program, *given = command[command.index("-m") + 1 :]
        if program in parsers:
            parsers[program](given)
            parsed += 1
    assert parsed >= 2
    assert sum(step.seconds for step in steps) <= 60 * 9.3 + 120, "steps end earlier than at their limits"


@pytest.mark.parametrize("name", ["where", "races"])
def test_a_dry_run_goes_through_every_step(name: str, tmp_path: Path) -> None:
    """The programs of `right` are the report's, whose dry run has a test of its own."""
    assert scripts.main([name, "--dry-run", "--out", str(tmp_path), "--minutes", "5"]) == 0
    lines = (tmp_path / "steps.txt").read_text().splitlines()
    statuses = {line.split()[0]: line.split(" s  ")[1] for line in lines}
    skipped = {step for step, status in statuses.items() if status.startswith("skipped: there is no")}
    assert skipped <= {"nvidia-smi", "counters"}
    assert {status for step, status in statuses.items() if step not in skipped} == {"ok"}
    if name == "where":
        kernels, measured = ((tmp_path / file).read_text() for file in ("kernels.csv", "micro.csv"))
        assert '"bs 2, base"' in kernels
        assert "beside a prompt" in kernels
        assert {line.split('"')[1] for line in measured.splitlines()} == set(micro.BENCHMARKS)
        assert "failed" not in measured
    else:
        churned = (tmp_path / "churn.log").read_text()
        assert "0 with a wrong token" in churned
        assert "0 adapters evicted" not in churned
