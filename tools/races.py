"""Runs the compiled CPU kernels' tests under ThreadSanitizer; ends with status 1 for a race in them or a failed test.

usage: python -m tools.races [PYTEST_ARGUMENT...]      needs g++ and its libtsan; takes some minutes

Only the kernels are built for it. What it reports of other libraries, which it sees in part, is not counted.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from kernels.cpu.compiled import build

ROOT = Path(__file__).parents[1]
TARGET = build.Target("races", (*build.NATIVE.flags, "-O1", "-g1", "-fsanitize=thread"), frozenset())
TESTS = [
    "tests/kernels/cpu/compiled",
    "tests/runtime/cpu",
    "--ignore=tests/kernels/cpu/compiled/test_build.py",  # these compile libraries of their own
    "--ignore=tests/kernels/cpu/compiled/test_portable_builds.py",
]
# Runs pytest on a library that is named. No compiler, which would run under the sanitizer too.
RUN = """
import sys, pathlib, pytest
from kernels.cpu.compiled import library
library.library = lambda: pathlib.Path(sys.argv[1])
sys.exit(pytest.main(sys.argv[2:]))
"""
RACE = "WARNING: ThreadSanitizer: data race"


def found(report: str) -> list[str]:
    """The races of a report in which both threads were in the kernels, each in ThreadSanitizer's words.

    A thread of another library, whose barriers the sanitizer does not see, seems to race with what came long before.
    """
    races = [part.strip() for part in report.split("==================") if RACE in part]
    return [race for race in races if all("kernels/cpu/compiled/" in stack for stack in race.split("\n\n")[:2])]


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        library = Path(scratch, "races.so")
        build.build(TARGET, library)
        preloaded = subprocess.run(["g++", "-print-file-name=libtsan.so"], check=True, capture_output=True, text=True)
        options = {"TSAN_OPTIONS": f"log_path={scratch}/report exitcode=0 history_size=7", "OMP_NUM_THREADS": "1"}
        environment = os.environ | options | {"LD_PRELOAD": preloaded.stdout.strip()}
        tests = [sys.executable, "-c", RUN, str(library), "-q", "-p", "no:cacheprovider", *(arguments or TESTS)]
        status = subprocess.run(tests, cwd=ROOT, env=environment).returncode
        races = [race for file in Path(scratch).glob("report.*") for race in found(file.read_text(errors="replace"))]
    print(f"{len(races)} races in the kernels", *races[:10], sep="\n\n")
    return 1 if races or status else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
