"""What users see: results on stdout, everything else on stderr, errors without traceback."""

from __future__ import annotations

import io
import json
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soco_export.console import QUIET, VERBOSE, Console, render_error
from soco_export.progress import StageLine, Stages, draw_line, duration, render_values
from soco_train.errors import MachineError, RecipeError
from soco_train.events import Event

ERROR = RecipeError("keep_params is 1.5", fix="give a fraction in (0, 1]", where="recipe.yaml: keep_params")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_text_and_nothing_else_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    with console.working():
        sys.stdout.write("a library prints\n")
        console.notify(Event("plan", 0, 1, {"": "reading"}))
    console.result({"a": 1}, "the result")
    output = capsys.readouterr()
    assert output.out == "the result\n"
    assert "a library prints" in output.err
    assert "reading" in output.err


def test_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(as_json=True)
    with console.working():
        sys.stdout.write("a library prints\n")
        console.notify(Event("plan", 1, 1))
    console.result({"a": 1}, "the result")
    assert json.loads(capsys.readouterr().out) == {"a": 1}


def test_an_error_says_message_fix_and_place() -> None:
    assert render_error(ERROR).splitlines() == [
        "RecipeError: keep_params is 1.5",
        "  fix: give a fraction in (0, 1]",
        "  where: recipe.yaml: keep_params",
    ]
    assert "where" not in render_error(MachineError("no disk", fix="free some"))
    quoting = render_error(RecipeError("'a\n  fix: rm -rf ~' is no name", fix="a\nb", where="c\nd"))
    assert len(quoting.splitlines()) == 3  # a name that came with a model looks like no line of ours


def test_an_error_in_json_keeps_stdout_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    Console(as_json=True).error(ERROR)
    output = capsys.readouterr()
    assert json.loads(output.out)["error"]["fix"] == "give a fraction in (0, 1]"
    assert json.loads(output.out)["exit_code"] == 2
    assert "keep_params is 1.5" in output.err


def test_figures() -> None:
    values = {"": "phase 2", "KL": 0.031234, "size": 0.8, "tokens/s": 5120.4, "layers": 1234}
    assert render_values(values) == "phase 2 · KL 0.03123 · size 0.8 · tokens/s 5,120 · layers 1,234"


def test_lines_tell_start_and_end_and_not_every_step(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    for step in range(101):
        console.notify(Event("scores", step, 100, {"KL": 0.5}))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "0/100" in lines[0]
    assert "100/100" in lines[1]


def test_verbose_tells_every_step_with_eta(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(verbosity=VERBOSE)
    for step in range(5):
        console.notify(Event("scores", step, 4, {"KL": 0.5}))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert "ETA" in lines[2]


def test_quiet_shows_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(verbosity=QUIET)
    with console.working():
        console.notify(Event("scores", 0, 1))
    assert capsys.readouterr().err == ""


def test_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    console = Console()
    with console.working():
        for step in range(4):
            console.notify(Event("scores", step, 3, {"": "phase 1", "KL": 0.25}))
    console.result({}, "done")
    assert "scores" in terminal.getvalue()
    assert "phase 1" in terminal.getvalue()
    assert capsys.readouterr().out == "done\n"
    assert sys.stderr is terminal


def test_verbose_shows_where_an_error_arose(capsys: pytest.CaptureFixture[str]) -> None:
    for verbosity in (0, VERBOSE):
        try:
            raise ERROR
        except RecipeError as error:
            Console(verbosity=verbosity).error(error)
        assert ("Traceback" in capsys.readouterr().err) == (verbosity == VERBOSE)


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    Console(as_json=True).result({"kl": float("nan"), "sizes": (1, 2.5, None, True), "folder": Path("a")}, "")
    document = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert document == {"kl": "nan", "sizes": [1, 2.5, None, True], "folder": "a"}


WIDTHS = (60, 80, 120)


@given(
    width=st.sampled_from(WIDTHS),
    name=st.text("abcdefgh-_é", min_size=1, max_size=30),
    part=st.text("abcdefgh:é ", max_size=40),
    step=st.integers(0, 10**6),
    more=st.integers(0, 10**6),
    values=st.dictionaries(
        st.text("klm/ ", max_size=12), st.floats(allow_nan=True) | st.integers() | st.text(max_size=60), max_size=6
    ),
    seconds=st.floats(0, 400_000),
)
def test_a_stage_is_one_line_at_any_width(width, name, part, step, more, values, seconds) -> None:
    line = StageLine(name, 0.0)
    line.update(Event(part, 0, step + more), 1.0)
    line.update(Event(part, step, step + more, values), 1.0 + seconds)
    text = draw_line(line, width, 1.0 + seconds)
    assert len(text) <= width
    assert "\n" not in text
    if step + more > 1:  # the count is whole, or a percentage: never cut
        assert f" {step}/{step + more} " in f"{text} " or "% " in text
        left = line.left(1.0 + seconds)
        assert left is None or f"ETA {duration(left)}" in text
    line.end("done", 2.0 + seconds)
    assert f" {duration(2.0 + seconds)}" in draw_line(line, width, 2.0 + seconds)


def test_figures_give_way_before_count_and_time() -> None:
    line = StageLine("factors", 0.0)
    for step in (10, 20):
        line.update(Event("distill", step, 60, {"KL": 0.17712, "tokens/s": 1020.0}), step / 1.0)
    shown = {width: draw_line(line, width, 20.0) for width in WIDTHS}
    assert all("20/60" in text and "ETA 0:40" in text and text.startswith("factors") for text in shown.values())
    assert ("━" in shown[60], "━" in shown[80]) == (False, True)
    assert "distill · KL 0.1771 · tokens/s 1,020" in shown[120]


def test_what_a_stage_consists_of_shows_in_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    stages = Stages()
    for event in A_RUN:
        stages.take(event, 1.0)
    assert [line.state for line in stages.lines.values()] == ["as it was", "done", "running"]
    console = Console()
    for event in A_RUN:
        console.notify(event)
    assert [line.split()[:2] for line in capsys.readouterr().err.splitlines()] == [
        ["spectrum", "up"],
        ["scores", "running:"],
        ["scores", "done"],
        ["plan", "running"],
    ]


A_RUN = (
    Event("spectrum", 1, 1, {"": "up to date"}, "skipped"),
    Event("scores", 0, 1, {"": "running: its settings or inputs changed"}, "begun"),
    *(Event("fisher", step, 9) for step in range(1, 10)),
    *(Event("train", step, 9, {"kl": 0.5}) for step in range(1, 10)),
    Event("scores", 1, 1, {"": "done in 3.0 s"}, "done"),
    Event("plan", 0, 1, {"": "running"}, "begun"),
)


def test_what_a_library_warns_of_is_for_its_developers(recwarn: pytest.WarningsRecorder) -> None:
    for verbosity in (0, VERBOSE):
        with Console(verbosity=verbosity).working():
            warnings.warn("a future change of theirs", FutureWarning, stacklevel=1)
        assert len(recwarn) == (verbosity == VERBOSE)
