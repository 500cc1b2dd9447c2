"""Hostile and damaged files: every reader answers with a right result or with one UserError, and with nothing else.

The default suite tries INPUTS files per reader, `slow` tries MANY; both are the same in every run (derandomized).
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clbench.checkpoints.run_folder import read_checkpoint, read_manifest
from clbench.checkpoints.state import load_state, save_state
from clbench.config.compose import compose, compose_files, override, to_dict, to_yaml
from clbench.config.folders import SHIPPED
from clbench.data.info import DataInfo, load_info
from clbench.errors import UserError
from clbench.evaluation.evaluate import run_config
from clbench.evaluation.records import CellFile
from clbench.metrics import Record, compute_metrics, load_record

INPUTS = 50
MANY = 2500
counts = pytest.mark.parametrize("count", [INPUTS, pytest.param(MANY, marks=pytest.mark.slow)])


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def fuzz(count: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], Any]) -> None:
    """Calls `check` with `count` values; a UserError with one bounded message is a fine answer."""

    @settings(
        max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(strategy)
    def go(value: Any) -> None:
        try:
            check(value)
        except UserError as e:
            assert 0 < len(str(e)) < 4000, "a message that nobody reads"

    go()


def must(call: Callable[[], Any]) -> Any:
    """The result of a call that has no reason to refuse anything."""
    try:
        return call()
    except UserError as e:
        raise AssertionError(f"refused: {e}") from e


# ------------------------------------------------------------------------------------------ what is tried

SNIPPETS = [
    *("NaN", "-Infinity", "1e999", "null", "true", "~", '"', "'", "{", "}", "[", "]", ",", ":", ": ", "\n", "- ", "#"),
    *("0", "-1", "0.5", "2", "1" * 5000, "0x" + "f" * 9000, "1_0", ".inf", "2001-99-99", "1:2:3", "é", "\ud800"),
    *("[" * 300, '{"a":' * 300, "&a ", "*a", "<<: *a", "!!python/name:os.system ", "!!binary ", "${oc.env:HOME}"),
    *(
        "${train.steps}",
        "${",
        "???",
        "\\ud800",
        "\\u0000",
        "\0",
        "\ufeff",
        "\u2028",
        "\x1b[31m",
        "../../x",
        "/etc/passwd",
    ),
]
snippet = st.sampled_from(SNIPPETS).map(lambda s: s.encode("utf-8", "surrogatepass")) | st.binary(max_size=4)
place = st.floats(0, 1, exclude_max=True)
edits = st.lists(st.tuples(st.sampled_from(["flip", "cut", "insert", "replace", "copy", "end"]), place, place, snippet),
                 min_size=1, max_size=4)  # fmt: skip


def damage(data: bytes, edit_list: list[tuple[str, float, float, bytes]]) -> bytes:
    """`data` after some edits, each somewhere."""
    for kind, a, b, new in edit_list:
        i = int(a * len(data))
        j = min(len(data), i + int(b * 12))
        if kind == "flip" and data:
            data = data[:i] + bytes([data[i] ^ 1 << int(b * 8)]) + data[i + 1 :]
        elif kind == "cut":
            data = data[:i] + data[j:]
        elif kind == "insert":
            data = data[:i] + new + data[i:]
        elif kind == "replace":
            data = data[:i] + new + data[j:]
        elif kind == "copy":
            data = data[:j] + data[i:]
        elif kind == "end":
            data = data[:i]
    return data


scalar = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(SNIPPETS)
tree = st.recursive(
    scalar,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6) | scalar.map(str), inner, max_size=4)
    ),
    max_leaves=12,
)


def paths_of(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [prefix, *(p for k, v in items for p in paths_of(v, (*prefix, k)))]


def graft(value: Any, at: float, new: Any) -> Any:
    """A copy of `value` with `new` in one of its places."""
    value = json.loads(json.dumps(value))
    where = paths_of(value)[int(at * len(paths_of(value)))]
    if not where:
        return new
    parent = value
    for k in where[:-1]:
        parent = parent[k]
    parent[where[-1]] = new
    return value


def json_like(valid: Any) -> st.SearchStrategy[bytes]:
    """Files that are almost `valid`: a value of another kind in one place, edited bytes, or garbage."""
    text = json.dumps(valid).encode()
    grafted = st.builds(lambda at, new: json.dumps(graft(valid, at, new)).encode(), place, tree)
    return (
        grafted
        | edits.map(lambda e: damage(text, e))
        | st.binary(max_size=40)
        | tree.map(lambda v: json.dumps(v).encode())
    )


# -------------------------------------------------------------------------------------------- configurations


@counts
def test_configuration_files(folder: Path, count: int) -> None:
    """What composes can be written and composes to itself again."""
    config, _ = compose(model="dit_dec_tiny", algorithms=["er"], dataset="metaworld_quick")
    valid = to_dict(config)
    text = to_yaml(config).encode()
    path, again = folder / "c.yaml", folder / "again.yaml"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        read, _ = compose_files([str(path)])
        written = to_yaml(read)
        assert "${" not in written
        again.write_text(written)
        assert to_dict(must(lambda: compose_files([str(again)]))[0]) == to_dict(read)

    grafted = st.builds(
        lambda at, new: yaml.safe_dump(graft(valid, at, new)).encode("utf-8", "surrogatepass"), place, tree
    )
    dumped = tree.map(lambda v: yaml.safe_dump(v).encode("utf-8", "surrogatepass"))
    fuzz(count, grafted | edits.map(lambda e: damage(text, e)) | st.binary(max_size=40) | dumped, check)


@counts
def test_overrides(count: int) -> None:
    config, _ = compose(model="dit_dec_tiny", algorithms=["er"], dataset="metaworld_quick")
    known = [".".join(map(str, p)) for p in paths_of(to_dict(config)) if p and not any(isinstance(k, int) for k in p)]
    key = (
        st.sampled_from(known)
        | st.text(max_size=10)
        | st.sampled_from(["a." * 3000 + "b", "policy." + "a." * 3000 + "b"])
    )
    value = st.text(max_size=12) | st.sampled_from(SNIPPETS) | tree.map(lambda v: json.dumps(v, ensure_ascii=True))
    items = st.lists(
        st.builds(lambda k, sep, v: k + sep + v, key, st.sampled_from(["=", "=", "=", ""]), value), max_size=3
    )

    def check(overrides: list[str]) -> None:
        changed = override(config, overrides)
        again = must(lambda: override(config, []))
        assert to_dict(again) == to_dict(config), "the configuration that was overridden changed"
        if not overrides:
            assert to_dict(changed) == to_dict(config)
        yaml.safe_load(to_yaml(changed))

    fuzz(count, items, check)


# --------------------------------------------------------------------------------------------------- matrices

rate = st.none() | st.floats(0, 1)
name = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=6)


@st.composite
def matrices(draw: Any) -> dict[str, Any]:
    n = draw(st.integers(1, 4))
    row = st.lists(rate, min_size=n, max_size=n)
    k = draw(st.integers(1, n))
    return {
        "tasks": draw(st.lists(name, min_size=n, max_size=n)),
        "success": draw(st.lists(row, min_size=k, max_size=k)),
        "episodes": draw(
            st.none() | st.lists(st.lists(st.integers(0, 50), min_size=n, max_size=n), min_size=k, max_size=k)
        ),
        "base": draw(st.none() | row),
        "random": draw(st.none() | row),
        "criterion": draw(st.sampled_from(["success_once", "success_at_end"])),
    }


def numbers(rows: list[list[float | None]]) -> np.ndarray:
    return np.array([[math.nan if v is None else v for v in row] for row in rows], dtype=float)


def sound(record: Record) -> None:
    """What every record that was read fulfils; and its metrics can be computed."""
    k, n = record.success.shape
    assert 1 <= k <= n == len(record.tasks) and len(record.rows) == k
    values = record.success[~np.isnan(record.success)]
    assert ((values >= 0) & (values <= 1)).all()
    for metric in compute_metrics(record, bootstrap=5).values():
        assert metric["value"] is None or math.isfinite(metric["value"])
    json.dumps(compute_metrics(record, bootstrap=0), allow_nan=False)


@counts
def test_valid_matrices_are_read_as_they_are(folder: Path, count: int) -> None:
    def check(matrix: dict[str, Any]) -> None:
        path = folder / "m.json"
        path.write_text(json.dumps(matrix))
        read = load_record(path)
        assert read.tasks == matrix["tasks"] and read.criterion == matrix["criterion"]
        np.testing.assert_array_equal(read.success, numbers(matrix["success"]))
        for key, row in (("base", read.base), ("random", read.random)):
            assert (row is None) == (matrix[key] is None)
            if row is not None:
                np.testing.assert_array_equal(row, numbers([matrix[key]])[0])
        assert (read.episodes is None) == (matrix["episodes"] is None)
        sound(read)

        lines = [["k", *(f"t{j}" for j in range(len(matrix["tasks"])))]]
        for label in ("base", "random"):
            if matrix[label] is not None:
                lines.append([label, *("" if v is None else repr(v) for v in matrix[label])])
        lines += [[str(k), *("" if v is None else repr(v) for v in row)] for k, row in enumerate(matrix["success"])]
        csv = folder / "m.csv"
        csv.write_text("\n".join(",".join(line) for line in lines))
        np.testing.assert_array_equal(load_record(csv).success, numbers(matrix["success"]))

    fuzz(count, matrices(), lambda matrix: must(lambda: check(matrix)))


@counts
def test_damaged_json_matrices(folder: Path, count: int) -> None:
    valid = {
        "tasks": ["a", "b", "c"],
        "success": [[0.5, 0.25, None], [0.125, 1.0, 0.0], [0, 1, 0.75]],
        "episodes": [[4, 4, 0], [4, 4, 4], [4, 4, 4]],
        "base": [0.5, 0.5, 0.5],
        "criterion": "success_once",
    }
    path = folder / "m.json"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        record = load_record(path)
        sound(record)
        there = json.loads(data.decode("utf-8-sig"))
        np.testing.assert_array_equal(record.success, numbers(there["success"] if isinstance(there, dict) else there))

    fuzz(count, json_like(valid) | json_like(valid["success"]), check)


@counts
def test_damaged_csv_matrices(folder: Path, count: int) -> None:
    path = folder / "m.csv"
    text = b"k,a,b,c\nbase,0.5,0.5,0.5\n0,0.5,0.25,\n1,0.125,1,0\n2,0,1,0.75\n"
    cell = st.sampled_from(["0.5", "1", "", "null", "nan", "x", "80%", "1e5", '"', "0,5"]) | st.text(max_size=4)
    made = st.lists(st.lists(cell, max_size=4), max_size=5).flatmap(
        lambda rows: st.sampled_from(",;\t").map(
            lambda d: "\n".join(d.join(r) for r in rows).encode("utf-8", "replace")
        )
    )

    def check(data: bytes) -> None:
        path.write_bytes(data)
        sound(load_record(path))

    fuzz(count, edits.map(lambda e: damage(text, e)) | made | st.binary(max_size=40), check)


# ------------------------------------------------------------------------------------------------ run folders

MANIFEST = {
    "format": 1, "run_id": "r", "algorithm": "er", "algorithm_config": {"mode": "mix"}, "lora": {"enabled": False},
    "policy": "dit_dec_tiny", "dataset": "quick", "seed": 0, "mode": "sequential",
    "visits": [
        {"k": k, "task": t, "instruction": f"do {t}", "data": "/x", "episodes": 3, "expert_success": 1.0,
         "env": {"type": "metaworld", "task": t, "max_steps": 200}} for k, t in enumerate("ab")
    ],
    "heldout": [], "checkpoints": ["a", "b"], "data_fingerprint": "0", "base": {"path": "/b"}, "versions": {},
}  # fmt: skip


def episodes(k: int, j: int, count: int = 4) -> list[dict[str, Any]]:
    return [
        {"k": k, "j": j, "episode": i, "seed": 100 + i, "success_once": i < 2, "success_at_end": False, "length": 9}
        for i in range(count)
    ]


def make_run(root: Path) -> None:
    (root / "eval/cells").mkdir(parents=True)
    (root / "manifest.json").write_text(json.dumps(MANIFEST))
    for k, j in np.ndindex(2, 2):
        rows = "".join(json.dumps(e) + "\n" for e in episodes(k, j))
        (root / f"eval/cells/k{k:02d}_j{j:02d}.jsonl").write_text(rows)
    matrix = {"tasks": ["a", "b"], "success": [[0.5, 0.5]] * 2, "episodes": [[4, 4]] * 2, "criterion": "success_once"}
    (root / "eval/matrix.json").write_text(json.dumps(matrix))


@counts
def test_damaged_manifests(folder: Path, count: int) -> None:
    """What is read has all that an evaluation takes from it."""
    make_run(folder)

    def check(data: bytes) -> None:
        (folder / "manifest.json").write_bytes(data)
        record = load_record(folder)  # may be read where an evaluation could not use it
        np.testing.assert_array_equal(record.success, [[0.5, 0.5]] * 2)
        sound(record)
        manifest = read_manifest(folder)
        for c in [*manifest["visits"], *(manifest.get("heldout") or [])]:
            texts = (c["task"], c["instruction"], c["env"]["type"], c["env"]["task"])
            assert all(isinstance(t, str) for t in texts) and 1 <= c["env"]["max_steps"] <= 1_000_000
        assert isinstance(manifest["base"].get("path", ""), str | None)

    fuzz(count, json_like(MANIFEST), check)


@counts
def test_damaged_records(folder: Path, count: int) -> None:
    make_run(folder)
    path = folder / "eval/cells/k00_j01.jsonl"
    lines = [json.dumps(e).encode() for e in episodes(0, 1)]

    def check(data: bytes) -> None:
        path.write_bytes(data)
        try:
            rows = CellFile(folder / "eval", 0, 1).rows
            assert all(r["success_once"] in (0, 1) and r["episode"] == e for e, r in rows.items())
        except UserError as e:
            assert path.name in str(e)
        sound(load_record(folder))

    one = json_like(episodes(0, 1)[0]).map(lambda b: b"\n".join([lines[0], b, *lines[2:], b""]))
    fuzz(count, one | edits.map(lambda e: damage(b"\n".join(lines) + b"\n", e)), check)


@counts
def test_damaged_small_files(folder: Path, count: int) -> None:
    """config.yaml and checkpoint.json of a run, meta/clbench.json of a data set."""
    config, _ = compose(model="dit_dec_tiny", algorithms=["er"], dataset="metaworld_quick")
    text = to_yaml(config).encode()
    task = {"name": "a", "instruction": "do a", "task_index": 0, "episodes": [0, 1], "frames": 20, "expert_attempts": 2}
    task |= {"expert_successes": 2, "expert_success_rate": 1.0, "demo_attempts": 3, "demo_successes": 2}
    info = {"format": 1, "name": "d", "env_type": "metaworld", "seed": 0, "action_noise": 0.1, "tail_steps": 10}
    info |= {"max_steps": 200, "demos_per_task": 2, "ceiling_episodes": 20, "fingerprint": "0", "versions": {"a": "1"}}
    info |= {"tasks": [{**task, "demo_success_rate": 0.6}]}
    (folder / "meta").mkdir()

    def check(data: tuple[str, bytes]) -> None:
        kind, content = data
        path = folder / {"config": "config.yaml", "checkpoint": "checkpoint.json", "data": "meta/clbench.json"}[kind]
        path.write_bytes(content)
        try:
            if kind == "config":
                to_yaml(run_config(folder))
            elif kind == "checkpoint":
                read_checkpoint(folder).get("digest")
            else:
                read = load_info(folder)
                assert isinstance(read, DataInfo) and read.episodes >= 0 and read.frames >= 0
        except UserError as e:
            assert path.name in str(e) or "configuration" in str(e)

    fuzz(
        count,
        st.tuples(st.just("config"), edits.map(lambda e: damage(text, e)))
        | st.tuples(st.just("checkpoint"), json_like({"k": 0, "task": "a", "digest": "0"}))
        | st.tuples(st.just("data"), json_like(info)),
        check,
    )


# -------------------------------------------------------------------------------------------- checkpoint states

tensor = st.builds(
    lambda dtype, shape, seed: torch.from_numpy(np.random.default_rng(seed).integers(0, 2, shape)).to(dtype),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8]),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    st.integers(0, 9),
)
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(
    st.characters(exclude_categories=["Cs"]), max_size=4
)  # fmt: skip
states = st.recursive(
    plain | tensor,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs"]), max_size=4) | st.integers(0, 9), inner, max_size=3
        )
    ),
    max_leaves=8,
)


def same(a: Any, b: Any) -> bool:
    if torch.is_tensor(a) and torch.is_tensor(b):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@counts
def test_states_come_back_or_are_refused(folder: Path, count: int) -> None:
    """A state is read as it was written; after any damage it is that state or an error."""

    def check(data: tuple[Any, Any, str, list[Any]]) -> None:
        state, other, what, edit_list = data
        save_state(folder, "s", state)
        assert same(must(lambda: load_state(folder, "s")), state), "a state came back changed"
        if what == "mixed":
            save_state(folder, "o", other)
            (folder / "o.safetensors").replace(folder / "s.safetensors")
        else:
            path = folder / f"s.{what}"
            path.write_bytes(damage(path.read_bytes(), edit_list))
        assert same(load_state(folder, "s"), state), "damage went unnoticed"

    fuzz(count, st.tuples(states, states, st.sampled_from(["json", "safetensors", "mixed"]), edits), check)


@counts
def test_made_up_states(folder: Path, count: int) -> None:
    """Descriptions without a checksum, as clbench 0.1 wrote them: any tree gives a state of the known kinds."""
    save_state(folder, "s", {"a": torch.zeros(2), "b": [1, None]})
    valid = json.loads((folder / "s.json").read_text())["state"]

    def known(state: Any) -> bool:
        inner = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
        return isinstance(state, dict | list | int | float | str | torch.Tensor | None) and all(map(known, inner))

    def check(data: bytes) -> None:
        (folder / "s.json").write_bytes(data)
        assert known(load_state(folder, "s"))

    fuzz(count, json_like(valid), check)


def test_the_inputs_reach_what_they_are_meant_for() -> None:
    """The edits change files, and a valid file is among the shapes tried."""
    assert damage(b"abcdef", [("flip", 0.0, 0.0, b"")]) == b"`bcdef"
    assert damage(b"abcdef", [("end", 0.5, 0.0, b"")]) == b"abc"
    assert graft({"a": [1, 2]}, 0.99, "x") == {"a": [1, "x"]}
    assert (SHIPPED / "base.yaml").is_file()
