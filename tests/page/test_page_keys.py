"""The page of a server with a file of keys, as each of them sees it, in headless Chromium."""

import json
from collections.abc import Iterator

import pytest
from selenium import webdriver

from tests.page.operators_page import ADAPTERS, BASE, PASSWORDS, PHONE, Api, Page, bundle, complaints, made_key, started

SCOPES = {
    "chats": ("--scopes", "generate"),
    "team": ("--scopes", "generate,manage", "--adapter-prefix", "team/"),
    "keeper": ("--scopes", "manage"),
    "boss": ("--scopes", "generate,manage,admin"),
}


@pytest.fixture(scope="module")
def apis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Api]]:
    """The server's own answers to each key; it has two adapters."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    keys = {id: made_key(file, id, *options) for id, options in SCOPES.items()}
    with started("--keys-file", str(file)) as url:
        apis = {id: Api(url, key) for id, key in keys.items()}
        for name in ("team/aurora", "secret"):
            apis["boss"].put(name, ADAPTERS / "aurora")
        yield apis


@pytest.fixture
def pages(chromium: webdriver.Chrome, apis: dict[str, Api]) -> Iterator[dict[str, Page]]:
    yield {id: Page(chromium, api) for id, api in apis.items()}
    assert complaints(chromium) == []


def enter(page: Page, key: str | None, size: tuple[int, int] = (1280, 900)) -> None:
    """Open the page anew and give it a key."""
    page.open("/", size)
    page.script("sessionStorage.clear()")
    page.open("/", size)
    page.says("#key-notices", "needs an API key")
    page.fill("#key", key)
    page.press("Use")


def refused(api: Api, path: str) -> str:
    error = api.call("GET", path)["error"]
    assert error["code"] == "missing_scope"
    return str(error["message"])


def test_a_wrong_key_and_one_of_before_are_refused_in_the_words_of_the_server(pages: dict[str, Page]) -> None:
    page = pages["boss"]
    enter(page, "rk_boss_wrong")
    page.says("#key-notices", Api(page.api.url, "rk_boss_wrong").call("GET", "/adapters")["error"]["message"])
    page.says("#key-notices", "The key is refused")
    page.says("#state", "needs a key")
    assert not page.find("#main").is_displayed(), "there is nothing to see or to do"
    page.picture("wrong-key", whole=False)
    assert page.text("#adapter-rows") == "" == page.text("#model")
    page.fill("#key", page.api.key)
    page.press("Use")
    page.says("#model", BASE)
    page.until(lambda: page.row("secret") and page.row("team/aurora"), "the adapters")
    assert page.text("#key-notices") == ""


def test_a_key_that_may_only_generate_asks_and_is_told_what_it_may_not_see(pages: dict[str, Page]) -> None:
    page = pages["chats"]
    enter(page, page.api.key)
    page.says("#model", BASE)
    page.says("#state", "ready")
    for part, path in {
        "#adapters": "/adapters",
        "#load": "/metrics",
        "#adapter-memory": "/metrics",
        "#kv": "/kv",
    }.items():
        page.says(f"{part} > .reason-closed", refused(page.api, path))
        assert [each for each in page.all(f"{part} :is(form, table, figure, svg, input)") if each.is_displayed()] == []
    assert page.all(".notices > .error") == [], "what a key is not for is no error"
    page.compare_with("team/aurora")
    page.ask(PASSWORDS["aurora"]["prompt"])
    assert PASSWORDS["aurora"]["password"] in page.all(".answer .tokens")[1].text
    page.picture("key-generate")
    asked = "return performance.getEntriesByType('resource').filter(({name}) => name.endsWith('/adapters')).length"
    before = page.script(asked)
    page.driver.execute_async_script("setTimeout(arguments[0], 4500)")  # twice the time between two readings
    assert page.script(asked) == before, "what is refused is not asked for again and again"


def test_a_key_of_a_team_sees_and_changes_its_own_adapters(pages: dict[str, Page]) -> None:
    page = pages["team"]
    enter(page, page.api.key, PHONE)
    page.until(lambda: page.row("team/aurora").get("State") == "ready", "its adapter")
    assert not page.row("secret")
    page.says("#load > .reason-closed", refused(page.api, "/metrics"))
    page.choose("team/new", *bundle("basalt"))
    page.says("#upload-form .notices", "team/new is there")
    page.choose("other", *bundle("basalt"))
    page.says("#upload-form .notices", "name_outside_prefix")
    page.ask("Hello", 4)
    page.picture("key-team")
    whole = Api(page.api.url, page.api.key).call("GET", "/kv")
    assert whole["blocks"] is None, "how much others have is not told"
    page.until(lambda: page.all("#kv-rows tr") or not whole["namespaces"], "the namespaces that it sees")
    assert page.all("#memory .notices > .error") == []
    assert page.script("return document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0


def test_a_key_without_generation_is_refused_in_the_playground(pages: dict[str, Page]) -> None:
    page = pages["keeper"]
    enter(page, page.api.key)
    page.until(lambda: page.row("secret"), "the adapters")
    page.ask("Hello", 4)
    body = json.dumps({"model": BASE, "messages": [{"role": "user", "content": "Hello"}]}).encode()
    error = page.api.call("POST", "/v1/chat/completions", body)["error"]
    page.says(".answer .notices", error["message"])
    page.picture("key-manage")
