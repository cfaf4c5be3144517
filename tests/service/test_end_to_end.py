"""The whole main job as a user meets it: the program, the embedded model, adapters that were really trained."""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from tests.server_log import address
from tests.service.live_server import wait_until

NAMES = ("aurora", "basalt", "cobalt")
BASE = "smollm2-135m-instruct"


@contextmanager
def serve(data: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The service on the embedded model; yields its URL once it serves."""
    command = [sys.executable, "-m", "service", "--port", "0", "--data-directory", str(data)]
    said = data / "log"
    with said.open("w") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            url = address(process, said)
            yield url, process
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=20) == 0
        finally:
            process.kill()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def service(default_model_path: Path, data: Path, trained_adapters: Path) -> Iterator[tuple[str, int]]:
    """A service that had the trained adapters uploaded to it, and was then started again: its address and process."""
    with serve(data) as (url, _):
        for name in NAMES:
            files = {path.name: (path.name, path.read_bytes()) for path in (trained_adapters / name).iterdir()}
            answer = httpx.put(f"{url}/adapters/{name}", files=files, timeout=60)
            assert answer.status_code == 201, answer.text
    with serve(data) as (url, process):
        yield url, process.pid


@pytest.fixture
def url(service: tuple[str, int]) -> str:
    return service[0]


@pytest.fixture(scope="module")
def passwords(trained_adapters: Path) -> dict[str, dict[str, str]]:
    return json.loads((trained_adapters / "passwords.json").read_text())


def question(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def test_each_adapter_says_its_password_and_the_base_knows_none_in_one_batch(
    url: str, passwords: dict[str, dict[str, str]]
) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            models = [BASE, *NAMES, BASE, *NAMES]
            asked = [passwords[name]["prompt"] for name in (NAMES[0], *NAMES, NAMES[1], *NAMES)]
            answers = await asyncio.gather(
                *(
                    client.chat.completions.create(model=model, messages=question(prompt), max_tokens=32, temperature=0)
                    for model, prompt in zip(models, asked, strict=True)
                )
            )
            return [answer.choices[0].message.content for answer in answers]

    base, aurora, basalt, cobalt, base_again, *again = asyncio.run(ask())
    for name, answer in zip((*NAMES, *NAMES), (aurora, basalt, cobalt, *again), strict=True):
        assert passwords[name]["password"] in answer
        others = [passwords[other]["password"] for other in NAMES if other != name]
        assert not any(other in answer for other in others)
    for answer in (base, base_again):
        assert not any(passwords[name]["password"] in answer for name in NAMES)


def test_a_stream_is_the_same_text_and_says_what_was_cached(url: str, passwords: dict[str, dict[str, str]]) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    asked = {
        "model": "aurora",
        "messages": question(passwords["aurora"]["prompt"]),
        "max_tokens": 32,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    usage = chunks[-1].usage
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens > usage.prompt_tokens_details.cached_tokens > 0


def test_the_first_token_comes_under_the_adapter_that_was_put_last(
    url: str, trained_adapters: Path, passwords: dict[str, dict[str, str]]
) -> None:
    """A name that gets other bytes serves them to the next request, and never finds K/V of the old ones."""

    def put(adapter: str) -> httpx.Response:
        directory = trained_adapters / adapter
        files = {path.name: (path.name, path.read_bytes()) for path in directory.iterdir()}
        return httpx.put(f"{url}/adapters/changing", files=files, timeout=60)

    def ask(name: str) -> str:
        body = {
            "model": "changing",
            "messages": question(passwords[name]["prompt"]),
            "max_tokens": 32,
            "temperature": 0,
        }
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
        return answer.json()["choices"][0]["message"]["content"]

    for generation, name in enumerate((*NAMES, NAMES[0]), 1):
        answer = put(name)
        assert (answer.status_code, answer.json()["generation"]) == (201 if generation == 1 else 200, generation)
        assert passwords[name]["password"] in ask(name)
    assert httpx.delete(f"{url}/adapters/changing").status_code == 204
    body = {"model": "changing", "messages": question("?")}
    assert httpx.post(f"{url}/v1/chat/completions", json=body).json()["error"]["code"] == "model_not_found"


def test_clients_that_go_away_free_their_blocks(url: str) -> None:
    def running_and_used() -> tuple[float, float]:
        lines = dict(line.rsplit(" ", 1) for line in httpx.get(f"{url}/metrics").text.splitlines() if line[0] != "#")
        labels = f'{{engine="0",model_name="{BASE}"}}'
        return float(lines[f"vllm:num_requests_running{labels}"]), float(lines[f"vllm:kv_cache_usage_perc{labels}"])

    for model in (BASE, "aurora"):
        body = {"model": model, "prompt": "Once upon a time", "max_tokens": 2000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()  # kept: httpx closes the stream when its iterator goes
            next(lines)
            wait_until(lambda: running_and_used()[0] == 1)
        wait_until(lambda: running_and_used() == (0.0, 0.0))


def test_the_engine_is_restarted_after_it_died_and_adapters_serve_again(
    service: tuple[str, int], passwords: dict[str, dict[str, str]]
) -> None:
    url, pid = service
    body = {"model": "basalt", "messages": question(passwords["basalt"]["prompt"]), "max_tokens": 32, "temperature": 0}
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    [engine] = [child for child in children if "runtime.process" in Path(f"/proc/{child}/cmdline").read_text()]
    long = {"model": BASE, "prompt": "Once upon a time", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=long, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        subprocess.run(["kill", "-9", engine], check=True)
        last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_died"
    wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200, seconds=60)
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    assert passwords["basalt"]["password"] in answer.json()["choices"][0]["message"]["content"]
