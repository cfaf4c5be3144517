"""`python -m service` as a program, with the real engine on random weights: its start, its messages and its end."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.service.live_server import wait_until


@contextmanager
def service(
    model: Path, data: Path, *options: str, program: Sequence[str] = ("-m", "service"), **environment: str
) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, *program, "--model", str(model), "--port", "0", "--data-directory", str(data)]
    command += ["--kv-cache-bytes", "1M", "--adapter-bytes", "1M", "--threads", "1", *options]
    environment = {**os.environ, **environment}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def said(process: subprocess.Popen[str], pattern: str) -> str:
    """The first group of a pattern in the first line of standard error that matches; fails if no line does."""
    assert process.stderr is not None
    text = ""
    for line in process.stderr:
        text += line
        if found := re.search(pattern, line):
            return found[1]
    raise AssertionError(f"the service did not say {pattern!r} but:\n{text}")


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def engine_of(process: subprocess.Popen[str]) -> int:
    [engine] = [pid for pid in children(process.pid) if "runtime.process" in Path(f"/proc/{pid}/cmdline").read_text()]
    return engine


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_service_says_where_it_listens_serves_and_ends_at_a_signal(tiny_model: Path, tmp_path: Path) -> None:
    with service(tiny_model, tmp_path, "--load-format", "dummy", ROOTSTOCK_SERVED_MODEL_NAME="base") as process:
        url = said(process, r"serves base at (http://127\.0\.0\.1:\d+)$")
        engine = engine_of(process)
        answer = httpx.post(f"{url}/v1/completions", json={"model": "base", "prompt": "hello", "max_tokens": 4})
        assert answer.json()["usage"]["completion_tokens"] >= 1
        asked = {"model": "base", "prompt": "hello", "max_tokens": 100, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=asked) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(signal.SIGTERM)
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        assert process.wait(timeout=10) == 0
        assert not alive(engine)


SIGNAL_AT_ONCE = """
import os, signal, sys
from service import __main__ as program
say_where = program.say_where
def say_where_and_end(*given):
    say_where(*given)
    os.kill(os.getpid(), signal.SIGTERM)
program.say_where = say_where_and_end
program.main(sys.argv[1:])
print("ended", file=sys.stderr)
"""


def test_a_signal_as_soon_as_it_says_where_it_listens_ends_a_service(tiny_model: Path, tmp_path: Path) -> None:
    program = ("-c", SIGNAL_AT_ONCE)
    with service(tiny_model, tmp_path, "--load-format", "dummy", program=program) as process:
        said(process, "(ended)")
        assert process.wait(timeout=20) == 0


def test_a_second_signal_ends_requests_that_run(tiny_model: Path, tmp_path: Path) -> None:
    with service(tiny_model, tmp_path, "--load-format", "dummy", "--served-name", "base") as process:
        url = said(process, r"at (http://127\.0\.0\.1:\d+)$")
        httpx.post(f"{url}/pause", params={"mode": "keep"})
        answers: list[httpx.Response] = []
        asked = {"model": "base", "prompt": "hello", "max_tokens": 4}
        client = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}/v1/completions", json=asked, timeout=60))
        )
        client.start()
        wait_until(lambda: 'num_requests_waiting{engine="0",model_name="base"} 1.0' in httpx.get(f"{url}/metrics").text)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 503)
        assert client.is_alive()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
        client.join(20)
        assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (503, "shutting_down")


def test_log_records_of_the_engine_have_a_time_a_level_and_a_name(tiny_model: Path, tmp_path: Path) -> None:
    with service(tiny_model, tmp_path, "--load-format", "dummy", ROOTSTOCK_LOG_LEVEL="info") as process:
        record = r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO runtime\.process: started with (\S+) in \d+\.\d s$"
        assert said(process, record) == str(tiny_model)


def test_the_log_level_reaches_the_engine(tiny_model: Path, tmp_path: Path) -> None:
    with service(tiny_model, tmp_path, "--load-format", "dummy", "--log-level", "warning") as process:
        assert said(process, r"(runtime\.process|at http://)") == "at http://"


def test_a_signal_while_the_engine_starts_ends_both(tiny_model: Path, tmp_path: Path) -> None:
    with service(tiny_model, tmp_path, "--load-format", "dummy") as process:
        said(process, "(starting the engine)")
        wait_until(lambda: bool(children(process.pid)))
        [engine] = children(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 0
        wait_until(lambda: not alive(engine))


def test_an_engine_that_cannot_start_ends_the_service_with_its_reason(tiny_model: Path, tmp_path: Path) -> None:
    """The tiny model has no weights."""
    with service(tiny_model, tmp_path) as process:
        assert "model.safetensors" in said(process, "^rootstock: (.*)$")
        assert process.wait(timeout=10) == 1


def test_a_store_that_cannot_be_reached_ends_the_service_with_a_sentence(tiny_model: Path, tmp_path: Path) -> None:
    environment = {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9", "AWS_DEFAULT_REGION": "us-east-1"}
    environment |= {"AWS_ACCESS_KEY_ID": "an-id", "AWS_SECRET_ACCESS_KEY": "a-secret"}
    options = ("--load-format", "dummy", "--store", "s3://bucket", "--cache-directory", str(tmp_path / "cache"))
    with service(tiny_model, tmp_path, *options, **environment) as process:
        sentence = said(process, "^rootstock: (.*)$")
        assert process.wait(timeout=30) == 1
    assert "s3://bucket" in sentence
    assert "a-secret" not in sentence


@pytest.mark.parametrize("option", ["--data-directory", "--cache-directory"])
def test_a_directory_that_cannot_be_written_ends_the_service_with_a_sentence(
    tiny_model: Path, tmp_path: Path, option: str
) -> None:
    (tmp_path / "file").write_text("")
    options = ("--load-format", "dummy", "--store", "s3://bucket") if option == "--cache-directory" else ()
    with service(tiny_model, tmp_path, *options, option, str(tmp_path / "file" / "below")) as process:
        assert "below" in said(process, "^rootstock: (.*)$")
        assert process.wait(timeout=30) == 1


def test_an_engine_does_not_outlive_a_service_that_was_killed(tiny_model: Path, tmp_path: Path) -> None:
    with service(tiny_model, tmp_path, "--load-format", "dummy") as process:
        said(process, r"at (http://127\.0\.0\.1:\d+)$")
        engine = engine_of(process)
        process.kill()
        process.wait(timeout=10)
        wait_until(lambda: not alive(engine))


def test_a_service_with_keys_follows_their_file_and_keeps_secrets_from_its_engine(
    tiny_model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "keys.json"

    def program(*argv: str) -> str:
        command = [sys.executable, "-m", "service.keys", *argv, "--keys-file", str(file)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def models(key: str) -> int:
        return httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {key}"}).status_code

    secrets = {"ROOTSTOCK_API_KEY": "the-option", "AWS_SECRET_ACCESS_KEY": "of-aws", "HF_TOKEN": "hf_of-the-hub"}
    secrets |= {"AWS_SESSION_TOKEN": "of-aws-too", "DATABASE_URL": "postgres://user:password@host"}
    first = program("add", "first")
    options = ("--load-format", "dummy", "--keys-file", str(file))
    with service(tiny_model, tmp_path, *options, **secrets, CUDA_VISIBLE_DEVICES="", HF_HOME="/hub") as process:
        url = said(process, r"at (http://127\.0\.0\.1:\d+)$")
        engine = Path(f"/proc/{engine_of(process)}/environ").read_text().split("\0")
        given = dict(variable.split("=", 1) for variable in engine if variable)
        assert {"PATH", "CUDA_VISIBLE_DEVICES", "HF_HOME", "OMP_NUM_THREADS"} <= given.keys()
        assert not secrets.keys() & given.keys()
        assert not [name for name, value in given.items() if value in secrets.values()]
        assert [models(key) for key in (first, "the-option", "wrong")] == [200, 200, 401]
        asked = {"model": tiny_model.name, "prompt": "hello", "max_tokens": 4}
        answer = httpx.post(f"{url}/v1/completions", json=asked, headers={"authorization": f"Bearer {first}"})
        assert answer.json()["usage"]["completion_tokens"] >= 1
        second = program("add", "second")
        wait_until(lambda: models(second) == 200)
        program("revoke", "first")
        wait_until(lambda: models(first) == 401)
        assert models(second) == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0


def test_a_broken_keys_file_ends_the_service_with_a_sentence(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text("{")
    with service(tiny_model, tmp_path, "--keys-file", str(tmp_path / "keys.json")) as process:
        assert "keys.json is no keys file" in said(process, "^rootstock: (.*)$")
        assert process.wait(timeout=10) == 2
