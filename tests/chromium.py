"""Drive a headless Chromium: where it is, and a page of a server that is opened, clicked and read through DevTools."""

import asyncio
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")  # as in the Makefile
CHROMIUM = next((path for name in BROWSERS if (path := shutil.which(name))), None)
# Without a sandbox it runs as root as well; the others keep it from calling home.
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium: `make browser` as root, or `apt-get install chromium`"
)
_START_SEC, _POLL_SEC = 60, 0.05


class Page:
    """A page in a browser."""

    def __init__(self, target: str, loop: asyncio.AbstractEventLoop) -> None:
        self._target, self._loop = target, loop

    def evaluate(self, script: str) -> Any:
        """Return the JSON value of an expression, or of the promise that it is. Fails where it throws."""
        request = {"expression": script, "awaitPromise": True, "returnByValue": True}
        answer = self._loop.run_until_complete(_asked(self._target, "Runtime.evaluate", request))
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, script: str, limit_sec: float = 60) -> Any:
        """Return the value of an expression as soon as it is true."""
        end = time.monotonic() + limit_sec
        while not (found := self.evaluate(script)):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(_POLL_SEC)
        return found


@contextmanager
def opened(url: str, profile: Path) -> Iterator[Page]:
    """Open a page within the block. The browser finds no other machine than this one."""
    alone = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    words = [CHROMIUM or "", *FLAGS, alone, f"--user-data-dir={profile}", "--remote-debugging-port=0", url]
    browser = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    loop = asyncio.new_event_loop()
    try:
        yield Page(loop.run_until_complete(_target_of(profile, url)), loop)
    finally:
        loop.close()
        browser.terminate()
        browser.wait()


async def _target_of(profile: Path, url: str) -> str:
    """Return the WebSocket of the page that shows a URL."""
    end = time.monotonic() + _START_SEC
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < end:
            await asyncio.sleep(_POLL_SEC)
            file = profile / "DevToolsActivePort"  # the browser writes it when it listens
            if not file.exists() or not (lines := file.read_text().splitlines()):
                continue
            async with session.get(f"http://127.0.0.1:{lines[0]}/json") as answer:
                for page in await answer.json():
                    if page["type"] == "page" and page["url"].startswith(url):
                        return str(page["webSocketDebuggerUrl"])
    raise AssertionError(f"Chromium did not open {url}")


async def _asked(target: str, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the answer of a page to one request."""
    async with aiohttp.ClientSession() as session, session.ws_connect(target, max_msg_size=0) as socket:
        await socket.send_json({"id": 1, "method": method, "params": parameters})
        async for message in socket:
            answer = json.loads(message.data)
            if answer.get("id") == 1:
                return dict(answer["result"])
    raise AssertionError(f"the page closed before it answered {method}")
