"""junit.xml: one test case per gate, so that any CI shows which promise was broken, by which figure."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from soco_export.report.gates import Verdict
from soco_export.report.schema import Results

FORBIDDEN = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # not allowed in XML 1.0


def render_junit(results: Results) -> str:
    """Return junit.xml; a gate that failed names its figure and its threshold, an inconclusive one is skipped."""
    states = [verdict.state for verdict in results.verdicts]
    counts = {"tests": str(len(states)), "failures": str(states.count("failed")), "errors": "0"}
    root = ElementTree.Element("testsuites", counts)
    skipped = {"skipped": str(states.count("inconclusive"))}
    suite = ElementTree.SubElement(
        root, "testsuite", {"name": f"soco-export gates: {_clean(results.model.name)}", **counts, **skipped}
    )
    for verdict in results.verdicts:
        _add_case(suite, results.model.name, verdict)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _add_case(suite: ElementTree.Element, model: str, verdict: Verdict) -> None:
    attributes = {"classname": f"soco-export.{_clean(model)}", "name": verdict.name, "time": "0"}
    case = ElementTree.SubElement(suite, "testcase", attributes)
    figure = "not measured" if verdict.figure is None else repr(verdict.figure)
    detail = f"{verdict.source} = {figure}, threshold {verdict.name} = {verdict.threshold!r}"
    if verdict.passed:
        ElementTree.SubElement(case, "system-out").text = _clean(detail)
    elif verdict.inconclusive:
        ElementTree.SubElement(case, "skipped", {"message": _clean(verdict.message)})
    else:
        failure = ElementTree.SubElement(case, "failure", {"type": "gate", "message": _clean(verdict.message)})
        failure.text = _clean(detail)


def _clean(text: str) -> str:
    return FORBIDDEN.sub("?", text)
