"""Reading from the hub: what it answers, what it is told, and what it must never be told."""

import time
from pathlib import Path

import huggingface_hub.constants
import pytest

from storage.huggingface import HubRepository
from storage.store import (
    AccessDenied,
    InvalidKey,
    NotFound,
    ObjectTooLarge,
    StoreError,
    StoreUnavailable,
)
from tests.storage.fake_hub import REPOSITORY, FakeHub

WEIGHTS = bytes(range(256)) * 20_000
FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": WEIGHTS, "other/adapter_config.json": b"{ }"}


@pytest.fixture(autouse=True)
def filled(hub: FakeHub) -> None:
    hub.commit(FILES)


def content(repository: HubRepository, key: str, tmp_path: Path) -> bytes:
    repository.fetch(key, tmp_path / "content")
    read = (tmp_path / "content").read_bytes()
    (tmp_path / "content").unlink()
    return read


def opened(
    hub: FakeHub,
    revision: str | None = None,
    folder: str = "",
    token: str | None = None,
    patience_seconds: float = 5.0,  # for a machine that is busy
) -> HubRepository:
    return HubRepository(
        REPOSITORY, revision, folder, endpoint=hub.endpoint, token=token, timeout_seconds=patience_seconds, attempts=3
    )


def test_a_revision_is_resolved_once_and_its_files_stay_what_they_were(hub: FakeHub, tmp_path: Path) -> None:
    repository = opened(hub)
    assert repository.commit == hub.revisions["main"]
    later = hub.commit({**FILES, "adapter_config.json": b"changed"})

    assert content(repository, "adapter_config.json", tmp_path) == b"{}"
    assert content(repository, "adapter_model.safetensors", tmp_path) == WEIGHTS
    assert opened(hub).commit == later
    assert content(opened(hub, repository.commit), "adapter_config.json", tmp_path) == b"{}"


def test_a_branch_may_have_a_slash_in_its_name(hub: FakeHub, tmp_path: Path) -> None:
    commit = hub.commit({"a": b"on a branch"}, "refs/pr/1")

    repository = opened(hub, "refs/pr/1")
    assert (repository.commit, content(repository, "a", tmp_path)) == (commit, b"on a branch")


def test_a_folder_hides_what_is_beside_it(hub: FakeHub, tmp_path: Path) -> None:
    repository = opened(hub, folder="other/")

    assert content(repository, "adapter_config.json", tmp_path) == b"{ }"
    with pytest.raises(NotFound):
        content(repository, "adapter_model.safetensors", tmp_path)
    with pytest.raises(NotFound):
        content(opened(hub, folder="nothing/here"), "adapter_config.json", tmp_path)


def test_the_token_goes_to_the_hub_and_to_no_other_host(hub: FakeHub, tmp_path: Path) -> None:
    hub.token = "hf_secret"
    repository = opened(hub, token="hf_secret")
    repository.fetch("adapter_model.safetensors", tmp_path / "weights")

    seen = {path.startswith("elsewhere"): headers.get("authorization") for path, headers in hub.requests}
    assert seen == {False: "Bearer hf_secret", True: None}


def test_the_token_comes_from_the_environment_unless_it_is_given(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert opened(hub).commit
    with pytest.raises(AccessDenied):
        opened(hub, token="hf_another")


def test_the_endpoint_is_the_librarys_unless_it_is_given(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)  # HF_ENDPOINT, read at import

    assert HubRepository(REPOSITORY).commit == hub.revisions["main"]


def test_what_is_missing_is_named(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"someone/nothing.*repository"):
        HubRepository("someone/nothing", endpoint=hub.endpoint)
    with pytest.raises(NotFound, match=r"@nothing.*revision"):
        opened(hub, "nothing")
    with pytest.raises(NotFound, match=r"nothing.json.*file"):
        opened(hub).fetch("nothing.json", tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_a_private_or_gated_repository_is_denied_without_naming_the_token(hub: FakeHub) -> None:
    hub.token = "hf_secret"
    with pytest.raises(AccessDenied, match=r"without a token \(HF_TOKEN\)"):
        opened(hub)
    with pytest.raises(AccessDenied, match="with the token given") as caught:
        opened(hub, token="hf_another")
    assert "hf_another" not in str(caught.value)
    hub.token, hub.gated = None, True
    with pytest.raises(AccessDenied, match="GatedRepo"):
        opened(hub)


@pytest.mark.parametrize("repository", ["", "a/b/c", "../x", "a b/c", "someone/x?y", "someone/--"])
def test_a_name_that_is_no_repository_asks_nobody(hub: FakeHub, repository: str) -> None:
    with pytest.raises(InvalidKey):
        HubRepository(repository, endpoint=hub.endpoint)
    assert hub.requests == []


@pytest.mark.parametrize("folder", ["..", "a/../../b", "a//b", "."])
def test_a_folder_cannot_lead_out_of_the_repository(hub: FakeHub, folder: str) -> None:
    with pytest.raises(InvalidKey):
        opened(hub, folder=folder)
    assert hub.requests == []


def test_a_hub_that_recovers_is_asked_again(hub: FakeHub, tmp_path: Path) -> None:
    repository = opened(hub)
    hub.broken_answers, hub.cut_bodies = 1, 1

    seen: list[tuple[int, int]] = []
    repository.fetch("adapter_model.safetensors", tmp_path / "weights", on_progress=lambda *now: seen.append(now))
    assert (tmp_path / "weights").read_bytes() == WEIGHTS
    assert seen == sorted(seen)  # what had come was kept
    assert seen[-1] == (len(WEIGHTS), len(WEIGHTS))


def test_a_hub_that_does_not_recover_is_given_up_and_leaves_nothing(hub: FakeHub, tmp_path: Path) -> None:
    repository = opened(hub)
    hub.cut_bodies = 1000
    with pytest.raises(StoreUnavailable, match="3 times") as caught:
        repository.fetch("adapter_model.safetensors", tmp_path / "weights")
    assert "signature" not in str(caught.value)
    hub.broken_answers = 1000
    with pytest.raises(StoreUnavailable, match="503"):
        repository.fetch("adapter_model.safetensors", tmp_path / "weights")
    assert list(tmp_path.iterdir()) == []


def test_a_hub_that_is_not_there_is_unavailable(hub: FakeHub) -> None:
    started = time.monotonic()
    with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1:9"):
        HubRepository(REPOSITORY, endpoint="http://127.0.0.1:9", attempts=2)
    assert time.monotonic() - started < 20


def test_a_hub_that_says_nothing_is_given_up(hub: FakeHub, tmp_path: Path) -> None:
    repository = opened(hub, patience_seconds=0.5)
    hub.silent = True
    started = time.monotonic()
    with pytest.raises(StoreUnavailable, match="3 times"):
        repository.fetch("adapter_config.json", tmp_path / "config")
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("page", [b"<html>hello", b"[]", b"{}", b'{"id": "someone/adapter"}'])
def test_an_answer_that_is_no_hubs_is_a_clear_error(hub: FakeHub, page: bytes) -> None:
    hub.page = page
    with pytest.raises(StoreError, match=r"does not answer as the hub does|named no commit"):
        opened(hub)


def test_offline_means_offline_and_is_no_outage(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NotFound, match="HF_HUB_OFFLINE"):
        opened(hub)
    assert hub.requests == []


def test_a_file_that_is_too_large_is_refused_before_it_is_read(hub: FakeHub, tmp_path: Path) -> None:
    seen: list[int] = []
    with pytest.raises(ObjectTooLarge, match=f"{len(WEIGHTS)} bytes; at most 1000"):
        opened(hub).fetch(
            "adapter_model.safetensors", tmp_path / "weights", max_bytes=1000, on_progress=lambda *_: seen.append(1)
        )
    assert seen == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stated", [len(WEIGHTS) - 1, len(WEIGHTS) + 1])
def test_a_hub_and_a_host_that_disagree_about_the_length_are_not_believed(
    hub: FakeHub, tmp_path: Path, stated: int
) -> None:
    hub.stated_bytes = stated
    with pytest.raises(StoreError, match="how many bytes"):
        opened(hub).fetch("adapter_model.safetensors", tmp_path / "weights")
    assert list(tmp_path.iterdir()) == []
