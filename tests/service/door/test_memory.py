"""A request that is far too large costs the service neither memory nor time, on a real process."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.service.test_serve import said, service

MB = 1 << 20
WORDS = "a " * (2 * MB)
EMPTY = {"role": "user", "content": ""}
TOO_LARGE = {
    "one text": ("/v1/completions", {"prompt": WORDS}),
    "one word": ("/v1/completions", {"prompt": "a" * 4 * MB}),
    "its end": ("/v1/completions", {"prompt": WORDS, "truncate_prompt_tokens": 4, "max_tokens": 2}),
    "many prompts": ("/v1/completions", {"prompt": ["a"] * MB}),
    "empty lists": ("/v1/completions", {"prompt": [[]] * MB}),
    "token ids": ("/v1/completions", {"prompt": [300] * 800_000}),
    "one message": ("/v1/chat/completions", {"messages": [EMPTY | {"content": WORDS}]}),
    "many messages": ("/v1/chat/completions", {"messages": [EMPTY] * 100_000}),
    "many items": ("/v1/responses", {"input": [EMPTY] * 100_000}),
    "an item": ("/v1/responses", {"input": WORDS}),
    "tokens to count": ("/tokenize", {"prompt": WORDS}),
    "a chat to count": ("/tokenize", {"messages": [EMPTY] * 100_000}),
    "a prefix": ("/kv/prefixes", {"prompt": WORDS}),
    "SageMaker's": ("/invocations", {"prompt": WORDS}),
    "LMI's": ("/invocations", {"inputs": WORDS}),
    "vLLM's token ids": ("/inference/v1/generate", {"token_ids": [30] * MB, "sampling_params": {}}),
}


class Process:
    def __init__(self, pid: int, url: str) -> None:
        self._status, self.url = Path(f"/proc/{pid}/status"), url

    def megabytes(self, name: str) -> int:
        """VmRSS, the memory that is resident now, or VmHWM, the most that ever was."""
        found = re.search(rf"{name}:\s+(\d+) kB", self._status.read_text())
        assert found is not None
        return int(found[1]) // 1024


@pytest.fixture(scope="module")
def process(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    options = ("--load-format", "dummy", "--served-name", "base")
    with service(tiny_model, tmp_path_factory.mktemp("data"), *options) as running:
        found = Process(running.pid, said(running, r"at (http://127\.0\.0\.1:\d+)$"))
        httpx.post(f"{found.url}/tokenize", json={"prompt": "hello"})
        yield found


@pytest.mark.parametrize("kind", TOO_LARGE)
def test_a_request_that_is_far_too_large_is_refused_soon_and_with_little_memory(process: Process, kind: str) -> None:
    path, body = TOO_LARGE[kind]
    content = json.dumps({"model": "base", **body}).encode()
    before, began = process.megabytes("VmHWM"), time.monotonic()
    answer = httpx.post(f"{process.url}{path}", content=content, timeout=60)
    assert answer.status_code == (200 if kind == "its end" else 413 if b"[]" in content else 400), answer.text[:500]
    assert time.monotonic() - began < 10
    assert process.megabytes("VmHWM") - before < 20 * len(content) / MB + 20


def test_memory_is_given_back(process: Process) -> None:
    before = process.megabytes("VmRSS")
    for path, body in TOO_LARGE.values():
        httpx.post(f"{process.url}{path}", json={"model": "base", **body}, timeout=60)
    deadline = time.monotonic() + 30
    while process.megabytes("VmRSS") > before + 40:
        assert time.monotonic() < deadline, f"{before} MB before, {process.megabytes('VmRSS')} after"
        time.sleep(0.2)
