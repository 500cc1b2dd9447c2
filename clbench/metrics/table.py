"""Matrices as other tools write them, turned into the JSON form that record.py checks: labels decide, not positions.

Text: cells apart by commas, tabs, semicolons or blanks; an optional first line of task names and an optional first
column of row labels; or one line per pair of tasks (trained on, evaluated on). Binary: NumPy's .npy and .npz. What
can be read in two ways is an error, and what was decided by the labels is a note.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import re
import unicodedata
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from reprlib import repr as shown
from tokenize import TokenError
from typing import Any

import numpy as np
import numpy.typing as npt

from clbench.errors import UserError
from clbench.io import MAX_JSON_BYTES

MAX_TASKS = 1000  # columns, and so rows
NOT_EVALUATED = {"", "null", "none", "nan", "na", "n/a", "-"}
# The name of a first column that holds the rows' labels.
LABEL_HEADERS = {
    "", "k", "i", "id", "row", "rows", "index", "unnamed: 0", "task", "after", "visit", "checkpoint", "ckpt", "step",
    "epoch", "stage", "phase", "experience", "exp", "train", "trained", "training", "trained_on", "trained on",
    "learned",
}  # fmt: skip
_BASE = ("base", "-1")
_END = r"(?=[\s_:=#.\-]|\d|$)"
_AFTER = rf"(?:after|trained|training|train|learned|checkpoint|ckpt|visit){_END}"
_ON = rf"(?:evaluated|evaluation|eval|test|on){_END}"
_WORDS = rf"(?:{_AFTER}|{_ON}|(?:tasks?|experience|exp|row|step|k|to){_END})"
_PREFIX = re.compile(rf"(?:{_WORDS}(?:-|[\s_:=#.]*))+(?=.)")
_SUMMARY_WORDS = {"average", "avg", "mean", "loss", "std", "stderr", "sem"}  # anywhere in a name
_SUMMARIES = {
    "overall", "total", "all", "acc", "accuracy", "n", "episodes", "epoch", "step", "time", "seconds", "forgetting",
    "bwt", "fwt", "nbt", "auc", "asr",
}  # fmt: skip
_FRACTION = re.compile(r"([0-9]{1,9})\s*/\s*([0-9]{1,9})")


@dataclass
class _Table:
    """Cells as text, and what the file calls its columns and rows; None = it does not."""

    cells: list[list[str]]
    names: list[str] | None = None
    labels: list[str] | None = None
    corner: str = ""  # the name of the column of labels
    comma: bool = False  # whether 0,5 is a number
    notes: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------ text


def from_text(text: str, where: str) -> tuple[dict[str, Any], list[str]]:
    """The matrix in a text file in JSON form ("tasks", "success", "base", …), and notes on how it was read.

    Raises:
        UserError: it is no matrix, or could be read in two ways.
    """
    comments, body = _without_comments(text)
    delimiter = _delimiter(body, where)
    lines = _split(body, delimiter, where)
    if not lines:
        raise UserError(f"{where} is empty.")
    if comments:  # numpy.savetxt(header=…) writes the names behind a #
        named = _split(comments[-1].lstrip("# "), delimiter, where)
        width = max(map(len, lines))
        first = [row[0] for row in lines]
        widths = (width, width - 1) if any(map(_is_text, first)) or _numbered(first) else (width,)  # else a remark
        fits = named and len(named[0]) in widths and all(map(_is_text, named[0][1:]))
        if fits and not _is_header(lines[0], lines[1:]):
            lines.insert(0, named[0])
    comma = delimiter != ","
    long = _long_table(lines, where, comma)
    if long is not None:
        return long
    if max(len(lines), *map(len, lines)) > MAX_TASKS + 20:  # beside tasks, a few lines of something else
        raise UserError(f"{where} has more than {MAX_TASKS} rows or columns.")
    table = _table(lines, where, comma)
    _turn(table, where)
    _leave_out(table, where)
    return _in_order(table, where), table.notes


def _without_comments(text: str) -> tuple[list[str], str]:
    """The lines at the top that begin with #, and the rest."""
    comments = []
    rest = text
    while rest.startswith("#"):
        line, _, rest = rest.partition("\n")
        comments.append(line)
    return comments, rest


def _split(text: str, delimiter: str, where: str, limit: int | None = None) -> list[list[str]]:
    """Lines of stripped cells; lines without any are left out."""
    if delimiter == " ":
        text = text.replace("\t", " ")
    lines = io.StringIO(text, newline="")  # not splitlines: U+2028 in a name ends no line
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=delimiter == " ")
    try:
        table = [[c.strip() for c in row] for row in itertools.islice(reader, limit)]
    except csv.Error as e:
        raise UserError(f"{where} is not CSV: {e}.") from e
    if delimiter == " ":
        return [cells for row in table if (cells := [c for c in row if c])]
    return [row for row in table if any(row) or len(row) > 1]


def _delimiter(text: str, where: str) -> str:
    """What stands between the cells: of the usual ones, that which leaves most numbers."""
    best, found = (-1.0, 0), ","
    lines = [line for line in text.splitlines() if line.strip()]
    apart = any(all(d in line for line in lines) for d in ("\t", ";"))  # then blanks are in names: "task 1"
    for delimiter in (",", "\t", ";") if apart else (",", "\t", ";", " "):
        try:
            cells = [c for row in _split(text, delimiter, where, 200) for c in row if c]
        except UserError:  # raised again, if this is the one
            continue
        numbers = sum(_is_number(c, delimiter != ",") for c in cells)
        score = (numbers / max(1, len(cells)), numbers)
        if score > best:
            best, found = score, delimiter
    return found


def _float(cell: str, comma: bool = False) -> float:
    """The number in a cell; ValueError for anything else."""
    if "_" in cell:  # Python's own way of writing numbers, nobody else's
        raise ValueError
    if comma and re.fullmatch(r"[+-]?[0-9]*,[0-9]+", cell):
        cell = cell.replace(",", ".")
    return float(cell)


def _is_number(cell: str, comma: bool = False) -> bool:
    """Whether a cell is meant as a number: 0.5, 17/20, also 85%, which is refused later."""
    if _FRACTION.fullmatch(cell):
        return True
    try:
        _float(cell.removesuffix("%").rstrip() if cell.endswith("%") else cell, comma)
    except ValueError:
        return False
    return cell.lower() not in NOT_EVALUATED


def _is_text(cell: str, comma: bool = False) -> bool:
    return cell.lower() not in NOT_EVALUATED and not _is_number(cell, comma)


def _whole(cell: str) -> int | None:
    """The number of a cell that is nothing but digits."""
    return int(cell) if cell.isascii() and cell.isdigit() and len(cell) < 10 else None


def _numbered(cells: Sequence[str]) -> bool:
    """Whether these are 0, 1, 2, … or 1, 2, 3, …"""
    numbers = [_whole(c) for c in cells]
    return numbers[0] in (0, 1) and numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def _is_header(first: list[str], rows: list[list[str]], comma: bool = False) -> bool:
    """Whether the first line names the columns: by text, or (pandas' default) by their numbers."""
    if all(_is_text(c, comma) for c in first[1:]) and (_is_text(first[0], comma) or (len(first) > 1 and not first[0])):
        return True
    cornered = len(first) > 1 and first[0].lower() in LABEL_HEADERS
    cells = first[1:] if cornered else first
    numbers = sorted(n for c in cells if (n := _whole(c)) is not None)
    if len(numbers) < len(cells) or len(set(numbers)) < len(numbers):
        return False
    if not _numbered([str(n) for n in numbers]):  # numbers of tasks, by which the rows go too
        return cornered and {row[0] for row in rows if row} <= {*cells, *_BASE, "random"}
    if cornered or max(numbers) > 1 or (rows and all(len(row) == len(first) + 1 for row in rows)):
        return True
    return numbers == [_whole(c) for c in cells] and len(rows) == len(cells)  # 0,1 above a 2 × 2 matrix


def _table(lines: list[list[str]], where: str, comma: bool) -> _Table:
    """Tell names, labels and cells apart."""
    width = max(map(len, lines))
    bare = [row[:-1] for row in lines]
    if len(lines) > 1 and all(len(row) == width and not row[-1] for row in lines) and _is_header(bare[0], bare[1:]):
        lines, width = bare, width - 1  # every line ends with a separator, the names' too
    header: list[str] | None = None
    if _is_header(lines[0], lines[1:], comma):
        header, lines = lines[0], lines[1:]
    if not lines:
        raise UserError(f"{where} is not a matrix: it has no row of numbers.")
    width = max(map(len, lines))
    first = [row[0] for row in lines]
    by_text = all(len(row) > 1 for row in lines) and any(_is_text(c, comma) for c in first)
    by_text = by_text and all(_is_text(c, comma) or _whole(c) is not None for c in first)
    by_width = header is not None and width == len(header) + 1
    if by_width and not by_text and all(not row[-1] for row in lines if len(row) == width):
        if not _numbered(first):  # rates: it is the separator at the end of each line that is one too many
            lines, by_width = [row[:-1] if len(row) == width else row for row in lines], False
        elif len(first) < 3:
            raise UserError(
                f"{where}: its lines have one cell more than the first line has names, and the last is empty. Name the "
                "first column (k) where it numbers the rows, or remove the separator at the end of each line."
            )
    by_name = header is not None and len(header) > 1 and header[0].lower() in LABEL_HEADERS
    by_count = len(lines) > 2 and width > 1 and _numbered(first)  # 2 is no rate
    whole = any(_whole(c) is not None for row in lines for c in row[1:])
    if header is None and len(lines) == 2 and width == 3 and first == ["0", "1"] and not whole:
        raise UserError(
            f"{where}: its first column is 0, 1: rates, or the rows' numbers? Say so in a first line of names "
            '("k,a,b" where the rows are numbered, "a,b,c" where not).'
        )
    table = _Table(lines, header, comma=comma)
    if by_name or by_width or by_text or by_count:
        lines = [row for row in lines if any(row)]  # a spreadsheet's lines of nothing
        table.labels = [row[0] for row in lines]
        table.cells = [row[1:] for row in lines]
        if header is not None and not by_width:
            table.corner, table.names = header[0], header[1:]
    return table


# ---------------------------------------------------------------------------------------------- labels


def _key(label: str) -> str:
    """What a label names: "after task_b", "b" and "1: b" name the same."""
    text = unicodedata.normalize("NFC", label).casefold().strip()
    text = _PREFIX.sub("", text, count=1) if _PREFIX.match(text) else text
    text = re.sub(r"^\d+\s*:\s*(?=\S)", "", text)
    number = _whole(text)
    return text if number is None else str(number)


def _is_summary(label: str) -> bool:
    words = re.split(r"[\s_.\-]+", label.casefold())
    return not _SUMMARY_WORDS.isdisjoint(words) or label.casefold() in _SUMMARIES


def _turn(table: _Table, where: str) -> None:
    """Exchange rows and columns where the labels say that the rows are tasks and the columns checkpoints."""
    if table.names is None:
        return
    columns = [n for n in table.names if n and not _is_summary(n) and _key(n) not in (*_BASE, "random")]
    after = len(columns) > 1 and all(re.match(_AFTER, n.casefold()) for n in columns)
    if table.labels is None:
        if after:
            raise UserError(
                f"{where}: its columns are named after checkpoints ({shown(columns[0])}), so its rows are tasks, but "
                "no first column names them. Add one, or exchange rows and columns."
            )
        return
    rows = [n for n in table.labels if not _is_summary(n)]
    after = after and not any(re.match(_AFTER, n.casefold()) for n in rows)
    on = bool(rows) and all(re.match(_ON, n.casefold()) for n in rows)
    on = on and not any(re.match(_ON, n.casefold()) for n in columns)
    base = not {_key(n) for n in rows}.intersection(_BASE) and any(_key(n) in _BASE for n in table.names)
    corner, _, across = (part.strip() for part in re.sub(r"[\\/|]", "/", table.corner.casefold()).partition("/"))
    tested = re.match(_ON, corner) and (not across or re.match(_AFTER, across))  # "eval", "eval/train"
    if not (after or on or base or tested):
        return
    if any(len(row) != len(table.names) for row in table.cells):
        raise UserError(f"{where}: its rows are tasks, and they have not as many cells as there are columns.")
    table.cells = [list(column) for column in zip(*table.cells, strict=True)]
    table.names, table.labels = table.labels, table.names
    table.notes.append("by their labels, the file's rows are tasks and its columns checkpoints: they were exchanged")


def _leave_out(table: _Table, where: str) -> None:
    """Drop what is no task and no checkpoint: averages, losses, the nothing behind the last separator."""
    if not any(table.cells):
        raise UserError(f"{where} is not a matrix: it has no rates of tasks.")
    width = max(map(len, table.cells))
    keys = {_key(n) for n in table.labels or ()}
    drop: list[int] = []
    for j, name in enumerate(table.names or ()):
        column = [row[j] for row in table.cells if j < len(row)]
        if "seed" in re.split(r"[\s_.\-]+", name.casefold()) and _key(name) not in keys:
            if len(set(column)) > 1:
                raise UserError(f"{where} has the rows of several seeds ({shown(name)}); keep those of one run.")
            drop.append(j)
        elif _is_summary(name) and (_key(name) not in keys or name in (table.labels or ())):
            drop.append(j)
        elif not name or name.casefold().startswith("unnamed:"):
            if any(column):
                raise UserError(f"{where}: its column {j} has no name. Give it the task's.")
            drop.append(j)
    left = [table.names[j] for j in drop if table.names and table.names[j]]
    ends = all(len(row) == width and not row[-1] for row in table.cells)
    if table.names is None and width == len(table.cells) + 1 and ends:
        drop = [width - 1]
        table.notes.append(
            "the separator at the end of every line was not taken for one more column; name the columns in a first "
            "line if there is a last task that was never evaluated"
        )
    if drop:
        gone = set(drop)
        table.cells = [[c for j, c in enumerate(row) if j not in gone] for row in table.cells]
        if table.names is not None:
            table.names = [n for j, n in enumerate(table.names) if j not in gone]
    if table.labels is not None:
        names = {_key(n) for n in table.names or ()}
        kept = [i for i, n in enumerate(table.labels) if not (_is_summary(n) and _key(n) not in names)]
        left += [n for i, n in enumerate(table.labels) if i not in set(kept)]
        table.cells = [table.cells[i] for i in kept]
        table.labels = [table.labels[i] for i in kept]
    if left:
        table.notes.append(f"left out, as being of no task: {', '.join(map(shown, left[:5]))}")
    if not table.cells or table.names == []:
        raise UserError(f"{where} is not a matrix: it has no rates of tasks.")


def _in_order(table: _Table, where: str) -> dict[str, Any]:
    """The JSON form, rows at the visits that their labels name."""
    n = len(table.names) if table.names is not None else max(map(len, table.cells))
    extra: dict[str, list[str]] = {}
    rows: list[list[str]] = []
    labels: list[str] = []
    for i, cells in enumerate(table.cells):
        label = table.labels[i] if table.labels is not None else ""
        key = _key(label)
        name = "base" if key in _BASE else key
        if table.labels is not None and name in ("base", "random"):
            if name in extra:
                raise UserError(f"{where} has more than one base or random row.")
            extra[name] = cells
        else:
            rows.append(cells)
            labels.append(label)
    places = list(range(len(rows))) if table.labels is None else _places(labels, table, n, where)
    ragged = len(set(map(len, rows))) > 1
    ordered: list[list[str]] = [[""] * (k + 1 if ragged else n) for k in range(max(places, default=-1) + 1)]
    for k, cells in zip(places, rows, strict=True):
        ordered[k] = cells

    named = table.names is not None and not _numbered(table.names)
    found: dict[str, Any] = {"tasks": table.names if named else None}
    for name, cells in extra.items():
        found[name] = [_rate(c, f'{where}: row "{name}", column {j}', table.comma)[0] for j, c in enumerate(cells)]
    pairs = [
        [_rate(c, f"{where}, row {k}, column {j}", table.comma) for j, c in enumerate(row)]
        for k, row in enumerate(ordered)
    ]
    found["success"] = [[rate for rate, _ in row] for row in pairs]
    counts = [count for row in pairs for rate, count in row if rate is not None]
    if counts and None not in counts:
        found["episodes"] = [[count or 0 for _, count in row] for row in pairs]
    if table.names is None:
        _refuse_means(found["success"], where)
    return found


def _places(labels: list[str], table: _Table, n: int, where: str) -> list[int]:
    """The visit that each row's label names: that of the column of the same name, or its number."""
    keys = [_key(label) for label in labels]
    order = list(range(len(keys)))
    columns = [_key(name) for name in table.names or ()]
    if not keys or keys == columns[: len(keys)]:
        return order
    twice = next((label for i, label in enumerate(labels) if keys[i] in keys[:i]), None)
    if twice is not None:
        numbers = shown([_whole(k) for k in keys]) if all(_whole(k) is not None for k in keys) else shown(labels)
        raise UserError(f"{where}: its rows are not in order, or two have one label: {numbers}.")
    strange = [label for label, key in zip(labels, keys, strict=True) if key not in columns]
    if columns and not strange:
        if len(set(columns)) < len(columns):
            raise UserError(f"{where}: a task stands in it twice, and its rows are not in the order of its columns.")
        places = [columns.index(key) for key in keys]
        if places != sorted(places):
            if all(_whole(key) is not None for key in keys):
                raise UserError(f"{where}: its rows are not in order: {shown(labels)}, columns {shown(columns)}.")
            table.notes.append("rows were put in the order of the columns, by their labels")
        return places
    if columns and len(strange) < len(labels):
        raise UserError(
            f"{where}: row {shown(strange[0])} has the name of none of the columns, and other rows have. Name rows and "
            "columns alike, and the row before the stream base."
        )
    stems = [m for key in keys if (m := re.fullmatch(r"(.*?)([0-9]{1,9})", key, re.DOTALL))]
    if len(stems) < len(keys) or len({m[1] for m in stems}) > 1:
        if columns:
            table.notes.append(
                f"the rows' labels ({shown(labels[0])}, …) name none of the columns: they are in the file's order"
            )
        return order
    visits = [int(m[2]) for m in stems]
    if any(b <= a for a, b in itertools.pairwise(visits)):
        raise UserError(f"{where}: its rows are not in order: {shown(visits)}.")
    first, gaps = visits[0], visits != list(range(visits[0], visits[0] + len(visits)))
    if first in (0, 1) and visits[-1] - first < n:
        return [number - first for number in visits]
    if len(visits) > 1 and (visits[-1] < n or not gaps) and first > 1:
        raise UserError(
            f"{where}: its rows are numbered from {first} on. Give those before a line too, with empty cells where "
            "nothing was evaluated."
        )
    if gaps:
        table.notes.append(f"the rows' numbers ({shown(visits)}) are no visits: they were taken in the file's order")
    return order


def _refuse_means(rows: list[list[float | None]], where: str) -> None:
    """Raise UserError where the last of the unnamed columns is the mean of the others."""
    n = len(rows[0]) if rows else 0
    if len(rows) < 2 or n != len(rows) + 1 or any(len(row) != n or None in row for row in rows):
        return
    full = np.array(rows, dtype=float)
    with np.errstate(all="ignore"):  # anything may stand in the cells so far
        alike = np.ptp(full, axis=1) < 0.01
        seen = np.array([row[: k + 1].mean() for k, row in enumerate(full)])
        means = [np.abs(full[:, -1] - mean) < 0.006 for mean in (full[:, :-1].mean(axis=1), seen)]
    if any(is_mean.all() for is_mean in means) and not alike.all():
        raise UserError(
            f"{where}: its last column is the mean of the others. Remove it; or name the columns in a first line if it "
            "is a task."
        )


def _rate(cell: str, where: str, comma: bool) -> tuple[float | None, int | None]:
    """The number in a cell (None = not evaluated), and of how many episodes it is, where the cell says so."""
    if cell.lower() in NOT_EVALUATED:
        return None, None
    fraction = _FRACTION.fullmatch(cell)
    if fraction is not None:
        hits, total = int(fraction[1]), int(fraction[2])
        if hits > total or total == 0:
            raise UserError(f"{where} is {cell}: more successes than episodes, or none of these.")
        return hits / total, total
    try:
        return _float(cell, comma), None
    except ValueError:
        hint = " Write the rate as a fraction in [0, 1]." if cell.endswith("%") else ""
        raise UserError(f"{where} is {shown(cell)}, not a number.{hint}") from None


# ------------------------------------------------------------------------------- one line per pair of tasks


def _long_table(lines: list[list[str]], where: str, comma: bool) -> tuple[dict[str, Any], list[str]] | None:
    """A table with one line per pair of tasks, as avalanche's loggers write it; None where it is none."""
    header, rows = lines[0], lines[1:]
    names = [re.sub(r"[^a-z0-9]+", "_", h.casefold()).strip("_") for h in header]
    if len(set(names)) < len(names) or len(names) < 3 or not all(_is_text(h, comma) for h in header if h):
        return None
    values = [j for j, h in enumerate(names) if re.search(r"succ|(^|_)(acc|accuracy|rate|score|value)($|_)", h)]
    kinds = [j for j, h in enumerate(names) if h in ("metric", "metric_name", "measure", "name")]
    ids = [j for j, h in enumerate(names) if j not in values + kinds and "loss" not in h]
    trained = [j for j in ids if re.search(r"train|learn|(^|_)after|^k$|^checkpoint$", names[j])]
    tested = [j for j in ids if j not in trained and re.search(r"eval|test|^j$|^task(_id|_name)?$", names[j])]
    if len(trained) != 1 or len(tested) != 1 or any(len(row) != len(header) for row in rows) or not rows:
        return None
    k_column, j_column = trained[0], tested[0]
    if any(_is_number(row[j_column], comma) and _whole(row[j_column]) is None for row in rows):
        return None  # rates: its columns are tasks of such names
    if len(values) != 1:
        raise UserError(
            f"{where} has a line for each pair of tasks ({header[k_column]}, {header[j_column]}), and "
            f"{len(values) or 'no'} columns of rates{''.join(f', {header[j]}' for j in values)}. Keep one, "
            "called success."
        )
    if len(kinds) == 1:
        known = sorted({row[kinds[0]] for row in rows})
        wanted = [v for v in known if re.search(r"succ|acc", v.casefold()) and not _is_summary(v.replace("/", " "))]
        if len(wanted) != 1:
            raise UserError(
                f"{where} has the values of {len(known)} metrics, and {'several' if wanted else 'none'} may be the "
                f"rate of success: {shown(wanted or known)}. Keep the lines of one."
            )
        rows = [row for row in rows if row[kinds[0]] == wanted[0]]
    return _from_pairs([(row[k_column], row[j_column], row[values[0]]) for row in rows], where, comma)


def _from_pairs(lines: list[tuple[str, str, str]], where: str, comma: bool) -> tuple[dict[str, Any], list[str]]:
    """The matrix of (trained on, evaluated on, rate)."""
    cells: dict[tuple[str, str], str] = {}
    spelled: dict[str, str] = {}
    for after, on, cell in lines:
        base = _key(after) in _BASE or after.lower() in NOT_EVALUATED  # evaluated before any training
        pair = ("base" if base else _key(after), _key(on))
        spelled.setdefault(_key(on), on)
        if cells.setdefault(pair, cell) != cell:
            raise UserError(
                f"{where} has two values for the task {shown(on)} after {shown(after)}: of several runs, epochs or "
                "streams? Keep the lines of one."
            )
    visits = [key for key in dict.fromkeys(k for k, _ in cells) if key != "base"]
    tasks = list(dict.fromkeys(j for _, j in cells))
    if not set(visits) <= set(tasks):
        missing = next(k for k in visits if k not in tasks)
        raise UserError(f"{where}: the task {shown(missing)} was trained, and there is no line that evaluates it.")
    if all(_whole(t) is not None for t in tasks):
        tasks.sort(key=int)
    else:  # in the order of training, then those that were never trained
        tasks = visits + [t for t in tasks if t not in visits]
    if len(tasks) > MAX_TASKS:
        raise UserError(f"{where} has more than {MAX_TASKS} tasks.")
    if not visits:
        raise UserError(f"{where} is not a matrix: nothing in it was evaluated after a task was trained.")
    last = max(tasks.index(k) for k in visits)
    names = [spelled[t] for t in tasks]
    rows = ["base", *tasks[: last + 1]]
    table = _Table([[cells.get((k, j), "") for j in tasks] for k in rows], names, rows, comma=comma)
    if not any(k == "base" for k, _ in cells):
        table.cells, table.labels = table.cells[1:], rows[1:]
    table.notes.append("read from a table with one line per pair of tasks")
    return _in_order(table, where), table.notes


# --------------------------------------------------------------------------------------------- NumPy's files

NPY = b"\x93NUMPY"
ZIP = b"PK\x03\x04"


def from_numpy(data: bytes, where: str) -> Any:
    """The arrays of a .npy or .npz file in JSON form. Numbers and names alone: nothing is unpickled."""
    if data.startswith(NPY):
        return _array(data, where)
    arrays: dict[str, Any] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [m for m in archive.infolist() if m.filename.endswith(".npy")]
            if not members:
                raise UserError(
                    f"{where} is an archive without arrays of NumPy, so no .npz. Save the matrix as CSV, JSON or .npy."
                )
            names = [m.filename.removesuffix(".npy") for m in members]
            if len(members) > 1 and names.count("success") != 1:
                number = "several" if "success" in names else "none"
                raise UserError(f"{where} has several arrays ({shown(names)}) and {number} called success.")
            for name, member in zip(names, members, strict=True):
                if len(members) > 1 and name not in ("success", "tasks", "base", "random", "episodes"):
                    continue
                with archive.open(member) as f:
                    content = f.read(MAX_JSON_BYTES + 1)
                if len(content) > MAX_JSON_BYTES:
                    raise UserError(f"{where}: {member.filename} is larger than {MAX_JSON_BYTES} bytes.")
                arrays[name] = _array(content, f"{where}: {shown(name)}")
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OSError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{where} is a damaged .npz file: {e}.") from e
    return arrays if len(members) > 1 else next(iter(arrays.values()))


def _array(data: bytes, where: str) -> list[Any]:
    """One array as nested lists, NaN as None. Its size is compared with the file's before memory is taken."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        if version not in ((1, 0), (2, 0)):
            raise UserError(f"{where} is in version {version} of NumPy's format, which is not read here.")
        shape, by_columns, dtype = read(file)
    except (ValueError, EOFError, SyntaxError, TypeError, RecursionError, MemoryError, TokenError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{where} is a damaged .npy file: {' '.join(str(e).split())[:200]}.") from e
    if dtype.hasobject:
        raise UserError(f"{where} holds Python objects (a pickle), which are not loaded. Save an array of numbers.")
    if dtype.kind not in "fiuU" or dtype.itemsize == 0:
        raise UserError(f"{where} holds {dtype}, no numbers.")
    if not 1 <= len(shape) <= 2 or any(type(n) is not int or not 1 <= n <= MAX_TASKS for n in shape):
        raise UserError(f"{where} has the shape {shape}; expected one matrix, of at most {MAX_TASKS} rows and columns.")
    content = data[file.tell() :]
    count = math.prod(shape)
    if len(content) != count * dtype.itemsize:
        raise UserError(f"{where} is damaged: it has {len(content)} bytes of {count * dtype.itemsize}.")
    array = np.frombuffer(content, dtype).reshape(shape, order="F" if by_columns else "C")
    if dtype.kind != "f":
        try:
            found: list[Any] = array.tolist()
        except ValueError as e:  # numbers that are no characters
            raise UserError(f"{where} is damaged: {e}.") from e
        return found
    rates = array.astype(np.float64)
    if rates.ndim == 1:
        return _no_nan(rates)
    return [_no_nan(rates[i]) for i in range(len(rates))]


def _no_nan(values: npt.NDArray[np.float64]) -> list[float | None]:
    return [None if math.isnan(v) else float(v) for v in values]
