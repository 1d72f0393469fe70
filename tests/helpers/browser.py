"""A headless Chromium, driven over the WebDriver protocol that its own driver speaks."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PATIENCE = 120.0  # seconds, on a machine that does much else
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element, by the W3C's WebDriver
BACKSPACE, TAB, ENTER = "\ue003", "\ue004", "\ue007"


class Browser:
    """One window. Scripts run by `call` are the driver's: a page's policy does not hold them."""

    def __init__(self, address: str, width: int, height: int):
        self._address = address
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--force-color-profile=srgb"]
        options.append(f"--window-size={width},{height}")
        size = {"width": width, "height": height, "pixelRatio": 1.0}
        wanted = {  # a window has no less than 500 columns, but may behave as a telephone
            "goog:chromeOptions": {"args": options, "mobileEmulation": {"deviceMetrics": size}},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        made = self._ask("POST", "", {"capabilities": {"alwaysMatch": wanted}})
        self._address += f"/{made['sessionId']}"

    def open(self, address: str) -> None:
        """Load a page."""
        self._ask("POST", "/url", {"url": address})

    def call(self, script: str, *words: Any) -> Any:
        """Run a function's body in the page; return what it returns."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": list(words)})

    def click(self, selector: str) -> None:
        """Click the first element of a selector, as a mouse does."""
        self._ask("POST", f"/element/{self._find(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        """Type into an element."""
        self._ask("POST", f"/element/{self._find(selector)}/value", {"text": text})

    def press(self, text: str) -> None:
        """Type into whatever has the focus."""
        keys = [{"type": kind, "value": key} for key in text for kind in ("keyDown", "keyUp")]
        actions = [{"type": "key", "id": "keyboard", "actions": keys}]
        self._ask("POST", "/actions", {"actions": actions})

    def until(self, true: Callable[[], Any], what: str) -> Any:
        """Wait for something to become true; return it."""
        end = time.monotonic() + PATIENCE
        while not (value := true()):
            assert time.monotonic() < end, f"no {what} within {PATIENCE:.0f} s"
            time.sleep(0.1)
        return value

    def picture(self) -> bytes:
        """Return what the window shows, as a PNG file."""
        return base64.b64decode(self._ask("GET", "/screenshot", None))

    def complaints(self) -> list[str]:
        """Errors that the page has met, a breach of its policy among them."""
        entries = self._ask("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def close(self) -> None:
        """End it."""
        self._ask("DELETE", "", None)

    def _find(self, selector: str) -> str:
        found = self._ask("POST", "/element", {"using": "css selector", "value": selector})
        return found[ELEMENT]

    def _ask(self, method: str, path: str, body: Any) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._address + path, data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from error


@contextlib.contextmanager
def browser(folder: Path, width: int = 1280, height: int = 900) -> Iterator[Browser]:
    """Start Chromium for a block; a test without one is skipped."""
    if not (shutil.which("chromedriver") and shutil.which("chromium")):
        pytest.skip("needs chromium and chromedriver")
    log = folder / "chromedriver.log"
    with log.open("w") as file:
        driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=file, stderr=file)
    try:
        end, port = time.monotonic() + PATIENCE, None
        while port is None:
            assert time.monotonic() < end, log.read_text()
            port = re.search(r"started successfully on port (\d+)", log.read_text())
            time.sleep(0.1)
        window = Browser(f"http://127.0.0.1:{port[1]}/session", width, height)
        try:
            yield window
        finally:
            window.close()
    finally:
        driver.terminate()
        driver.wait(PATIENCE)
