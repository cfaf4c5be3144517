"""Which log records the service writes to standard error, and in which form."""

import logging
import re
import subprocess
import sys

import pytest

from service import logs

PROGRAM = """
import logging, sys
from service.logs import say, set_up
set_up(sys.argv[1])
for name in ("service.access", "storage.s3", "botocore"):
    for severity in ("debug", "info", "warning", "error"):
        getattr(logging.getLogger(name), severity)("%s of %s", severity, name)
say("for a person")
"""


def written(level: str) -> list[str]:
    command = [sys.executable, "-c", PROGRAM, level]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()


@pytest.mark.parametrize(
    ("level", "ours", "of_libraries"),
    [
        ("debug", ["debug", "info", "warning", "error"], ["warning", "error"]),
        ("info", ["info", "warning", "error"], ["warning", "error"]),
        ("warning", ["warning", "error"], ["warning", "error"]),
        ("error", ["error"], ["error"]),
    ],
)
def test_records_from_the_level_upwards_are_written_and_of_libraries_only_warnings_and_errors(
    level: str, ours: list[str], of_libraries: list[str]
) -> None:
    expected = [f"{severity} of {name}" for name in ("service.access", "storage.s3") for severity in ours]
    expected += [f"{severity} of botocore" for severity in of_libraries]
    *records, last = written(level)
    assert [record.split(": ", 1)[1] for record in records] == expected
    assert last == "for a person"


def test_a_record_has_a_time_with_milliseconds_its_level_and_its_logger() -> None:
    form = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO service\.access: info of service\.access"
    assert re.fullmatch(form, written("info")[0])


def test_lines_that_strangers_can_cause_are_few(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(logs.time, "monotonic", lambda: now)
    logger = logging.getLogger("tests.strangers")
    few = logs.Few(3)
    logger.addFilter(few)
    for number in range(10):
        logger.warning("from %d", number)
    now += 1.5
    logger.warning("from %d", 10)
    logger.warning("from %d", 11)
    logger.removeFilter(few)
    left_out = "from 10 (7 such lines before it were left out)"
    assert [record.getMessage() for record in caplog.records] == ["from 0", "from 1", "from 2", left_out]
