"""A flood of requests of one tenant, or of one adapter, does not starve other users; judged by counts of answers."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest

from loadtests.server_process import running_server
from tests.loadtests.commands import SMALL
from tests.loadtests.test_load import locust, put_adapter

OTHERS, FLOOD, PLACES = 2, 40, 4  # users, and the requests that run at one time
MODELS = ("hot", "calm", "cool")


@pytest.fixture(scope="module")
def narrow_server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that runs few requests at a time, so that nearly all of a flood wait."""
    adapters = tmp_path_factory.mktemp("adapters")
    with running_server(["--model", str(tiny_model), *SMALL, "--max-running", str(PLACES)]) as url:
        for seed, name in enumerate(MODELS):
            put_adapter(url, adapters, name, seed)
            body = {"model": name, "prompt": "hello", "max_tokens": 1}
            assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200
        yield url


@pytest.mark.parametrize("what", ["tenant", "adapter"])
def test_others_get_many_times_the_answers_of_a_user_of_the_flood(narrow_server: str, what: str) -> None:
    """Were requests served as they come, each user would have as many answers as any other one."""
    flood = ["--users", str(OTHERS + FLOOD), "--spawn-rate", "100", "--others", str(OTHERS), "--flood", what]
    models = ["--models", ",".join(MODELS), "--max-tokens", "32", "--requests", "200"]
    ended = locust(narrow_server, *models, *flood, file="locust_fairness")
    assert ended.returncode == 0, ended.stderr
    entries = msgspec.json.decode(ended.stdout)
    assert sum(entry["num_failures"] for entry in entries) == 0

    def count(kind: str, of: str, *, flooding: bool) -> float:
        return sum(each[of] for each in entries if each["method"] == kind and (each["name"] == "flood") == flooding)

    each_other = count("POST", "num_requests", flooding=False) / OTHERS
    each_of_flood = count("POST", "num_requests", flooding=True) / FLOOD
    assert each_of_flood > 1, "the flood is served too"
    assert each_other > 3 * each_of_flood
    waits = [
        count("first token", "total_response_time", flooding=flooding)
        / count("first token", "num_requests", flooding=flooding)
        for flooding in (False, True)
    ]
    assert 2 * waits[0] < waits[1], f"first token of the others, of the flood: {waits} ms"
