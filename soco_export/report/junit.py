"""junit.xml: one test case per gate, so that any CI shows which promise was broken, by which figure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from xml.etree import ElementTree

from soco_export.files.text import visible
from soco_export.report.gates import Verdict
from soco_export.report.schema import Results
from soco_export.report.sentences import figures_sentence
from soco_export.report.words import verdict_words

_FORBIDDEN = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # not allowed in XML 1.0


# figures by their first name → the stage of a run that measures them
STAGES = {name: "proof" for name in ("parity", "perplexity", "tasks", "forgetting")} | {
    name: "bench" for name in ("latency", "memory")
}


def render_junit(results: Results, command: str = "") -> str:
    """Return junit.xml; a failed gate names figure and threshold, one without a figure is an error, unsure is skipped.

    A case's time is its share of the stage that measured its figure, in seconds.
    """
    states = [_outcome(verdict) for verdict in results.verdicts]
    counts = {
        "tests": str(len(states)),
        "failures": str(states.count("failure")),
        "errors": str(states.count("error")),
        "skipped": str(states.count("skipped")),
        "time": f"{sum(_seconds(results).values()):.3f}",
    }
    name = f"soco-export gates: {results.model.name}"
    root = ElementTree.Element("testsuites", {"name": name, **counts})
    started = str(results.provenance.get("started", ""))
    when = {"timestamp": started.partition("+")[0]} if started else {}
    suite = ElementTree.SubElement(root, "testsuite", {"name": name, **counts, **when, "hostname": "localhost"})
    properties = ElementTree.SubElement(suite, "properties")
    for key, value in _properties(results, command).items():
        ElementTree.SubElement(properties, "property", {"name": key, "value": value})
    for verdict in results.verdicts:
        _add_case(suite, results, verdict)
    for element in root.iter():
        element.attrib = {name: _clean(value) for name, value in element.attrib.items()}
        element.text = _clean(element.text or "")
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _properties(results: Results, command: str) -> dict[str, str]:
    found = {
        "source": results.model.source,
        "format": results.format,
        "keep_params": f"{results.sizes.keep_params:g}",
        "summary": figures_sentence(results),
        "command": command,
        **{f"version {name}": version for name, version in results.machine.versions.items()},
    }
    return {name: value for name, value in found.items() if value}


def _seconds(results: Results) -> Mapping[str, float]:
    return results.provenance.get("seconds") or {}


def _time(results: Results, verdict: Verdict) -> float:
    """Return the verdict's share of the stage that measured its figure, 0 for what was only counted."""
    stage = STAGES.get(verdict.source.partition(".")[0], "")
    sharing = sum(STAGES.get(other.source.partition(".")[0]) == stage for other in results.verdicts)
    return _seconds(results).get(stage, 0.0) / max(1, sharing)


def _outcome(verdict: Verdict) -> str:
    if verdict.passed:
        return "system-out"
    if verdict.inconclusive:
        return "skipped"
    return "error" if verdict.figure is None else "failure"


def _add_case(suite: ElementTree.Element, results: Results, verdict: Verdict) -> None:
    attributes = {
        "classname": f"soco-export.{results.model.name}",
        "name": verdict.name,
        "time": f"{_time(results, verdict):.3f}",
    }
    case = ElementTree.SubElement(suite, "testcase", attributes)
    figure = "not measured" if verdict.figure is None else repr(verdict.figure)
    detail = f"{verdict.source} = {figure}, threshold {verdict.name} = {verdict.threshold!r}"
    outcome = _outcome(verdict)
    about = {} if outcome == "system-out" else {"message": f"{verdict_words(verdict)} [{verdict.message}]"}
    if outcome in ("failure", "error"):
        about["type"] = "gate"
    ElementTree.SubElement(case, outcome, about).text = detail


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("?", visible(text))
