"""A headless Chromium, driven through a pair of pipes (the DevTools protocol, JSON ended by a zero byte).

with Browser() as browser, browser.open(path, 1200, 800) as page:
    assert page.evaluate("1 + 1") == 2
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from tests.harness.unpacked import unpacked

__all__ = ["Browser", "Page"]

_LIMIT = 60.0  # seconds for an answer
_FONTS = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>{fonts}</dir><cachedir>{cache}</cachedir></fontconfig>
"""


class Browser:
    """The one that ``.ci/ensure-system`` unpacked. It has no network, and a profile of its own."""

    def __init__(self) -> None:
        root = unpacked("chromium")
        program = root / "usr/lib/chromium/chromium-headless-shell"
        self._directory = tempfile.TemporaryDirectory(prefix="browser-")
        home = Path(self._directory.name)
        fonts = home / "fonts.conf"
        fonts.write_text(_FONTS.format(fonts=root / "usr/share/fonts", cache=home / "cache"))
        libraries = [
            *root.glob("usr/lib/*-linux-gnu"),
            *root.glob("usr/lib/*-linux-gnu/pulseaudio"),
        ]
        to_child, self._out = os.pipe()
        self._in, from_child = os.pipe()

        def use_pipes() -> None:  # the browser reads from descriptor 3 and writes to 4
            first, second = os.dup(to_child), os.dup(from_child)
            os.dup2(first, 3)
            os.dup2(second, 4)

        self._process = subprocess.Popen(
            [
                program,
                "--remote-debugging-pipe",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--host-resolver-rules=MAP * ~NOTFOUND",
                f"--user-data-dir={home / 'profile'}",
                "--hide-scrollbars",
                "--force-device-scale-factor=1",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=use_pipes,
            close_fds=False,
            env={
                **os.environ,
                "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
                "FONTCONFIG_FILE": str(fonts),
                "HOME": str(home),
            },
        )
        os.close(to_child)
        os.close(from_child)
        self._number = 0
        self._received = b""
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._directory.cleanup()

    def call(self, method: str, session: str | None = None, **parameters: object) -> dict[str, Any]:
        """Call a method of the protocol and return its result; events that come before are kept."""
        self._number += 1
        message: dict[str, object] = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + _LIMIT
        while True:
            answer = self._next(deadline)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return dict(answer["result"])
            self.events.append(answer)

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._received:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._in], [], [], left)[0]:
                raise TimeoutError("the browser does not answer")
            data = os.read(self._in, 1 << 20)
            assert data, f"the browser ended with {self._process.wait()}"
            self._received += data
        message, _, self._received = self._received.partition(b"\0")
        return dict(json.loads(message))

    @contextlib.contextmanager
    def open(
        self, path: Path, width: int, height: int, fragment: str = "", dark: bool = False
    ) -> Iterator[Page]:
        """Open a file in a window of this size, and wait until its body says ``data-ready``."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[theme])
        page.call("Page.navigate", url=f"{path.absolute().as_uri()}{fragment}")
        page.wait_for("document.body && document.body.dataset.ready === 'yes'")
        yield page
        self.call("Target.closeTarget", targetId=target)


class Page:
    """A page that is shown."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def call(self, method: str, **parameters: object) -> dict[str, Any]:
        return self._browser.call(method, self._session, **parameters)

    def evaluate(self, expression: str) -> Any:
        """The value of an expression; AssertionError where it throws."""
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, expression: str, limit: float = 30.0) -> None:
        deadline = time.monotonic() + limit
        while not self.evaluate(expression):
            assert time.monotonic() < deadline, f"never true: {expression}; {self.errors()}"
            time.sleep(0.02)

    def click(self, x: float, y: float, *, count: int = 1) -> None:
        for kind in ("mousePressed", "mouseReleased"):
            self.call(
                "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=count
            )

    def wheel(self, x: float, y: float, by: float, *, control: bool = False) -> None:
        self.call(
            "Input.dispatchMouseEvent",
            type="mouseWheel",
            x=x,
            y=y,
            deltaX=0,
            deltaY=by,
            modifiers=2 if control else 0,
        )

    def screenshot(self) -> bytes:
        """What is seen, as a PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def errors(self) -> list[str]:
        """Exceptions of scripts, and what the console and the log call an error, so far."""
        found = []
        for event in self._browser.events:
            if event.get("sessionId") != self._session:
                continue
            method, parameters = event["method"], event["params"]
            if method == "Runtime.exceptionThrown":
                found.append(str(parameters["exceptionDetails"]))
            elif method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
                found.append(str(parameters["entry"]["text"]))
            elif method == "Runtime.consoleAPICalled" and parameters["type"] == "error":
                found.append(str(parameters["args"]))
        return found

    def requests(self) -> list[str]:
        """The addresses that the page asked for."""
        return [
            event["params"]["request"]["url"]
            for event in self._browser.events
            if event.get("sessionId") == self._session
            and event["method"] == "Network.requestWillBeSent"
        ]
