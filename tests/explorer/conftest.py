"""A headless Chromium, driven over its debugging pipe, and a run whose page it opens."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip


class Browser:
    """One page of a headless Chromium."""

    def __init__(self, program: str, profile: Path, *flags: str) -> None:
        theirs, self._write = os.pipe()
        self._read, answers = os.pipe()
        # Chromium reads descriptor 3 and writes to 4; the shell sets them from numbers that are neither.
        read_here, write_here = (fcntl.fcntl(each, fcntl.F_DUPFD, 20) for each in (theirs, answers))
        command = [program, *FLAGS, *flags, f"--user-data-dir={profile}", "about:blank"]
        shell = f'exec "$@" 3<&{read_here} 4>&{write_here}'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "chromium", *command],
            pass_fds=(read_here, write_here),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for each in (theirs, answers, read_here, write_here):
            os.close(each)
        self._buffer, self._count, self._session = b"", 0, None
        self.events: list[dict[str, Any]] = []
        target = next(each for each in self.call("Target.getTargets")["targetInfos"] if each["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol; returns its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message(120)
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _message(self, seconds: float) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            assert select.select([self._read], [], [], max(0, end - time.monotonic()))[0], "Chromium does not answer"
            content = os.read(self._read, 1 << 20)
            assert content, "Chromium has ended"
            self._buffer += content
        line, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(line)

    def run(self, expression: str, by_value: bool = True) -> Any:
        """Evaluate JavaScript, waiting for a promise; returns its value, or else the protocol's id of an object."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=by_value)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value" if by_value else "objectId")

    def open(self, page: Path, fragment: str = "") -> None:
        """Open a file and wait until its model answers."""
        self.call("Page.navigate", url="about:blank")
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri() + fragment)
        end = time.monotonic() + 120
        while not self.run("window.explorer !== undefined"):
            assert time.monotonic() < end, self.events[-5:]
            time.sleep(0.1)
        self.run("explorer.ready.then(() => true)")

    def resize(self, width: int, height: int, scale: float = 1, dark: bool = False) -> None:
        """Set the size of the window in CSS pixels, its pixel density, and the colour scheme."""
        phone = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def press(self, key: str) -> None:
        """Press a key, by the name of the DOM; a single letter is typed."""
        codes = {"Tab": 9, "Enter": 13, " ": 32}
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        common = {"key": key, "code": key, "windowsVirtualKeyCode": codes.get(key, 0)}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        """Type a text into what has the focus."""
        self.call("Input.insertText", text=text)

    def shoot(self, path: Path) -> None:
        """Save a PNG of the window."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        """End the browser."""
        os.close(self._write)
        os.close(self._read)
        self._process.terminate()
        self._process.wait(20)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("needs Chromium")
    opened = Browser(program, tmp_path_factory.mktemp("profile"))
    try:
        yield opened
    finally:
        opened.close()
