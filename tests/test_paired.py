"""Paired comparison: McNemar and Holm by hand, the differences' intervals and error rate by simulation, the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.interval_coverage import Setting, simulate
from clbench.errors import UserError
from clbench.io import write_json, write_jsonl
from clbench.metrics import Record, compare, compute_metrics, mcnemar
from clbench.metrics.cli import main
from clbench.metrics.paired import Difference, _holm, differing_cells


def test_mcnemar_by_hand() -> None:
    a = dict.fromkeys(range(8), 1.0) | {8: 0.0, 9: 0.0}
    b = a | dict.fromkeys(range(5), 0.0)  # five episodes that a alone solves
    assert mcnemar(a, b) == mcnemar(b, a) == pytest.approx(2 / 2**5)
    assert mcnemar(a, a) == 1.0
    assert mcnemar(a, b | {8: 1.0}) == pytest.approx(2 * (1 + 6) / 2**6)  # 5 against 1


def test_holm_by_hand() -> None:
    ps = [0.01, 0.04, 0.03, 0.9]
    found = _holm([Difference("a", "b", "asr", 0.1, 0.0, 0.2, p) for p in ps])
    assert [d.holm for d in found] == pytest.approx([0.04, 0.09, 0.09, 0.9])
    assert [d.verdict for d in found[:2]] == ["a is better", "no difference seen"]
    (worse,) = _holm([Difference("a", "b", "nbt_clare", 0.1, 0.0, 0.2, 0.01)])
    assert worse.verdict == "b is better"  # a lower NBT


def pair(rng: np.random.Generator, gap: float = 0.0) -> tuple[Record, Record]:
    """Two methods' runs on the same episodes: what an episode's seed draws is common to both."""
    setting = Setting(4, 20, 0.7, 0.3, shared=True)
    state = rng.integers(1 << 40)
    common = [np.random.default_rng([int(state), i]) for i in (0, 0)]
    records = []
    for number, (own, level) in enumerate(zip(common, (0.0, gap), strict=True)):
        record = simulate(setting, (setting.rates() - level).clip(0.02, 0.98), _Shared(own, number, rng))
        records.append(record)
    return records[0], records[1]


class _Shared:
    """A generator whose first draw, what is common to an episode, is the same for both methods."""

    def __init__(self, own: np.random.Generator, number: int, rng: np.random.Generator) -> None:
        self.own, self.rest, self.first = own, rng, True

    def normal(self, size: object) -> object:
        if self.first:
            self.first = False
            return self.own.normal(size=size)
        return self.rest.normal(size=size)

    def integers(self, high: int) -> object:
        return self.rest.integers(high)


def test_equal_methods_differ_in_one_table_of_twenty() -> None:
    rng, rejected, widths = np.random.default_rng(0), 0, []
    for _ in range(80):
        a, b = pair(rng)
        (d,) = compare({"a": [a], "b": [b]}, names=("asr",), bootstrap=200)
        rejected += d.holm < 0.05
        alone = compute_metrics(a, bootstrap=200)["asr"]
        widths.append((d.high - d.low) / (alone["high"] - alone["low"]))
    assert rejected / 80 < 0.05 + 3 * (0.05 * 0.95 / 80) ** 0.5
    assert np.mean(widths) < 1.0  # two independent means differ by √2 of one's width
    found = [
        compare({"a": [x], "b": [y]}, names=("asr",), bootstrap=200)[0] for x, y in (pair(rng, 0.3) for _ in range(20))
    ]
    assert np.mean([d.verdict == "a is better" for d in found]) > 0.8


def test_seeds_are_paired_with_their_like() -> None:
    rng = np.random.default_rng(1)
    groups: dict[str, list[Record]] = {"a": [], "b": []}
    for seed in (0, 1, 2):
        for name, record in zip(groups, pair(rng), strict=True):
            record.manifest["seed"] = seed
            groups[name].append(record)
    del groups["b"][1]
    (d,) = compare(groups, names=("asr",), bootstrap=100)
    want = np.mean([groups["a"][i].success[-1].mean() - groups["b"][j].success[-1].mean() for i, j in ((0, 0), (2, 1))])
    assert d.n == 2 and d.value == pytest.approx(want)


def test_what_cannot_be_paired_is_refused() -> None:
    a, b = pair(np.random.default_rng(2))
    other = Record(**{**vars(b), "outcomes": {c: {s + 1: v for s, v in o.items()} for c, o in b.outcomes.items()}})
    with pytest.raises(UserError, match="did not play the same episodes"):
        compare({"a": [a], "b": [other]})
    with pytest.raises(UserError, match="same tasks in the same order"):
        compare({"a": [a], "b": [Record(**{**vars(b), "tasks": ["x", *b.tasks[1:]]})]})
    with pytest.raises(UserError, match="differ in their split: test and validation"):
        compare({"a": [Record(**{**vars(a), "split": "test"})], "b": [Record(**{**vars(b), "split": "validation"})]})


def write(folder: Path, record: Record) -> Path:
    """An eval folder with this record's episodes."""
    cells = folder / "cells"
    cells.mkdir(parents=True)
    for (k, j), outcomes in record.outcomes.items():
        rows = [{"k": k, "j": j, "episode": i, "seed": s, "success_once": bool(v), "success_at_end": bool(v)}
                for i, (s, v) in enumerate(sorted(outcomes.items()))]  # fmt: skip
        write_jsonl(cells / f"k{k:02d}_j{j:02d}.jsonl", rows)
    matrix = {"tasks": record.tasks, "success": record.success.tolist(), "episodes": [[20] * 4] * 4}
    write_json(folder / "matrix.json", matrix)
    return folder


def test_the_command_compares_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = pair(np.random.default_rng(3), 0.4)
    paths = [str(write(tmp_path / name, r)) for name, r in (("er", a), ("clare", b))]
    assert main(paths) == 0
    out = capsys.readouterr().out
    (row,) = [line for line in out.splitlines() if line.startswith("asr")]
    assert f"er − clare  {a.success[-1].mean() - b.success[-1].mean():+.3f} [" in row and row.endswith("er is better")
    cells = differing_cells(a, b)
    assert "cells in which er and clare differ" in out and all(f"k={k} j={j} " in out for k, j, _ in cells)
    assert main([*paths, "--json"]) == 0
    assert {d["metric"] for d in json.loads(capsys.readouterr().out)["differences"]} >= {"asr", "auc_clare"}
    assert main([*paths, "--joint", paths[0]]) == 2
    assert "are for one run" in capsys.readouterr().err
