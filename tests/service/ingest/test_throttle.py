"""Uploads beside running requests: a rest after each piece, and the same adapter in the end."""

import asyncio
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from service.ingest.throttle import MOST_RESTS, PIECE_BYTES, REST_SECONDS, Pace
from tests.service.adapters.adapter_service import TINY, multipart, serving
from tests.service.adapters.adapter_service import config as adapter_config

MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
RANK = 40_000  # whose A and B have 2.5 MB each


@pytest.mark.parametrize("busy", [True, False])
def test_one_rests_while_requests_run_and_no_longer(busy: bool) -> None:
    pace, times = Pace(lambda: busy), [time.monotonic()]
    pace.pause()
    times.append(time.monotonic())
    asyncio.run(pace.rest())
    times.append(time.monotonic())

    if busy:
        assert min(np.diff(times)) >= REST_SECONDS


def test_an_upload_rests_only_so_often() -> None:
    pace = Pace(lambda: True)
    for _ in range(MOST_RESTS):
        pace.pause()
    started = time.monotonic()
    for _ in range(10 * MOST_RESTS):
        pace.pause()
    assert time.monotonic() - started < 10 * MOST_RESTS * REST_SECONDS / 2


def test_an_upload_beside_running_requests_is_the_same_upload(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weights = save(
        {
            f"{MODULE}.lora_A.weight": random.standard_normal((RANK, TINY.hidden_size)).astype(np.float32),
            f"{MODULE}.lora_B.weight": random.standard_normal((TINY.hidden_size, RANK)).astype(np.float32),
        }
    )
    files = multipart(adapter_config(RANK), weights)
    with serving(tmp_path / "data", max_rank=RANK, max_upload_bytes=2 * len(weights)) as service:
        alone = service.client.put("/adapters/one", files=files).json()["digest"]
        service.engine.running = 1
        started = time.monotonic()
        answer = service.client.put("/adapters/two", files=files)
        seconds = time.monotonic() - started

    assert answer.json()["digest"] == alone
    assert seconds >= 2 * (len(weights) // PIECE_BYTES - 1) * REST_SECONDS, (
        "once while it comes, once while it is checked"
    )
