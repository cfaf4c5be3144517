"""The first half hour with a GPU, in three scripts of less than ten minutes. None needs a network.

    python -m tools.first_gpu right     is the output right, and the first figures
    python -m tools.first_gpu where     where the time goes: kernels by their share, micro-benchmarks
    python -m tools.first_gpu races     memory errors and races, the kernels' tests, the tuner

Each is a list of programs with a time limit each; one that fails does not stop those after it. What they print is shown
as it comes and kept in --out, with the figures as they are measured: keep them with device, versions and date.
--dry-run runs tiny sizes in Triton's interpreter on a CPU, to see that the scripts run.

The exit status is 1 if a program failed; one that is not installed is skipped.
"""

import argparse
import datetime
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.first_gpu.steps import Step, python, run_steps

# What the programs import, with what those import; besides, pytest-xdist runs the tests in parallel
NEEDED = ("torch", "triton", "transformers", "peft", "safetensors", "numpy", "msgspec", "blake3", "llguidance", "tqdm")
FOR_TESTS = ("pytest", "hypothesis", "pytest-xdist")
VERSIONS = f"""
import importlib.metadata, platform, sys
print("Python", platform.python_version())
missing = []
for name in {NEEDED + FOR_TESTS}:
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        missing.append(name)
if missing:
    sys.exit("MISSING: " + " ".join(missing))
import torch
if torch.cuda.is_available():
    print(torch.cuda.get_device_properties(0), torch.cuda.mem_get_info(0))
"""
SANITIZER = ("compute-sanitizer", "--error-exitcode", "9", "--launch-timeout", "0")
INTERPRETED = {"TRITON_INTERPRET": "1"}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(
        "python -m tools.first_gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("script", choices=SCRIPTS)
    parser.add_argument("--out", type=Path, help="directory of the output; default: first-gpu-SCRIPT-DATE")
    parser.add_argument("--minutes", type=float, default=9.3, help="of all steps together; default: %(default)g")
    parser.add_argument("--dry-run", action="store_true")
    chosen = parser.parse_args(argv)
    out = (chosen.out or Path(f"first-gpu-{chosen.script}-{datetime.date.today().isoformat()}")).absolute()
    ended = run_steps(SCRIPTS[chosen.script](out, chosen.dry_run), out, 60 * chosen.minutes)
    return 1 if any(each.status.startswith(("failed", "stopped")) for each in ended) else 0


def conditions() -> list[Step]:
    """Under which all else is measured."""
    return [
        Step("nvidia-smi", 20, ["nvidia-smi"]),
        Step("versions", 60, python("-c", VERSIONS)),
    ]


def right(out: Path, dry: bool) -> list[Step]:
    report = ["tools.gpu_report", "--out", str(out), *(["--dry-run"] if dry else [])]
    dtypes = [] if dry else ["--dtypes", "bfloat16"]
    sections = ["engine", "decode", "lora", "prefill", "alora", "load", "update"]
    return [
        *conditions(),
        Step("correctness", 110, python("-m", *report, "--only", "correctness", "--here", *dtypes, "--minutes", "1.7")),
        Step("figures", 430, python("-m", *report, "--only", *sections, "--minutes", "7")),
    ]


def where(out: Path, dry: bool) -> list[Step]:
    own = ["--out", str(out), *(["--dry-run"] if dry else [])]
    counters = shlex.split("ncu --set basic --clock-control none --graph-profiling node -c 24 -k")
    counters.append("regex:_decode_kernel|_expand_kernel|_shrink_kernel")
    few = ["--batches", "1", "--adapters", "1", "--no-mixed"]
    return [
        *conditions(),
        Step("profile", 230, python("-m", "tools.first_gpu.profile", *own)),
        Step("micro", 180, python("-m", "tools.first_gpu.micro", *own, "--seconds", "170")),
        Step("counters", 100, [*counters, *python("-m", "tools.first_gpu.profile", *own, *few, "--no-trace")]),
    ]


def races(out: Path, dry: bool) -> list[Step]:
    own = ["--dry-run"] if dry else []
    sanitizer = [] if dry else [*SANITIZER, "--tool"]
    memory, shared = ([*sanitizer, tool] if sanitizer else [] for tool in ("memcheck", "racecheck"))
    interpreted = INTERPRETED if dry else None
    tests = ["tests/kernels", "--ignore=tests/kernels/cpu", "-n", "8"]
    if dry:
        tests = ["tests/kernels/test_lora_tiles.py"]
    tune = ["--tiny", "--candidates", "1"] if dry else ["--seconds", "110"]
    launches = ["kernels.tune", "--tiny", "--candidates", "1", *(["silu_mul"] if dry else [])]
    return [
        *conditions(),
        Step("churn", 60, python("-m", "tools.first_gpu.churn", *own)),
        Step("memcheck", 140, [*memory, *python("-m", "tools.first_gpu.churn", *own, "--few")]),
        Step("racecheck", 60, [*shared, *python("-m", *launches)], interpreted),
        Step("kernel-tests", 150, python("-m", "pytest", "-q", *tests, "-k", "not every_candidate")),
        Step("tune", 125, python("-m", "kernels.tune", *tune, *(["silu_mul"] if dry else [])), interpreted),
    ]


SCRIPTS = {"right": right, "where": where, "races": races}

if __name__ == "__main__":
    sys.exit(main())
