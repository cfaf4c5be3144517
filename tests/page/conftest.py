"""The operators' page in a real browser, on a server of the embedded model: `make test-page`.

The browser runs in `.venv-page`, the server in `.venv`. The browser can reach no other host.
"""

import shutil
from collections.abc import Iterator

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from tests.page.operators_page import ADAPTERS, Api, Page, complaints, started

OPTIONS = (
    "--headless=new",
    "--no-sandbox",  # tests run as root in containers
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)


@pytest.fixture(scope="session")
def server() -> Iterator[Api]:
    memory = ("--host-kv-bytes", "64M", "--kv-cache-bytes", "64M", "--adapter-bytes", "64M")
    with started(*memory, "--allow-source", f"file://{ADAPTERS}") as url:
        yield Api(url)


@pytest.fixture(scope="session")
def locked_server() -> Iterator[Api]:
    with started("--api-key", "open sesame", "--max-upload-bytes", "2M") as url:
        yield Api(url, "open sesame")


@pytest.fixture(scope="session")
def chromium() -> Iterator[webdriver.Chrome]:
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if missing := [name for name, path in programs.items() if path is None]:
        pytest.skip(f"{' and '.join(missing)} not found: install Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs["chromium"]
    for option in OPTIONS:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(programs["chromedriver"]))
    yield driver
    driver.quit()


@pytest.fixture
def aurora(server: Api) -> Api:
    """A server that has the adapter `aurora`."""
    server.put("aurora", ADAPTERS / "aurora")
    return server


@pytest.fixture
def page(chromium: webdriver.Chrome, server: Api) -> Iterator[Page]:
    yield Page(chromium, server)
    assert complaints(chromium) == []


@pytest.fixture
def locked_page(chromium: webdriver.Chrome, locked_server: Api) -> Iterator[Page]:
    yield Page(chromium, locked_server)
    assert complaints(chromium) == []
