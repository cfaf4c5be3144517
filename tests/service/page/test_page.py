"""The operators' page over HTTP: which files there are, how they may be cached, that nothing else can be had."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.page.routes import FILES, PATHS
from tests.service.live_server import LiveServer, fake_settings, live_server

ROOT = Path(__file__).parents[3]
TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
MODULES = sorted(FILES.glob("*.js"))


@pytest.fixture(scope="module")
def locked(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A service with a key, which no request of these tests sends."""
    with live_server(fake_settings(tiny_model, tmp_path_factory.mktemp("data"), api_key="secret")) as live:
        yield live


def linked(html: str) -> set[str]:
    return {f"/{path}" for path in re.findall(r'(?:href|src)="([^#"]*)"', html)}


def test_the_page_and_its_files_come_without_a_key_and_nothing_else_does(locked: LiveServer) -> None:
    page = locked.client.get("/", headers={"accept": "text/html,*/*;q=0.8"})
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert locked.client.get("/ui").content == page.content
    assert linked(page.text) <= PATHS
    for path in PATHS - {"/", "/ui"}:
        answer = locked.client.get(path)
        assert answer.status_code == 200, path
        assert answer.headers["content-type"].partition(";")[0] == TYPES[Path(path).suffix]
        assert answer.content == (FILES / Path(path).name).read_bytes()
    assert {Path(path).name for path in PATHS} - {"", "ui"} == {path.name for path in FILES.iterdir()} - {"index.html"}
    folder = next(path for path in PATHS if path.endswith("main.js")).removesuffix("main.js")
    for path in ("/ui/", "/ui/other/main.js", f"{folder}other.js", f"{folder}index.html", "/adapters", "/metrics"):
        assert locked.client.get(path).status_code == 401, path


def test_scripts_import_only_scripts_of_the_page() -> None:
    folder = next(path for path in PATHS if path.endswith("main.js")).removesuffix("main.js")
    imported = {name for module in MODULES for name in re.findall(r'from "\./([^"]*)"', module.read_text())}
    assert {f"{folder}{name}" for name in {*imported, "main.js"}} == {path for path in PATHS if path.endswith(".js")}


@pytest.mark.parametrize("path", sorted(PATHS))
def test_what_has_not_changed_is_not_sent_again(server: LiveServer, path: str) -> None:
    first = server.client.get(path)
    for_good = path not in ("/", "/ui")
    assert ("immutable" in first.headers["cache-control"], "no-cache" in first.headers["cache-control"]) == (
        for_good,
        not for_good,
    )
    for known in (first.headers["etag"], f'"other", W/{first.headers["etag"]}', "*"):
        again = server.client.get(path, headers={"if-none-match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", first.headers["etag"])
    assert server.client.get(path, headers={"if-none-match": '"other"'}).content == first.content
    head = httpx.head(f"{server.url}{path}")
    assert (head.status_code, head.content) == (200, b"")
    for name in ("etag", "content-length", "content-type", "cache-control", "content-security-policy"):
        assert head.headers[name] == first.headers[name]


def test_a_browser_is_told_to_run_and_load_nothing_of_others(server: LiveServer) -> None:
    """And there is nothing that it would have to refuse: no inline script or style, no address of another host."""
    for path in PATHS:
        headers = server.client.get(path).headers
        policy = dict(each.strip().split(" ", 1) for each in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'self'"
        assert policy["require-trusted-types-for"] == "'script'"
        assert headers["x-content-type-options"] == "nosniff"
    html = (FILES / "index.html").read_text()
    assert re.findall(r"<script(?![^>]* src=)|<style|\son\w+=|\sstyle=", html) == []
    texts = {path.name: path.read_text() for path in FILES.iterdir()}
    hosts = {(name, host) for name, text in texts.items() for host in re.findall(r"https?://([\w.]+)", text)}
    assert {host for _, host in hosts} <= {"www.w3.org"}, hosts  # the name of SVG
    assert [
        name for name, text in texts.items() if re.search(r"innerHTML|outerHTML|insertAdjacentHTML|eval\(", text)
    ] == []


@pytest.mark.parametrize(
    "path",
    [
        "/ui/VERSION/../routes.py",
        "/ui/VERSION/..%2froutes.py",
        "/ui/VERSION/%2e%2e/routes.py",
        "/ui/VERSION/..%5croutes.py",
        "/ui/VERSION//etc/passwd",
        "/ui/VERSION/main.js%00.css",
        "/ui/VERSION/",
        "/ui/VERSION/main.js/",
        "/ui/VERSION/MAIN.JS",
        "/ui/../ui",
        "//ui",
    ],
)
def test_no_other_path_leads_to_a_file(server: LiveServer, path: str) -> None:
    """Sent as it is: a client library would make it shorter first."""
    version = next(path for path in PATHS if path.endswith("main.js")).split("/")[2]
    with server.connect(
        f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".replace("VERSION", version).encode()
    ) as sent:
        answer = b"".join(iter(lambda: sent.recv(65536), b""))
    assert answer.split(b" ", 2)[1] == b"404", answer[:200]
    assert b"service.http" not in answer


def test_a_program_that_asks_for_json_gets_links(server: LiveServer) -> None:
    answer = server.client.get("/", headers={"accept": "application/json"})
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["vary"] == "accept" == server.client.get("/").headers["vary"]
    for name, path in answer.json().items():
        assert server.client.get(path).status_code == 200, name


def test_the_files_are_part_of_the_package() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "service.page" in tool["packages"]
    packed = {path for pattern in tool["package-data"]["service.page"] for path in FILES.parent.glob(pattern)}
    assert packed == set(FILES.iterdir())


def test_the_picture_of_the_readme_is_small() -> None:
    assert FILES.with_name("page.png").stat().st_size < 200_000
