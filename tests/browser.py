"""A headless Chromium for tests of pages, driven by selenium; tests that use it are marked."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--hide-scrollbars"),
)


def missing() -> str:
    """Why tests in a browser cannot run here; "" if they can."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return 'no selenium: pip install -e ".[test]"'
    if not any(map(shutil.which, NAMES)):
        return "no Chromium"
    return "" if shutil.which("chromedriver") else "no chromedriver"


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A browser with a window of 1280 x 900, and a new profile in that folder."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = next(path for path in map(shutil.which, NAMES) if path)
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        driver.set_window_size(1280, 900)
        yield driver
    finally:
        driver.quit()
