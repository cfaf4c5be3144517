"""The page without a pointer, on a narrow window, in the dark; in headless Chromium."""

from pathlib import Path

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.page.operators_page import ADAPTERS, DESKTOP, PASSWORDS, PHONE, Api, Page

CHECKS = Path(__file__).with_name("page_checks.js").read_text()
NARROW = (320, 640)  # a small phone, or a desktop's window at 400 %
LONG = "a-team-with-a-long-name/" + "project" * 10 + "/final-v2"


def test_a_whole_flow_by_the_keyboard_alone(page: Page) -> None:
    """Pin, unpin, read, ask, look at a token and delete, each step from where the last one left the focus."""
    page.api.put("typed", ADAPTERS / "aurora")
    page.open()
    page.until(lambda: page.row("typed").get("State") == "ready", "the row")
    page.keys(Keys.TAB)
    assert page.focused() == "Skip to the adapters"
    page.keys(Keys.ENTER)
    page.tab_to("filter")
    page.keys("typed")
    page.until(lambda: len(page.all("#adapter-rows tr")) == 1, "one row")
    page.tab_to("Pin typed")
    page.keys(Keys.SPACE)
    page.until(lambda: page.row("typed")["Pin"] == "device", "the pin")
    assert page.focused() == "Unpin typed", "the button keeps the focus"
    page.keys(Keys.ENTER)
    page.until(lambda: page.row("typed")["Pin"] == "–", "the end of the pin")

    page.tab_to("typed", back=True)
    page.keys(Keys.ENTER)
    page.says("#details", page.api.call("GET", "/adapters/typed")["digest"])
    assert page.focused() == "Close"
    page.keys(Keys.ESCAPE)
    page.until(lambda: page.focused() == "typed", "the focus where it was")

    page.tab_to("prompt")
    page.keys(PASSWORDS["aurora"]["prompt"])
    page.tab_to("add-model")
    page.keys("typed")
    page.tab_to("add-column")
    page.keys(Keys.ENTER)
    page.tab_to("prompt", back=True)
    page.driver.switch_to.active_element.send_keys(Keys.CONTROL, Keys.ENTER)
    page.until(lambda: len(page.all(".answer .facts")) == 2, "two columns")
    page.until(lambda: all("ended by" in facts.text for facts in page.all(".answer .facts")), "the answers")
    assert PASSWORDS["aurora"]["password"] in page.all(".answer .tokens")[1].text
    first = page.all(".answer:nth-child(2) .tokens [role=button]")[0].text.strip()
    page.tab_to("Remove typed")
    page.tab_to(first)
    page.keys(Keys.ARROW_RIGHT, Keys.ENTER)
    chosen = page.find(".answer:nth-child(2) [aria-pressed=true]")
    assert page.driver.switch_to.active_element == chosen
    page.until(lambda: page.all(".answer:nth-child(2) .alternatives tr.chosen"), "what else could have stood there")

    page.tab_to("Delete typed", back=True)
    page.keys(Keys.ENTER)
    assert page.focused() == "Keep it"
    page.keys(Keys.TAB, Keys.ENTER)
    page.until(lambda: not page.row("typed"), "the end of the row")
    assert page.script("return document.getElementById('adapters').contains(document.activeElement)"), (
        "the focus is not lost with the row"
    )
    page.keys(Keys.TAB)
    assert page.script("return document.getElementById('adapters').contains(document.activeElement)")


@pytest.mark.parametrize(
    ("size", "scheme"), [(NARROW, "light"), (PHONE, "dark"), (DESKTOP, "dark")], ids=["narrow", "phone", "desktop"]
)
def test_long_names_and_refusals_fit_the_window_and_can_be_read(
    page: Page, aurora: Api, size: tuple[int, int], scheme: str
) -> None:
    page.api.put(LONG, ADAPTERS / "cobalt")
    page.open("/", size, scheme)
    page.until(lambda: page.row(LONG), "the row")
    page.compare_with(LONG)
    page.press(f"Delete {LONG}")
    check(page, f"long-delete-{size[0]}-{scheme}")
    page.keys(Keys.ESCAPE)
    page.press(LONG)
    check(page, f"long-details-{size[0]}-{scheme}")
    page.keys(Keys.ESCAPE)
    page.fill("#import-name", LONG)
    page.fill("#import-source", "s3://a-bucket/" + "a-long-prefix/" * 12)
    page.press("Import")
    page.says("#import-form .notices", "source_not_allowed")
    page.fill("#prompt", "Hello")
    page.fill("#max-tokens", 100000)
    page.press("Ask")
    page.says(".answer .notices", "100000")
    check(page, f"long-{size[0]}-{scheme}")
    page.api.call("DELETE", f"/adapters/{LONG}")


def check(page: Page, picture: str) -> None:
    """Nothing beside the window, nothing faint; and a picture, for a person to look at."""
    wide = """
        const end = document.documentElement.clientWidth, nodes = [...document.querySelectorAll("body *:not(svg *)")];
        const beyond = nodes.filter((node) => node.checkVisibility() && node.getBoundingClientRect().right > end + 0.5);
        return [document.documentElement.scrollWidth - end, beyond.map((node) => node.outerHTML.slice(0, 100))];
    """
    assert page.script(wide) == [0, []]
    assert page.script(f"{CHECKS}\nreturn tooFaint()") == []
    assert page.script(f"{CHECKS}\nreturn outside()") == []
    shown = [dialog for dialog in page.driver.find_elements(By.CSS_SELECTOR, "dialog") if dialog.is_displayed()]
    for dialog in shown:
        assert page.script("return arguments[0].scrollWidth - arguments[0].clientWidth", dialog) == 0
    page.picture(picture, whole=not shown)
