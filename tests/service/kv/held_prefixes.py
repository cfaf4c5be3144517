"""Holding prefixes over HTTP, for tests."""

import httpx

from tests.service.live_server import LiveServer


def post(live: LiveServer, model: str = "tiny", **body: object) -> httpx.Response:
    return live.post("/kv/prefixes", model=model, **body)


def hold(live: LiveServer, model: str = "tiny", **body: object) -> dict:
    response = post(live, model, **body)
    assert response.status_code == 201, response.text
    found: dict = response.json()
    return found


def listed(live: LiveServer) -> list[dict]:
    found: list[dict] = live.client.get("/kv/prefixes").json()["prefixes"]
    return found


def get(live: LiveServer, prefix: dict) -> httpx.Response:
    return live.client.get(f"/kv/prefixes/{prefix['id']}")


def gone(live: LiveServer, prefix: dict, reason: str) -> bool:
    response = get(live, prefix)
    if response.status_code != 404:
        return False
    assert response.json()["error"]["code"] == "prefix_not_found"
    assert response.json()["error"]["param"] == "id"
    return reason in response.json()["error"]["message"]


def error(response: httpx.Response) -> tuple[int, str, str | None]:
    found = response.json()["error"]
    return response.status_code, found["code"], found["param"]


def in_flight(live: LiveServer, name: str) -> int:
    found: int = live.client.get(f"/adapters/{name}").json()["requests_in_flight"]
    return found
