"""Data sets as they come: odd columns, short episodes, damaged values, empty instructions, LeRobot's older format."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from clbench.checkpoints.policy_io import load_policy
from clbench.config.compose import compose
from clbench.config.policy_types import check_fits
from clbench.data.frames import StreamFrames, unpacked, used_features
from clbench.errors import UserError
from clbench.evaluation.evaluate import evaluate
from clbench.io import read_json, read_jsonl, write_json
from clbench.policies.view import PolicyView
from clbench.streams.stream import build_stream, pretraining_tasks
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


def camera(name: str, size: int) -> Any:
    image = {"dtype": "image", "shape": (size, size, 3), "names": ["height", "width", "channel"]}
    rng = np.random.default_rng(size)
    return {f"observation.images.{name}": (image, lambda e, i: rng.integers(0, 256, (size, size, 3), dtype=np.uint8))}


def both(root: Path, first: str, second: str, **dataset: Any) -> Any:
    path = root / "both.yaml"
    path.write_text(json.dumps(lab_config(root / first, root / second, **dataset)))
    return compose(model="dit_dec_tiny", algorithms=["seqfft"], dataset=str(path), registered=["seqfft"])[0]


class _Counting:
    """An encoder whose feature is the images' height."""

    shape = (1, 1)
    cameras = {"observation.images.top": "encoded"}  # noqa: RUF012

    def identity(self, camera: str) -> str:
        return "height"

    def encode(self, camera: str, images: torch.Tensor) -> torch.Tensor:
        return torch.full((len(images), 1, 1), float(images.shape[-2]))


ALONE = SimpleNamespace(action_delta_indices=[0, 1], observation_delta_indices=None)


def test_sets_whose_images_differ(tmp_path: Path) -> None:
    top = "observation.images.top"
    for name, features in (("a", camera("top", 16)), ("b", camera("top", 24)), ("c", camera("wrist", 16))):
        make_lab_set(tmp_path / name, TWO, lengths=2, features=features)
    with pytest.raises(UserError, match=r"top: images \(16, 16, 3\) and images \(24, 24, 3\).*dataset\.resize"):
        build_stream(both(tmp_path, "a", "b").dataset)
    with pytest.raises(UserError, match=r"top: images \(16, 16, 3\) and none; observation.images.wrist: none and"):
        build_stream(both(tmp_path, "a", "c").dataset)
    with pytest.raises(UserError, match=r"dataset\.resize: the data set in .* has no such feature 'action'"):
        build_stream(both(tmp_path, "a", "b", resize={top: 16, "action": 16}).dataset)
    renamed = build_stream(both(tmp_path, "a", "c", rename={"observation.images.wrist": top}).dataset)
    assert [len(t.pieces) for t in renamed.columns] == [2, 2]
    stream = build_stream(both(tmp_path, "a", "b", resize={top: 16}).dataset)
    kept, decoded = (StreamFrames([v.tasks for v in stream.visits], ALONE, gb) for gb in (1.0, 0.0))  # type: ignore[arg-type]
    refs = torch.tensor([[k, i] for k in range(2) for i in range(kept.length(k))])
    images = [unpacked(frames.fetch(refs))[top] for frames in (kept, decoded)]
    assert images[0].shape == (32, 3, 16, 16) and torch.equal(*images)
    plain = StreamFrames([v.tasks[:1] for v in stream.visits], ALONE)  # type: ignore[arg-type]
    assert plain.parts(0)[0].task.root.name == "a"
    own = np.random.default_rng(16).integers(0, 256, (16, 16, 3), dtype=np.uint8)  # of that size: as they were
    assert np.array_equal((images[0][0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy(), own)
    encoder = _Counting()
    for size in (16, 8):  # what is kept of one size is not taken for another
        sized = build_stream(both(tmp_path, "a", "b", resize={top: size}).dataset)
        made = StreamFrames([v.tasks for v in sized.visits], ALONE)  # type: ignore[arg-type]
        assert made.keep_features(encoder, 1.0)
        assert (made.fetch(refs)["encoded"] == size).all()
    assert used_features(stream.columns[0].pieces[1], read_json(tmp_path / "b" / "meta" / "info.json")["features"])[
        top
    ]["shape"] == (16, 16, 3)


def test_sets_of_other_widths_are_padded(tmp_path: Path) -> None:
    make_lab_set(tmp_path / "a", TWO, action=3, state=5)
    make_lab_set(tmp_path / "b", TWO, action=4, state=6)
    widths = {"action": 4, "observation.state": 6}
    with pytest.raises(
        UserError, match=r"action: \(3,\) and \(4,\); observation.state: \(5,\) and \(6,\).*dataset\.pad"
    ):
        build_stream(both(tmp_path, "a", "b").dataset)
    with pytest.raises(UserError, match=r"'action' of the data set in .*b has 4 numbers, more than 3"):
        build_stream(both(tmp_path, "a", "b", pad={"action": 3, "observation.state": 6}).dataset)
    padded = both(tmp_path, "a", "b", pad=widths, partition="by_dataset", holdout=0.25)
    stream = build_stream(padded.dataset)
    frames = StreamFrames([v.tasks for v in stream.visits], ALONE)  # type: ignore[arg-type]
    batch = frames.fetch(torch.tensor([[0, 0], [1, 0]]))
    assert batch["action"].shape == (2, 2, 4) and batch["observation.state"].shape == (2, 6)
    assert batch["action_dim_is_pad"].tolist() == [[False, False, False, True], [False] * 4]
    assert (batch["action"][0, :, 3] == 0).all() and batch["observation.state"][0, 5] == 0
    config = toy_config(tmp_path, {"name": "er"}, f"output_dir={tmp_path}", "train.steps=3", "eval.episodes=9")
    config.dataset = padded.dataset
    folder = train(config, "r")
    matrix = evaluate(folder, config, progress=False)
    each = matrix["dimensions"]["first_error"]["normalised"][1]
    assert each[0][3] is None and None not in each[0][:3] and None not in each[1]
    first = read_jsonl(folder / "eval" / "cells" / "k01_j00.jsonl")[0]["dimensions"]["first_error"]["normalised"]
    assert read_jsonl(folder / "eval" / "cells" / "k01_j00.jsonl")[0]["first_error"] == pytest.approx(
        np.mean(first[:3])
    )
    loaded = load_policy(folder / "checkpoints" / "task_01" / "policy")
    view = PolicyView(loaded.policy, loaded.policy, loaded.preprocessor, nullcontext)
    chunks = StreamFrames([v.tasks for v in stream.visits], loaded.policy.config)
    some = chunks.fetch(torch.tensor([[0, 0], [1, 0]]))
    found = view.outputs(some, view.draw(2, torch.Generator().manual_seed(0)), ("loss", "prediction", "target", "mask"))
    assert (
        found.mask is not None and found.prediction is not None and found.target is not None and found.loss is not None
    )
    squared = (found.prediction - found.target).square()
    by_hand = [squared[i][found.mask[i]].mean() for i in range(2)]
    assert torch.allclose(found.loss, torch.stack(by_hand)) and found.mask[0, 0].tolist() == [True, True, True, False]


def test_padding_is_the_same_from_lerobots_items(tmp_path: Path) -> None:
    """Frames with images that are not kept come from LeRobot, which drops the dimension of single numbers."""
    top = "observation.images.top"
    for name, action in (("a", 1), ("b", 3)):
        make_lab_set(tmp_path / name, TWO, lengths=2, action=action, state=action + 1, features=camera("top", 16))
    pad = {"action": 3, "observation.state": 4}
    stream = build_stream(both(tmp_path, "a", "b", pad=pad).dataset)
    kept, decoded = (StreamFrames([v.tasks for v in stream.visits], ALONE, gb) for gb in (1.0, 0.0))  # type: ignore[arg-type]
    refs = torch.tensor([[k, i] for k in range(2) for i in range(kept.length(k))])
    one, other = unpacked(kept.fetch(refs)), unpacked(decoded.fetch(refs))
    assert one["action"].shape == (len(refs), 2, 3) and one["observation.state"].shape == (len(refs), 4)
    for key in ("action", "observation.state", "action_dim_is_pad", top):
        assert torch.equal(one[key], other[key])


def test_the_bases_sets_are_shaped_alike(tmp_path: Path) -> None:
    make_lab_set(tmp_path / "a", TWO, action=3)
    make_lab_set(tmp_path / "b", TWO, action=4)
    sets = [{"data": str(shutil.copytree(tmp_path / name, tmp_path / f"base_{name}"))} for name in ("a", "b")]
    config = both(tmp_path, "a", "b", pad={"action": 4}, pretrain={"sets": sets})
    assert all(t.pad == {"action": 4} for t in pretraining_tasks(config.dataset)[0])
    config.dataset.pad = {"action": 3}
    with pytest.raises(UserError, match=r"'action' of the data set in .*b has 4 numbers, more than 3"):
        pretraining_tasks(config.dataset)


def test_padding_needs_a_policy_that_leaves_it_out(tmp_path: Path) -> None:
    make_lab_set(tmp_path / "a", TWO)
    config = compose(model="act", algorithms=["seqfft"], dataset="metaworld_quick", registered=["seqfft"])[0]
    config.dataset.pad = {"action": 5}
    with pytest.raises(UserError, match="policy type 'act' would count what is added: use dit_dec or dit_encdec"):
        check_fits(config)
    for settings, words in (({"pad": {"reward": 3}}, "is for observation.state and action"),
                            ({"resize": {"observation.images.top": 2}}, "8 to 4096 pixels")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            stream_of(tmp_path / "a", **settings)
