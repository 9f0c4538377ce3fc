"""A real browser, Chromium without a window, driven by the DevTools protocol.

Source: https://chromedevtools.github.io/devtools-protocol/. Messages go over a pipe, each ended by a NUL.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import wait_until
from tests.front import DEBIAN

PROGRAM = "chromium-headless-shell"
REPLY_DEADLINE_S = 30.0
LOADED_DEADLINE_S = 60.0


class Browser:
    """Sends commands and keeps the events that came meanwhile, by the tab that they are about."""

    def __init__(self, commands: int, replies: int) -> None:
        self._commands, self._replies = commands, replies
        self._number, self._unread = 0, b""
        self.events: dict[str, list[dict[str, Any]]] = {}

    def call(self, method: str, session: str = "", /, **parameters: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        os.write(self._commands, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while (reply := self._read()).get("id") != self._number:
            self.events.setdefault(reply.get("sessionId", ""), []).append(reply)
        if "error" in reply:
            raise RuntimeError(f"{method}: {reply['error']}")
        return reply["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            if not select.select([self._replies], [], [], REPLY_DEADLINE_S)[0]:
                pytest.fail("the browser does not answer")
            received = os.read(self._replies, 1 << 20)
            assert received, "the browser has ended"
            self._unread += received
        message, _, self._unread = self._unread.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    @contextmanager
    def tab(self, url: str, *, width: int = 1000, height: int = 800, dark: bool = False) -> Iterator[Tab]:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, session)
        for domain in ("Page", "Runtime", "Log", "DOM", "Accessibility"):
            tab.call(f"{domain}.enable")
        tab.call("Emulation.setScrollbarsHidden", hidden=True)
        tab.resize(width, height)
        tab.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        tab.call("Page.navigate", url=url)
        tab.wait("document.readyState === 'complete' && location.href !== 'about:blank'")
        try:
            yield tab
        finally:
            self.call("Target.closeTarget", targetId=target)


class Tab:
    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def call(self, method: str, **parameters: Any) -> Any:
        return self._browser.call(method, self._session, **parameters)

    def resize(self, width: int, height: int = 800, scale: float = 1) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )

    def run(self, script: str) -> Any:
        """The value of an expression, or of the promise that it gives."""
        reply = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, reply["exceptionDetails"]
        return reply["result"].get("value")

    def wait(self, condition: str) -> None:
        wait_until(lambda: bool(self.run(condition)), LOADED_DEADLINE_S)

    def text(self, selector: str) -> str:
        """What a person sees there; nothing if it is hidden."""
        shown = f"(e => e && e.checkVisibility() ? e.innerText : '')(document.querySelector({selector!r}))"
        return str(self.run(shown)).strip()

    def texts(self, selector: str) -> list[str]:
        return [str(text) for text in self.run(f"[...document.querySelectorAll({selector!r})].map(e => e.innerText)")]

    def choose_file(self, selector: str, path: Path) -> None:
        found = self.call("Runtime.evaluate", expression=f"document.querySelector({selector!r})")["result"]
        self.call("DOM.setFileInputFiles", objectId=found["objectId"], files=[str(path)])

    def drop(self, *, files: Sequence[Path] = (), link: str = "") -> None:
        items = [{"mimeType": "text/uri-list", "data": link}] if link else []
        data = {"items": items, "files": list(map(str, files)), "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=200, y=300, data=data)

    def press(self, key: str, code: int) -> None:
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **text)
            text = {}

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def point_at(self, selector: str, number: int = 0) -> None:
        """Move the pointer to the middle of an element."""
        self.run(f"document.querySelectorAll({selector!r})[{number}].scrollIntoView({{block: 'center'}})")
        x, y = self.run(
            f"(r => [r.x + r.width / 2, r.y + r.height / 2])"
            f"(document.querySelectorAll({selector!r})[{number}].getBoundingClientRect())"
        )
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def complaints(self) -> list[str]:
        """Errors that scripts threw, and what the browser refused or could not do."""
        self.run("0")
        found = []
        for event in self._browser.events.get(self._session, []):
            match event["method"]:
                case "Runtime.exceptionThrown":
                    found.append(str(event["params"]["exceptionDetails"]))
                case "Log.entryAdded" if event["params"]["entry"]["level"] == "error":
                    found.append(event["params"]["entry"]["text"])
        return found

    def screenshot(self, *, format: str = "png", whole: bool = False, **options: Any) -> bytes:
        shot = self.call("Page.captureScreenshot", format=format, captureBeyondViewport=whole, **options)
        return base64.b64decode(shot["data"])


@contextmanager
def browser() -> Iterator[Browser]:
    program, environment = _program()
    commands, replies = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory() as profile:
        process = subprocess.Popen(
            [
                *("bash", "-c", f'exec "$@" 3<&{commands[0]} 4>&{replies[1]}', "bash", program),
                *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
                *("--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-proxy-server"),
            ],
            env=environment,
            pass_fds=(commands[0], replies[1]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands[0])
        os.close(replies[1])
        driven = Browser(commands[1], replies[0])
        try:
            yield driven
            driven.call("Browser.close")
        finally:
            process.terminate()
            process.wait(20)
            os.close(commands[1])
            os.close(replies[0])


def _program() -> tuple[str, dict[str, str]]:
    """The browser of this machine, or the one that `make test` brings, with its libraries and fonts."""
    if installed := shutil.which(PROGRAM):
        return installed, dict(os.environ)
    brought = DEBIAN / "usr" / "lib" / "chromium" / PROGRAM
    if not brought.exists():
        pytest.fail(f"{PROGRAM} is missing; `make test` brings it")
    libraries = os.pathsep.join(str(path.parent) for path in (DEBIAN / "usr" / "lib").glob("*/libminizip.so.1"))
    environment = {**os.environ, "LD_LIBRARY_PATH": libraries}
    if (DEBIAN / "etc" / "fonts" / "fonts.conf").exists():
        environment["FONTCONFIG_SYSROOT"] = str(DEBIAN)
    return str(brought), environment
