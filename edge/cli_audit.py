"""`tacit audit`: what a run leaks, as far as attacks can find out."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from tacit.edge.cli_output import Outcome

__all__ = ["audit", "register"]

TestName = Literal["mechanism", "noise", "canaries", "membership"]
_NARROW = 60  # columns below which words go on lines of their own


def register(app: App) -> None:
    """Adds the command."""
    app.command(audit)


def audit(
    folder: Path,
    /,
    *,
    shadows: int = 8,
    canaries: int = 2000,
    trials: int | None = None,
    skip: Annotated[tuple[TestName, ...], Parameter(negative="", show_default=False)] = (),
) -> Outcome:
    """Attack a run: does it leak more than it claims?

    Writes audit.json into the run directory and renews its report. What is done is not done again.

    Args:
        folder: The run directory, trained.
        shadows: Shadow models of the membership attack, each a training of its own; 0 for an attack without.
        canaries: Canaries that are put into the round loop.
        trials: Releases of one step on each of two inputs; as many as its noise asks for when left out.
        skip: A test to leave out: mechanism, noise, canaries or membership; may be repeated.
    """
    from tacit.edge import pipeline
    from tacit.edge.audit import AuditOptions, check_passed
    from tacit.edge.audit import audit as run_audit
    from tacit.edge.progress import Console

    options = AuditOptions(shadows=shadows, canaries=canaries, trials=trials, skip=skip)
    console = Console()
    try:
        content = run_audit(folder, options=options, progress=console)
        if any(folder.glob("summary*.json")):  # a void run's says so in its name
            pipeline.report(folder, progress=console)
        if content["verdict"] == "fail":  # stdout is for results that hold; what was found is told above the error
            for line in _lines(content, folder):
                console.note(line)
    finally:
        console.stop()
    check_passed(content, folder)
    return Outcome(text="\n".join(_lines(content, folder)), data=content)


def _lines(content: Mapping[str, object], folder: Path) -> list[str]:
    """The verdict, a paragraph for each test, a row for each model that was asked, and what it means."""
    from tacit.edge.wording import audit_claim, audit_finding

    listed = content["tests"]
    tests = [test for test in listed if isinstance(test, dict)] if isinstance(listed, list) else []
    lines = [f"audit      {content['verdict']}"]
    for test in tests:
        if test["name"] != "membership":
            found = f"{audit_finding(test)}, held against {audit_claim(test)}"
            lines += _wrapped(f"{test['name']:<10} {test['verdict']}; {found}")
    asked = [test for test in tests if test["name"] == "membership"]
    lines += _membership(asked)
    skipped = content["skipped"]
    for test in skipped if isinstance(skipped, list) else []:
        lines += _wrapped(f"{test['name']:<10} not run: {test['reason']}")
    lines += ["", *_wrapped(str(content["statement"]), indent=0), f"details    {folder}/audit.json"]
    return lines


def _membership(tests: list[dict[str, object]]) -> list[str]:
    """A row for each model that was asked."""
    if not tests:
        return []
    rows = [["model", "AUC", "95 %"]]
    for test in tests:
        interval = test["interval"]
        shown = f"{interval[0]:.3f}-{interval[1]:.3f}" if isinstance(interval, list) else "-"
        rows.append([str(test["artifact"]), f"{test['statistic']:.3f}", shown])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [f"{name:<{widths[0]}}  {area:>{widths[1]}}  {interval}" for name, area, interval in rows]
    details = tests[0]["details"]
    counts = f"{details['members']} members against {details['others']} others" if isinstance(details, dict) else ""
    return [*_wrapped(f"membership {counts}, {tests[0]['method']}; an AUC of 0.5 is chance"), "", *table]


def _wrapped(line: str, indent: int = 11) -> list[str]:
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    inner = indent if width >= _NARROW else min(indent, 2)
    return textwrap.wrap(line, width, subsequent_indent=" " * inner, break_long_words=False)
