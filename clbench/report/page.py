"""The report as one self-contained HTML page."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from clbench.metrics import Record, wilson
from clbench.metrics.cli import NOT_COMPARABLE, evaluated_counts, width_notes
from clbench.metrics.compute import higher_is_better
from clbench.metrics.definitions import all_metrics
from clbench.metrics.paired import Difference, p_text
from clbench.report import tables
from clbench.report.runs import Group, Run
from clbench.report.tables import escape_html

CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222 }
body { max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
.sub, figcaption, .note { color: #555; font-size: .9rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd }
thead th { border-bottom: 2px solid #888; white-space: nowrap }
.summary td { white-space: nowrap }
figure { margin: 1.2rem 0 } img { max-width: 100%; height: auto }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1rem }
pre { background: #f6f6f6; padding: .7rem; overflow-x: auto; font-size: .8rem }
"""

Image = tuple[str, str, bytes]  # file name, caption, PNG


def page(
    title: str,
    runs: Sequence[Run],
    groups: Sequence[Group],
    figures: Sequence[Image],
    matrices: Sequence[Image],
    absent: Sequence[str],
    notes: Sequence[str],
    command: str,
    paired: Sequence[Difference] | None = None,
) -> str:
    """The full page: table and pictures, definitions with intervals, how wide they are, provenance."""
    rates = runs[0].record.is_rate
    body = [
        f"<h1>{escape_html(title)}</h1>",
        f'<p class="sub">{escape_html(_subtitle(runs))}</p>',
        f'<div class="wide summary">{tables.to_html(tables.header(groups), tables.rows(groups))}</div>',
        f'<p class="note">{escape_html(tables.caption(groups))}</p>',
        *(_paragraph(n) for n in notes),
        f"<h2>{'Success' if rates else escape_html(runs[0].record.quantity.label)}</h2>" if matrices else "",
        f'<div class="{"grid" if len(matrices) > 1 else ""}">{"".join(map(_image, matrices))}</div>',
        *map(_image, figures),
        *([] if paired is None else ["<h2>Differences, paired by episode</h2>", _differences(paired)]),
        _list("Left out, for lack of records", absent),
        "<h2>Every metric with its definition</h2>",
        _paragraph(NOT_COMPARABLE),
        f'<div class="wide">{_metrics_table(groups)}</div>',
        "<h2>How wide the intervals are</h2>",
        *(_width(run) for run in runs),
        "<h2>Where this comes from</h2>",
        f"<pre>{escape_html(command)}</pre>",
        *(_provenance(run) for run in runs),
    ]
    # No script, no request: a hostile name that slipped through escaping could still do nothing.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape_html(title)}</title><style>{CSS}</style></head>\n<body>\n"
        + "\n".join(b for b in body if b)
        + "\n</body></html>\n"
    )


def _differences(found: Sequence[Difference]) -> str:
    """Differences between methods, over the episodes that both played."""
    head = ["metric", "first − second", "difference", "95 % interval", "p (Holm)", "", "training seeds"]
    rows = [
        [d.metric, f"{d.first} − {d.second}", f"{d.value:+.3f}", f"[{d.low:+.3f}, {d.high:+.3f}]", p_text(d.holm),
         d.verdict, str(d.n)]
        for d in found
    ]  # fmt: skip
    about = (
        "Intervals of differences, from draws that weight an episode alike in both; p by a normal approximation, after "
        "Holm's correction over the pairs of a metric. Whether two intervals in the table above overlap says nothing."
    )
    return f'<p class="note">{escape_html(about)}</p><div class="wide">{tables.to_html(head, rows)}</div>'


def _subtitle(runs: Sequence[Run]) -> str:
    record = runs[0].record
    counts = [n for r in runs for n in evaluated_counts(r.record)]
    episodes = "" if not counts else f", {_span(counts)} episodes a cell"
    seeds = sorted({str(r.seed) for r in runs if r.seed is not None})
    parts = [
        ", ".join(sorted({r.policy for r in runs} - {""})),
        ", ".join(sorted({r.dataset for r in runs} - {""})),
        f"{len(record.tasks)} tasks",
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}" if seeds else "",
        *sorted({label for run in runs for label in run.labels}),
        f"an episode succeeds by {record.criterion}{episodes}" if record.is_rate else _error_of(record) + episodes,
    ]
    return " · ".join(p for p in parts if p)


def _error_of(record: Record) -> str:
    """What a page says of errors."""
    unit = f" in {record.unit}" if record.unit else ""
    return f"{record.label}{unit}, {record.quantity.direction}"


def _span(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def _paragraph(text: str) -> str:
    return f'<p class="note">{escape_html(text)}</p>'


def _list(title: str, items: Sequence[str]) -> str:
    if not items:
        return ""
    return f"<h2>{escape_html(title)}</h2><ul>{''.join(f'<li>{escape_html(i)}</li>' for i in items)}</ul>"


def _image(image: Image) -> str:
    name, caption, png = image
    data = base64.b64encode(png).decode("ascii")
    return (
        f'<figure><img alt="{escape_html(caption)}" title="{escape_html(name)}" '
        f'src="data:image/png;base64,{data}">'
        f"<figcaption>{escape_html(caption)}</figcaption></figure>"
    )


def _metrics_table(groups: Sequence[Group]) -> str:
    head = ["metric", *(g.label for g in groups), "better", "definition", "source"]
    body = []
    for name, metric in all_metrics().items():
        entries = [g.metrics[name] for g in groups]
        definition = entries[0]["definition"]
        better = "higher" if higher_is_better(metric, groups[0].runs[0].record) else "lower"
        body.append([name, *(_full(m, len(groups) == 1) for m in entries), better, definition, metric.source])
    return tables.to_html(head, body) + _reasons(groups)


def _reasons(groups: Sequence[Group]) -> str:
    """Why metrics are missing, for tables of several groups, whose cells have no room for that."""
    reasons: dict[str, list[str]] = {}
    for g in groups if len(groups) > 1 else ():
        by_reason: dict[str, list[str]] = {}
        for name, m in g.metrics.items():
            if m["value"] is None:
                by_reason.setdefault(m["missing"], []).append(name)
        for reason, names in by_reason.items():
            reasons.setdefault(f"{', '.join(names)}: {reason}", []).append(g.label)
    items = [f"{', '.join(labels)} lacks {what}" for what, labels in reasons.items()]
    return "".join(["<ul>", *(f"<li>{escape_html(i)}</li>" for i in items), "</ul>"]) if items else ""


def _full(m: dict[str, Any], reason: bool) -> str:
    if m["value"] is None:
        return f"missing: {m['missing']}" if reason else tables.NONE
    text = f"{m['value']:z.3f}"
    if m.get("low") is not None:
        text += f" [{m['low']:z.3f}, {m['high']:z.3f}]"
    if m.get("sd") is not None:
        text += f", spread over seeds {m['sd']:.3f}"
    return text + (f" (n={m['n']})" if m.get("missing_in") else "")


def _width(run: Run) -> str:
    """What is known about the widths, and every cell with its Wilson interval."""
    record = run.record
    items = "".join(f"<li>{escape_html(n)}</li>" for n in width_notes(record, run.metrics))
    text = f"<p><b>{escape_html(run.name)}</b></p><ul>{items}</ul>"
    if record.episodes is None:
        return text
    if not record.is_rate:
        return text + _errors(record)
    body = []
    for k, rates, counts in zip(record.rows, record.success, record.episodes, strict=True):
        label = "joint" if record.one_row else f"after {k}"
        body.append([label, *(_cell(float(r), int(n)) for r, n in zip(rates, counts, strict=True))])
    table = tables.to_html(["", *(f"{j}: {t}" for j, t in enumerate(record.tasks))], body)
    summary = "every cell with its 95 % Wilson interval and number of episodes"
    return f'{text}<details><summary>{summary}</summary><div class="wide">{table}</div></details>'


def _errors(record: Record) -> str:
    """Every cell's mean with its standard error over held-out episodes."""
    body = []
    for k, row in zip(record.rows, record.success, strict=True):
        cells = []
        for j, value in enumerate(row):
            values = np.array(list(record.outcomes.get((k, j), {}).values()))
            spread = f" ± {values.std(ddof=1) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
            cells.append(tables.NONE if math.isnan(value) else f"{value:.3f}{spread} ({len(values)})")
        body.append(["joint" if record.one_row else f"after {k}", *cells])
    table = tables.to_html(["", *(f"{j}: {t}" for j, t in enumerate(record.tasks))], body)
    summary = "every cell with its standard error over held-out episodes and their number"
    return f'<details><summary>{summary}</summary><div class="wide">{table}</div></details>'


def _cell(rate: float, n: int) -> str:
    if math.isnan(rate):
        return tables.NONE
    if n <= 0:
        return f"{rate:.2f}"
    low, high = wilson(rate * n, n)
    return f"{rate:.2f} [{low:.2f}, {high:.2f}] ({n})"


_PATH = re.compile(r"(?<![\w./~-])~?(?:/[^\s/'\"<>|,;:=(){}\[\]]+){2,}/?")


def without_paths(text: str) -> str:
    """The text with names instead of absolute paths: the page reveals nothing about the machine that made it."""
    return _PATH.sub(lambda m: m[0].rstrip("/").rsplit("/", 1)[-1], text)


def by_name(value: Any) -> Any:
    """A value (an argument /DIR/NAME or KEY=/DIR/NAME, a list, a dictionary) with names instead of absolute paths."""
    if isinstance(value, str):
        key, equals, path = value.rpartition("=")
        whole = path.startswith(("/", "~/"))  # including blanks in it
        return f"{key}{equals}{path.rstrip('/').rsplit('/', 1)[-1]}" if whole else without_paths(value)
    if isinstance(value, list):
        return [by_name(v) for v in value]
    return {k: by_name(v) for k, v in value.items()} if isinstance(value, dict) else value


def _provenance(run: Run) -> str:
    m = run.manifest
    about: dict[str, Any] = {
        "run": run.path.name,
        **{key: m[key] for key in ("run_id", "algorithm", "policy", "dataset", "mode", "seed") if key in m},
        **{key: by_name(m[key]) for key in ("command", "git_revision", "base", "versions") if key in m},
    }
    rows = [[key, v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)] for key, v in about.items()]
    rows += [["episodes played in", run.record.played_with]] if run.record.played_with else []
    rows += [["note", without_paths(n.replace(str(run.path), run.path.name))] for n in run.notes]
    visits = m.get("visits")
    if isinstance(visits, list):
        for v in visits:
            if isinstance(v, dict):
                rows.append([f"visit {v.get('k')}", f"{v.get('task')}: {v.get('instruction') or ''}"])
    return (
        f"<details{' open' if run.notes else ''}><summary>{escape_html(run.name)}</summary>"
        f"{tables.to_html(['', ''], rows)}</details>"
    )
