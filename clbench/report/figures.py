"""The report's figures. Every function returns a matplotlib Figure; matplotlib is imported when one is drawn.

Colour-blind readers can tell the colours apart (Okabe & Ito's palette, the cividis map); lines also differ in
marker and are labelled.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from clbench.metrics import Record, wilson
from clbench.metrics.definitions import FloatArray
from clbench.report.runs import Group, Routing, Run
from clbench.report.tables import count_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]
GREY = "#D9D9D9"
REFERENCE = "#666666"  # of what is no method of the stream: joint training, one policy per task
MAX_POINTS = 400  # of one loss curve
MAX_PANELS = 12  # layers of the routing figure


def figure(width: float, height: float) -> Figure:
    """An empty figure that draws with Agg, outside pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(fig)
    return fig


def to_png(fig: Figure, note: str = "") -> bytes:
    """The figure as PNG, with a note above it that has to accompany the picture."""
    if note:
        note = short(note, 200)
        title = fig.get_suptitle()
        fig.suptitle(f"{title}\n{note}" if title else note, x=0.01, ha="left", fontsize=8, color="0.35")
    from matplotlib.text import Text

    for text in fig.findobj(Text):
        text.set_fontfamily([*text.get_fontfamily(), *(family for family, _ in _fallbacks())])
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png")
    return buffer.getvalue()


def short(name: str, length: int = 22) -> str:
    """A name that fits an axis: its middle is left out; `$` and characters that no font has would not print."""
    name = drawable("".join(c if c.isprintable() else " " for c in name))
    if len(name) > length:
        head = (length - 1) * 2 // 3
        name = name[:head].rstrip() + "…" + name[len(name) - (length - 1 - head) :].lstrip()
    return name.replace("$", r"\$")


def distinct(names: Sequence[str], length: int) -> list[str]:
    """Names that fit, numbered where leaving out their middles made two identical."""
    texts = [short(name, length) for name in names]
    return [f"{text} #{i}" if texts.count(text) > 1 else text for i, text in enumerate(texts, 1)]


# Families that have what matplotlib's own font lacks, if one of them is installed.
FALLBACKS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Noto Sans JP", "Noto Sans KR", "Source Han Sans SC",
    "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback", "PingFang SC", "Hiragino Sans",
    "Microsoft YaHei", "SimHei", "Malgun Gothic", "NanumGothic", "Noto Sans", "Noto Sans Devanagari", "Noto Sans Thai",
    "Noto Emoji", "Symbola", "Segoe UI Emoji", "Segoe UI Symbol", "Arial Unicode MS", "Unifont", "FreeSans",
)  # fmt: skip


@functools.cache
def _own_font() -> frozenset[int]:
    """The characters of the font that matplotlib draws with."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties())).get_charmap())


@functools.cache
def _fallbacks() -> tuple[tuple[str, frozenset[int]], ...]:
    """The installed fonts among `FALLBACKS`, with their characters."""
    from matplotlib.font_manager import fontManager, get_font

    files: dict[str, str] = {}
    for font in fontManager.ttflist:
        files.setdefault(font.name, font.fname)
    return tuple((name, frozenset(get_font(files[name]).get_charmap())) for name in FALLBACKS if name in files)


def undrawable(text: str) -> list[str]:
    """The printable characters of a text that no installed font has, each once."""
    strange = sorted({c for c in text if ord(c) > 126 and c.isprintable() and ord(c) not in _own_font()})
    return [c for c in strange if not any(ord(c) in characters for _, characters in _fallbacks())]


def drawable(text: str) -> str:
    """The text with the numbers of characters that no installed font has, which would all be the same empty box."""
    if text.isascii():
        return text
    strange = set(undrawable(text))
    return "".join(c.encode("unicode_escape").decode() if c in strange else c for c in text)


def _style(i: int) -> dict[str, Any]:
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#EEEEEE", linewidth=0.8)
    axes.set_axisbelow(True)


def _tasks_axis(axes: Axes, names: Sequence[str], vertical: bool = False) -> None:
    ticks = range(len(names))
    if vertical:
        axes.set_yticks(ticks, names)
    else:
        axes.set_xticks(ticks, names, rotation=40, ha="right", rotation_mode="anchor")


def _matrix(
    axes: Axes, values: FloatArray, texts: Sequence[Sequence[str]], scale: float = 1.0, most: float = 1.0,
    map_name: str = "cividis",
) -> Any:  # fmt: skip
    """Cells coloured 0…`most` with their text; NaN hatched grey."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    cmap = colormaps[map_name]
    image = axes.imshow(np.ma.masked_invalid(values), cmap=cmap, vmin=0, vmax=most, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        if math.isnan(value):
            box = Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=GREY, edgecolor="#AAAAAA", hatch="////", linewidth=0)
            axes.add_patch(box)
        elif texts[i][j]:
            light = value / most if map_name == "cividis" else 1 - value / most
            colour = "black" if light > 0.55 else "white"
            axes.text(j, i, texts[i][j], ha="center", va="center", color=colour, fontsize=9 * scale)
    axes.set_xticks(np.arange(values.shape[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(values.shape[0] + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    return image


# ------------------------------------------------------------------------------------------- success


def success_matrix(record: Record, title: str) -> Figure:
    """Heat map of success: the random policy and the base on top, experts below, if they were measured."""
    above = [("random", record.random), ("base", record.base)]
    rows = [(name, r) for name, r in above if r is not None]
    n_above = len(rows)
    names = [f"{j}: {short(t)}" for j, t in enumerate(record.tasks)]
    if record.one_row:
        rows.append(("joint", record.success[0]))
    else:
        rows += [
            (f"after {names[k]}" if k < len(names) else f"after {k}", r)
            for k, r in zip(record.rows, record.success, strict=True)
        ]
    expert = _expert(record)
    if expert is not None:
        rows.append(("expert", expert))
    values = np.stack([r for _, r in rows])
    n_rows, n = values.shape
    fig = figure(2.9 + 0.62 * max(n, 3), 2.0 + 0.42 * n_rows)
    axes = fig.add_subplot()
    texts = [["" if math.isnan(v) else f"{v:.2f}" for v in row] for row in values]
    image = _matrix(axes, values, texts, most=_most(record), map_name="cividis" if record.is_rate else "cividis_r")
    for edge, there in ((n_above, n_above > 0), (n_rows - 1, expert is not None)):
        if there:
            axes.axhline(edge - 0.5, color="white", linewidth=6)
    _tasks_axis(axes, names)
    _tasks_axis(axes, [name for name, _ in rows], vertical=True)
    axes.set_xlabel("evaluated task")
    axes.set_title(short(title, 60), fontsize=11, loc="left")
    label = _axis_label(record, "success rate")
    fig.colorbar(image, ax=axes, label=label, shrink=min(1.0, 1.6 / (0.42 * n_rows) + 0.4))
    return fig


def _most(record: Record) -> float:
    """The upper end of the scale: 1 for rates."""
    if record.is_rate:
        return 1.0
    rows = [record.success, *([] if record.base is None else [record.base[None]])]
    known = np.concatenate([r[~np.isnan(r)] for r in rows])
    return float(known.max()) if known.size and known.max() > 0 else 1.0


def _axis_label(record: Record, of_rates: str) -> str:
    if record.is_rate:
        return of_rates
    return f"{record.quantity.name}" + (f"\n[{record.unit}]" if record.unit else "") + ", lower is better"


def _expert(record: Record) -> FloatArray | None:
    """Success of the scripted experts per column, from the manifest's visits."""
    visits = record.manifest.get("visits")
    if not isinstance(visits, list) or len(visits) != len(record.tasks):
        return None
    rates = [v.get("expert_success") if isinstance(v, dict) else None for v in visits]
    known = [isinstance(r, int | float) and not isinstance(r, bool) and 0 <= r <= 1 for r in rates]
    if not any(known):
        return None
    return np.array([float(r) if ok else math.nan for r, ok in zip(rates, known, strict=True)])  # type: ignore[arg-type]


def mean_seen(record: Record) -> FloatArray:
    """(K,) mean success of row k over the tasks learned by then (j ≤ k); NaN if one was not evaluated."""
    return np.array([row[: k + 1].mean() for k, row in zip(record.rows, record.success, strict=True)])


def success_over_tasks(record: Record, title: str) -> Figure:
    """One panel per task: success after every visit with Wilson bars; below, the mean over tasks seen."""
    n, most = len(record.tasks), _most(record)
    columns = min(n, 5)
    panel_rows = math.ceil(n / columns)
    fig = figure(max(2.1 * columns + 0.6, 6.0), 1.75 * panel_rows + 3.0)
    top, bottom = fig.subfigures(2, 1, squeeze=False, height_ratios=[1.75 * panel_rows + 0.4, 2.6])[:, 0]
    panels = top.subplots(panel_rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for j, axes in enumerate(panels):
        if j >= n:
            axes.set_visible(False)
            continue
        _clean(axes)
        axes.axvspan(-0.4, j - 0.5, color="#F3F3F3", zorder=0)  # not yet learned
        _with_bars(axes, record, j)
        axes.set(ylim=(-0.05 * most, 1.05 * most), xlim=(-0.4, max(record.rows) + 0.4))
        axes.set_title(f"{j}: {short(record.tasks[j], 20)}", fontsize=8.5)
        axes.set_xticks(record.rows[:: math.ceil(len(record.rows) / 6)])
        axes.tick_params(labelsize=8, labelbottom=j + columns >= n)
    top.supylabel("success" if record.is_rate else "error", fontsize=9)
    axes = bottom.subplots()
    _clean(axes)
    mean = mean_seen(record)
    axes.plot(record.rows, mean, color="black", linewidth=2.8, marker="o", label="mean over tasks seen so far")
    if record.base is not None and not np.isnan(record.base).any():
        axes.axhline(record.base.mean(), color="#777777", linestyle=":", label="base, mean over all tasks")
    axes.set(ylim=(-0.05 * most, 1.05 * most), xlim=(-0.4, max(record.rows) + 0.4), xlabel="after visit k")
    axes.set_ylabel(_axis_label(record, "success"), fontsize=None if record.is_rate else 8)
    axes.set_xticks(record.rows)
    axes.legend(frameon=False, fontsize=8, loc="best")
    fig.suptitle(short(title, 60), fontsize=11, x=0.02, ha="left")
    return fig


def _with_bars(axes: Axes, record: Record, j: int) -> None:
    rates = record.success[:, j]
    x = [k for k, r in zip(record.rows, rates, strict=True) if not math.isnan(r)]
    y = np.array([r for r in rates if not math.isnan(r)])
    if not x:
        axes.text(0.5, 0.5, "not evaluated", ha="center", va="center", transform=axes.transAxes, fontsize=8)
        return
    axes.plot(x, y, color=COLOURS[0], marker="o", markersize=3.5)
    if not record.is_rate:
        values = [np.array(list(record.outcomes.get((k, j), {}).values())) for k in x]
        errors = np.array([v.std(ddof=1) / math.sqrt(len(v)) if len(v) > 1 else 0.0 for v in values])
        axes.vlines(x, y - errors, y + errors, color=COLOURS[0], alpha=0.35, linewidth=3)
        return
    if record.episodes is None:
        return
    counts = [int(record.episodes[record.rows.index(k), j]) for k in x]
    if min(counts) > 0:
        bars = [wilson(r * n, n) for r, n in zip(y, counts, strict=True)]
        low, high = (np.array(side) for side in zip(*bars, strict=True))
        axes.vlines(x, low, high, color=COLOURS[0], alpha=0.35, linewidth=3)


def comparison(groups: Sequence[Group]) -> Figure:
    """Mean success on the tasks seen so far, a line per algorithm with its seeds' range; joint: dashed."""
    fig = figure(8.2, 4.4)
    axes = fig.add_subplot()
    _clean(axes)
    last = max(max(r.record.rows) for g in groups for r in g.runs)
    for i, (g, name) in enumerate(zip(groups, distinct([g.label for g in groups], 34), strict=True)):
        style = _style(i)
        if g.multitask or g.singletask:
            rows = [r.record.success[-1] if g.multitask else np.diag(r.record.success) for r in g.runs]
            level = g.mean([_mean(row) for row in rows])
            if level is not None:
                dashes, what = ("--", "joint") if g.multitask else (":", "one policy per task")
                label = f"{name} ({what})"
                axes.axhline(level, color=REFERENCE, linestyle=dashes, label=label)
            continue
        table = np.full((len(g.runs), last + 1), np.nan)
        for line, r in zip(table, g.runs, strict=True):
            line[r.record.rows] = mean_seen(r.record)
        known = ~np.isnan(table).all(axis=0)
        x = np.flatnonzero(known)
        label = f"{name} (n={len(g.runs)})"
        axes.plot(x, np.nanmean(table[:, known], axis=0), linewidth=2, markersize=5, label=label, **style)
        if len(g.runs) > 1:
            low, high = np.nanmin(table[:, known], axis=0), np.nanmax(table[:, known], axis=0)
            axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    record = groups[0].runs[0].record
    most = max(_most(r.record) for g in groups for r in g.runs)
    axes.set(xlabel="after visit k", ylim=(-0.03 * most, 1.03 * most))
    axes.set_ylabel("mean success on tasks seen so far" if record.is_rate else "mean over tasks seen so far: "
                    + _axis_label(record, ""), fontsize=None if record.is_rate else 8)  # fmt: skip
    axes.set_xticks(range(last + 1))
    axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return fig


def _mean(row: FloatArray) -> float | None:
    return None if np.isnan(row).any() else float(row.mean())


# -------------------------------------------------------------------------------------- size and cost


def parameter_growth(groups: Sequence[Group]) -> Figure | None:
    """Parameters added since the base, after each task; None when no log has any."""
    lines = []
    for g, name in zip(groups, distinct([g.label for g in groups], 34), strict=True):
        for run in g.runs[:1]:  # seeds of one algorithm grow the same way
            if run.growth:
                lines.append((name, run.growth))
    if not any(y for _, points in lines for _, y in points):
        return None
    from matplotlib.ticker import FuncFormatter

    fig = figure(8.2, 3.6)
    axes = fig.add_subplot()
    _clean(axes)
    for i, (label, points) in enumerate(lines):
        x, y = zip(*points, strict=True)
        # lines that lie on each other stay visible: later ones are thinner
        axes.plot(x, y, label=label, linewidth=max(1.2, 4 - 0.6 * i), markersize=5, **_style(i))
    axes.set(xlabel="after visit k", ylabel="parameters added")
    axes.set_xticks(sorted({k for _, points in lines for k, _ in points}))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: count_text(v)))
    axes.set_ylim(bottom=0 if min(y for _, p in lines for _, y in p) >= 0 else None)
    axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return fig


def cost(groups: Sequence[Group]) -> Figure | None:
    """Training time, evaluation time and peak memory of each algorithm (mean over seeds)."""
    panels = []
    for title, scale, values in (
        ("training [min]", 60, [g.mean([r.train_seconds for r in g.runs]) for g in groups]),
        ("evaluation [min]", 60, [g.mean([r.eval_seconds for r in g.runs]) for g in groups]),
        ("peak memory [GB]", 1000, [g.mean([r.peak_memory_mb for r in g.runs]) for g in groups]),
    ):
        if any(v is not None for v in values):
            panels.append((title, [None if v is None else v / scale for v in values]))
    if not panels:
        return None
    fig = figure(1.6 + 2.6 * len(panels), 1.1 + 0.36 * len(groups))
    all_axes = fig.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, values) in zip(all_axes, panels, strict=True):
        heights = [v or 0.0 for v in values]
        colours = [COLOURS[i % len(COLOURS)] for i in range(len(groups))]
        bars = axes.barh(range(len(groups)), heights, color=colours, height=0.65)
        axes.bar_label(bars, ["n/a" if v is None else f"{v:.3g}" for v in values], padding=3, fontsize=8)
        axes.set_xlim(0, max(heights) * 1.3 or 1.0)
        axes.set_title(title, fontsize=9.5)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.xaxis.set_visible(False)
        axes.tick_params(length=0)
    all_axes[0].set_yticks(range(len(groups)), distinct([g.label for g in groups], 28))
    all_axes[0].set_ylim(max(len(groups), 2) - 0.4, -0.6)  # downwards; a lone bar stays a bar
    return fig


# ------------------------------------------------------------------------------ one run in more detail


def routing_confusion(routing: Routing, tasks: Sequence[str], title: str) -> Figure | None:
    """Per layer, the share of each adapter among the choices made on task j; None without records.

    With more layers than fit, evenly spaced ones are shown.
    """
    layers = [layer for layer, per_task in routing.items() if any(per_task)]
    if not layers:
        return None
    if len(layers) > MAX_PANELS:
        layers = [layers[i] for i in np.linspace(0, len(layers) - 1, MAX_PANELS).round().astype(int)]
    n = len(tasks)
    adapters = 1 + max(a for layer in layers for counts in routing[layer] for a in counts)
    columns = 2 if len(layers) == 4 else min(len(layers), 3 if n > 6 else 4)
    panel_rows = math.ceil(len(layers) / columns)
    width = max(0.4 * adapters + 0.3, 2.0)
    fig = figure(2.2 + width * columns, 1.0 + (0.8 + 0.32 * n) * panel_rows)
    panels = fig.subplots(panel_rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    names = [f"{j}: {short(t, 20)}" for j, t in enumerate(tasks)]
    image: Any = None
    for i, axes in enumerate(panels):
        if i >= len(layers):
            axes.set_visible(False)
            continue
        shares = np.full((n, adapters), np.nan)
        for j, counts in enumerate(routing[layers[i]]):
            total = sum(counts.values())
            if total:
                shares[j] = [counts.get(a, 0) / total for a in range(adapters)]
        texts = [["" if math.isnan(v) or v < 0.005 else f"{100 * v:.0f}" for v in row] for row in shares]
        image = _matrix(axes, shares, texts, scale=0.8)
        axes.set_title(short(layers[i], int(8 * width)), fontsize=8.5)
        axes.set_xticks(range(adapters))
        axes.tick_params(labelbottom=i + columns >= len(layers))
        _tasks_axis(axes, names, vertical=True)
    fig.supxlabel("chosen adapter (numbers: percent of the choices)", fontsize=9)
    fig.suptitle(short(title, 60), fontsize=11, x=0.02, ha="left")
    fig.colorbar(image, ax=panels.tolist(), label="share of choices", fraction=0.04, aspect=30, pad=0.02)
    return fig


def losses(run: Run) -> Figure | None:
    """The training loss of each task against its steps, one line per phase; None without a log."""
    by_task: dict[int, dict[str, list[tuple[int, float]]]] = {}
    for e in run.steps:
        loss = e.get("loss")
        if isinstance(loss, int | float) and not isinstance(loss, bool) and math.isfinite(loss):
            by_task.setdefault(e["k"], {}).setdefault(str(e.get("phase", "train")), []).append((e["step"], loss))
    if not by_task:
        return None
    phases = sorted({p for lines in by_task.values() for p in lines}, key=lambda p: (p != "train", p))
    columns = min(len(by_task), 5)
    panel_rows = math.ceil(len(by_task) / columns)
    fig = figure(max(2.1 * columns + 0.6, 5.0), 1.9 * panel_rows + 0.9)
    panels = fig.subplots(panel_rows, columns, sharey=True, squeeze=False).ravel()
    positive = all(v > 0 for lines in by_task.values() for points in lines.values() for _, v in points)
    for axes in panels[len(by_task) :]:
        axes.set_visible(False)
    for axes, k in zip(panels, sorted(by_task), strict=False):
        _clean(axes)
        for phase, points in by_task[k].items():
            points.sort()
            chosen = points[:: max(1, math.ceil(len(points) / MAX_POINTS))]
            x, y = zip(*chosen, strict=True)
            marker = "o" if len(chosen) == 1 else None
            colour = COLOURS[phases.index(phase) % len(COLOURS)]
            axes.plot(x, y, color=colour, linewidth=1.1, marker=marker, label=short(phase, 24))
        if positive:
            axes.set_yscale("log")
        name = run.record.tasks[k] if k < len(run.record.tasks) and not run.record.one_row else "all tasks"
        axes.set_title(f"{k}: {short(name, 20)}", fontsize=8.5)
        axes.tick_params(labelsize=8)
    if len(phases) > 1:
        handles: dict[str, Any] = {}
        for a in panels[: len(by_task)]:
            lines, labels = a.get_legend_handles_labels()
            handles.update(zip(labels, lines, strict=True))
        fig.legend(handles.values(), handles.keys(), loc="outside upper right", ncols=4, frameon=False, fontsize=8)
    fig.supxlabel("step", fontsize=9)
    fig.supylabel("loss", fontsize=9)
    return fig
