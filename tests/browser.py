"""A real browser for the tests of the report: Chromium without a window, driven through its debugging pipe.

Chromium reads commands from descriptor 3 and writes answers to 4, each a JSON document that ends in a zero byte
(--remote-debugging-pipe): no port, no websocket, nothing to install beside the browser.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import cold

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """Use as a context manager; `open` gives a page."""

    def __enter__(self) -> "Browser":
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        # Above 9, so that making them 3 and 4 in the child overwrites neither.
        ours = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for pipe in (os.pipe(), os.pipe()) for fd in pipe]
        child_reads, self.writes, self.reads, child_writes = ours
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        self.process = subprocess.Popen(
            [CHROMIUM, *flags, "--remote-debugging-pipe", f"--user-data-dir={self.profile.name}", "about:blank"],
            preexec_fn=lambda: (os.dup2(child_reads, 3), os.dup2(child_writes, 4)),
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(child_reads)
        os.close(child_writes)
        self.buffer, self.number, self.events = b"", 0, []
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.terminate()
        self.process.wait(cold.HANG)
        os.close(self.reads)
        os.close(self.writes)
        self.profile.cleanup()

    def _receive(self, until: float) -> dict | None:
        while b"\0" not in self.buffer:
            if not select.select([self.reads], [], [], max(0.0, until - time.monotonic()))[0]:
                return None
            data = os.read(self.reads, 1 << 20)
            assert data, "Chromium is gone"
            self.buffer += data
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def call(self, method: str, session: str = "", seconds: float = cold.HANG, **params: Any) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params, **({"sessionId": session} if session else {})}
        os.write(self.writes, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + seconds
        while (answer := self._receive(until)) is not None:
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.events.append(answer)
        raise TimeoutError(f"{method}: no answer in {seconds} s")

    def open(self, path: Path, **options: Any) -> "Page":
        return Page(self, path, **options)


class Page:
    """One tab with a file in it, ready to be used."""

    def __init__(self, browser: Browser, path: Path, width: int = 1280, dark: bool = False, before: str = ""):
        self.browser = browser
        self.target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=self.target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Page", "Network"):
            self.call(f"{domain}.enable")
        self.resize(width)
        self.media("screen", dark)
        if before:  # a script that runs before the page's own
            self.call("Page.addScriptToEvaluateOnNewDocument", source=before)
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.wait("document.documentElement?.dataset.ready")

    def call(self, method: str, **params: Any) -> dict:
        return self.browser.call(method, self.session, **params)

    def resize(self, width: int, height: int = 900) -> None:
        metrics = {"deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, **metrics)

    def media(self, kind: str, dark: bool = False) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=kind, features=[scheme])

    def run(self, script: str) -> Any:
        """The value of a script; a promise is awaited."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: float = cold.HANG) -> None:
        until = time.monotonic() + seconds
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < until, f"not within {seconds} s: {condition}; {self.complaints()}"
            time.sleep(0.01)

    def press(self, key: str) -> None:
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def mine(self) -> list[dict]:
        return [e for e in self.browser.events if e.get("sessionId") == self.session]

    def complaints(self) -> list[str]:
        """What the console says: exceptions, errors, warnings, what the content security policy stopped."""
        found = []
        for event in self.mine():
            params = event.get("params", {})
            if event["method"] == "Runtime.exceptionThrown":
                found.append(json.dumps(params["exceptionDetails"]))
            elif event["method"] == "Runtime.consoleAPICalled" or event["method"] == "Log.entryAdded":
                found.append(json.dumps(params))
        return found

    def requests(self) -> list[str]:
        return [e["params"]["request"]["url"] for e in self.mine() if e["method"] == "Network.requestWillBeSent"]

    def screenshot(self, path: Path) -> None:
        """The whole page, not only what fits the window."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))

    def close(self) -> None:
        self.browser.call("Target.closeTarget", targetId=self.target)
