"""The report in a headless browser: nothing is asked of a network, nothing is wider than the page, light or dark."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--virtual-time-budget=2000"),
)
# Run by the page itself when it is whole: what it measures stands in its title, which --dump-dom shows.
PROBE = """<script>
const faults = [];
addEventListener("error", event => faults.push(String(event.message)), true);
addEventListener("load", () => {
  const page = document.documentElement;
  const box = selector => [...document.querySelectorAll(selector)].map(e => e.getBoundingClientRect().width);
  document.title = "PROBE" + JSON.stringify({
    faults, inner: FRAME, wide: page.scrollWidth, plots: box("figure svg"),
    asked: performance.getEntriesByType("resource").map(e => e.name),
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    ground: getComputedStyle(page).backgroundColor, ink: getComputedStyle(document.body).color,
    lines: [...document.querySelectorAll("figure svg text")].map(e => getComputedStyle(e).fill),
  }) + "PROBE";
});
</script>"""


def look(page: Path, folder: Path, width: int, dark: bool) -> dict[str, object]:
    """Load `page` in a frame of `width` pixels (a window has a least width of its own), and return what it measures."""
    text = page.read_text(encoding="utf-8").replace("</head>", PROBE.replace("FRAME", "innerWidth") + "</head>", 1)
    (folder / "page.html").write_text(text, encoding="utf-8")
    frame = f'<iframe src="page.html" width="{width}" height="900" style="border:0"></iframe>'
    script = """<script>setInterval(() => {
      document.title = document.querySelector("iframe").contentDocument.title; }, 50)</script>"""
    (folder / "frame.html").write_text(f"<!doctype html><title>wait</title>{frame}{script}", encoding="utf-8")
    command = [
        str(BROWSER), *FLAGS, f"--user-data-dir={folder / 'profile'}", "--allow-file-access-from-files",
        f"--window-size={width + 100},1000", "--enable-logging=stderr", "--dump-dom",
        *(("--force-dark-mode", "--blink-settings=preferredColorScheme=0") if dark else ()),
        (folder / "frame.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    found = re.search(r"PROBE(\{.*\})PROBE", done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return {**json.loads(found[1].replace("&amp;", "&").replace("&quot;", '"')), "said": said}


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1400])
def test_the_report_in_a_browser(tiny_run: Path, tmp_path: Path, width: int, dark: bool) -> None:
    seen = look(tiny_run / "report.html", tmp_path, width, dark)
    assert seen["inner"] == width
    assert seen["dark"] == dark
    assert (seen["faults"], seen["said"], seen["asked"]) == ([], [], [])
    assert seen["wide"] <= width
    assert len(seen["plots"]) >= 3
    assert all(0.3 * min(width, 800) < plot <= width for plot in seen["plots"])
    # what is drawn in the page's ink is drawn in its colour of text; what lies on a colour is black or white
    assert set(seen["lines"]) <= {seen["ink"], "rgb(0, 0, 0)", "rgb(255, 255, 255)"}
    assert seen["ink"] in seen["lines"]
    assert (seen["ink"] == "rgb(255, 255, 255)") == dark
