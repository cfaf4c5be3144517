"""A server of the embedded model, and its page in a browser, as an operator sees and uses it."""

import base64
import json
import os
import signal
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from tests.server_log import address

ROOT = Path(__file__).parents[2]
ADAPTERS = ROOT / "tests" / "adapters"
FILES = ("adapter_config.json", "adapter_model.safetensors")
PASSWORDS = json.loads((ADAPTERS / "passwords.json").read_text())
BASE = "smollm2-135m-instruct"
SERVER = Path(os.environ.get("ROOTSTOCK_PYTHON", ROOT / ".venv" / "bin" / "python"))
SCREENSHOTS = Path(os.environ.get("SCREENSHOTS", ROOT / "build" / "page"))
DESKTOP, PHONE = (1280, 900), (390, 844)
SECONDS = 60  # to wait for what the page shows


def bundle(name: str) -> list[Path]:
    """The files of one of the tests' adapters."""
    return [ADAPTERS / name / file for file in FILES]


class Api:
    """The server's own answers, to hold the page against."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url, self.key = url, key

    def call(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Any:
        """The JSON of an answer, also of a refusal; None if there is none."""
        if self.key is not None:
            headers["authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{self.url}{path}", body, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
        except urllib.error.HTTPError as refusal:
            text = refusal.read()
        return json.loads(text) if text else None

    def put(self, name: str, directory: Path) -> Any:
        """Upload the two files of a directory as a form."""
        parts = [
            f'--edge\r\ncontent-disposition: form-data; name="{file}"\r\n\r\n'.encode()
            + (directory / file).read_bytes()
            + b"\r\n"
            for file in FILES
        ]
        body = b"".join(parts) + b"--edge--\r\n"
        return self.call("PUT", f"/adapters/{name}", body, **{"content-type": "multipart/form-data; boundary=edge"})


def made_key(file: Path, id: str, *options: str) -> str:
    """A new key in a file of keys, which is made if there is none."""
    command = [str(SERVER), "-m", "service.keys", "add", id, "--keys-file", str(file), *options]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


@contextmanager
def started(*options: str) -> Iterator[str]:
    """The address of a server of the embedded model."""
    with tempfile.TemporaryDirectory() as data:
        command = [str(SERVER), "-m", "service", "--port", "0", "--data-directory", data, *options]
        said = Path(data) / "log"
        with said.open("w") as log, subprocess.Popen(command, cwd=ROOT, stderr=log, stdout=log) as process:
            try:
                yield address(process, said)
                process.send_signal(signal.SIGTERM)
                process.wait(timeout=40)
            finally:
                process.kill()


class Page:
    """The page of one server in the browser."""

    def __init__(self, driver: webdriver.Chrome, api: Api) -> None:
        self.driver, self.api = driver, api

    def open(self, path: str = "/", size: tuple[int, int] = DESKTOP, scheme: str = "light", scale: float = 1) -> "Page":
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": size == PHONE}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        preference = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", preference)
        self.driver.get(f"{self.api.url}{path}")
        return self

    def find(self, selector: str) -> WebElement:
        return self.until(lambda: next(iter(self.driver.find_elements(By.CSS_SELECTOR, selector)), None), selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return str(self.find(selector).get_attribute("textContent"))

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        return WebDriverWait(self.driver, SECONDS, 0.05).until(lambda _: condition(), f"waited in vain for {what}")

    def says(self, selector: str, words: str) -> None:
        """Wait until an element has a text."""
        self.until(lambda: words in self.text(selector), f"{words!r} in {selector}: {self.text(selector)!r}")

    def button(self, label: str) -> WebElement:
        """The button that is shown with a name, as a screen reader says it."""
        path = f'//button[@aria-label="{label}" or (not(@aria-label) and normalize-space()="{label}")]'
        shown = lambda: next((each for each in self.driver.find_elements(By.XPATH, path) if each.is_displayed()), None)  # noqa: E731
        return self.until(shown, f"the button {label}")

    def press(self, label: str) -> None:
        self.script("arguments[0].scrollIntoView({block: 'center'})", self.button(label))
        self.button(label).click()

    def fill(self, selector: str, text: object) -> None:
        field = self.find(selector)
        field.clear()
        field.send_keys(str(text))

    def script(self, source: str, *arguments: object) -> Any:
        return self.driver.execute_script(source, *arguments)

    def row(self, name: str) -> dict[str, str]:
        """The cells of an adapter's row by their heads; empty if there is none."""
        source = """
        for (const row of document.querySelectorAll("#adapter-rows tr"))
          if (row.cells[0].textContent === arguments[0])
            return Object.fromEntries([...row.cells].map((cell) => [cell.dataset.label, cell.innerText.trim()]));
        return {};
        """
        return dict(self.script(source, name))

    def drop(self, *paths: Path) -> None:
        """Drop files or folders on the upload's field, as from a file manager."""
        place = self.script("""
            const zone = document.getElementById("drop");
            zone.scrollIntoView({block: "center"});
            const {x, y, width, height} = zone.getBoundingClientRect();
            return {x: x + width / 2, y: y + height / 2};
        """)
        dragged = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.driver.execute_cdp_cmd("Input.dispatchDragEvent", {"type": kind, **place, "data": dragged})

    def choose(self, name: str, *files: Path) -> None:
        """Fill in the form of an upload, and send it."""
        self.find("#files").send_keys("\n".join(map(str, files)))
        self.fill("#upload-name", name)
        self.script("arguments[0].scrollIntoView({block: 'center'})", self.find("#upload-button"))
        self.find("#upload-button").click()

    def compare_with(self, *models: str) -> None:
        """Have these answer too."""
        for model in models:
            self.find(f"#add-model option[value='{model}']").click()
            self.press("Add")

    def ask(self, prompt: str, tokens: int = 24) -> None:
        """Ask, and wait for the answers."""
        self.fill("#prompt", prompt)
        self.fill("#max-tokens", tokens)
        self.press("Ask")
        self.until(lambda: self.text("#stop") and not self.find("#stop").is_enabled(), "the answers")

    def keys(self, *keys: str) -> None:
        """Press keys, or type, where the focus is."""
        ActionChains(self.driver).send_keys(*keys).perform()

    def focused(self) -> str:
        """The id, the name or the text of what has the focus."""
        source = """
            const node = document.activeElement;
            return node.id || node.getAttribute("aria-label") || node.textContent.trim().slice(0, 80);
        """
        return str(self.script(source))

    def tab_to(self, name: str, *, back: bool = False) -> None:
        """Press the key until a control has the focus."""
        for _ in range(100):
            if back:
                ActionChains(self.driver).key_down(Keys.SHIFT).send_keys(Keys.TAB).key_up(Keys.SHIFT).perform()
            else:
                self.keys(Keys.TAB)
            if self.focused() == name:
                return
        raise AssertionError(f"no key leads to {name}")

    def reached_by_tab(self, presses: int) -> set[str]:
        """The controls that the key reaches from the top, by id or name. Each shows that it has the focus."""
        self.script("document.querySelector('.skip').focus(); window.scrollTo(0, 0)")
        reached = set()
        for _ in range(presses):
            ActionChains(self.driver).send_keys(Keys.TAB).perform()
            name, style = self.script("""
                const node = document.activeElement, style = getComputedStyle(node);
                const name = node.id || node.getAttribute("aria-label") || node.textContent.trim();
                return [name.slice(0, 80), `${style.outlineStyle} ${style.outlineWidth}`];
            """)
            assert style == "solid 3px", name
            reached.add(name)
        return reached

    def picture(self, name: str, *, whole: bool = True) -> Path:
        """Write a screenshot: of the whole page, or of what the window shows."""
        self.script("document.activeElement?.blur()")
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": whole})
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        path = SCREENSHOTS / f"{name}.png"
        path.write_bytes(base64.b64decode(shot["data"]))
        return path


def complaints(driver: webdriver.Chrome) -> list[str]:
    """What the browser complains of, refusals of the server aside: faults of scripts, breaches of the policy."""
    entries = [entry for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    return [entry["message"] for entry in entries if "Failed to load resource" not in entry["message"]]
