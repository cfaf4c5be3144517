"""Which log records the service writes to standard error, and in which form."""

import json
import logging
import re
import subprocess
import sys

import pytest

from runtime.output.logs import Field, JsonLines, TextLines
from service import logs

PROGRAM = """
import logging, sys
import huggingface_hub.utils.logging  # gives its logger a handler of its own
from service.logs import say, set_up
set_up(sys.argv[1])
for name in ("service.access", "storage.s3", "botocore", "huggingface_hub"):
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
    expected += [f"{severity} of {name}" for name in ("botocore", "huggingface_hub") for severity in of_libraries]
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
    lines = [TextLines().format(record).split(": ", 1)[1] for record in caplog.records]
    assert lines == ["from 0", "from 1", "from 2", "from 10 left_out=7"]


FORGED = "\n2026-01-01 00:00:00,000 INFO service.access: request status=200\x1b[2J\u2028\u202e"


def record(message: str, error: Exception | None = None, **fields: Field) -> logging.LogRecord:
    what = None if error is None else (type(error), error, None)
    made = logging.LogRecord("service.access", logging.INFO, "", 0, "%s", (message,), what)
    made.fields = fields
    return made


@pytest.mark.parametrize("form", [TextLines, JsonLines])
def test_nobody_writes_a_line_of_his_own_by_a_message_a_field_or_an_error(form: type[logging.Formatter]) -> None:
    text = form().format(record(f"a{FORGED}", ValueError(f"b{FORGED}"), name=f"c{FORGED}"))
    first, *below = text.splitlines()
    assert first.isprintable()
    assert all(line.startswith("    ") and line.isprintable() for line in below)


def test_a_line_in_json_has_all_fields_with_their_types() -> None:
    line = json.loads(JsonLines().format(record("done", ValueError("bad"), status=200, ms=1.5, model="a\nb", ok=True)))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    fields = {"status": 200, "ms": 1.5, "model": "a\nb", "ok": True, "traceback": "ValueError: bad"}
    assert line == {"level": "info", "logger": "service.access", "message": "done", **fields}


def test_a_value_in_words_is_quoted_where_it_could_be_taken_for_another_field() -> None:
    line = TextLines().format(record("done", path="/a b status=200", model="org/name", count=3, cut=None))
    assert line.endswith(' done path="/a b status=200" model=org/name count=3 cut=null')


def test_long_texts_are_cut(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tests.cut")
    logs.log_event(logging.getLogger("tests.cut"), "done", {"model": "b" * 100_000, "id": None})
    [written] = caplog.records
    for form in (TextLines(), JsonLines()):
        assert len(form.format(written)) < 500
        assert len(form.format(record("m" * 1_000_000))) < 5000
    assert "id" not in written.fields


def test_what_is_said_to_a_person_is_a_line_of_the_log_where_that_is_json() -> None:
    command = [sys.executable, "-c", PROGRAM.replace("set_up(sys.argv[1])", "set_up(sys.argv[1], 'json')"), "info"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()
    assert json.loads(lines[-1])["message"] == "for a person"
