"""Build a report: read the runs, draw, write the page and the files next to it."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from clbench.errors import UserError
from clbench.evaluation.records import TEST
from clbench.io import write_bytes, write_json, write_text
from clbench.metrics.paired import Difference, compare
from clbench.redaction import redact_command, secrets_of
from clbench.report import figures, tables
from clbench.report.beyond import beyond_the_method
from clbench.report.page import Image, by_name, page
from clbench.report.runs import Group, Run, group_runs, load_runs

MAX_NAME = 100  # maximum characters of a run's name in its file names


def build_report(
    runs: Sequence[Path],
    out: Path | None = None,
    *,
    name: str | None = None,
    bootstrap: int = 1000,
    command: str | None = None,
    split: str = TEST,
) -> Path:
    """Write the report of one run, or of several side by side, and return its index.html.

    Args:
        runs: folders of evaluated runs.
        out: folder to write to; by default RUN/report, or reports/NAME next to the runs for several; for validation
            episodes, the folder "validation" in it.
        name: NAME of a report of several runs; by default their data set.
        bootstrap: resamples behind each interval; 0 for none.
        command: the command to print as provenance; by default this process's.
        split: which episodes, test or validation.

    Raises:
        UserError: no run, a run without an evaluation, or runs that learned different tasks.
    """
    if not runs:
        raise UserError("name at least one run.")
    loaded = load_runs([Path(r) for r in runs], bootstrap, split)
    groups, notes = group_runs(loaded)
    several = len({r.path for r in loaded}) > 1
    if several and name is None:
        name = loaded[0].dataset or "comparison"
    folder = out or (
        (loaded[0].path.parent / "reports" / folder_name(name or "") if several else loaded[0].path / "report")
        / ("" if split == TEST else split)
    )

    title = f"Continual learning: {name}" if several else f"Continual learning: {loaded[0].name}"
    own = file_names([run.name for run in loaded])
    matrices = [_matrix_image(run, file_name) for run, file_name in zip(loaded, own, strict=True)]
    drawn, absent = _draw(loaded, groups, own)
    shown = "".join(text for run in loaded for text in (run.name, run.algorithm, *run.labels, *run.record.tasks))
    strange = figures.undrawable(shown + "".join(g.label for g in groups))
    if strange:
        notes.append(
            f"no font on this machine has {', '.join(strange[:8])}{', …' if len(strange) > 8 else ''}: pictures show "
            f"such characters by their numbers ({figures.drawable(strange[0])}) until a font that has them is installed"
        )
    for file_name, _, png in [*matrices, *drawn]:
        write_bytes(folder / file_name, png)
    write_json(folder / "metrics.json", _metrics(loaded, groups, folder))
    head, body = tables.header(groups), tables.rows(groups)
    beyond = beyond_the_method(groups)
    labels = [*_labels(loaded), *([beyond] if beyond else [])]
    notes += [beyond] if beyond else []
    write_text(folder / "table.tex", tables.to_latex(head, body, labels, tables.caption(groups)))
    write_text(folder / "table.md", tables.to_markdown(head, body, labels, tables.caption(groups)))
    if command is None:
        command = shlex.join(redact_command([Path(sys.argv[0]).name, *by_name(sys.argv[1:])], secrets_of()))
    paired, why = _paired(groups, bootstrap)
    notes += [] if why is None else [why]
    if paired:
        write_text(folder / "paired.md", tables.paired_markdown(paired))
    html = page(title, loaded, groups, drawn, matrices, absent, notes, command, paired)
    write_text(folder / "index.html", html)
    return folder / "index.html"


def _paired(groups: Sequence[Group], bootstrap: int) -> tuple[list[Difference] | None, str | None]:
    """The differences between the methods that learned in sequence; None, with the reason if there is one to report."""
    methods = {g.label: [r.record for r in g.runs] for g in groups if not (g.multitask or g.singletask)}
    if len(methods) < 2 or bootstrap < 2:
        return None, None
    try:
        return compare(methods, bootstrap=bootstrap) or None, None
    except UserError as e:
        return None, f"methods are not compared in pairs: {e}"


def _beside(path: Path, folder: Path) -> str:
    """`path` relative to `folder` if both are in the same results folder, else its name: nothing about the machine."""
    return os.path.relpath(path, folder) if folder.is_relative_to(path.parent) else path.name


def _labels(runs: Sequence[Run]) -> list[str]:
    """What has to be stated with every result of these runs."""
    return sorted({label for run in runs for label in run.labels})


def _metrics(runs: Sequence[Run], groups: Sequence[Group], folder: Path) -> dict[str, object]:
    """One run: {"about", "metrics"} as `clbench metrics --json` prints it; several: that per run and per group.

    A run's path is relative to the report's `folder`, or left out if the report is elsewhere.
    """
    if len(runs) == 1:
        return {"about": runs[0].record.about, "metrics": runs[0].metrics}
    return {
        "runs": {
            run.name: {
                "path": _beside(run.path, folder.resolve()),
                "view": run.view,
                "about": run.record.about,
                "metrics": run.metrics,
            }
            for run in runs
        },
        "groups": [
            {"label": g.label, "notes": _labels(g.runs), "runs": [r.name for r in g.runs], "metrics": g.metrics}
            for g in groups
        ],
    }


def file_names(names: Sequence[str]) -> list[str]:
    """A file name for each of these names: plain ASCII, and never the same for two, on any file system.

    Names that a file name cannot show, or that would coincide, get some digits of the name's digest.
    """
    plain = [re.sub(r"[^A-Za-z0-9_.+-]+", "_", name).strip("._")[:MAX_NAME] for name in names]
    alike = Counter(text.casefold() for text in plain)
    return [
        text if text and text == name and alike[text.casefold()] == 1 else f"{text or 'name'}-{_digest(name)}"
        for name, text in zip(names, plain, strict=True)
    ]


def _digest(name: str) -> str:
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:10]


def folder_name(name: str) -> str:
    """A folder's name, as seen by file systems that ignore case."""
    text = file_names([name])[0]
    return text if text != name or name == name.casefold() else f"{text}-{_digest(name)}"


def _matrix_image(run: Run, file_name: str) -> Image:
    label = f"{run.algorithm}, seed {run.seed}" if run.manifest else run.name
    png = figures.to_png(figures.success_matrix(run.record, label), "; ".join(_labels([run])))
    what = "success" if run.record.is_rate else run.record.quantity.label
    caption = f"{run.name}: {what} after each task. Hatched: not evaluated."
    return f"matrix_{file_name}.png", caption, png


def _draw(runs: Sequence[Run], groups: Sequence[Group], own: Sequence[str]) -> tuple[list[Image], list[str]]:
    """The figures that the records allow, and what is left out."""
    drawn: list[Image] = []
    absent: list[str] = []
    rates = runs[0].record.is_rate
    what, file = ("success", "success.png") if rates else ("offline action error", "error.png")
    bars = "95 % Wilson intervals" if rates else "one standard error over held-out episodes"

    def add(file_name: str, caption: str, fig: object, why_not: str) -> None:
        if fig is None:
            absent.append(why_not)
        else:
            drawn.append((file_name, caption, figures.to_png(fig, "; ".join(_labels(runs)))))  # type: ignore[arg-type]

    if len(runs) > 1:
        caption = (
            f"Mean {what} on the tasks seen so far; band: range over seeds; dashed: joint training; "
            "dotted: one policy per task."
        )
        add(file, caption, figures.comparison(groups), "")
    elif runs[0].record.mode == "singletask":
        absent.append(f"{what} over tasks: one independent policy was trained per task")
    elif runs[0].record.one_row:
        absent.append(f"{what} over tasks: one policy was trained on all tasks at once")
    else:
        caption = (
            f"Each task's {what} after every visit (grey: not yet learned; bars: {bars}), "
            "and the mean over the tasks seen so far."
        )
        add(file, caption, figures.success_over_tasks(runs[0].record, runs[0].name), "")
    add(
        "parameters.png",
        "Parameters added to the base after each task.",
        figures.parameter_growth(groups),
        "parameter growth: nothing was added to the base, or no log has it",
    )
    add(
        "cost.png",
        "Wall time and peak memory, mean over seeds.",
        figures.cost(groups),
        "time and memory: no log or eval/summary.json has them",
    )
    for run, file_name in zip(runs, own, strict=True):
        suffix = f"_{file_name}" if len(runs) > 1 else ""
        if run.routing or len(runs) == 1:
            add(
                f"routing{suffix}.png",
                f"{run.name}: the adapters chosen while acting on each task with the last checkpoint.",
                figures.routing_confusion(run.routing, run.record.tasks, run.name),
                "routing: the episodes record no choice of adapters",
            )
        add(
            f"loss{suffix}.png",
            f"{run.name}: training loss of each task.",
            figures.losses(run),
            f"training loss of {run.name}: no log of its steps",
        )
    return drawn, absent
