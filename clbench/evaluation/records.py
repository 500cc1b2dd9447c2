"""Episode records on disk, and the matrix derived from them. Imports no torch.

eval/cells/k00_j03.jsonl holds the episodes of checkpoint k on task j; base_j03 and random_j03 those of the base and
of random actions. A file has one writer, which appends as episodes end and sorts it when its cell is done.
Every record states its cell and seed: a record in another cell's file is an error (`check_cell`).
eval/failures.json lists the abandoned cells; it exists only if there are any.
"""

from __future__ import annotations

import json
import os
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shown
from typing import Any

from clbench.envs.base import SPLITS
from clbench.errors import UserError
from clbench.evaluation.seeds import CONSECUTIVE, EpisodeSeeds
from clbench.io import read_bytes, read_json, read_jsonl, write_json, write_jsonl

BASE, RANDOM = -1, -2  # row numbers of the base and of random actions
TEST, VALIDATION = "test", "validation"  # eval.split
EPISODE_SEEDS = "episode_seeds"  # key of settings.json and of a matrix's "run": the rule's name
SIMULATORS = "simulators"  # key of settings.json: environment type → {package: version} behind the episodes
EARLIER, UNKNOWN = "earlier_simulators", "unknown"  # key and value, if episodes are older than that key


@dataclass(frozen=True)
class Quantity:
    """What the cells of a matrix are.

    Attributes:
        name: in words.
        unit: of a cell; "" = none.
        higher_is_better: otherwise lower is.
        criteria: keys of an episode's record that a matrix may be of; the first is the headline.
    """

    name: str
    unit: str
    higher_is_better: bool
    criteria: tuple[str, ...]

    @property
    def direction(self) -> str:
        return "higher is better" if self.higher_is_better else "lower is better"

    @property
    def label(self) -> str:
        """For titles and axes."""
        return f"{self.name}, {self.direction}"


SUCCESS = Quantity("success rate", "", True, ("success_once", "success_at_end"))
# On held-out episodes (offline.py): without a simulator.
OFFLINE = Quantity("offline action error", "standard deviations of the actions", False,
                   ("chunk_error", "first_error", "loss"))  # fmt: skip
OFFLINE_WORDS = {"chunk_error": "mean absolute error of the whole chunk", "loss": "the policy's loss under fixed draws",
                 "first_error": "mean absolute error of the first action"}  # fmt: skip
QUANTITIES = {q.name: q for q in (SUCCESS, OFFLINE)}
VALUES = {SUCCESS.name: "success", OFFLINE.name: "error"}  # key of a matrix that has the cells


def eval_folder(run: Path, split: str = TEST) -> Path:
    """Where a split's episodes are in a run's folder: eval, or eval/validation, so that they never mix."""
    return run / "eval" if split == TEST else run / "eval" / split


def cell_name(k: int, j: int) -> str:
    row = {BASE: "base", RANDOM: "random"}.get(k, f"k{k:02d}")
    return f"{row}_j{j:02d}"


def _is_record(row: Any) -> bool:
    if not isinstance(row, dict) or type(row.get("episode")) is not int:
        return False
    if OFFLINE.criteria[0] in row:
        return all(isinstance(row.get(c), int | float) and row[c] >= 0 for c in OFFLINE.criteria[:2])
    return all(row.get(c) in (0, 1) for c in ("success_once", "success_at_end") if c in row) and "success_once" in row


def check_cell(
    path: Path, rows: Iterable[Mapping[str, Any]], k: int, j: int, seeds: EpisodeSeeds | None = None
) -> None:
    """Raise UserError if records in the file of cell (k, j) belong to another cell or other episodes.

    What a record does not state is not compared. `seeds`: null = not known.
    """
    remedy = "Move the file away; an evaluation will play the cell again."
    found: dict[int, tuple[Any, ...]] = {}
    for row in rows:
        if (row.get("k", k), row.get("j", j)) != (k, j):
            raise UserError(
                f"{path} holds records of another cell (k={shown(row.get('k'))}, j={shown(row.get('j'))}): they are "
                f"in the wrong place. {remedy}"
            )
        episode = row.get("episode")
        if type(episode) is not int:
            continue
        if seeds is not None and row.get("seed", seeds.of(episode)) != seeds.of(episode):
            raise UserError(
                f"{path}: episode {episode} has the seed {shown(row['seed'])}, but in this evaluation its seed is "
                f"{seeds.of(episode)} ({seeds.split} episodes, eval.seed={seeds.seed}). {remedy}"
            )
        outcome = tuple(row.get(key) for key in ("seed", *SUCCESS.criteria, *OFFLINE.criteria))
        if found.setdefault(episode, outcome) != outcome:
            raise UserError(f"{path}: episode {episode} is recorded twice, with different results. {remedy}")


class CellFile:
    """Reads and appends to the records of one cell. UserError for records of another cell."""

    def __init__(self, folder: Path, k: int, j: int, seeds: EpisodeSeeds | None = None) -> None:
        self.k, self.j = k, j
        self.path = folder / "cells" / f"{cell_name(k, j)}.jsonl"
        self.rows: dict[int, dict[str, Any]] = {}
        self._repaired = False
        if self.path.is_file():
            self._repaired = not read_bytes(self.path).endswith(b"\n")
            rows = read_jsonl(self.path)
            if not all(map(_is_record, rows)):
                raise UserError(f"{self.path} holds a line that is not an episode record; move the file away.")
            check_cell(self.path, rows, k, j, seeds)
            self.rows = {row["episode"]: row for row in rows}

    def append(self, row: dict[str, Any]) -> None:
        """Add one episode, so that it survives the death of this process and of the machine.

        Raises UserError when it cannot be written, for example on a full disk.
        """
        self.rows[row["episode"]] = row
        if self._repaired:  # a torn last line: rewrite instead of appending after it
            self.sort()
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as f:
                f.write(json.dumps(row, allow_nan=False) + "\n")
                f.flush()
                os.fsync(f.fileno())
        except OSError as e:
            raise UserError(
                f"cannot write {self.path}: {e.strerror}. Finished episodes are kept: fix that, then run the same "
                "command again."
            ) from e

    def sort(self) -> None:
        """Rewrite the file in the order of episodes; a cell without episodes gets no file."""
        if not self.rows:
            return
        self._repaired = False
        write_jsonl(self.path, [self.rows[e] for e in sorted(self.rows)])


def counted(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Episodes 0, 1, … up to the first that is missing, in that order.

    Those after a gap come from an unfinished evaluation. Which ones it has depends on their outcome (a success ends
    sooner, a failing simulator never), so they do not count until it is continued.
    """
    by_number = {row["episode"]: row for row in rows}
    found: list[Mapping[str, Any]] = []
    while len(found) in by_number:
        found.append(by_number[len(found)])
    return found


def read_failures(folder: Path, tasks: Sequence[str]) -> dict[tuple[int, int], dict[str, Any]]:
    """(k, j) → what failures.json of an eval folder says about an abandoned cell: episode, reason, attempts.

    Raises UserError when the file is damaged, or is for tasks other than the columns `tasks`.
    """
    path = folder / "failures.json"
    if not path.is_file():
        return {}
    listed = read_json(path)
    if not isinstance(listed, list) or not all(
        isinstance(f, dict) and isinstance(f.get("k"), int) and isinstance(f.get("j"), int) for f in listed
    ):
        raise UserError(f"{path} is not a list of cells; move the file away.")
    for f in listed:
        j = f["j"]
        if not 0 <= j < len(tasks) or f.get("task", tasks[j]) != tasks[j]:
            raise UserError(
                f"{path} names a task j={shown(j)} ({shown(f.get('task'))}) that the matrix there does not have: it is "
                "from another evaluation. Move the file away."
            )
    return {(f["k"], f["j"]): f for f in listed}


def read_simulators(folder: Path) -> dict[str, dict[str, str]]:
    """Environment type → {package: version} of the simulators behind an eval folder's episodes; {} = not recorded.

    Raises UserError when settings.json, which has them, is damaged.
    """
    path = folder / "settings.json"
    settings = read_json(path) if path.is_file() else {}
    found = settings.get(SIMULATORS, {}) if isinstance(settings, dict) else None
    if not isinstance(found, dict) or not all(
        isinstance(v, dict) and all(isinstance(text, str) for text in v.values()) for v in found.values()
    ):
        raise UserError(f"{path} is damaged: its '{SIMULATORS}' are not versions of packages.")
    return found


def read_seeds(folder: Path) -> EpisodeSeeds | None:
    """The seeds of an eval folder's episodes, from settings.json; None if there is no such file.

    Raises UserError when the file is damaged.
    """
    path = folder / "settings.json"
    if not path.is_file():
        return None
    settings = read_json(path)
    found = settings if isinstance(settings, dict) else {}
    rule, split, seed = found.get(EPISODE_SEEDS, CONSECUTIVE), found.get("split", TEST), found.get("seed", 0)
    known = isinstance(settings, dict) and isinstance(rule, str) and isinstance(split, str) and split in SPLITS
    if not known or type(seed) is not int:
        raise UserError(f"{path} is damaged: it does not say which episodes were played.")
    return EpisodeSeeds(rule, split, seed) if "seed" in found else None


def write_failures(folder: Path, failures: Mapping[tuple[int, int], dict[str, Any]]) -> None:
    """Write failures.json, or remove it when nothing failed."""
    path = folder / "failures.json"
    if failures:
        write_json(path, [failures[cell] for cell in sorted(failures)])
    else:
        path.unlink(missing_ok=True)


def build_matrix(
    folder: Path,
    tasks: list[str],
    rows: Sequence[int],
    criterion: str = "success_once",
    failed: Container[tuple[int, int]] = (),
    split: str = TEST,
    about: Mapping[str, Any] | None = None,
    seeds: EpisodeSeeds | None = None,
    quantity: Quantity = SUCCESS,
) -> dict[str, Any]:
    """Write matrix.json from the cells of the checkpoints `rows`.

    A cell without episodes is null, and so is one in `failed`: its episodes may be the easy ones. "episodes" counts
    the episodes behind a rate, or those that a failed cell has. `about` is stored as "run": whose matrix it is. `seeds`
    are those that the records must have; null = not known. `quantity`: what cells are of; `criterion` is one of its.
    """

    def rate(k: int, j: int) -> tuple[float | None, int]:
        found = CellFile(folder, k, j, None if seeds is None else seeds.for_task(tasks[j])).rows.values()
        if (k, j) in failed:
            return None, len(found)
        values = [r[criterion] if quantity is not SUCCESS else bool(r[criterion]) for r in counted(found)]
        return (sum(values) / len(values) if values else None), len(values)

    def row(k: int) -> list[tuple[float | None, int]]:
        return [rate(k, j) for j in range(len(tasks))]

    def optional(k: int) -> list[float | None] | None:
        values = [v for v, _ in row(k)]
        return None if all(v is None for v in values) else values

    cells = [row(k) for k in rows]
    about_cells: dict[str, Any] = {}
    if quantity is not SUCCESS:
        about_cells = {"quantity": quantity.name, "unit": quantity.unit, "direction": quantity.direction}
    matrix = {
        "tasks": tasks,
        **about_cells,
        "criterion": criterion,
        "split": split,
        VALUES[quantity.name]: [[v for v, _ in r] for r in cells],
        "episodes": [[n for _, n in r] for r in cells],
        "base": optional(BASE),
        "random": optional(RANDOM),
        "run": dict(about or {}),
    }
    write_json(folder / "matrix.json", matrix)
    return matrix
