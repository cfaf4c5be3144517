"""What an operator does on the page, in headless Chromium, held against what the server itself says."""

import json
import math
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.page.operators_page import ADAPTERS, BASE, DESKTOP, FILES, PASSWORDS, PHONE, Api, Page, bundle

CHECKS = Path(__file__).with_name("page_checks.js").read_text()


def test_an_upload_by_the_file_chooser(page: Page) -> None:
    page.api.call("DELETE", "/adapters/chosen")
    page.open().choose("chosen", *bundle("basalt"))
    page.says("#upload-form .notices", "chosen is there")
    page.until(lambda: page.row("chosen"), "the new row")
    adapter = page.api.call("GET", "/adapters/chosen")
    row = page.row("chosen")
    assert (row["Digest"], row["Kind"], row["Rank"]) == (adapter["digest"][:12], "LoRA", str(adapter["rank"]))
    page.until(lambda: page.row("chosen")["Tier"] == "device" and page.row("chosen")["State"] == "ready", "its load")


def test_an_upload_by_dropping(page: Page) -> None:
    page.api.call("DELETE", "/adapters/dropped")
    page.open()
    page.until(lambda: "ready" in page.text("#state"), "the first answers")
    page.drop(*bundle("cobalt"))
    page.says("#chosen", FILES[1])
    page.fill("#upload-name", "dropped")
    page.press("Upload")
    page.says("#upload-form .notices", "dropped is there")
    digest = page.api.call("GET", "/adapters/dropped")["digest"]
    assert digest == page.api.put("cobalt", ADAPTERS / "cobalt")["digest"]


def test_a_refusal_is_shown_in_the_words_of_the_server(page: Page, tmp_path: Path) -> None:
    config = json.loads((ADAPTERS / "aurora" / FILES[0]).read_text())
    (tmp_path / FILES[0]).write_text(json.dumps(config | {"r": "<b>eight</b>"}))
    (tmp_path / FILES[1]).write_bytes((ADAPTERS / "aurora" / FILES[1]).read_bytes())
    refused = page.api.put("broken", tmp_path)["error"]
    page.open().choose("broken", *(tmp_path / file for file in FILES))
    page.says("#upload-form .notices", refused["message"])
    page.says("#upload-form .notices", f"field {refused['param']}")
    page.says("#upload-form .notices", "status 422")
    assert page.all("#upload-form .notices b") == [], "the server's text became HTML"
    page.picture("refusal")

    page.choose("two words", *bundle("aurora"))
    page.says("#upload-form .notices", "it has a space")
    page.fill("#import-name", "strange")
    page.fill("#import-source", "<img src=x>")
    page.press("Import")
    refused = page.api.call("POST", "/adapters", b'{"name": "strange", "src": "<img src=x>"}')["error"]
    page.says("#import-form .notices", refused["message"])
    assert page.all("img") == []


def test_an_import_and_one_that_fails(page: Page) -> None:
    page.open()
    for name, folder in (("imported", "cobalt"), ("nowhere", "nothing")):
        page.fill("#import-name", name)
        page.fill("#import-source", f"file://{ADAPTERS / folder}")
        page.press("Import")
        page.says("#import-form .notices", f"the import of {name} has begun")
    page.until(lambda: page.row("imported").get("State") == "ready", "the import")
    page.until(lambda: page.row("nowhere").get("State", "").startswith("failed"), "its failure")
    assert page.api.call("GET", "/adapters/nowhere")["reason"] in page.row("nowhere")["State"]
    page.press("Delete nowhere")
    page.press("Delete")
    page.until(lambda: not page.row("nowhere"), "the end of the row")


def test_content_is_replaced_only_knowingly(page: Page) -> None:
    page.api.put("swapped", ADAPTERS / "aurora")
    page.open()
    page.until(lambda: page.row("swapped"), "the row")
    page.find("#files").send_keys("\n".join(map(str, bundle("basalt"))))
    page.fill("#upload-name", "swapped")
    assert page.text("#upload-button") == "Replace"
    # Another client was faster, and the page has not heard of it
    show(page, hidden=True)
    digest = page.api.put("swapped", ADAPTERS / "cobalt")["digest"]
    page.press("Replace")
    page.says("#upload-form .notices", "status 412")
    assert page.api.call("GET", "/adapters/swapped")["digest"] == digest
    show(page, hidden=False)
    page.until(lambda: page.row("swapped")["Digest"] == digest[:12], "the newer digest")
    page.press("Replace")
    page.says("#upload-form .notices", "swapped is there")
    assert page.api.call("GET", "/adapters/swapped")["digest"] != digest


def alternatives(page: Page, column: int) -> list[list[str]]:
    """The table below an answer: token, picture, probability, its logarithm."""
    rows = page.all(f".answer:nth-child({column}) .alternatives tbody tr")
    return [[cell.text for cell in row.find_elements(By.CSS_SELECTOR, "th, td")] for row in rows]


def test_base_and_adapter_answer_side_by_side_with_the_log_probabilities_of_a_token(page: Page, aurora: Api) -> None:
    prompt = PASSWORDS["aurora"]["prompt"]
    page.open()
    page.compare_with("aurora")
    page.ask(prompt)
    base, adapter = page.all(".answer .tokens")
    assert PASSWORDS["aurora"]["password"] in adapter.text
    assert PASSWORDS["aurora"]["password"] not in base.text
    for facts in page.all(".answer .facts"):
        for fact in ("tokens", "first after", "tok/s", "cached", "ended by"):
            assert fact in facts.text
    for model, tokens in ((BASE, base), ("aurora", adapter)):
        body = {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": 24}
        own = page.api.call(
            "POST", "/v1/chat/completions", json.dumps(body | {"logprobs": True, "top_logprobs": 5}).encode()
        )
        [choice] = own["choices"]
        assert tokens.text == choice["message"]["content"]
        third = choice["logprobs"]["content"][2]
        tokens.find_elements(By.CSS_SELECTOR, "[role=button]")[2].click()
        shown = alternatives(page, 1 if model == BASE else 2)
        expected = sorted(third["top_logprobs"], key=lambda top: -top["logprob"])
        assert [row[0] for row in shown] == [
            json.dumps(top["token"]) + (" chosen" if top["token"] == third["token"] else "") for top in expected
        ]
        assert [float(row[3]) for row in shown] == pytest.approx([top["logprob"] for top in expected], abs=1e-3)
        likely = [100 * math.exp(top["logprob"]) for top in expected]
        assert [float(row[2].strip("< %")) for row in shown] == pytest.approx(likely, abs=0.51)
    focused = page.driver.switch_to.active_element
    focused.send_keys(Keys.ARROW_RIGHT, Keys.ENTER)
    assert page.script("return [...document.activeElement.parentElement.children].indexOf(document.activeElement)") == 3
    assert page.driver.switch_to.active_element.get_attribute("aria-pressed") == "true"


def test_an_answer_is_stopped(page: Page) -> None:
    page.open()
    page.find(".answer")
    page.fill("#prompt", "Count from one to a thousand, in words.")
    page.fill("#max-tokens", 1000)
    page.fill("#temperature", 1)
    page.press("Ask")
    page.until(lambda: len(page.text(".answer .tokens")) > 20, "text")
    page.press("Stop")
    page.says(".answer .facts", "ended by: stopped here")
    page.says("#plot-sequences", "running 0")


def test_a_refused_question_says_why(page: Page) -> None:
    page.open()
    page.find(".answer")
    page.fill("#prompt", "Hello")
    page.fill("#max-tokens", 100000)
    page.press("Ask")
    page.says(".answer .notices", "100000")
    page.says(".answer .notices", "field max_tokens")


def test_pin_and_unload(page: Page, aurora: Api) -> None:
    aurora.call("PATCH", "/adapters/aurora", b'{"pinned": false}')
    page.open()
    page.until(lambda: page.row("aurora"), "the row")
    page.press("Pin aurora")
    page.until(lambda: page.row("aurora")["Pin"] == "device", "the pin")
    assert aurora.call("GET", "/adapters/aurora")["pin_tier"] == "device"
    page.press("Unload aurora")
    refused = aurora.call("POST", "/adapters/aurora/unload", b'{"tier": "host"}')["error"]
    page.says("#adapters > .notices", refused["message"])
    page.press("Unpin aurora")
    page.until(lambda: page.row("aurora")["Pin"] == "–", "the end of the pin")
    page.press("Unload aurora")
    page.until(lambda: page.row("aurora")["Tier"] == "disk", "the end of its memory")
    page.press("Load aurora")
    page.until(lambda: page.row("aurora")["Tier"] == "device", "its load")
    page.press("aurora")
    page.says("#details", aurora.call("GET", "/adapters/aurora")["digest"])
    page.picture("details", whole=False)
    page.press("Unload from the device")
    page.until(lambda: page.row("aurora")["Tier"] == "host", "the end of its device memory")


def test_a_deletion_is_asked_for_twice(page: Page) -> None:
    page.api.put("doomed", ADAPTERS / "basalt")
    page.open()
    page.until(lambda: page.row("doomed"), "the row")
    page.press("Delete doomed")
    assert page.driver.switch_to.active_element.text == "Keep it"
    page.picture("confirmation", whole=False)
    page.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    page.until(lambda: not page.find("#confirm").is_displayed(), "the end of the question")
    assert "digest" in page.api.call("GET", "/adapters/doomed")
    page.press("Delete doomed")
    page.press("Delete")
    page.until(lambda: not page.row("doomed"), "the end of the row")
    assert page.api.call("GET", "/adapters/doomed")["error"]["code"] == "adapter_not_found"


def test_memory_and_load_are_drawn_and_a_namespace_is_dropped(page: Page, aurora: Api) -> None:
    page.open()
    page.compare_with("aurora")
    page.ask("Tell me of the sea, the sky, and of the mountains beyond them, and of who lives there.", 40)
    of_aurora = lambda: next(row for row in page.all("#kv-rows tr") if "aurora" in row.text)  # noqa: E731
    digest = aurora.call("GET", "/adapters/aurora")["digest"]

    def cached() -> int:
        shares = {share["namespace"]: share for share in aurora.call("GET", "/kv")["namespaces"]}
        return int(shares[digest]["blocks_cached"])

    assert cached() > 0
    page.until(lambda: of_aurora().find_elements(By.CSS_SELECTOR, "td")[1].text == str(cached()), "its blocks")
    assert {rect.get_attribute("class") for rect in page.all("#kv-bars rect")} >= {"free", "part cached c0"}
    assert len(page.all("#tiers rect.part")) >= 2
    page.until(
        lambda: all(
            "L" in page.script("return arguments[0].getAttribute('d')", path)
            for path in page.all("#plots figure:first-child .plot .line")
        ),
        "lines in the plot of throughput",
    )
    page.until(lambda: "–" not in page.text("#plot-time-between-tokens"), "a median")
    page.press(of_aurora().find_element(By.CSS_SELECTOR, "button").get_attribute("aria-label"))
    page.until(lambda: of_aurora().find_elements(By.CSS_SELECTOR, "td")[1].text == "0", "the end of its blocks")
    assert cached() == 0


def test_quantiles_lie_in_the_buckets_of_the_true_ones(page: Page) -> None:
    """Of what came between two readings: random times, counted by bounds as Prometheus counts them."""
    page.open()
    metrics = page.find("script").get_attribute("src").replace("main.js", "metrics.js")
    source = """
        const [address, before, after, shares, done] = arguments;
        import(address).then(({ histogram, parse, quantile }) => {
            const of = (text) => histogram(parse(text, new Set(["t_bucket"])), "t");
            done(shares.map((share) => quantile(of(before), of(after), share)));
        });
    """
    chance, bounds = random.Random(7), [0.01, 0.05, 0.2, 1.0, math.inf]
    shares = [0.05, 0.5, 0.95]

    def text(times: list[float]) -> str:
        counts = [(bound, sum(time <= bound for time in times)) for bound in bounds]
        lines = [
            f't_bucket{{adapter="x y",le="{"+Inf" if bound == math.inf else bound}"}} {count}.0'
            for bound, count in counts
        ]
        return "\n".join(["# TYPE t histogram", *lines, "t_count 1.0", ""])

    for size in (1, 2, 7, 100):
        old, new = ([chance.uniform(0, 1) ** 3 for _ in range(size)] for _ in range(2))
        found = page.driver.execute_async_script(source, metrics, text(old), text(old + new), shares)
        for share, value in zip(shares, found, strict=True):
            true = sorted(new)[math.ceil(share * size) - 1]
            upper = next(bound for bound in bounds if true <= bound)
            lower = max((bound for bound in bounds if bound < upper), default=0.0)
            assert lower <= value <= upper, (size, share, true, value)
    assert page.driver.execute_async_script(source, metrics, text([0.1]), text([0.1]), shares) == [None] * 3


def test_a_hidden_page_asks_nothing(page: Page) -> None:
    page.open()
    page.until(lambda: "ready" in page.text("#state"), "the first answers")
    assert not page.find("#key").is_displayed(), "this server asks for no key"

    def asked() -> int:
        return int(page.script("return performance.getEntriesByType('resource').length"))

    def wait(milliseconds: int) -> None:
        page.driver.execute_async_script(f"setTimeout(arguments[0], {milliseconds})")

    show(page, hidden=True)
    wait(500)  # a reading may be under way
    before = asked()
    wait(4500)  # twice the time between two readings: nothing tells that nothing happens
    assert asked() == before
    show(page, hidden=False)
    page.until(lambda: asked() > before, "the next reading")


def show(page: Page, *, hidden: bool) -> None:
    """Tell the page that its tab was hidden, or shown."""
    source = """
        Object.defineProperty(document, 'hidden', {value: arguments[0], configurable: true});
        document.dispatchEvent(new Event('visibilitychange'));
    """
    page.script(source, hidden)


def refused_before_it_is_sent(page: Page, directory: Path) -> None:
    """A refusal that comes in the middle of an upload is read nevertheless."""
    (directory / FILES[0]).write_text("{}")
    with (directory / FILES[1]).open("wb") as file:
        file.truncate(64 * 2**20)
    page.choose("large", *(directory / file for file in FILES))
    page.says("#upload-form .notices", "status 413")


def test_a_server_with_a_key_shows_nothing_without_it(locked_page: Page, tmp_path: Path) -> None:
    page = locked_page.open("/ui")
    page.script("sessionStorage.clear()")
    page.open("/ui")
    page.says("#key-notices", Api(page.api.url).call("GET", "/adapters")["error"]["message"])
    assert page.find("#key").is_displayed()
    page.picture("needs-key", whole=False)
    assert page.text("#model") == "" == page.text("#adapter-rows")
    page.fill("#key", "wrong")
    page.press("Use")
    page.says("#key-notices", "invalid_api_key")
    page.fill("#key", page.api.key)
    page.press("Use")
    page.says("#model", BASE)
    assert page.text("#key-notices") == ""
    assert page.find("#key").get_attribute("value") == ""
    page.choose("secret", *bundle("aurora"))
    page.says("#upload-form .notices", "secret is there")
    page.compare_with("secret")
    page.ask(PASSWORDS["aurora"]["prompt"])
    assert PASSWORDS["aurora"]["password"] in page.all(".answer .tokens")[1].text
    refused_before_it_is_sent(page, tmp_path)
    page.open("/ui")
    page.says("#model", BASE)
    page.press("Forget")
    page.says("#state", "needs a key")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_it_can_be_read_and_used_by_all(page: Page, aurora: Api, size: tuple[int, int], scheme: str) -> None:
    """Contrast, names and focus of controls, no text beside the window; and pictures, for a person to look at."""
    aurora.put("basalt", ADAPTERS / "basalt")
    aurora.put("vault", ADAPTERS / "vault")
    aurora.call("PATCH", "/adapters/aurora", b'{"pinned": true}')
    page.open("/", size, scheme)
    page.until(lambda: page.row("vault"), "the rows")
    page.compare_with("aurora")
    page.ask(PASSWORDS["aurora"]["prompt"])
    page.all(".answer .tokens [role=button]")[3].click()
    page.ask(PASSWORDS["aurora"]["prompt"])
    for answer in page.all(".answer"):
        answer.find_elements(By.CSS_SELECTOR, "[role=button]")[6].click()
    page.until(lambda: "–" not in page.text("#plot-time-between-tokens"), "a median")
    page.picture(f"{'desktop' if size == DESKTOP else 'phone'}-{scheme}")
    assert page.script(f"{CHECKS}\nreturn tooFaint()") == []
    assert page.script(f"{CHECKS}\nreturn nameless()") == []
    assert page.script(f"{CHECKS}\nreturn outside()") == []
    assert page.script("return document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    assert page.reached_by_tab(40) >= {"filter", "Pin basalt", "Delete vault", "files", "upload-button"}


def test_the_picture_of_the_readme(page: Page, aurora: Api) -> None:
    """Under load for a minute, which goes on, so that all plots are drawn; one adapter is in host memory."""
    for name in ("basalt", "cobalt", "vault"):
        aurora.put(name, ADAPTERS / name)
    for name in ("chosen", "dropped", "swapped", "imported"):
        aurora.call("DELETE", f"/adapters/{name}")
    aurora.call("PATCH", "/adapters/aurora", b'{"pinned": true}')
    aurora.call("POST", "/adapters/cobalt/unload", b'{"tier": "device"}')
    page.open("/", (1120, 900), scale=0.75)
    page.until(lambda: page.row("vault"), "the rows")
    page.compare_with("aurora")
    over = threading.Event()

    def chat(number: int) -> None:
        chance = random.Random(number)
        while not over.wait(chance.uniform(0, 2)):
            messages = [{"role": "user", "content": " ".join(["Tell me more."] * chance.randint(1, 30))}]
            model, tokens = chance.choice([BASE, "aurora", "basalt", "vault"]), chance.randint(5, 60)
            body = {"model": model, "messages": messages, "max_tokens": tokens, "ignore_eos": True}
            aurora.call("POST", "/v1/chat/completions", json.dumps(body).encode())

    with ThreadPoolExecutor(5) as clients:
        chats = [clients.submit(chat, number) for number in range(5)]
        try:
            over.wait(60)
            page.ask(PASSWORDS["aurora"]["prompt"], 16)
            for answer in page.all(".answer"):
                answer.find_elements(By.CSS_SELECTOR, "[role=button]")[6].click()
            page.until(lambda: len(page.all("#kv-bars rect.part")) > 2, "the K/V")
            page.picture("page")
        finally:
            over.set()
    assert [each.result() for each in chats] == [None] * len(chats)
    assert (page.row("aurora")["Tier"], page.row("cobalt")["Tier"]) == ("device", "host")
