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
SERVER = Path(os.environ.get("ROOTSTOCK_PYTHON", ROOT / ".venv" / "bin" / "python"))
SCREENSHOTS = Path(os.environ.get("SCREENSHOTS", ROOT / "build" / "page"))
DESKTOP, PHONE = (1280, 900), (390, 844)
SECONDS = 60  # to wait for what the page shows


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
            for file in ("adapter_config.json", "adapter_model.safetensors")
        ]
        body = b"".join(parts) + b"--edge--\r\n"
        return self.call("PUT", f"/adapters/{name}", body, **{"content-type": "multipart/form-data; boundary=edge"})


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

    def choose(self, name: str, *files: Path) -> None:
        """Fill in the form of an upload, and send it."""
        self.find("#files").send_keys("\n".join(map(str, files)))
        self.fill("#upload-name", name)
        self.script("arguments[0].scrollIntoView({block: 'center'})", self.find("#upload-button"))
        self.find("#upload-button").click()

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
