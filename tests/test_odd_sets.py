"""Data sets as they come: odd columns, short episodes, damaged values, empty instructions, LeRobot's older format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clbench.config.compose import compose
from clbench.errors import UserError
from clbench.evaluation.evaluate import evaluate
from clbench.io import read_json, write_json
from clbench.streams.stream import build_stream
from clbench.testing import toy_config
from clbench.training.trainer import train
from tests.lab_sets import lab_config, make_lab_set

TWO = ["left"] * 4 + ["right"] * 4


def stream_of(root: Path, **dataset: Any) -> Any:
    path = root.parent / f"{root.name}.yaml"
    path.write_text(json.dumps(lab_config(root, **dataset)))
    return compose(model="dit_dec_tiny", algorithms=["seqfft"], dataset=str(path), registered=["seqfft"])[0].dataset


def learned(root: Path, **dataset: Any) -> dict[str, Any]:
    """The matrix of a run that trained for a few steps."""
    config = toy_config(root.parent, {"name": "er"}, f"output_dir={root.parent}", "train.steps=3", "eval.episodes=9")
    config.dataset = stream_of(root, holdout=0.25, **dataset)
    return evaluate(train(config, "r"), config, progress=False)


def rewrite(root: Path, column: str, change: Any) -> None:
    """Replace a column of the set's one data file by `change` of its values; null removes the column."""
    (path,) = sorted((root / "data").glob("*/*.parquet"))
    table = pq.read_table(path)
    at = table.column_names.index(column)
    if change is None:
        table = table.remove_column(at)
    else:
        values = change(table[column].to_pylist())
        table = table.set_column(at, table.schema.field(at), pa.array(values, type=table.schema.field(at).type))
    pq.write_table(table, path)


def retype(root: Path, column: str, dtype: str, kind: Any) -> None:
    """Store a column as numbers of another kind, and say so."""
    (path,) = sorted((root / "data").glob("*/*.parquet"))
    table = pq.read_table(path)
    at = table.column_names.index(column)
    rows = [[kind(round(v)) for v in row] for row in table[column].to_pylist()]
    types = {"bool": pa.bool_(), "int64": pa.int64(), "uint8": pa.uint8(), "float64": pa.float64()}
    array = pa.array(rows, type=pa.list_(types[dtype]))
    pq.write_table(table.set_column(at, column, array).replace_schema_metadata(None), path)
    info = read_json(root / "meta" / "info.json")
    info["features"][column]["dtype"] = dtype
    write_json(root / "meta" / "info.json", info)


@pytest.mark.parametrize(
    ("column", "dtype", "kind"),
    [
        ("action", "bool", lambda v: v > 0),
        ("action", "int64", int),
        ("observation.state", "uint8", abs),
        ("observation.state", "float64", float),
    ],
)
def test_numbers_of_any_kind_are_read_as_float32(tmp_path: Path, column: str, dtype: str, kind: Any) -> None:
    root = make_lab_set(tmp_path / "set", TWO)
    retype(root, column, dtype, kind)
    matrix = learned(root)
    assert np.isfinite(matrix["error"]).all() and np.isfinite(matrix["others"]["loss"]).all()


def test_columns_that_are_not_used_may_be_anything(tmp_path: Path) -> None:
    extra = {
        "next.done": ({"dtype": "bool", "shape": (1,), "names": None}, lambda e, i: np.array([i == 5])),
        "counter": ({"dtype": "int64", "shape": (1,), "names": None}, lambda e, i: np.array([i])),
        "observation.extra": ({"dtype": "float32", "shape": (2,), "names": None}, lambda e, i: np.ones(2, np.float32)),
    }
    root = make_lab_set(tmp_path / "set", TWO, features=extra)
    stream = build_stream(stream_of(root))
    assert stream.data["features_unused"] == [
        "counter", "episode_index", "frame_index", "index", "next.done", "observation.extra", "task_index", "timestamp",
    ]  # fmt: skip
    assert np.isfinite(learned(root)["error"]).all()


def test_episodes_of_one_frame(tmp_path: Path) -> None:
    root = make_lab_set(tmp_path / "set", TWO, lengths=[1, 1, 3, 1, 1, 5, 1, 1])
    assert np.isfinite(learned(root)["error"]).all()


@pytest.mark.parametrize(
    ("column", "change", "words"),
    [
        ("action", None, r"is damaged: .*action"),
        ("action", lambda rows: [[float("nan")] * 3, *rows[1:]], r"'action' \(episode 0\) that are not finite"),
        ("observation.state", lambda rows: [*rows[:-1], [float("inf")] * 6], r"'observation.state' \(episode 7\)"),
        ("observation.state", lambda rows: [None, *rows[1:]], r"is damaged: .*observation.state"),
        ("episode_index", lambda rows: [1, *rows[1:]], "frames of episode 0 are not those"),
    ],
)
def test_damaged_columns_are_one_message(tmp_path: Path, column: str, change: Any, words: str) -> None:
    root = make_lab_set(tmp_path / "set", TWO)
    rewrite(root, column, change)
    with pytest.raises(UserError, match=words):
        build_stream(stream_of(root))


def test_a_set_without_actions_or_observations(tmp_path: Path) -> None:
    root = make_lab_set(tmp_path / "set", TWO, names=("observation.state", "command"))
    with pytest.raises(UserError, match=r"has no actions: .*numbers, one dimension.*command float32 \(3,\).*rename"):
        build_stream(stream_of(root))
    assert len(build_stream(stream_of(root, rename={"command": "action"})).columns) == 2
    blind = make_lab_set(tmp_path / "blind", TWO, names=("qpos", "action"))
    with pytest.raises(UserError, match="has no observations"):
        build_stream(stream_of(blind))


def test_empty_instructions(tmp_path: Path) -> None:
    root = make_lab_set(tmp_path / "set", ["", "", "right", "right"])
    with pytest.raises(UserError, match=r"2 episodes with an empty instruction\. Name their task"):
        build_stream(stream_of(root))
    named = build_stream(stream_of(root, instructions={"": "unnamed"}))
    assert [(t.name, t.instruction, t.episodes) for t in named.columns] == [
        ("unnamed", "", (0, 1)), ("right", "right", (2, 3)),
    ]  # fmt: skip
    only = stream_of(root, tasks=["0-1", "2-3"], partition="by_episodes")
    assert [t.instruction for t in build_stream(only).columns] == ["", "right"]
    assert np.isfinite(learned(root, instructions={"": "unnamed"})["error"]).all()


@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v1.6"])
def test_lerobots_older_formats(tmp_path: Path, version: str) -> None:
    """As a v2 set lies on disk: JSON lines in meta/, one file for each episode."""
    root = make_lab_set(tmp_path / "set", TWO)
    info = read_json(root / "meta" / "info.json")
    data_path = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    write_json(root / "meta" / "info.json", info | {"codebase_version": version, "data_path": data_path})
    shutil.rmtree(root / "meta" / "episodes")
    (root / "meta" / "tasks.parquet").unlink()
    (root / "meta" / "tasks.jsonl").write_text('{"task_index": 0, "task": "left"}\n')
    (root / "meta" / "episodes.jsonl").write_text('{"episode_index": 0, "tasks": ["left"], "length": 6}\n')
    with pytest.raises(UserError, match=rf"format {version}; clbench reads v3\. Convert it with .*v21_to_v30"):
        build_stream(stream_of(root))


def test_sets_whose_images_differ(tmp_path: Path) -> None:
    def camera(name: str, size: int) -> Any:
        image = {"dtype": "image", "shape": (size, size, 3), "names": ["height", "width", "channel"]}
        return {f"observation.images.{name}": (image, lambda e, i: np.full((size, size, 3), e + i, np.uint8))}

    for name, features in (("a", camera("top", 16)), ("b", camera("top", 24)), ("c", camera("wrist", 16))):
        make_lab_set(tmp_path / name, TWO, lengths=2, features=features)

    def both(first: str, second: str, **dataset: Any) -> Any:
        path = tmp_path / "both.yaml"
        path.write_text(json.dumps(lab_config(tmp_path / first, tmp_path / second, **dataset)))
        config = compose(model="dit_dec_tiny", algorithms=["seqfft"], dataset=str(path), registered=["seqfft"])[0]
        return build_stream(config.dataset)

    with pytest.raises(UserError, match=r"top: images \(16, 16, 3\) and images \(24, 24, 3\)"):
        both("a", "b")
    with pytest.raises(UserError, match=r"top: images \(16, 16, 3\) and none; observation.images.wrist: none and"):
        both("a", "c")
    renamed = both("a", "c", rename={"observation.images.wrist": "observation.images.top"})
    assert [len(t.pieces) for t in renamed.columns] == [2, 2]
