"""Reading records: run folders, matrices as JSON and CSV, what is refused, and the command lines."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from clbench.errors import UserError
from clbench.evaluation.records import CellFile, cell_name, read_seeds
from clbench.metrics import compute_metrics, load_record
from clbench.metrics.cli import add_arguments, main, run

EXAMPLE = [[0.8, 0.1, 0.0], [0.6, 0.9, 0.2], [0.4, 0.5, 0.7]]
SCRIPT = Path(__file__).parents[1] / "scripts" / "compute_cl_matrix_metrics.py"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def make_run(root: Path, outcomes: np.ndarray, tasks: list[str], base: np.ndarray | None = None) -> Path:
    """A run folder whose cells hold outcomes (K, N, S); at the end of an episode nothing succeeds."""

    def cell(name: str, k: int, j: int, values: np.ndarray) -> None:
        rows = [
            {"k": k, "j": j, "episode": i, "seed": 1000 + i, "success_once": bool(v), "success_at_end": False}
            for i, v in enumerate(values)
        ]
        write(root / "eval/cells" / name, "".join(json.dumps(r) + "\n" for r in rows))

    for k, j in np.ndindex(outcomes.shape[:2]):
        cell(f"k{k:02d}_j{j:02d}.jsonl", k, j, outcomes[k, j])
    for j, values in enumerate(base if base is not None else []):
        cell(f"base_j{j:02d}.jsonl", -1, j, values)
    matrix = {
        "tasks": tasks,
        "success": outcomes.mean(axis=-1).tolist(),
        "episodes": np.full(outcomes.shape[:2], outcomes.shape[2]).tolist(),
        "base": base.mean(axis=-1).tolist() if base is not None else None,
        "criterion": "success_once",
    }
    write(root / "eval/matrix.json", json.dumps(matrix))
    write(root / "manifest.json", json.dumps({"algorithm": "er", "seed": 0, "mode": "sequential"}))
    return root


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    return make_run(tmp_path / "run", rng.integers(0, 2, (3, 3, 8)), ["a", "b", "c"], base=rng.integers(0, 2, (3, 8)))


# --------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("part", ["", "eval", "eval/matrix.json"])
def test_run_folder_eval_folder_and_matrix_are_the_same_record(run_folder: Path, part: str) -> None:
    r = load_record(run_folder / part)
    assert r.tasks == ["a", "b", "c"] and r.mode == "sequential" and r.manifest["algorithm"] == "er"
    assert len(r.outcomes) == 12 and (r.episodes == 8).all() and r.base is not None
    assert compute_metrics(r)["fwt_gem"]["low"] is not None


def test_episode_records_win_over_a_stale_matrix(run_folder: Path) -> None:
    path = run_folder / "eval/matrix.json"
    matrix = json.loads(path.read_text())
    true, matrix["success"][0][0] = matrix["success"][0][0], 0.01
    path.write_text(json.dumps(matrix))
    r = load_record(run_folder)
    assert r.success[0, 0] == pytest.approx(true) and "differ from their episode records" in r.notes[0]


def test_null_in_the_matrix_stays_not_evaluated(run_folder: Path) -> None:
    path = run_folder / "eval/matrix.json"
    matrix = json.loads(path.read_text())
    matrix["success"][2][1] = None
    path.write_text(json.dumps(matrix))
    r = load_record(run_folder)
    assert math.isnan(r.success[2, 1]) and (2, 1) not in r.outcomes
    assert compute_metrics(r)["asr"]["missing"]


def test_at_end_recomputes_from_the_episodes(run_folder: Path, tmp_path: Path) -> None:
    r = load_record(run_folder, criterion="success_at_end")
    assert (r.success == 0).all() and r.criterion == "success_at_end"
    with pytest.raises(UserError, match="no episode records"):
        load_record(write(tmp_path / "m.json", json.dumps(EXAMPLE)), criterion="success_at_end")


def test_repeated_task_shares_its_episode_file(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", np.random.default_rng(0).integers(0, 2, (2, 2, 6)), ["a", "a"])
    (root / "eval/cells/k01_j01.jsonl").unlink()
    r = load_record(root)
    assert r.outcomes[1, 1] == r.outcomes[1, 0]


def test_curves_and_heldout_tasks(run_folder: Path) -> None:
    steps = np.linspace(0, 1, 11)
    for k in range(3):
        curve = {"k": k, "fractions": steps.tolist(), "success": (steps / 2).tolist()}
        write(run_folder / f"eval/curves/k{k:02d}.json", json.dumps(curve))
    write(run_folder / "eval/heldout/matrix.json", json.dumps({"tasks": ["x", "y"], "success": [[0.2, 0.4]]}))
    m = compute_metrics(load_record(run_folder))
    assert m["fwt_libero"]["value"] == pytest.approx(0.25) and m["fwt_libero"]["low"] is None
    assert m["zero_shot_heldout"]["value"] == pytest.approx(0.3)
    assert compute_metrics(load_record(run_folder, criterion="success_at_end"))["fwt_libero"]["value"] is None


@pytest.mark.parametrize(
    ("text", "tasks"),
    [
        ("0.8,0.1,0.0\n0.6,0.9,0.2\n0.4,0.5,0.7\n", ["task_0", "task_1", "task_2"]),
        ("a,b,c\n0.8,0.1,0.0\n0.6,0.9,0.2\n0.4,0.5,0.7", ["a", "b", "c"]),
        (",a,b,c\n0,0.8,0.1,0.0\n1,0.6,0.9,0.2\n2,0.4,0.5,0.7", ["a", "b", "c"]),
        ("after a,0.8,0.1,0.0\nafter b,0.6,0.9,0.2\nafter c,0.4,0.5,0.7", ["task_0", "task_1", "task_2"]),
        ("a,b,c\nx,0.8,0.1,0.0\ny,0.6,0.9,0.2\nz,0.4,0.5,0.7", ["a", "b", "c"]),
        ("\ufeffk;a;b;c\nx;0.8;0.1;0.0\n\ny;0.6;0.9;0.2\nz;0.4;0.5;0.7\n", ["a", "b", "c"]),
        ("a\tb\tc\r\n0.8\t0.1\t0.0\r\n0.6\t0.9\t0.2\r\n0.4\t0.5\t0.7\r\n", ["a", "b", "c"]),
    ],
)
def test_csv(tmp_path: Path, text: str, tasks: list[str]) -> None:
    r = load_record(write(tmp_path / "m.csv", text))
    assert r.success.tolist() == EXAMPLE and r.tasks == tasks


E0, E1, E2 = EXAMPLE_LINES = ("0.8,0.1,0.0", "0.6,0.9,0.2", "0.4,0.5,0.7")
LOWER = [[0.8, math.nan, math.nan], [0.6, 0.9, math.nan], [0.4, 0.5, 0.7]]
AVALANCHE = "eval_exp,training_exp,eval_accuracy,eval_loss,forgetting\n" + "".join(
    f"{j},{k},{rate},{2 - rate},0\n" for k, row in enumerate(EXAMPLE) for j, rate in enumerate(row)
)


@pytest.mark.parametrize(
    ("text", "rates", "tasks"),
    [
        # rows in the order of their labels
        (f",a,b,c\nb,{E1}\na,{E0}\nc,{E2}\n", EXAMPLE, "a b c"),
        (f"a,b,c\nafter c,{E2}\nafter a,{E0}\nafter b,{E1}\n", EXAMPLE, "a b c"),
        (f"k,a,b,c\na,{E0}\nc,{E2}\n", [EXAMPLE[0], [math.nan] * 3, EXAMPLE[2]], "a b c"),
        (f"k,a,b,c\n0,{E0}\n2,{E2}\n", [EXAMPLE[0], [math.nan] * 3, EXAMPLE[2]], "a b c"),
        (f"step,a,b,c\n300,{E0}\n600,{E1}\n900,{E2}\n", EXAMPLE, "a b c"),
        (f",4,2,7\n4,{E0}\n2,{E1}\n7,{E2}\n", EXAMPLE, "4 2 7"),
        # rows are tasks, columns checkpoints
        ("task,after_a,after_b,after_c\na,0.8,0.6,0.4\nb,0.1,0.9,0.5\nc,0,0.2,0.7\n", EXAMPLE, "a b c"),
        ("eval_task,a,b,c\na,0.8,0.6,0.4\nb,0.1,0.9,0.5\nc,0,0.2,0.7\n", EXAMPLE, "a b c"),
        ("eval \\ train,a,b,c\na,0.8,0.6,0.4\nb,0.1,0.9,0.5\nc,0,0.2,0.7\n", EXAMPLE, "a b c"),
        (f"train\\eval,a,b,c\na,{E0}\nb,{E1}\nc,{E2}\n", EXAMPLE, "a b c"),
        (",after c,after a,after b\na,0.4,0.8,0.6\nb,0.5,0.1,0.9\nc,0.7,0,0.2\n", EXAMPLE, "a b c"),
        # pandas' default, an index without a name
        (f",0,1,2\n0,{E0}\n1,{E1}\n2,{E2}\n", EXAMPLE, ""),
        (f"0,1,2\n{E0}\n{E1}\n{E2}\n", EXAMPLE, ""),
        ("0,1\n0.8,0.1\n0.6,0.9\n", [[0.8, 0.1], [0.6, 0.9]], ""),
        (f"Unnamed: 0,a,b,c\n0,{E0}\n1,{E1}\n2,{E2}\n", EXAMPLE, "a b c"),
        (f"0,{E0}\n1,{E1}\n2,{E2}\n", EXAMPLE, ""),
        # columns and rows that are no tasks
        (f"k,a,b,c,average\n0,{E0},0.3\n1,{E1},0.57\n2,{E2},0.53\n", EXAMPLE, "a b c"),
        (f"k,a,b,c,eval_loss\n0,{E0},2.3\n1,{E1},1.5\n2,{E2},1.3\nmean,0.6,0.5,0.3,1.7\n", EXAMPLE, "a b c"),
        # a separator at the end
        (f"{E0},\n{E1},\n{E2},\n", EXAMPLE, ""),
        (f"a,b,c\n{E0},\n{E1},\n{E2},\n", EXAMPLE, "a b c"),
        (f"k,a,b,c,\n0,{E0},\n1,{E1},\n2,{E2},\n", EXAMPLE, "a b c"),
        # other separators
        ("a b c\n" + "\n".join(EXAMPLE_LINES).replace(",", "   "), EXAMPLE, "a b c"),
        ("# made by numpy\n# a b c\n" + "\n".join(EXAMPLE_LINES).replace(",", " "), EXAMPLE, "a b c"),
        (f"# k,a,b,c\n0,{E0}\n1,{E1}\n2,{E2}\n", EXAMPLE, "a b c"),
        ("# success\n0.8,0.1\n0.6,0.9\n", [[0.8, 0.1], [0.6, 0.9]], ""),  # a remark, no names
        ("# success rates\n" + "\n".join(EXAMPLE_LINES).replace(",", " "), EXAMPLE, ""),
        ("\n".join(EXAMPLE_LINES).replace(",", ";").replace(".", ","), EXAMPLE, ""),
        ("\ttask 1\ttask 2\ntask 1\t1\t0\ntask 2\t0.5\t1\n", [[1, 0], [0.5, 1]], "task 1|task 2"),
        ("task 1;task 2\n1;0\n0.5;1\n", [[1, 0], [0.5, 1]], "task 1|task 2"),
        ("put; a, b\tb\tc\n" + "\n".join(EXAMPLE_LINES).replace(",", "\t"), EXAMPLE, "put; a, b|b|c"),
        # a lower triangle
        ("0.8\n0.6,0.9\n0.4,0.5,0.7\n", LOWER, ""),
        ("a,b,c\n0,0.8\n1,0.6,0.9\n2,0.4,0.5,0.7\n", LOWER, "a b c"),
        ("0.8\n0.6 0.9\n0.4 0.5 0.7\n", LOWER, ""),
        # rounding
        ("1.0000000000000002,-1e-9\n0.5,1.0009765625\n", [[1, 0], [0.5, 1]], ""),
        # one line per pair of tasks
        (AVALANCHE, EXAMPLE, ""),
        ("after,task,success\nb,a,0.6\na,a,0.8\nb,b,0.9\n", [[0.9, 0.6], [math.nan, 0.8]], "b a"),
    ],
)  # fmt: skip
def test_tables_of_other_tools(tmp_path: Path, text: str, rates: list[list[float]], tasks: str) -> None:
    r = load_record(write(tmp_path / "m.csv", text))
    np.testing.assert_array_equal(r.success, rates)
    assert r.tasks == (tasks.split("|" if "|" in tasks else " ") if tasks else [f"task_{j}" for j in range(len(rates))])


def test_what_the_labels_decided_is_a_note(tmp_path: Path) -> None:
    for text, note in (
        (f",a,b,c\nb,{E1}\na,{E0}\nc,{E2}\n", "in the order of the columns"),
        ("task,after_a,after_b\na,0.8,0.6\nb,0.1,0.9\n", "they were exchanged"),
        (f"k,a,b,c,average\n0,{E0},0.3\n1,{E1},0.57\n2,{E2},0.53\n", "left out, as being of no task: 'average'"),
        (f"{E0},\n{E1},\n{E2},\n", "separator at the end"),
        (f"a,b,c\nx,{E0}\ny,{E1}\nz,{E2}\n", "name none of the columns"),
    ):
        assert note in " ".join(load_record(write(tmp_path / "m.csv", text)).notes)
    assert load_record(write(tmp_path / "m.csv", f"k,a,b,c\na,{E0}\nb,{E1}\nc,{E2}\n")).notes == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("k,a,b\nafter 1,0.6,0.9\nafter 0,0.8,0.1\n", "not in order"),
        ("k,1,2\n0,0.8,0.1\n1,0.6,0.9\n", "name of none of the columns"),
        ("k,a,b,c\na,0.8,0.1,0\nstart,0.6,0.9,0\n", "'start' has the name of none"),
        ("k,a,b\na,0.8,0.1\na,0.6,0.9\n", "one label"),
        ("k,a,b,c,d\n2,0.8,0.1,0,0\n3,0.6,0.9,0,0\n", "numbered from 2"),
        ("0,0.8,0.1\n1,0.6,0.9\n", "rates, or the rows' numbers"),
        ("a,b\n0,0.8,\n1,0.6,\n", "one cell more"),
        ("after_a,after_b\n0.8,0.6\n0.1,0.9\n", "no first column names them"),
        ("0.8,0.1,0.45\n0.6,0.9,0.75\n", "mean of the others"),
        ("seed,a,b\n0,0.8,0.1\n1,0.6,0.9\n", "several seeds"),
        ("0.8,0.1,0\n0.9,0.2\n0.7\n", "ragged"),
        ("21/20,0\n0,1\n", "more successes than episodes"),
        ("1.02,0\n0.5,1\n", r"is 1\.02, outside \[0, 1\]\.$"),
        ("2.3,4.5\n1.2,3\n", r"outside \[0, 1\]\.$"),
        ("17,3\n12,20\n", "count successes"),
        ("train,test,metric,value\na,a,top1_acc,0.8\na,a,top5_acc,0.9\n", "2 metrics"),
        ("after,task,success\na,a,0.8\na,a,0.5\n", "two values"),
        ("trained_on,evaluated_on,reward\na,a,0.8\n", "no columns of rates"),
    ],
)  # fmt: skip
def test_tables_that_could_be_read_in_two_ways_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_record(write(tmp_path / "m.csv", text))


def test_fractions_say_how_many_episodes(tmp_path: Path) -> None:
    r = load_record(write(tmp_path / "m.csv", "base,1/20,0/20\n0,17/20,\n1,5/10,10/10\n"))
    assert r.base is not None and r.base.tolist() == [0.05, 0] and r.episodes is not None
    assert r.success[0, 0] == 0.85 and r.episodes.tolist() == [[20, 0], [10, 10]]


def test_numpy_files(tmp_path: Path) -> None:
    rates = np.array(EXAMPLE)
    path = tmp_path / "m.npy"
    for array in (rates, np.asfortranarray(rates), rates.astype(">f4")):
        np.save(path, array)
        np.testing.assert_allclose(load_record(path).success, EXAMPLE, atol=1e-6)
    np.save(path, np.where(np.triu(np.ones((3, 3)), 1) > 0, np.nan, rates))
    np.testing.assert_array_equal(load_record(path).success, LOWER)
    np.savez_compressed(tmp_path / "one.npz", rates)
    assert load_record(tmp_path / "one.npz").success.tolist() == EXAMPLE
    others = {"tasks": np.array(["x", "y", "z"]), "base": rates[0] * 0, "losses": np.array([{}], dtype=object)}
    np.savez(tmp_path / "many.npz", success=rates, **others)  # type: ignore[arg-type]
    r = load_record(tmp_path / "many.npz")
    assert r.success.tolist() == EXAMPLE and r.tasks == ["x", "y", "z"] and r.base is not None


def test_csv_base_row_and_unevaluated_cells(tmp_path: Path) -> None:
    text = "k,a,b\nbase,0.1,0.2\nrandom,0,0\n0,0.5,\n1,null,NaN\n"
    r = load_record(write(tmp_path / "m.csv", text))
    assert r.base is not None and r.base.tolist() == [0.1, 0.2] and r.random is not None
    assert r.success[0, 0] == 0.5 and np.isnan(r.success).sum() == 3
    assert load_record(write(tmp_path / "one.csv", "0.5")).success.tolist() == [[0.5]]


def test_json_forms(tmp_path: Path) -> None:
    for data in (EXAMPLE, {"success": EXAMPLE}, {"tasks": list("abc"), "success": EXAMPLE}):
        assert load_record(write(tmp_path / "m.txt", json.dumps(data))).success.tolist() == EXAMPLE
    assert load_record(write(tmp_path / "m.json", "[[1, null]]")).one_row
    triangle = load_record(write(tmp_path / "m.json", "[[0.8], [0.6, 0.9], [0.4, 0.5, 0.7]]"))
    np.testing.assert_array_equal(triangle.success, LOWER)


# ------------------------------------------------------------------------------------ what is refused

BAD = {
    "ragged.json": ("[[0.1, 0.2], [0.3]]", "ragged"),
    "ragged2.json": ("[[0.1], [0.2, 0.3], [0.4, 0.5, 0.6, 0.7]]", "ragged"),
    "ragged.csv": ("0.1,0.2\n0.3\n", "ragged"),
    "text.json": ('[[0.1, "x"], [0.3, 0.4]]', "not a number"),
    "bool.json": ("[[true]]", "not a number"),
    "text.csv": ("0.1,x\n0.3,0.4\n0.5,y", "'x', not a number"),
    "percent.json": ("[[80, 10], [60, 90]]", "divide by 100"),
    "percent.csv": ("80,10\n60,90\n", "divide by 100"),
    "sign.csv": ("80%,10%\n60%,90%\n", "not a matrix|not a number"),
    "negative.json": ("[[-0.1]]", r"outside \[0, 1\]"),
    "large.json": ("[[1e300]]", r"outside \[0, 1\]"),
    "huge.json": ("[[1" + "0" * 400 + "]]", r"outside \[0, 1\]"),
    "nan.json": ("[[NaN]]", "null for a cell"),
    "inf.json": ("[[Infinity]]", "null for a cell"),
    "empty.json": ("[]", "empty"),
    "empty_row.json": ("[[]]", "empty"),
    "empty.csv": ("\n\n", "empty"),
    "header.csv": ("a,b\n", "no row of numbers"),
    "nothing.csv": ("k,a\n,\n", "no rates"),
    "flat.json": ("[0.1, 0.2]", "not a matrix"),
    "scalar.json": ("3", "not a matrix"),
    "object.json": ('{"rates": [[1]]}', "not a matrix"),
    "success.json": ('{"success": 3}', "not a matrix"),
    "broken.json": ("[[0.1,", "not valid JSON"),
    "deep.json": ("[" * 100_000, "not valid JSON"),
    "tall.json": ("[[0.1, 0.2], [0.1, 0.2], [0.1, 0.2]]", "3 rows for 2 tasks"),
    "names.json": ('{"tasks": ["a"], "success": [[0.1, 0.2]]}', "ragged"),
    "names2.json": ('{"tasks": "ab", "success": [[0.1, 0.2]]}', "list of names"),
    "base.json": ('{"success": [[0.1, 0.2]], "base": [0.1]}', "base"),
    "counts.json": ('{"success": [[0.1]], "episodes": [[1, 2]]}', "episodes"),
    "counts2.json": ('{"success": [[0.1]], "episodes": [[-1]]}', "episodes"),
    "criterion.json": ('{"success": [[0.1]], "criterion": "luck"}', "criterion"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_matrices_are_refused(tmp_path: Path, name: str) -> None:
    text, message = BAD[name]
    with pytest.raises(UserError, match=message):
        load_record(write(tmp_path / name, text))


def test_other_bad_paths(tmp_path: Path, run_folder: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_record(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="nothing has been evaluated"):
        load_record(tmp_path / "folder")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UserError, match="as text"):
        load_record(tmp_path / "bytes.csv")
    write(run_folder / "eval/cells/k00_j00.jsonl", '{"seed": 1, "success_once": true}\n' * 2)
    load_record(run_folder)  # the same episode twice is one episode
    write(
        run_folder / "eval/cells/k00_j00.jsonl",
        '{"seed": 1, "success_once": true}\n{"seed": 1, "success_once": false}\n',
    )
    with pytest.raises(UserError, match="recorded twice"):
        load_record(run_folder)
    write(run_folder / "eval/cells/k00_j00.jsonl", '{"seed": 1}\n')
    with pytest.raises(UserError, match="success_once"):
        load_record(run_folder)


def test_cells_that_were_given_up_are_not_evaluated(run_folder: Path) -> None:
    """Whatever the matrix says, which may be older; and nothing is made of the episodes behind a gap."""
    failed = [{"k": 1, "j": 2, "reason": "it hung"}, {"k": -1, "j": 0, "reason": "it died"}]
    write(run_folder / "eval/failures.json", json.dumps([{**f, "attempts": 3} for f in failed]))
    cell = run_folder / "eval/cells/k00_j00.jsonl"
    lines = cell.read_text().splitlines(keepends=True)
    cell.write_text("".join(lines[:3] + lines[5:]))
    record = load_record(run_folder)
    assert np.isnan(record.success[1, 2]) and record.base is not None and np.isnan(record.base[0])
    assert np.isnan(record.success).sum() == np.isnan(record.base).sum() == 1
    assert (1, 2) not in record.outcomes and (-1, 0) not in record.outcomes
    notes = [n for n in record.notes if "could not be evaluated" in n]
    assert len(notes) == 2 and "k01_j02 (c)" in notes[0] and "it hung (3 attempts)" in notes[0]
    assert list(record.outcomes[0, 0]) == [1000, 1001, 1002]
    assert record.episodes is not None and record.episodes[0, 0] == 3
    write(run_folder / "eval/failures.json", "[1]")
    with pytest.raises(UserError, match=r"failures\.json"):
        load_record(run_folder)


def settings(folder: Path, rows: list[Path], **values: object) -> None:
    """Give an eval folder settings.json, and the episodes in `rows` the seeds that these say."""
    write(folder / "settings.json", json.dumps(values))
    first = {"test": 1_000_000, "validation": 2_000_000}[str(values.get("split", "test"))] + int(str(values["seed"]))
    for path in rows:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        write(path, "".join(json.dumps({**row, "seed": first + row["episode"]}) + "\n" for row in lines))


def both_readers(run: Path, k: int, j: int) -> list[Callable[[], object]]:
    """What metrics and reports read records with, and what evaluations do."""
    return [lambda: load_record(run), lambda: CellFile(run / "eval", k, j, read_seeds(run / "eval"))]


@pytest.mark.parametrize(("source", "k", "j"), [("k02_j02", 0, 0), ("k00_j01", 0, 0), ("base_j00", 0, 0),
                                                ("k00_j00", -1, 0), ("base_j01", -1, 0)])  # fmt: skip
def test_records_in_another_cells_file_are_refused(run_folder: Path, source: str, k: int, j: int) -> None:
    """A mixed-up copy or merge of two machines' cells."""
    cells = run_folder / "eval/cells"
    name = f"{cell_name(k, j)}.jsonl"
    good = (cells / name).read_text()
    mixed = good.splitlines(keepends=True)[:4] + (cells / f"{source}.jsonl").read_text().splitlines(keepends=True)[4:]
    for text in ((cells / f"{source}.jsonl").read_text(), "".join(mixed)):
        write(cells / name, text)
        for read in both_readers(run_folder, k, j):
            with pytest.raises(UserError, match=f"{name} holds records of another cell"):
                read()
    write(cells / name, good)
    for read in both_readers(run_folder, k, j):
        read()


def test_a_column_of_a_repeated_task_has_the_others_file_checked(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", np.random.default_rng(0).integers(0, 2, (2, 2, 6)), ["a", "a"])
    shutil.move(root / "eval/cells/k00_j00.jsonl", root / "eval/cells/k01_j01.jsonl")
    (root / "eval/cells/k01_j00.jsonl").unlink()
    with pytest.raises(UserError, match=r"k01_j01\.jsonl holds records of another cell"):
        load_record(root)


@pytest.mark.parametrize("split", ["test", "validation", None])
def test_records_have_the_seeds_of_their_evaluation(run_folder: Path, split: str | None) -> None:
    cell, cells = run_folder / "eval/cells/k01_j02.jsonl", list((run_folder / "eval/cells").iterdir())
    for rule in ({}, {"episode_seeds": "consecutive"}):  # recorded before rules had names, and since
        settings(run_folder / "eval", cells, seed=7, **({"split": split} if split else {}), **rule)
        for read in both_readers(run_folder, 1, 2):
            read()
    good = cell.read_text()
    other = "test" if split == "validation" else "validation"
    for change in ({"seed": 8, **({"split": split} if split else {})}, {"seed": 7, "split": other}):
        settings(run_folder / "elsewhere", [cell], **change)  # episodes of another evaluation
        for read in both_readers(run_folder, 1, 2):
            with pytest.raises(UserError, match=r"k01_j02\.jsonl: episode 0 has the seed .*eval\.seed=7"):
                read()
    write(cell, good)
    rows = good.splitlines(keepends=True)
    other_one = {**json.loads(rows[2]), "success_once": not json.loads(rows[2])["success_once"]}
    write(cell, good + json.dumps(other_one) + "\n")
    for read in both_readers(run_folder, 1, 2):
        with pytest.raises(UserError, match="episode 2 is recorded twice, with different results"):
            read()
    write(cell, good + rows[2])  # alike: it is one episode
    assert load_record(run_folder).episodes[1, 2] == 8  # type: ignore[index]


def test_a_rule_of_seeds_that_is_not_known_is_refused(run_folder: Path) -> None:
    write(run_folder / "eval/settings.json", json.dumps({"seed": 0, "split": "test", "episode_seeds": "of 2031"}))
    for read in both_readers(run_folder, 0, 0):
        with pytest.raises(UserError, match="rule 'of 2031', which this version"):
            read()
    for damaged in (
        "[]", '{"seed": "0"}', '{"seed": 0, "split": "exam"}', '{"seed": 0, "split": []}',
        '{"seed": 0, "episode_seeds": 3}',
    ):  # fmt: skip
        write(run_folder / "eval/settings.json", damaged)
        with pytest.raises(UserError, match=r"settings\.json"):
            load_record(run_folder)


def test_columns_in_another_order_than_the_runs_are_refused(run_folder: Path, tmp_path: Path) -> None:
    manifest = json.loads((run_folder / "manifest.json").read_text())
    visits = [{"k": k, "task": t} for k, t in enumerate("abc")]
    write(run_folder / "manifest.json", json.dumps({**manifest, "visits": visits}))
    load_record(run_folder)
    shutil.copytree(run_folder / "eval", run_folder / "eval/heldout")  # of other tasks
    with pytest.raises(UserError, match="than 'heldout' in the manifest"):
        write(run_folder / "manifest.json", json.dumps({**manifest, "visits": visits, "heldout": [{"task": "z"}]}))
        load_record(run_folder)
    shutil.rmtree(run_folder / "eval/heldout")
    visits[0], visits[1] = visits[1], visits[0]
    for changed, message in ((visits, "out of order"), ([{"task": v["task"]} for v in visits], "in another order")):
        write(run_folder / "manifest.json", json.dumps({**manifest, "visits": changed}))
        with pytest.raises(UserError, match=message):
            load_record(run_folder)
    write(run_folder / "manifest.json", json.dumps(manifest))
    write(run_folder / "eval/failures.json", json.dumps([{"k": 1, "j": 2, "task": "b", "reason": "it hung"}]))
    with pytest.raises(UserError, match=r"failures\.json names a task j=2 \('b'\)"):
        load_record(run_folder)


def test_a_matrix_away_from_its_run_says_whose_it_is(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As --output-base writes it; also beside a manifest that is another run's, and as a single file."""
    about = {"run_id": "mine", "algorithm": "er", "seed": 3, "mode": "sequential", "privileged": "object poses"}
    matrix = json.loads((run_folder / "eval/matrix.json").read_text())
    shutil.copytree(run_folder / "eval", tmp_path / "out/X/eval")
    write(tmp_path / "out/X/eval/matrix.json", json.dumps({**matrix, "run": about}))
    write(tmp_path / "out/manifest.json", json.dumps({"run_id": "other", "algorithm": "ewc", "seed": 5}))
    single = write(tmp_path / "sent.json", json.dumps({**matrix, "run": about}))
    for path in (tmp_path / "out/X", tmp_path / "out/X/eval/matrix.json", single):
        assert main([str(path)]) == 0
        assert "er, seed 3, privileged observations (object poses), " in capsys.readouterr().out
        assert main([str(path), "--json", "--bootstrap", "0"]) == 0
        found = json.loads(capsys.readouterr().out)["about"]
        assert {key: found[key] for key in about} == about
        assert load_record(path).mode == "sequential"

    write(run_folder / "manifest.json", json.dumps({**about, "algorithm": "mir", "visits": []}))
    for own in ({}, {"run": about}):  # made before a matrix said it, and since
        write(run_folder / "eval/matrix.json", json.dumps({**matrix, **own}))
        record = load_record(run_folder)
        assert record.manifest["algorithm"] == "mir" and "visits" in record.manifest
        assert record.about["privileged"] == "object poses"
    for wrong in ([], "er", {"seed": "3"}, {"mode": ["sequential"]}):
        with pytest.raises(UserError, match='"run"'):
            load_record(write(single, json.dumps({**matrix, "run": wrong})))


# ----------------------------------------------------------------------------------------- command lines


def test_clbench_metrics_json(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert run(parser.parse_args([str(run_folder), "--json", "--bootstrap", "50"])) == 0
    data = json.loads(capsys.readouterr().out)
    assert list(data) == ["about", "metrics"] and data["about"]["criterion"] == "success_once"
    assert {"value", "low", "high", "definition"} <= set(data["metrics"]["auc_clare"])
    assert data["metrics"]["ft_cw"]["value"] is None and data["metrics"]["ft_cw"]["missing"]


def test_text_names_every_definition(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run_folder)]) == 0
    out = capsys.readouterr().out
    assert "not comparable across papers" in out.replace("\n", " ") and "8 episodes a cell" in out
    columns = {line.index("definition") for line in out.splitlines() if line.startswith("metric")}
    assert len(columns) == 1 and "\nnbt_clare " in out and "\nfwt_gem " in out


def test_no_forgetting_is_a_zero_without_a_sign(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = [0.8, 0.6, 0.5, 0.3]
    success = [[rate if j <= k else 0.0 for j, rate in enumerate(kept)] for k in range(4)]
    path = write(tmp_path / "matrix.json", json.dumps({"tasks": list("abcd"), "success": success}))
    assert compute_metrics(load_record(path))["nbt_clare"]["value"] == 0
    assert main([str(path)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^nbt_final +0\.000 ", out, re.MULTILINE)
    assert "-0.000" not in out


def test_user_mistakes_are_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    with pytest.raises(UserError):
        main([str(tmp_path / "nowhere"), "--debug"])


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"tasks": ["\x1b[31mred"], "success": [[0.5]]}
    assert main([str(write(tmp_path / "m.json", json.dumps(data)))]) == 0
    assert "\x1b" not in capsys.readouterr().out


def call(*command: str, **kwargs) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=env, **kwargs)


def test_script(tmp_path: Path) -> None:
    matrix = write(tmp_path / "m.csv", "0.8,0.1,0.0\n0.6,0.9,0.2\n0.4,0.5,0.7\n")
    done = call(sys.executable, str(SCRIPT), str(matrix), "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics"]["nbt_clare"]["value"] == pytest.approx(0.35)
    bad = call(sys.executable, str(SCRIPT), str(tmp_path / "nowhere"), cwd=tmp_path)
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and "Traceback" not in bad.stderr
    assert os.access(SCRIPT, os.X_OK)


def test_script_hands_over_or_says_what_to_run(tmp_path: Path) -> None:
    """A Python without numpy: the project's environment takes over; without one, a clear message."""
    copy = write(tmp_path / "project/scripts/s.py", SCRIPT.read_text())
    isolated = (sys.executable, "-I", "-S")  # no site-packages, so no numpy
    without = call(*isolated, str(copy), "x")
    assert without.returncode == 2 and "quickstart.sh" in without.stderr and "Traceback" not in without.stderr
    python = write(tmp_path / "project/.venv/bin/python", '#!/bin/sh\necho "taken over: $2"\n')
    python.chmod(0o755)
    assert call(*isolated, str(copy), "x").stdout == "taken over: x\n"
