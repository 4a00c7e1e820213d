"""A real headless Chromium for tests of pages, with its console and its network log."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--force-color-profile=srgb",
    "--hide-scrollbars",
)


@dataclass(frozen=True)
class Browser:
    """A selenium driver and what its page asked for and complained of."""

    driver: Any

    def open(self, path: Path, *, width: int = 1280, height: int = 900) -> None:
        """Open a file of this machine in a window of the given size, with empty logs."""
        self.driver.set_window_size(width, height)
        # The page of an empty tab, which the browser opens first, asks for files of its own.
        self.driver.get("about:blank")
        for log in ("performance", "browser"):
            self.driver.get_log(log)
        self.driver.get(path.resolve().as_uri())
        # On a busy machine a large page may still be read when `get` returns.
        self.wait("return location.protocol == 'file:' && document.readyState == 'complete'")

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns in the page."""
        return self.driver.execute_script(script, *arguments)

    def wait(self, script: str, seconds: float = 20) -> None:
        """Wait until a script returns something true; fails the test after `seconds`."""
        end = time.monotonic() + seconds
        while not self.run(script):
            if time.monotonic() > end:
                pytest.fail(f"after {seconds} s still not so: {script}\n{self.complaints()}")
            time.sleep(0.05)

    def requests(self) -> list[str]:
        """The addresses asked for since the last call, without data: (it is not the network)."""
        events = (json.loads(line["message"]) for line in self.driver.get_log("performance"))
        sent = [e["message"] for e in events]
        names = ("Network.requestWillBeSent", "Network.webSocketCreated")
        urls = [_url(m["params"]) for m in sent if m["method"] in names]
        return [url for url in urls if not url.startswith(("data:", "chrome"))]

    def complaints(self) -> list[str]:
        """The console's messages since the last call: errors, warnings, blocked content."""
        return [line["message"] for line in self.driver.get_log("browser")]

    def screenshot(self, path: Path) -> None:
        """Save the whole page, not only the window, as a PNG."""
        height = self.run("return document.documentElement.scrollHeight")
        width = self.run("return window.innerWidth")
        self.driver.set_window_size(width, height + 200)
        self.driver.save_screenshot(str(path))


@contextlib.contextmanager
def open_browser(profile: Path, *flags: str) -> Iterator[Browser]:
    """A browser with a fresh profile folder; skips the test where none is installed."""
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    binary = next(filter(None, map(shutil.which, _BROWSERS)), None)
    service = shutil.which("chromedriver")
    if binary is None or service is None:
        pytest.skip("no Chromium with chromedriver on this machine, so no page can be opened")
    options = selenium.ChromeOptions()
    options.binary_location = binary
    for flag in (*_FLAGS, *flags, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(service))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


def _url(params: dict[str, Any]) -> str:
    return params["request"]["url"] if "request" in params else params["url"]
