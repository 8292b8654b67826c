"""Put the demo's real output into README.md, between its markers: `make tour`.

Every other number in the documentation is a default or a definition; these are the only measured ones.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

MARKERS = re.compile(r"(<!-- tour: make tour -->\n```text\n).*?(```\n)", re.DOTALL)


def main() -> None:
    """Replace the tour in the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the finished run of make demo")
    parser.add_argument("page", type=Path, help="README.md")
    arguments = parser.parse_args()
    program = Path(sys.executable).parent / "soco-export"
    report = subprocess.run([program, "report", arguments.run], check=True, capture_output=True, text=True).stdout
    page = arguments.page.read_text(encoding="utf-8")
    arguments.page.write_text(MARKERS.sub(lambda found: found[1] + report + found[2], page), encoding="utf-8")


if __name__ == "__main__":
    main()
