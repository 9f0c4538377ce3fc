"""The picture of the page in the README: `make page-picture` takes it anew."""

from __future__ import annotations

from tests.browser import browser, drop, open_tab
from tests.conftest import REAL, REPOSITORY, running_server
from tests.test_page import wait_for_caption

PICTURE = REPOSITORY / "docs" / "page.png"
CLIP = REPOSITORY / "examples" / "real" / "bearded-man-talking.mp4"
WORD = 1

if __name__ == "__main__":
    with (
        running_server("--checkpoint", str(REAL)) as server,
        browser() as chromium,
        open_tab(chromium, server.exporter, width=800, height=840) as tab,
    ):
        drop(tab, files=[CLIP])
        wait_for_caption(tab)
        tab.evaluate("scrollTo(0, 0)")
        tab.locator(".word").nth(WORD).evaluate("word => word.focus({preventScroll: true})")
        tab.wait_for_function("() => document.getAnimations().length === 0")
        tab.screenshot(path=PICTURE)
