"""Write every table of every page from the committed results."""

from __future__ import annotations

import sys

from tools.tables import ROOT, written

for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
    old = page.read_text(encoding="utf-8")
    new = written(old)
    if new != old:
        page.write_text(new, encoding="utf-8")
        sys.stdout.write(f"{page.relative_to(ROOT)}\n")
