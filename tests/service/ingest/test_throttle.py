"""Uploads beside running requests: a pause after each piece, and the same adapter in the end."""

import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from service.ingest.throttle import MAX_PAUSES, PAUSE_SECONDS, PIECE_BYTES, Throttle
from tests.service.adapters.adapter_bundles import TINY, multipart
from tests.service.adapters.adapter_bundles import config as adapter_config
from tests.service.adapters.adapter_service import serving

MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
RANK = 40_000  # whose A and B have 2.5 MB each


@pytest.mark.parametrize("busy", [True, False])
def test_an_upload_pauses_while_requests_run_and_only_then(busy: bool) -> None:
    throttle, asked = Throttle(lambda: busy), 10 * MAX_PAUSES
    started = time.monotonic()
    for _ in range(MAX_PAUSES if busy else asked):
        throttle.pause()
    seconds = time.monotonic() - started

    if busy:
        assert seconds >= MAX_PAUSES * PAUSE_SECONDS
    else:
        assert seconds < asked * PAUSE_SECONDS / 2


def test_an_upload_pauses_only_so_often() -> None:
    throttle = Throttle(lambda: True)
    for _ in range(MAX_PAUSES):
        throttle.pause()
    started = time.monotonic()
    for _ in range(10 * MAX_PAUSES):
        throttle.pause()
    assert time.monotonic() - started < 10 * MAX_PAUSES * PAUSE_SECONDS / 2


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
    assert seconds >= 2 * (len(weights) // PIECE_BYTES - 1) * PAUSE_SECONDS, (
        "once while it comes, once while it is checked"
    )
