"""What an operator uploads besides two files, and how adapters go, in headless Chromium."""

import json
import tarfile
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.page.operators_page import ADAPTERS, FILES, Api, Page, bundle


def archive(path: Path, name: str) -> Path:
    """A tar.gz of an adapter, as `tar czf` makes one of its folder."""
    with tarfile.open(path, "w:gz") as tar:
        tar.add(ADAPTERS / name, name)
    return path


def trained(directory: Path, name: str, others: int = 0) -> Path:
    """A folder as a training leaves it: an adapter, and files that nobody needs."""
    directory.mkdir()
    for file in bundle(name):
        (directory / file.name).write_bytes(file.read_bytes())
    (directory / "optimizer.pt").write_bytes(b"x" * 1000)
    for number in range(others):
        (directory / f"a-sample-{number}.txt").write_text("a sample")
    (directory / "runs").mkdir()
    return directory


@pytest.mark.parametrize("way", ["chosen", "dropped"])
def test_an_archive_is_uploaded_as_it_is(page: Page, tmp_path: Path, way: str) -> None:
    name = f"archive-{way}"
    page.api.call("DELETE", f"/adapters/{name}")
    path = archive(tmp_path / f"{name}.tar.gz", "basalt")
    page.open()
    page.until(lambda: "ready" in page.text("#state"), "the first answers")
    if way == "chosen":
        page.find("#files").send_keys(str(path))
    else:
        page.drop(path)
    page.says("#chosen", path.name)
    page.until(lambda: page.find("#upload-name").get_attribute("value") == name, "its name, of the file's")
    page.press("Upload")
    page.says("#upload-form .notices", f"{name} is there")
    assert page.api.call("GET", f"/adapters/{name}")["digest"] == page.api.put("two", ADAPTERS / "basalt")["digest"]
    page.until(lambda: page.row(name).get("State") == "ready", "the new row")


def test_an_archive_that_is_none_is_refused_in_the_words_of_the_server(page: Page, tmp_path: Path) -> None:
    broken = tmp_path / "broken.tar.gz"
    broken.write_bytes(archive(tmp_path / "whole.tar.gz", "basalt").read_bytes()[:5000])
    refused = page.api.call("PUT", "/adapters/broken", broken.read_bytes(), **{"content-type": "application/gzip"})
    page.open().choose("broken", broken)
    page.says("#upload-form .notices", refused["error"]["message"])
    page.says("#upload-form .notices", refused["error"]["code"])
    assert page.text("#chosen").startswith("broken.tar.gz"), "it stays chosen, to be tried again"


def test_a_folder_is_dropped_and_what_is_not_needed_stays_here(page: Page, tmp_path: Path) -> None:
    """More files than a browser lists at a time."""
    page.api.call("DELETE", "/adapters/checkpoint-500")
    page.open()
    page.until(lambda: "ready" in page.text("#state"), "the first answers")
    page.drop(trained(tmp_path / "checkpoint 500", "cobalt", others=250))
    for file in FILES:
        page.says("#chosen", file)
    listed = [each.text for each in page.all("#chosen li")]
    assert len(listed) == 3
    assert listed[2].startswith("not needed: ")
    assert listed[2].endswith(" and 248 more")
    page.picture("dropped-folder", whole=False)
    assert page.find("#upload-name").get_attribute("value") == "checkpoint-500"
    page.press("Upload")
    page.says("#upload-form .notices", "checkpoint-500 is there")
    digest = page.api.put("cobalt", ADAPTERS / "cobalt")["digest"]
    assert page.api.call("GET", "/adapters/checkpoint-500")["digest"] == digest


def test_an_upload_without_its_weights_is_refused_before_or_by_the_server(page: Page, tmp_path: Path) -> None:
    page.open().fill("#upload-name", "nothing")
    page.press("Upload")
    page.says("#upload-form .notices", "No files: choose adapter_config.json and adapter_model.safetensors")
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    page.choose("half", bundle("aurora")[0], tmp_path / "adapter_model.bin")
    boundary = {"content-type": "multipart/form-data; boundary=edge"}
    part = b'--edge\r\ncontent-disposition: form-data; name="adapter_config.json"\r\n\r\n'
    whole = part + bundle("aurora")[0].read_bytes() + b"\r\n--edge--\r\n"
    page.says("#upload-form .notices", page.api.call("PUT", "/adapters/half", whole, **boundary)["error"]["message"])
    assert "not needed: adapter_model.bin" in page.text("#chosen")


def unlike_all_others(directory: Path) -> Path:
    """An adapter of a content of its own: to end the requests of one that another name has is refused."""
    config, weights = bundle("basalt")
    changed = json.loads(config.read_text()) | {"lora_alpha": 1}
    (directory / config.name).write_text(json.dumps(changed))
    (directory / weights.name).write_bytes(weights.read_bytes())
    return directory


class Stream(threading.Thread):
    """A long generation, and how it ended."""

    answer: Any = None

    def __init__(self, api: Api, model: str, tokens: int) -> None:
        super().__init__()
        self._api = api
        self._body = {"model": model, "prompt": "Once", "max_tokens": tokens, "ignore_eos": True}

    def run(self) -> None:
        self.answer = self._api.call("POST", "/v1/completions", json.dumps(self._body).encode())


@pytest.mark.parametrize("force", [False, True], ids=["let end", "ended"])
def test_a_deletion_lets_requests_end_or_ends_them(page: Page, tmp_path: Path, force: bool) -> None:
    page.api.put("busy", unlike_all_others(tmp_path))
    page.open()
    page.until(lambda: page.row("busy").get("State") == "ready", "the row")
    running = Stream(page.api, "busy", 1500 if force else 150)
    running.start()
    page.until(lambda: page.row("busy").get("Running") == "1", "the request on it")
    page.press("Delete busy")
    page.says("#confirm", "also end the request that runs on it")
    if force:
        page.find("#confirm input").click()
        page.picture("force", whole=False)
    page.press("Delete")
    page.until(lambda: not page.row("busy"), "the end of the row")
    running.join(timeout=120)
    if force:
        assert running.answer["error"]["code"] == "adapter_deleted", running.answer
    else:
        assert running.answer["usage"]["completion_tokens"] == 150
    assert page.api.call("GET", "/adapters/busy")["error"]["code"] == "adapter_not_found"
