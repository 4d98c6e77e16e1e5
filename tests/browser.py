"""A page in a real browser: pictures of it, and text that does not fit where it stands.

`python -m tests.browser PAGE FOLDER` writes pictures of a page at both widths and in both colour schemes, and prints
what is cut.
"""

import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

WIDTHS = (1280, 390)
"""Widths of a page in pixels: a desk and a telephone."""
HEIGHT = 900
"""Height of a window in pixels."""
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WITHOUT = "needs the program 'chromium', which this machine does not have"
"""Why a test is skipped without a browser."""
# The pages are shown within frames, because a window of Chromium is at least 500 pixels wide.
FRAME = '<iframe style="border: 0; width: {width}px; height: {height}px" srcdoc="{page}"></iframe>'
LOOK = """<pre id="seen"></pre>
<script>
const look = page => {
  const cut = [], scrolls = [];
  for (const details of page.querySelectorAll("details")) details.open = true;
  for (const element of [page.documentElement, ...page.querySelectorAll("body *")]) {
    const overflow = getComputedStyle(element).overflowX;
    if (element !== page.documentElement && overflow === "visible") continue;
    if (!element.clientWidth || element.scrollWidth <= element.clientWidth) continue;
    const name = [element, ...element.children].map(one => `${one.tagName}.${one.className}`).slice(0, 2).join(" > ");
    const what = `${name}: ${element.scrollWidth} in ${element.clientWidth} px`;
    (element.className === "scroll" ? scrolls : cut).push(what);
  }
  return {cut, scrolls, height: page.documentElement.scrollHeight, text: page.body.innerText};
};
addEventListener("load", () => document.getElementById("seen").textContent =
  JSON.stringify([...document.querySelectorAll("iframe")].map(frame => look(frame.contentDocument))));
</script>"""


@dataclass(frozen=True)
class Seen:
    """What a reader meets on a page whose details are all open."""

    cut: list[str]
    """The page itself, and each element that hides what does not fit into it, if it holds something wider than it is.
    """
    scrolls: list[str]
    """Elements of the class "scroll" that hold something wider: readers move it sideways."""
    height: int
    """Height of the page in pixels."""
    text: str


def look(page: Path, widths: Sequence[int] = WIDTHS) -> list[Seen]:
    """Open a page at several widths, and return what a reader meets at each of them.

    Args:
        page: an HTML file that needs no other file.
        widths: pixels.
    """
    frames = [FRAME.format(width=width, height=HEIGHT, page=_escaped(page)) for width in widths]
    dom = _run("".join(frames) + LOOK, "--dump-dom")
    found = re.search('<pre id="seen">(.*?)</pre>', dom, re.DOTALL)
    assert found is not None, f"Chromium has not shown {page}"
    return [Seen(**seen) for seen in json.loads(html.unescape(found[1]))]


def photograph(page: Path, width: int, height: int, to: Path, *, dark: bool = False) -> None:
    """Write a PNG of the upper `height` pixels of a page that is `width` pixels wide."""
    frame = FRAME.format(width=width, height=height, page=_escaped(page))
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    _run(frame, scheme, f"--screenshot={to}", f"--window-size={width},{height}")


def _escaped(page: Path) -> str:
    return html.escape(page.read_text(encoding="utf-8"))


def _run(body: str, *options: str) -> str:
    """Open a page with this body in Chromium, and return what Chromium prints."""
    assert CHROMIUM is not None, WITHOUT
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        page.write_text(f'<!DOCTYPE html><meta charset="utf-8"><body style="margin: 0">{body}', encoding="utf-8")
        # As root, in a container, Chromium runs without its sandbox only. The page is our own.
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += ["--hide-scrollbars", f"--user-data-dir={folder}/profile", *options, page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout


def main(page: Path, folder: Path) -> None:
    for width, seen in zip(WIDTHS, look(page), strict=True):
        print(f"{width} px: {seen.height} px high, cut: {seen.cut}, scrolls: {seen.scrolls}")
        for dark in (False, True):
            to = folder / f"{page.stem}_{width}_{'dark' if dark else 'light'}.png"
            photograph(page, width, seen.height, to, dark=dark)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
