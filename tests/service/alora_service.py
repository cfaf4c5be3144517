"""A service on the fake engine with adapters of each kind, for tests of what they share and where they begin."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.numpy import save

from tests.service.adapters.adapter_bundles import config, multipart, tensors
from tests.service.live_server import LiveServer, fake_settings, live_server

INVOCATION = "<|start|>check\n"
HEADER = "<|start|>assistant\n"  # which the chat template ends with


def put_adapter(
    live: LiveServer, name: str, invocation: list[int] | None = None, seed: int = 0, *, last_layer: bool = False
) -> str:
    """Upload an adapter of q_proj and return its digest; one of the last layer only leaves K and V alone."""
    weights = {key.replace("layers.0", f"layers.{int(last_layer)}"): value for key, value in tensors(seed).items()}
    files = multipart(config(alora_invocation_tokens=invocation), save(weights))
    response = live.client.put(f"/adapters/{name}", files=files)
    assert response.status_code in (200, 201), response.text
    digest: str = response.json()["digest"]
    return digest


def encode(live: LiveServer, text: str) -> list[int]:
    found: list[int] = live.services.tokenizer.encode(text)
    return found


@contextmanager
def alora_server(model: Path, data: Path, **settings: object) -> Iterator[LiveServer]:
    """Adapters: `check` and `header`, aLoRAs with those invocations; `plain`; `late`, which leaves K and V alone."""
    with live_server(fake_settings(model, data, **settings)) as live:
        put_adapter(live, "check", encode(live, INVOCATION))
        put_adapter(live, "header", encode(live, HEADER))
        put_adapter(live, "plain")
        put_adapter(live, "late", last_layer=True)
        yield live
