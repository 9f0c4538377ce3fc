"""A real browser, Debian's Chromium without a window, driven by Playwright. It knows no page of ours."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import floor
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page, expect, sync_playwright

from tests.front import DEBIAN

PROGRAM = "chromium-headless-shell"
DEADLINE_MS = 60_000

expect.set_options(timeout=DEADLINE_MS)


@contextmanager
def browser() -> Iterator[BrowserContext]:
    """A browser whose tabs share what a person's tabs share. Only one at a time can run in a thread."""
    program, environment = _program()
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(
            executable_path=program,
            env={**environment},
            args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-proxy-server"],
        ) as chromium,
        chromium.new_context() as context,
    ):
        context.set_default_timeout(DEADLINE_MS)
        yield context


def open_tab(context: BrowserContext, url: str, *, width: int = 1000, height: int = 800, dark: bool = False) -> Page:
    tab = context.new_page()
    tab.set_viewport_size({"width": width, "height": height})
    tab.emulate_media(color_scheme="dark" if dark else "light")
    tab.goto(url)
    return tab


def text_of(tab: Page, selector: str) -> str:
    """What a person reads there, as soon as it is shown."""
    return tab.locator(selector).filter(visible=True).inner_text()


def drop(tab: Page, *, files: Sequence[Path] = (), link: str = "") -> None:
    """As a person does. Playwright's own drop only sends events of a script."""
    items = [{"mimeType": "text/uri-list", "data": link}] if link else []
    data = {"items": items, "files": list(map(str, files)), "dragOperationsMask": 1}
    devtools = tab.context.new_cdp_session(tab)
    for kind in ("dragEnter", "dragOver", "drop"):
        devtools.send("Input.dispatchDragEvent", {"type": kind, "x": 200, "y": 300, "data": data})


def percent(share: float) -> str:
    """As a page rounds, half up; Python rounds half to even."""
    return f"{floor(100 * share + 0.5)} %"


def press_tab_until(tab: Page, condition: str, *arguments: str) -> None:
    for _ in range(100):
        if tab.evaluate(condition, *arguments):
            return
        tab.keyboard.press("Tab")
    pytest.fail(f"the focus never comes where {condition}")


def complaints(tab: Page) -> list[str]:
    """Errors that scripts threw, and what the browser refused or could not do."""
    errors = [message.text for message in tab.console_messages() if message.type == "error"]
    return [*map(str, tab.page_errors()), *errors]


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb. Source: WCAG 2.2."""
    digits = colour.strip().removeprefix("#")
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    shares = [int(part, 16) / 255 for part in re.findall("..", digits)]
    red, green, blue = (s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """Source: WCAG 2.2."""
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def _program() -> tuple[str, dict[str, str]]:
    """The browser of this machine, or the one that `make test` brings, with its libraries and fonts."""
    if installed := shutil.which(PROGRAM):
        return installed, dict(os.environ)
    brought = DEBIAN / "usr" / "lib" / "chromium" / PROGRAM
    if not brought.exists():
        pytest.fail(f"{PROGRAM} is missing; `make test` brings it")
    # PulseAudio's library looks for its own parts where Debian installs them.
    libraries = {str(path.parent) for path in (DEBIAN / "usr" / "lib").glob("*-linux-gnu/**/lib*.so*")}
    environment = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(sorted(libraries))}
    if (DEBIAN / "etc" / "fonts" / "fonts.conf").exists():
        environment["FONTCONFIG_SYSROOT"] = str(DEBIAN)
    return str(brought), environment
