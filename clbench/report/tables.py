"""The comparison table as HTML, LaTeX (booktabs) and Markdown."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np

from clbench.metrics.definitions import FloatArray
from clbench.metrics.paired import LEVEL, Difference, p_text
from clbench.report.runs import Group

NONE = "–"
METRIC_COLUMNS = {"AUC": "auc_clare", "FWT": "fwt_clare", "NBT": "nbt_clare", "ASR": "asr", "BWT": "bwt_gem"}
COST_COLUMNS = ("added params", "exemplars", "state", "train min", "eval min", "peak memory")
CAPTION = (
    "AUC, FWT and NBT as in CLARE (FWT is the diagonal), not as in LIBERO, ASR: mean of the last row, BWT as in GEM; "
    "95 % intervals: with one seed, for these checkpoints; with several, for the method over training seeds, given the "
    "base and demonstrations. Pretraining tasks: the base's own, before → after the stream. State: what the method "
    "itself keeps (anchors, masks, references)."
)


OF_ERRORS = (
    "{quantity}{unit}, lower is better. AUC, FWT and ASR are errors; NBT is how far errors rise, so more than 0 is "
    "forgetting, and BWT is its opposite. "
)


def caption(groups: Sequence[Group]) -> str:
    """What stands under the table."""
    record = groups[0].runs[0].record if groups else None
    if record is None or record.is_rate:
        return CAPTION
    unit = f" in {record.unit}" if record.unit else ""
    label = record.label[0].upper() + record.label[1:]
    return OF_ERRORS.format(quantity=label, unit=unit) + CAPTION


def header(groups: Sequence[Group]) -> list[str]:
    """Column titles; the base's pretraining tasks have a column if any run was evaluated on them."""
    return ["algorithm", "seeds", *METRIC_COLUMNS, *(["pretraining tasks"] if _heldout(groups) else []), *COST_COLUMNS]


def _heldout(groups: Sequence[Group]) -> bool:
    return any(r.record.heldout is not None for g in groups for r in g.runs)


def heldout_text(g: Group) -> str:
    """Mean success on the base's pretraining tasks, before → after the stream."""
    held = [r.record.heldout for r in g.runs if r.record.heldout is not None]
    before = g.mean([None if h.base is None else _mean(h.base) for h in held])
    after = g.mean([_mean(h.success[-1]) for h in held])
    return NONE if after is None else f"{NONE if before is None else f'{before:.2f}'} → {after:.2f}"


def _mean(rates: FloatArray) -> float | None:
    """None if a task was not evaluated: a mean over the others would be for different tasks."""
    return None if np.isnan(rates).any() else float(rates.mean())


def rows(groups: Sequence[Group]) -> list[list[str]]:
    """One row of plain text per group."""
    table = []
    heldout = _heldout(groups)
    for g in groups:
        runs = g.runs
        minutes = (
            None if v is None else v / 60
            for v in (g.mean([r.train_seconds for r in runs]), g.mean([r.eval_seconds for r in runs]))
        )
        table.append(
            [
                g.label,
                str(len(runs)),
                *(metric_text(g.metrics[name]) for name in METRIC_COLUMNS.values()),
                *([heldout_text(g)] if heldout else []),
                count_text(g.mean([r.growth[-1][1] if r.growth else None for r in runs])),
                bytes_text(g.mean([r.last("exemplar_bytes") for r in runs])),
                bytes_text(g.mean([r.last("state_bytes") for r in runs])),
                *(NONE if m is None else f"{m:.1f}" for m in minutes),
                bytes_text(_mb(g.mean([r.peak_memory_mb for r in runs]))),
            ]
        )
    return table


def metric_text(m: dict[str, Any]) -> str:
    """value [low, high], or –; (n) after a mean that lacks some seeds."""
    if m["value"] is None:
        return NONE
    text = f"{m['value']:z.3f}"
    if m.get("low") is not None:
        text += f" [{m['low']:z.2f}, {m['high']:z.2f}]"
    return text + (f" (n={m['n']})" if m.get("missing_in") else "")


def count_text(n: float | None) -> str:
    """1234567 → 1.23 M."""
    if n is None:
        return NONE
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(n) >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:.0f}"


def bytes_text(n: float | None) -> str:
    """1234567 → 1.23 MB (powers of 1000)."""
    if n is None:
        return NONE
    return "0" if n == 0 else f"{count_text(n)}B" if abs(n) >= 1e3 else f"{n:.0f} B"


def _mb(value: float | None) -> float | None:
    return None if value is None else value * 1e6


def to_html(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """An escaped HTML table; the first column is a row header."""
    lines = ["<table><thead><tr>", *(f"<th>{escape_html(h)}</th>" for h in head), "</tr></thead><tbody>"]
    for row in body:
        cells = [f"<th>{escape_html(row[0])}</th>", *(f"<td>{escape_html(c)}</td>" for c in row[1:])]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "\n".join([*lines, "</tbody></table>"])


def escape_html(text: str) -> str:
    """Text escaped for HTML, in an element or a quoted attribute; without control and direction characters."""
    return html.escape(plain(text))


def plain(text: str) -> str:
    """Without characters that do not print."""
    return "".join(c if c.isprintable() else " " for c in text)


def to_markdown(
    head: Sequence[str], body: Sequence[Sequence[str]], notes: Sequence[str] = (), caption: str = CAPTION
) -> str:
    """A Markdown table, with its caption and `notes` below it."""
    rows = [[_escape_markdown(row[0]), *row[1:]] for row in body]  # the other cells are numbers
    lines = [head, ["---"] * len(head), *rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    return table + "".join(f"\n{_escape_markdown(note)}\n" for note in (caption, *notes))


def paired_markdown(found: Sequence[Difference]) -> str:
    """A Markdown table of paired differences: a row per pair, a column per metric that pairs have."""
    pairs = list(dict.fromkeys((d.first, d.second) for d in found))
    names = list(dict.fromkeys(d.metric for d in found))
    cells = {(d.first, d.second, d.metric): d for d in found}

    def text(d: Difference | None) -> str:
        if d is None:
            return NONE
        verdict = "no difference seen" if d.holm >= LEVEL else f"p {p_text(d.holm)}"
        return f"{d.value:+z.3f} [{d.low:z.2f}, {d.high:z.2f}], {verdict}"

    body = [
        [f"{_escape_markdown(a)} − {_escape_markdown(b)}", *(text(cells.get((a, b, name))) for name in names)]
        for a, b in pairs
    ]
    lines = [["difference", *names], ["---"] * (len(names) + 1), *body]
    seeds = sorted({d.n for d in found})
    note = (
        "Over the same episodes, with 95 % intervals; p after Holm's correction over the pairs of a column"
        + (f"; over {' or '.join(map(str, seeds))} training seeds" if seeds != [1] else "; one training seed")
        + "."
    )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{note}\n"


def to_latex(
    head: Sequence[str], body: Sequence[Sequence[str]], notes: Sequence[str] = (), caption: str = CAPTION
) -> str:
    r"""A LaTeX tabular for \usepackage{booktabs}; `notes` become comments."""
    columns = "lr" + "c" * (len(head) - 2 - len(COST_COLUMNS)) + "r" * len(COST_COLUMNS)
    beyond = any(ord(c) > 0x17F and c not in _LATEX for row in body for c in row[0])  # pdflatex has Latin characters
    lines = [
        r"% \usepackage{booktabs}",
        "% " + plain(caption),
        *("% " + plain(note) for note in notes),
        *(["% compile with lualatex or xelatex and a font that has these names"] if beyond else []),
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(map(escape_latex, head)) + r" \\",
        r"\midrule",
        *(" & ".join(map(escape_latex, row)) + r" \\" for row in body),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


_LATEX = {
    **{c: "\\" + c for c in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "–": "--",
    "−": "$-$",
    "→": r"$\rightarrow$",
    "…": r"\ldots{}",
    '"': "''",  # active in some languages
    "`": r"\textasciigrave{}",
    "|": r"\textbar{}",
    "*": "{*}",  # a row that begins with * would be read as part of the \\ before it
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "[": "{[}",  # likewise, as its option
    "]": "{]}",
}


def escape_latex(text: str) -> str:
    """Text escaped for LaTeX."""
    return "".join(_LATEX.get(c, c) for c in plain(text))


def _escape_markdown(text: str) -> str:
    return "".join("\\" + c if c in "\\|`*_[]" else c for c in html.escape(plain(text), quote=False))
