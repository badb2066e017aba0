"""Try the chat page in a headless Chromium, on a computer's screen and on a phone's, in light and dark.

    python scripts/serve_check.py --bundle runs/smollm2-int4 --screenshots docs/pictures

Without a bundle it makes a tiny one of random weights. Chromium is Debian's package, or what CHROMIUM names.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from served import Served, serving

_WAIT_S = 120
_DESK, _PHONE = (1100, 760), (390, 844)


class Browser:
    """A Chromium that is spoken to over two pipes, in its DevTools' protocol.

    Args:
        program: to start.
        folder: for its profile.
    """

    def __init__(self, program: str, folder: str) -> None:
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe",
                   f"--user-data-dir={folder}", "--no-first-run", "about:blank"]  # fmt: skip
        pipes = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", pipes, program, *options], pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._held, self._number, self._session = b"", 0, ""
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """Ask for something, and wait for the answer; what the page complains of meanwhile is kept."""
        self._number += 1
        asked = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            asked["sessionId"] = self._session
        os.write(self._out, json.dumps(asked, allow_nan=False).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("method") == "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(found["params"], allow_nan=False)[:600])
            if found.get("method") == "Log.entryAdded" and found["params"]["entry"]["level"] == "error":
                self.complaints.append(found["params"]["entry"]["text"])
            if found.get("id") == self._number:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']}")
                return found["result"]

    def _next(self) -> Any:
        while b"\0" not in self._held:
            more = os.read(self._in, 65536)
            if not more:
                raise RuntimeError("Chromium has ended")
            self._held += more
        message, _, self._held = self._held.partition(b"\0")
        return json.loads(message)

    def js(self, code: str) -> Any:
        """A JavaScript expression's value."""
        found = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{code}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def until(self, code: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + _WAIT_S
        while not self.js(code):
            if time.monotonic() > end:
                raise RuntimeError(f"never true: {code}")
            time.sleep(0.02)

    def open(self, address: str, size: tuple[int, int]) -> None:
        """Go to a page on a screen of a size."""
        self.call("Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1,
                  mobile=size == _PHONE)  # fmt: skip
        self.call("Page.navigate", url=address)
        self.until("document.readyState === 'complete' && document.querySelector('#model option') !== null")

    def shot(self, path: Path) -> None:
        """A picture of what is seen."""
        data = self.call("Page.captureScreenshot", format="png", optimizeForSpeed=False)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        """End it."""
        self._session = ""
        self.call("Browser.close")
        self._process.wait(30)


def check(browser: Browser, served: Served, pictures: Path | None) -> None:
    """Do what a person does, and look whether the page shows it."""
    b, count = browser, "document.querySelectorAll('.turn').length"
    idle = "!document.querySelector('#send').hidden"

    def say(text: str) -> None:
        value = json.dumps(text, allow_nan=False)
        b.js(f"document.querySelector('#text').value = {value}; document.querySelector('#send').click()")

    def press(label: str, turn: int) -> None:
        found = f"[...document.querySelectorAll('.turn')[{turn}].querySelectorAll('button')]"
        b.js(f"{found}.find((button) => button.textContent === {json.dumps(label, allow_nan=False)}).click()")

    def that(true: bool, what: str) -> None:
        if not true:
            raise RuntimeError(f"not so: {what}")
        print(f"  {what}")

    b.open(served.address, _DESK)
    b.js("document.querySelector('#temperature').value = 0; document.querySelector('#max_tokens').value = 60")
    say("What is the capital of France?")
    b.until(f"{count} === 2 && {idle}")
    note = b.js("document.querySelectorAll('.note')[1].textContent")
    that("tokens/s" in note, f"an answer comes, and its speed: {note}")
    that(b.js("document.querySelectorAll('.turn .text')[1].textContent.length") > 0, "it has a text")
    say("Tell me a long story about a fox.")
    b.until("document.querySelectorAll('.turn').length === 4 && "
            "document.querySelectorAll('.turn .text')[3].textContent.length > 10")  # fmt: skip
    b.js("document.querySelector('#stop').click()")
    b.until(idle)
    note = b.js("[...document.querySelectorAll('.tools')].pop().lastChild.textContent")
    that(note.startswith("stopped") or "tokens" in note, f"a running answer can be stopped: {note}")
    press("Edit", 0)
    b.js("document.querySelector('.turn textarea').value = 'What is the capital of Italy?'")
    press("Send", 0)
    b.until(f"{count} === 2 && {idle}")
    that("2/2" in b.js("document.querySelector('.turn .tools').textContent"), "an edited turn is a branch of its own")
    press("\u2039", 0)
    that(b.js(count) == 4, "and the first branch is still there")
    press("Fork", 1)
    that(b.js(count) == 2 and b.js("document.querySelectorAll('.chat').length") == 2, "a fork is a chat of its own")
    say("Write one sentence about it.")
    b.until(f"{count} === 4 && {idle}")
    b.js("document.documentElement.classList.contains('dark') && document.querySelector('#theme').click()")
    if pictures is not None:
        b.shot(pictures / "chat-light.png")
    b.js("document.querySelector('#theme').click()")
    that(b.js("getComputedStyle(document.body).backgroundColor") == "rgb(22, 23, 22)", "it can be dark")
    b.open(served.address, _PHONE)
    b.until(f"{count} === 4")
    that(b.js("document.documentElement.scrollWidth") <= _PHONE[0], "it fits a phone")
    that(b.js("document.querySelector('#send').getBoundingClientRect().bottom") <= _PHONE[1], "with all its buttons")
    if pictures is not None:
        b.shot(pictures / "chat-phone.png")
    say("And what is <b>bold</b> there?")
    b.until(f"{count} === 6 && {idle}")
    that(b.js("document.querySelectorAll('.turn b').length") == 0, "what is said is text and never HTML")
    that(not b.complaints, f"the browser has nothing to complain of {b.complaints or ''}")


def main() -> int:
    """Serve a bundle and try the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bundle", type=Path, help="with a chat template; none: a tiny one of random weights")
    parser.add_argument("--screenshots", type=Path, help="a folder for pictures")
    options = parser.parse_args()
    program = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        print("Chromium is not here: apt-get install chromium, or name one in CHROMIUM", file=sys.stderr)
        return 1
    if options.bundle is None:
        from tiny_bundles import attention_bundle

        options.bundle = attention_bundle()
    with tempfile.TemporaryDirectory() as folder, serving({options.bundle.name: options.bundle}) as served:
        browser = Browser(program, folder)
        try:
            check(browser, served, options.screenshots)
        finally:
            browser.close()
    print("The page does what it should.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
