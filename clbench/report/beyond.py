"""How the rows of a table differ beyond their method: steps, phases, settings, the task's identity."""

from __future__ import annotations

from collections.abc import Sequence

from clbench.report import settings
from clbench.report.runs import Group, Run

# Keys that are the method itself, or that the table shows.
METHOD = ("algorithm.", "lora.")


def beyond_the_method(groups: Sequence[Group]) -> str:
    """One line about a table's rows, except joint and single-task ones; "" if nothing is known to differ."""
    rows = [(g.label, g.runs[0]) for g in groups if not (g.multitask or g.singletask)]
    if len(rows) < 2:
        return ""
    parts = []
    steps = {label: _steps(run) for label, run in rows}
    if len(set(steps.values()) - {""}) > 1:
        known = "; ".join(f"{label}: {text}" for label, text in steps.items() if text)
        parts.append(f"training per task ({known})")
    told = [label for label, run in rows if _is_told(run)]
    if told and len(told) < len(rows):
        parts.append(f"the task's identity at test time (given to {', '.join(told)})")
    differing = settings.differing([run for _, run in rows])
    own = {key: values for key, values in differing.items() if not key.startswith(METHOD)}
    if own:
        parts.append("settings: " + settings.listed(own))
    return f"Beyond the method, rows differ in {'; in '.join(parts)}." if parts else ""


def _steps(run: Run) -> str:
    """How long a run trains each task: 300 steps, 400 discriminators steps, 50 detect batches."""
    return ", ".join(
        f"{count} {phase} {'steps' if trains else 'batches'}" if phase != "train" else f"{count} steps"
        for phase, (count, trains) in sorted(run.phases.items(), key=lambda item: item[0] != "train")
    )


def _is_told(run: Run) -> bool:
    config = run.manifest.get("algorithm_config")
    told = bool(config.get("eval_with_task_id")) if isinstance(config, dict) else False
    return run.view == "task_id" if run.view else told
