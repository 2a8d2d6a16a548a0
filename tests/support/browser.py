"""Opening a page in a headless Chromium, doing things to it, and reading what came of them."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)

# Before anything else on the page: what goes wrong is kept.
_LISTEN = """<script>
window.wrong = [];
addEventListener("error", (e) => wrong.push(String(e.message || e.target.tagName)), true);
addEventListener("unhandledrejection", (e) => wrong.push(String(e.reason)));
addEventListener("securitypolicyviolation", (e) => wrong.push(`policy: ${e.blockedURI}`));
console.error = console.warn = (...words) => wrong.push(words.join(" "));
</script>"""

_ACT = """<script>
const key = (name) => document.activeElement.dispatchEvent(
  new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true }));
const all = (selector) => [...document.querySelectorAll(selector)];
const one = (selector) => document.querySelector(selector);
(async () => {
  const seen = {};
  try { %s } catch (error) { wrong.push(String(error)); }
  await new Promise((done) => setTimeout(done, 50));
  seen.wrong = wrong;
  seen.width = innerWidth;
  seen.overflow = document.documentElement.scrollWidth - innerWidth;
  seen.fetched = performance.getEntriesByType("resource").map((entry) => entry.name);
  const result = document.createElement("pre");
  result.id = "result-of-test";
  result.textContent = JSON.stringify(seen);
  parent.document.body.append(result);
})();
</script>"""


def visit(page: str, script: str, folder: Path, width: int = 1280) -> dict[str, Any]:
    """Open the page in a frame of that width, run the script, which fills `seen`, and return that.

    A window cannot be as narrow as a phone. The page has the same origin as the one around it.

    Also there: `wrong`, all errors; `overflow`, how far the page is wider than the window;
    `fetched`, what it loaded.
    """
    assert CHROMIUM is not None
    source = page.replace("<style>", _LISTEN + "<style>", 1).replace(
        "</body>", _ACT % script + "</body>"
    )
    file = folder / "page.html"
    frame = f'<iframe srcdoc="{html.escape(source)}" style="width:{width}px;height:900px;border:0">'
    file.write_text(f"<!doctype html><body>{frame}</iframe>", encoding="utf-8")
    shown = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            f"--user-data-dir={folder / 'profile'}",
            "--window-size=1400,1000",
            "--virtual-time-budget=10000",
            "--dump-dom",
            file.as_uri(),
        ],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        check=True,
    ).stdout
    found = re.search(r'<pre id="result-of-test">(.*?)</pre>', shown, re.DOTALL)
    assert found, "the script did not come to its end"
    return json.loads(html.unescape(found[1]))
