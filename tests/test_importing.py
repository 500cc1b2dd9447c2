"""`clbench data import`: RLDS and LIBERO's HDF5, written by the tests themselves; published files are not here."""

from __future__ import annotations

import io
import json
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from lerobot.datasets import LeRobotDataset
from PIL import Image

from clbench.cli import main
from clbench.config.schema import DatasetConfig, EnvConfig
from clbench.data.importing.card import CARD_FILE
from clbench.data.importing.conventions import Gripper, opening_command, rotated
from clbench.data.importing.crc32c import crc32c as fast_crc32c
from clbench.data.importing.example import Malformed, parse_example, values
from clbench.data.importing.layout import layout
from clbench.data.importing.libero_hdf5 import LiberoHdf5
from clbench.data.importing.rlds import Rlds
from clbench.data.importing.survey import conventions, survey
from clbench.data.source import check_every_byte, open_data
from clbench.envs.base import STATE_KEY
from clbench.envs.libero.simulator import LiberoSimulator, axis_angle
from clbench.envs.making import make_simulator
from clbench.errors import UserError
from clbench.io import read_json, sha256
from clbench.streams.stream import build_stream
from tests import recordings
from tests.recordings import KETCHUP, SIZE, SOUP, feature, libero_episode, libero_record, write_hdf5, write_rlds

IMAGE, WRIST = "observation.images.image", "observation.images.image2"
EPISODES = [libero_episode(SOUP, 0), libero_episode(KETCHUP, 1, frames=7), libero_episode(SOUP, 2, frames=4)]


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLBENCH_DATA_ROOT", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The modified LIBERO sets' layout: two shards, three episodes, two tasks."""
    records = [libero_record(e) for e in EPISODES]
    return write_rlds(tmp_path / "libero_object_no_noops" / "1.0.0", [records[:2], records[2:]])


def run(folder: Path, *options: str, kind: str = "rlds") -> int:
    return main(["data", "import", str(folder), "--from", kind, "--out", "new", *options])


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *options: str, kind: str = "rlds") -> str:
    """The one message with which an import ends."""
    capsys.readouterr()
    assert run(folder, *options, kind=kind) == 2
    out, err = capsys.readouterr()
    (line,) = err.strip().splitlines()
    assert out == "" and line.startswith("clbench: ") and len(line) < 1200
    return line


def nothing(root: Path) -> bool:
    return not root.exists() or not list(root.iterdir())


def frames(root: Path) -> list[dict[str, Any]]:
    """The frames of a set in order, from its files, without LeRobot."""
    texts = {row.pop("task_index"): text for row in rows(root / "meta" / "tasks.parquet") for text in [row["task"]]}
    found = [row for path in sorted((root / "data").glob("*/*.parquet")) for row in rows(path)]
    for i, row in enumerate(found):
        assert row["index"] == i
        row["task"] = texts[row["task_index"]]
        for key in row:
            if key.startswith("observation.images."):
                row[key] = np.asarray(Image.open(io.BytesIO(row[key]["bytes"])))
    return found


def rows(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.ParquetFile(path).read().to_pylist()
    return found


def same_as(root: Path, episodes: list[dict[str, Any]], found: list[dict[str, Any]] | None = None) -> None:
    """The set has the episodes' frames, in order."""
    found = frames(root) if found is None else found
    expected = [(e, i) for e, episode in enumerate(episodes) for i in range(len(episode["action"]))]
    assert len(found) == len(expected)
    for frame, (e, i) in zip(found, expected, strict=True):
        assert int(frame["episode_index"]) == e and frame["task"] == episodes[e]["text"]
        np.testing.assert_array_equal(frame["observation.state"], episodes[e]["state"][i])
        np.testing.assert_allclose(frame["action"], episodes[e]["action"][i], atol=1e-6)
        np.testing.assert_array_equal(frame[IMAGE], episodes[e]["image"][i])
        np.testing.assert_array_equal(frame[WRIST], episodes[e]["wrist_image"][i])


def as_lerobot_reads(root: Path) -> list[dict[str, Any]]:
    dataset = LeRobotDataset("new", root=root)
    found = [dict(dataset[i]) for i in range(len(dataset))]
    for frame in found:
        for key in (IMAGE, WRIST):
            frame[key] = (frame[key].numpy().transpose(1, 2, 0) * 255).round().astype(np.uint8)
    return found


# ------------------------------------------------------------------------------------- checksums and messages


def test_checksums_are_those_of_rfc_3720() -> None:
    vectors = {
        b"123456789": 0xE3069283, bytes(32): 0x8A9136AA, b"\xff" * 32: 0x62A8AB43, bytes(range(32)): 0x46DD794E, b"": 0
    }  # fmt: skip
    for data, crc in vectors.items():
        assert fast_crc32c(data) == crc == recordings.crc32c(data)


@pytest.mark.parametrize("count", [1, 3, 4, 5, 255, 256, 257, 1000, 4096 * 256 + 1])
def test_checksums_of_any_length(count: int) -> None:
    data = np.random.default_rng(count).integers(0, 256, count, dtype=np.uint8).tobytes()
    if count < 2000:
        assert fast_crc32c(data) == recordings.crc32c(data)
    else:  # linear: with equal lengths, the checksum of a sum is the sum of the checksums
        other, zeros = bytes([1]) + bytes(count - 2) + bytes([7]), bytes(count)
        both = bytes(a ^ b for a, b in zip(data, other, strict=True))
        assert fast_crc32c(data) ^ fast_crc32c(other) ^ fast_crc32c(zeros) == fast_crc32c(both)
        assert fast_crc32c(data) != fast_crc32c(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("packed", [True, False])
def test_messages_are_read_as_they_were_written(packed: bool) -> None:
    ints = np.array([0, 1, 127, 128, 300, 2**40, -1, -(2**63)])
    floats = np.array([0.0, -1.5, 3.25])
    parsed = parse_example(
        recordings.example(
            {"a/b": feature(ints, packed), "ä": feature(floats, packed), "c": feature([b"", b"xyz"]), "none": b""}
        )
    )
    assert list(parsed) == ["a/b", "ä", "c", "none"]
    np.testing.assert_array_equal(values(parsed["a/b"]), ints)
    np.testing.assert_array_equal(values(parsed["ä"]), floats.astype(np.float32))
    assert [bytes(v) for v in values(parsed["c"])] == [b"", b"xyz"]
    assert len(values(parsed["none"])) == 0


def test_messages_agree_with_protobuf() -> None:
    """An independent implementation of the wire format, where it is installed."""
    pytest.importorskip("google.protobuf")
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")
    kinds = {"BytesList": 12, "FloatList": 2, "Int64List": 3}
    for name, kind in kinds.items():
        file.message_type.add(name=name).field.add(name="value", number=1, type=kind, label=3)
    one = file.message_type.add(name="Feature")
    one.oneof_decl.add(name="kind")
    for number, name in enumerate(kinds, 1):
        one.field.add(name=name.lower(), number=number, type=11, type_name=f".t.{name}", label=1, oneof_index=0)
    many = file.message_type.add(name="Features")
    entry = many.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=9, label=1)
    entry.field.add(name="value", number=2, type=11, type_name=".t.Feature", label=1)
    many.field.add(name="feature", number=1, type=11, type_name=".t.Features.FeatureEntry", label=3)
    file.message_type.add(name="Example").field.add(
        name="features", number=1, type=11, type_name=".t.Features", label=1
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    written = message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))()
    written.features.feature["i"].int64list.value.extend([5, -7, 2**62])
    written.features.feature["f"].floatlist.value.extend([0.5, -2.0])
    written.features.feature["b"].byteslist.value.extend([b"\0\xff", b""])
    parsed = parse_example(written.SerializeToString())
    assert values(parsed["i"]).tolist() == [5, -7, 2**62]  # type: ignore[union-attr]
    assert values(parsed["f"]).tolist() == [0.5, -2.0]  # type: ignore[union-attr]
    assert [bytes(v) for v in values(parsed["b"])] == [b"\0\xff", b""]


def test_damaged_messages_are_noticed_or_read_and_nothing_else() -> None:
    whole = libero_record(EPISODES[0])
    rng = np.random.default_rng(0)
    noticed = 0
    for _ in range(300):
        data = bytearray(whole)
        for at in rng.integers(0, 200, 3):
            data[at] = rng.integers(256)
        try:
            for part in parse_example(bytes(data[: rng.integers(1, len(data))])).values():
                values(part)
        except Malformed:
            noticed += 1
    assert noticed > 200


# ------------------------------------------------------------------------------------------------------- RLDS


def test_libero_in_rlds(folder: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder.parent) == 0  # the version's folder is found below it
    out = capsys.readouterr().out
    assert "3 episodes, 16 frames, 20 a second" in out and f"{WRIST} from observation/wrist_image" in out
    assert "not used: observation/joint_state, discount" in out and "dataset.data=new" in out
    assert [p.name for p in root.iterdir()] == ["new"]
    same_as(root / "new", EPISODES)
    same_as(root / "new", EPISODES, as_lerobot_reads(root / "new"))
    card = read_json(root / "new" / CARD_FILE)
    assert card["imported_from"] == "rlds" and card["source"]["folder"] == str(folder)
    assert {n: d for n, (_, d) in card["source"]["files"].items()} == {p.name: sha256(p) for p in folder.iterdir()}
    assert card["conventions"]["gripper"] == "open=-1,close=1"
    assert read_json(root / "new" / "meta" / "info.json")["robot_type"] == "panda"


def libero_stream(**changes: Any) -> DatasetConfig:
    names = [text.replace(" ", "_") for text in (KETCHUP, SOUP)]
    settings = {"name": "two", "data": "new", "env": EnvConfig("libero", 280), "tasks": names, "pretrain": None}
    return DatasetConfig(**(settings | changes))


def test_an_imported_set_is_a_stream_and_its_manifest_says_where_it_is_from(folder: Path, root: Path) -> None:
    assert run(folder) == 0
    stream = build_stream(libero_stream())
    assert [(v.task, len(v.tasks[0].episodes), v.tasks[0].frames) for v in stream.visits] == [
        (KETCHUP.replace(" ", "_"), 1, 7), (SOUP.replace(" ", "_"), 2, 9),
    ]  # fmt: skip
    assert stream.visits[0].tasks[0].env == {
        "type": "libero", "task": KETCHUP.replace(" ", "_"), "render": {"fidelity": "full", "size": SIZE},
    }  # fmt: skip
    imported = stream.data["imported"]
    assert imported["imported_from"] == "rlds" and len(imported["source"]["files"]) == 4
    offline = build_stream(libero_stream(env=None, tasks=[KETCHUP, SOUP]))
    assert offline.fingerprint == stream.fingerprint and offline.visits[1].tasks[0].episodes == (0, 2)


def test_a_changed_file_of_an_imported_set_is_noticed(
    folder: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder) == 0
    settings = libero_stream()
    source = open_data(settings, "libero", settings.tasks, stream="two")
    check_every_byte(source.root, source.description, "two")
    (table,) = (root / "new" / "data").glob("*/*.parquet")
    data = bytearray(table.read_bytes())
    data[100] ^= 1
    table.write_bytes(data)
    with pytest.raises(UserError, match=r"damaged: data/.*was changed. Import it again"):
        open_data(settings, "libero", settings.tasks, stream="two")
    card = root / "new" / CARD_FILE
    card.write_text(card.read_text().replace('"rlds"', '"other"'))
    with pytest.raises(UserError, match=r"clbench_import\.json is damaged: it was changed"):
        open_data(settings, "libero", settings.tasks, stream="two")


def test_what_is_there_is_replaced_only_on_demand_and_only_an_import(
    folder: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "new").mkdir(parents=True)
    (root / "new" / "mine").touch()
    assert "made by something else" in refused(capsys, folder, "--force")
    (root / "new" / "mine").unlink()
    assert run(folder) == 0
    before = read_json(root / "new" / CARD_FILE)
    assert "already holds an imported data set" in refused(capsys, folder)
    assert run(folder, "--force") == 0
    assert read_json(root / "new" / CARD_FILE) == before  # the same files give the same set
    assert [p.name for p in root.iterdir()] == ["new"]


def test_jpeg_images_are_decoded(tmp_path: Path, root: Path) -> None:
    flat = dict(libero_episode(SOUP, 0))
    flat["image"] = np.full((5, SIZE, SIZE, 3), 77, dtype=np.uint8)
    flat["wrist_image"] = np.full((5, SIZE, SIZE, 3), 200, dtype=np.uint8)
    assert run(write_rlds(tmp_path / "set", [[libero_record(flat, "JPEG")]])) == 0
    same_as(root / "new", [flat])


def shard(folder: Path, number: int = 0) -> Path:
    return folder / f"libero_object-train.tfrecord-{number:05d}-of-00002"


def flipped(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def info(folder: Path, change: Callable[[dict[str, Any]], None], name: str = "dataset_info.json") -> None:
    raw = json.loads((folder / name).read_text())
    change(raw)
    (folder / name).write_text(json.dumps(raw))


def lengths(*found: str) -> Callable[[dict[str, Any]], None]:
    return lambda raw: raw["splits"][0].update(shardLengths=list(found))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "payload": (lambda f: flipped(shard(f), 500), "record 0 of .*00000-of-00002 is damaged: its contents do not match"),
    "length": (lambda f: flipped(shard(f), 2), "record 0 of .* is damaged: its length does not match its checksum"),
    "cut short": (
        lambda f: shard(f).write_bytes(shard(f).read_bytes()[:-9]), "00000-of-00002 is truncated: record 1 lacks 9"
    ),
    "cut in a length": (lambda f: shard(f).write_bytes(shard(f).read_bytes()[:7]), "within the length of record 0"),
    "not a record": (lambda f: shard(f).write_bytes(b"\x1f\x8b" + bytes(50)), "not a TFRecord file, or a compr"),
    "missing shard": (
        lambda f: shard(f, 1).unlink(), "1 of its 2 shards are missing, first libero_object-train.tfrecord-00001"
    ),
    "missing record": (lambda f: info(f, lengths("3", "1")), "has 2 records, and dataset_info.json says 3"),
    "no shards": (lambda f: [p.unlink() for p in f.glob("*tfrecord*")], "2 of its 2 shards are missing"),
    "no features": (lambda f: (f / "features.json").unlink(), "has no features.json"),
    "no description": (lambda f: (f / "dataset_info.json").unlink(), "is not an RLDS data set as TFDS writes it"),
    "no splits": (lambda f: info(f, lambda raw: raw.pop("splits")), "does not describe a TFDS data set: 'splits'"),
    "other format": (lambda f: info(f, lambda raw: raw.update(fileFormat="riegeli")), "stored as 'riegeli'"),
    "a name that leads elsewhere": (lambda f: info(f, lambda raw: raw.update(name="../x")), "'../x' is not a file"),
    "no steps": (
        lambda f: info(f, lambda raw: raw["featuresDict"]["features"].pop("steps"), "features.json"), "not an RLDS"
    ),
    "old features": (
        lambda f: (f / "features.json").write_text('{"type": "x", "content": {}}'), "version of TFDS from before 2022"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_set_ends_in_one_message(
    name: str, folder: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = DAMAGE[name]
    damage(folder)
    assert re.search(message, refused(capsys, folder))
    assert nothing(root)


def changed(**changes: Any) -> dict[str, Any]:
    return dict(libero_episode(SOUP, 5)) | changes


def nan() -> np.ndarray:
    state = libero_episode(SOUP, 5)["state"].copy()
    state[2, 1] = np.nan
    return state


EPISODE = libero_episode(SOUP, 5)
BIG = np.zeros((5, SIZE + 1, SIZE, 3), dtype=np.uint8)
RECORDS: dict[str, tuple[bytes, str]] = {
    "feature": (libero_record(EPISODE, steps__action=None), "record 1 of .* has no 'steps/action', which feat"),
    "size": (libero_record(changed(image=BIG)), "image 0 of 'observation/image' is 9×8 pixels; features.json says 8×8"),
    "image": (
        libero_record(EPISODE, steps__observation__image=feature([b"no image"] * 5)),
        "image 0 of 'observation/image' cannot be decoded",
    ),
    "images": (
        libero_record(EPISODE, steps__observation__image=feature([recordings.encoded(EPISODE["image"][0])])),
        "'observation/image' has 1 values, the action 5",
    ),
    "length": (
        libero_record(EPISODE, steps__observation__state=feature(np.ones(39))), "'observation/state' has 39 numbers, no"
    ),
    "steps": (
        libero_record(EPISODE, steps__observation__state=feature(EPISODE["state"][:4].astype(float))),
        "'observation/state' has 4 values, the action 5",
    ),
    "kind": (libero_record(EPISODE, steps__action=feature([b"x"] * 5)), "'action' holds bytes instead of numbers"),
    "nan": (libero_record(changed(state=nan())), "values for observation.state that are not finite"),
    "no text": (libero_record(changed(text=" ")), "record 1 of .* has an empty instruction.*--instruction TEXT"),
    "no utf-8": (
        libero_record(EPISODE, steps__language_instruction=feature([b"\xff"] * 5)), "'language_instruction' is not UTF"
    ),
    "empty": (libero_record(EPISODE, steps__action=b""), "has no frames"),
    "no message": (b"\x0a\x05\x0a\xff\xff\xff\x0f", "record 1 of .* is damaged: a field is longer than its message"),
    "pose": (
        libero_record(changed(action=3 * EPISODE["action"])), r"number \d of the action goes from .* takes"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDS)
def test_a_wrong_record_ends_in_one_message(
    name: str, tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record, message = RECORDS[name]
    folder = write_rlds(tmp_path / "set", [[libero_record(EPISODES[0]), record]])
    assert re.search(message, refused(capsys, folder))
    assert nothing(root)


def test_an_image_that_turns_out_wrong_while_writing_leaves_nothing(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [recordings.encoded(i) for i in EPISODES[0]["image"]]
    record = libero_record(EPISODES[0], steps__observation__image=feature([*images[:3], b"no image", images[4]]))
    folder = write_rlds(tmp_path / "set", [[libero_record(EPISODES[1]), record]])
    assert "image 3 of 'observation/image' cannot be decoded" in refused(capsys, folder)
    assert nothing(root)


@pytest.mark.parametrize(("opens", "closes"), [(1.0, 0.0), (0.0, 1.0)])
def test_another_gripper_has_to_be_named(
    opens: float, closes: float, tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    episodes = [dict(libero_episode(SOUP, i, frames=8)) for i in range(2)]
    records = []
    for episode in episodes:
        action = episode["action"].copy()
        action[:, -1] = np.where(action[:, -1] < 0, opens, closes)
        records.append(libero_record(episode | {"action": action}))
    folder = write_rlds(tmp_path / "set", [records])
    wanted = f"open={opens:g},close={closes:g}"
    message = refused(capsys, folder)
    assert "goes from 0 to 1" in message and f"The fingers move as in --gripper {wanted}." in message
    assert nothing(root)
    assert run(folder, "--gripper", wanted) == 0
    same_as(root / "new", episodes)
    assert (
        run(folder, "--force", "--gripper", f"open={closes:g},close={opens:g}") == 0
    )  # taken as given, with a warning
    assert f"The fingers move as in --gripper {wanted}." in capsys.readouterr().err


def test_a_gripper_that_counts_the_other_way_round_is_noticed_by_its_fingers(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    episode = dict(libero_episode(SOUP, 0, frames=8))
    action = episode["action"] * np.array([1, 1, 1, 1, 1, 1, -1], dtype=np.float32)
    folder = write_rlds(tmp_path / "set", [[libero_record(episode | {"action": action})]])
    assert "State it with --gripper open=1,close=-1" in refused(capsys, folder)
    assert run(folder, "--gripper", "open=1,close=-1") == 0
    same_as(root / "new", [episode])


def test_how_fingers_move_says_which_command_opens() -> None:
    commands = np.array([0.0, 0.0, 1.0, 1.0])
    assert opening_command(commands, np.array([0.01, 0.01, -0.01, -0.01])) == "low"
    assert opening_command(commands, np.array([-0.01, -0.01, 0.01, 0.01])) == "high"
    assert opening_command(commands, np.array([0.01, 0.01, 0.01, 0.01])) is None
    assert opening_command(commands, np.array([0.001, 0.001, -0.001, -0.001])) is None  # nothing moved
    assert opening_command(commands, np.array([0, 0, -0.01, -0.01])) == "low"  # it was open already
    assert opening_command(np.ones(4), np.array([0.01, 0.01, -0.01, -0.01])) is None
    np.testing.assert_allclose(Gripper(1.0, 0.0).converted(np.array([1.0, 0.5, 0.0])), [-1, 0, 1])


def quaternion(state: np.ndarray) -> np.ndarray:
    """States with a quaternion xyzw in the place of their axis-angle."""
    angles = state[:, 3:6].astype(float)
    angle = np.linalg.norm(angles, axis=1, keepdims=True)
    turned = np.concatenate([angles / angle * np.sin(angle / 2), np.cos(angle / 2)], axis=1)
    return np.concatenate([state[:, :3], turned, state[:, 6:]], axis=1)


def test_a_quaternion_has_to_be_named(tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = recordings.libero_features()
    steps["observation"]["featuresDict"]["features"]["state"] = recordings.tensor([9])
    record = libero_record(EPISODES[0] | {"state": quaternion(EPISODES[0]["state"])})
    folder = write_rlds(tmp_path / "set", [[record]], steps)
    message = refused(capsys, folder)
    assert (
        "9 numbers" in message
        and "so its rotation is a quaternion. Say which one with --rotation quaternion_xyzw or" in message
    )
    assert nothing(root)
    assert run(folder, "--rotation", "quaternion_xyzw") == 0
    states = [frame["observation.state"] for frame in frames(root / "new")]
    np.testing.assert_allclose(states, EPISODES[0]["state"], atol=1e-5)
    assert read_json(root / "new" / CARD_FILE)["conventions"]["rotation"] == "quaternion_xyzw"


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (np.tile([0, 0, 0, 0.6, 0, 0.8, 0, 1.0], (5, 1)), "so they are a quaternion, which leaves one number"),
        (np.tile([0, 0, 0, 3.1, 0, 0, 0, 1.0], (5, 1)), "the last two numbers of the state go from 0 to 1"),
    ],
)
def test_a_state_that_is_not_liberos_is_refused(
    state: np.ndarray, message: str, tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_rlds(tmp_path / "set", [[libero_record(EPISODES[0] | {"state": state})]])
    found = refused(capsys, folder)
    assert message in found and "--map observation.state=none" in found
    assert "give --fps" in refused(capsys, folder, "--map", "observation.state=none")  # then it is no set of LIBERO's


def test_rotations_become_axis_angles() -> None:
    angles = np.array(
        [[3.1, 0.2, -0.1], [3.14, 0.2, -0.1], [3.2, 0.2, -0.1], [0.1, -0.4, 0.3]]
    )  # two beyond π in length
    state = np.concatenate([np.zeros((4, 3)), angles, np.ones((4, 2))], axis=1)
    xyzw = quaternion(state)
    wxyz = xyzw[:, [0, 1, 2, 6, 3, 4, 5, 7, 8]]
    np.testing.assert_allclose(rotated(xyzw, "quaternion_xyzw"), state, atol=1e-9)
    np.testing.assert_allclose(rotated(wxyz, "quaternion_wxyz"), state, atol=1e-9)
    x, y, z, w = xyzw[:3, 3:7].T
    roll = np.arctan2(2 * (w * x + y * z), 1 - 2 * (x**2 + y**2))
    pitch, yaw = np.arcsin(2 * (w * y - z * x)), np.arctan2(2 * (w * z + x * y), 1 - 2 * (y**2 + z**2))
    euler = np.concatenate([state[:3, :3], np.stack([roll, pitch, yaw], axis=1), state[:3, 6:]], axis=1)
    np.testing.assert_allclose(rotated(euler, "euler_xyz"), state[:3], atol=1e-6)  # without a jump beyond π
    assert axis_angle(xyzw[0, 3:7]) == pytest.approx(angles[0])


def other_robot(folder: Path, texts: tuple[str, str] = ("open it", "close it")) -> Path:
    """A set of another robot: an action in parts, states as encoded tensors, whole numbers, a depth image."""
    steps = {
        "observation": recordings.nested(
            {
                "image_0": recordings.image(6, 10), "depth": recordings.image(6, 10, 1, "float32"),
                "pose": recordings.tensor([4], "float64", "zlib"), "raw": recordings.tensor([2], "int32", "bytes"),
                "natural_language_instruction": recordings.TEXT,
            }
        ),
        "action": recordings.nested(
            {"world_vector": recordings.tensor([3]), "open": recordings.tensor([], "bool"),
             "ragged": recordings.tensor([-1])}
        ),
    }  # fmt: skip
    records = []
    for e, text in enumerate(texts):
        rng = np.random.default_rng(e)
        images = [recordings.encoded(i) for i in rng.integers(0, 256, (3, 6, 10, 3), dtype=np.uint8)]
        pose = np.arange(12.0).reshape(3, 4) + e
        records.append(
            recordings.example(
                {
                    "steps/observation/image_0": feature(images),
                    "steps/observation/pose": feature([zlib.compress(p.astype("<f8").tobytes()) for p in pose]),
                    "steps/observation/raw": feature([np.array([i, -i], "<i4").tobytes() for i in range(3)]),
                    "steps/observation/natural_language_instruction": feature([text.encode()] * 3),
                    "steps/action/world_vector": feature(np.full((3, 3), 5.0 + e)),
                    "steps/action/open": feature(np.array([1, 1, 0])),
                }
            )
        )
    return write_rlds(folder, [records], steps, name="other")


def test_other_features_are_mapped(tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = other_robot(tmp_path / "set")
    assert "has no observation/state or observation/proprio" in refused(capsys, folder)
    state = ("--map", "observation.state=observation/pose+observation/raw")
    message = refused(capsys, folder, *state)
    assert "has no action, from which action would come" in message and "action/world_vector: number (3,)" in message
    action = ("--map", "action=action/world_vector+action/open")
    assert "give --fps N" in refused(capsys, folder, *state, *action)
    assert "has to be numbers, and is float32 tensor" in refused(capsys, folder, "--map", "action=action/ragged")
    depth = ("--map", "observation.images.depth=observation/depth")
    assert "has to be images with 3 channels" in refused(capsys, folder, *state, *action, *depth)
    assert "Did you mean 'observation/pose'" in refused(capsys, folder, "--map", "observation.state=observation/poser")
    assert nothing(root)
    assert run(folder, *state, *action, "--fps", "5") == 0
    dataset, info = frames(root / "new"), read_json(root / "new" / "meta" / "info.json")
    assert info["fps"] == 5 and info["features"]["observation.images.image_0"]["shape"] == [6, 10, 3]
    np.testing.assert_allclose(dataset[4]["observation.state"], [5, 6, 7, 8, 1, -1])
    np.testing.assert_allclose(dataset[5]["action"], [6, 6, 6, 0])
    assert dataset[0]["task"] == "open it" and "without a simulator" in capsys.readouterr().out
    stream = build_stream(libero_stream(env=None, tasks=["open it", "close it"]))
    assert [v.tasks[0].episodes for v in stream.visits] == [(0,), (1,)]


def test_an_empty_instruction_is_given_one(tmp_path: Path, root: Path) -> None:
    folder = other_robot(tmp_path / "set", ("", "close it"))
    options = ("--map", "observation.state=none", "--map", "action=action/world_vector", "--fps", "5")
    assert run(folder, *options, "--instruction", "do something") == 0
    assert [f["task"] for f in frames(root / "new")] == ["do something"] * 3 + ["close it"] * 3
    assert run(folder, *options, "--force", "--map", "task=none", "--instruction", "do something") == 0
    assert {f["task"] for f in frames(root / "new")} == {"do something"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--map", "action"], "give KEY=FEATURE"),
        (["--map", "image=observation/image"], "KEY is observation.state, action, task or observation.images.NAME"),
        (["--map", "action=action", "--map", "action=reward"], "gives action twice"),
        (["--map", "task=reward"], "has to be a text, and is number"),
        (["--map", "action=none"], "without them there is nothing to learn"),
        (["--gripper", "open=1"], "say which commands open and close it"),
        (["--gripper", "open=1,close=1"], "say which commands open and close it"),
        (["--rotation", "quaternion_xyzw"], "numbers 3 to 6 of the state are not a quaternion"),
        (["--split", "test"], "has no split 'test'. Known: train"),
        (["--fps", "0"], "--fps must be from 1 to 10000 but is 0"),
        (["--observed", "after"], "--observed is for --from libero_hdf5"),
        (["--", "dataset.data=x"], "takes no overrides"),
    ],
)
def test_wrong_options_end_in_one_message(
    options: list[str], message: str, folder: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, folder, *options)
    assert nothing(root)


def test_without_lengths_the_names_of_shards_say_how_many_there_are(
    folder: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info(folder, lambda raw: raw["splits"][0].pop("shardLengths"))
    shard(folder, 0).rename(folder / "away")
    assert "1 of its 2 shards are missing" in refused(capsys, folder)
    (folder / "away").rename(shard(folder, 0))
    assert run(folder) == 0
    same_as(root / "new", EPISODES)


# ----------------------------------------------------------------------------------------------- LIBERO's HDF5

SOUPS, KETCHUPS = [EPISODES[0], EPISODES[2]], [EPISODES[1]]


def demos(folder: Path, observed: str = "after", convention: str | None = "opengl") -> Path:
    for episodes in (SOUPS, KETCHUPS):
        name = episodes[0]["text"].replace(" ", "_")
        write_hdf5(folder / "libero_object" / f"{name}_demo.hdf5", episodes, observed, convention)
    return folder


def late(episode: dict[str, Any]) -> dict[str, Any]:
    """What is left of an episode whose first observation is not in the file: action t has the observation before it."""
    frames = len(episode["action"])
    return {k: v if k == "text" else v[1:frames] for k, v in episode.items()}


@pytest.mark.parametrize(("observed", "convention"), [("after", "opengl"), ("after", "opencv"), ("before", None)])
def test_libero_in_hdf5(observed: str, convention: str | None, tmp_path: Path, root: Path) -> None:
    """Both ways to write it, and both ways round of images, give what the simulator shows."""
    folder = demos(tmp_path / "libero", observed, convention)
    assert run(folder, kind="libero_hdf5") == 0
    episodes = [*SOUPS, *KETCHUPS]
    same_as(root / "new", [late(e) for e in episodes] if observed == "after" else episodes)
    card = read_json(root / "new" / CARD_FILE)
    assert card["conventions"]["observed"] == f"{observed} the action in its row"
    files = {str(p.relative_to(folder)): sha256(p) for p in folder.rglob("*.hdf5")}
    assert {n: d for n, (_, d) in card["source"]["files"].items()} == files
    assert [len(v.tasks[0].episodes) for v in build_stream(libero_stream()).visits] == [1, 2]


def test_images_and_observations_as_a_user_says(tmp_path: Path, root: Path) -> None:
    folder = demos(tmp_path / "libero", "before", None)
    assert run(folder, "--images", "as_is", "--observed", "after", kind="libero_hdf5") == 0
    dataset = frames(root / "new")
    assert len(dataset) == 16 - 3
    np.testing.assert_array_equal(dataset[0][IMAGE], EPISODES[0]["image"][0][::-1, ::-1])
    np.testing.assert_allclose(dataset[0]["action"], EPISODES[0]["action"][1])


def rewritten(folder: Path, change: Callable[[Any], None]) -> None:
    import h5py

    path = next(folder.rglob("*ketchup*.hdf5"))
    with h5py.File(path, "r+") as file:
        change(file)


def cut(folder: Path, share: float) -> None:
    path = next(folder.rglob("*ketchup*.hdf5"))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def replaced(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def go(file: Any) -> None:
        demo = file["data/demo_0"]
        value = change(demo[name][()])
        del demo[name]
        demo[name] = value

    return lambda folder: rewritten(folder, go)


def external(file: Any) -> None:
    import h5py

    del file["data/demo_0/obs/agentview_rgb"]
    file["data/demo_0/obs/agentview_rgb"] = h5py.ExternalLink("/etc/other.hdf5", "/x")


HDF5: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (lambda f: cut(f, 0.5), "ketchup.*cannot be read as HDF5, it is damaged or truncated"),
    "no hdf5": (lambda f: cut(f, 0), "ketchup.*cannot be read as HDF5"),
    "no data": (lambda f: rewritten(f, lambda h: h.move("data", "other")), "is not a file of LIBERO demonstr"),
    "fewer": (lambda f: rewritten(f, lambda h: h["data"].attrs.update(num_demos=3)), "has 1 demonstrations and says"),
    "camera": (
        lambda f: rewritten(f, lambda h: h["data/demo_0/obs"].pop("eye_in_hand_rgb")), "demo_0 of .*has no 'obs/eye_in"
    ),
    "size": (
        replaced("obs/agentview_rgb", lambda v: v[:, 1:]), "image 0 of 'obs/agentview_rgb' is 7×8 pixels, the .* 8×8"
    ),
    "dtype": (replaced("obs/agentview_rgb", lambda v: v / 255), "is float64 .*, not uint8 images"),
    "rows": (replaced("obs/ee_states", lambda v: v[1:]), "'obs/ee_states' has 5 values, the action 6"),
    "nan": (replaced("actions", lambda v: v * np.nan), "demo_0 of .*values for action that are not finite"),
    "gripper": (replaced("actions", lambda v: (v + 1) / 2), "demo_0 of .*ketchup.*which mixes two conventions"),
    "link": (lambda f: rewritten(f, external), "'obs/agentview_rgb' is a link, which is not followed"),
    "no joints": (
        lambda f: rewritten(f, lambda h: h["data/demo_0/obs"].pop("joint_states")), "Give --observed after or"
    ),
    "convention": (
        lambda f: rewritten(f, lambda h: h["data"].attrs.update(macros_image_convention="x")),
        "images are 'x', which is neither opengl nor opencv.*--images",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HDF5)
def test_a_damaged_hdf5_file_ends_in_one_message(
    name: str, tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = HDF5[name]
    folder = demos(tmp_path / "libero")
    damage(folder)
    found = refused(capsys, folder, kind="libero_hdf5")
    assert re.search(message, found), found
    assert nothing(root)


def test_the_instruction_is_the_files_name_where_it_is_a_task_and_else_what_it_says(tmp_path: Path) -> None:
    task = tmp_path / "pick_up_the_ketchup_and_place_it_in_the_basket_demo.hdf5"
    mine = tmp_path / "mine_demo.hdf5"
    for path in (task, mine):
        write_hdf5(path, [EPISODES[1]])
    said = {path: next(iter(LiberoHdf5(path).read(False))).texts("language_instruction", 1) for path in (task, mine)}
    assert said == {task: [KETCHUP], mine: ["Pick it up as the BDDL file says"]}


def test_without_h5py_one_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = demos(tmp_path / "libero")
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert "pip install 'clbench[hdf5]'" in refused(capsys, folder, kind="libero_hdf5")
    assert "there is no" in refused(capsys, tmp_path / "nowhere")


def test_a_folder_without_such_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there are no files *.hdf5" in refused(capsys, tmp_path, kind="libero_hdf5")
    write_rlds(tmp_path / "a", [[libero_record(EPISODES[0])]])
    write_rlds(tmp_path / "b", [[libero_record(EPISODES[0])]])
    assert f"there are 2 data sets below {tmp_path}: a, b. Name one" in refused(capsys, tmp_path)


def test_help_lists_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["data", "import", "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    for option in ("--from", "--out", "--map", "--gripper", "--rotation", "--images", "--observed", "--split", "--fps"):
        assert option in out


def test_bytes_changed_anywhere_end_in_a_result_or_one_message(tmp_path: Path) -> None:
    """Checksums are those of the changed records, so that what is behind them is tried, too."""
    rng = np.random.default_rng(0)
    records = [libero_record(e) for e in EPISODES[:2]]
    folder = write_rlds(tmp_path / "rlds", [records])
    hdf5 = write_hdf5(tmp_path / "hdf5" / "mine_demo.hdf5", EPISODES[:2])
    whole = {path: path.read_bytes() for path in (*folder.iterdir(), hdf5)}
    ended = {True: 0, False: 0}
    for i in range(90):
        for path, data in whole.items():
            path.write_bytes(data)
        path = (folder / "features.json", folder / "dataset_info.json", hdf5, None)[i % 4]
        data = bytearray(records[0] if path is None else whole[path])
        for at in rng.integers(0, len(data), 4):
            data[at] = rng.integers(32, 127)
        if path is None:
            shard = next(folder.glob("*tfrecord*"))
            shard.write_bytes(recordings.tfrecord([bytes(data), records[1]]))
        else:
            path.write_bytes(data)
        try:
            recording = LiberoHdf5(hdf5) if path == hdf5 else Rlds(folder)
            chosen = layout(recording, {}, "a text")
            conventions(survey(recording.read(True), chosen, "a text"), None, None)
            for episode in recording.read(False):
                for name in chosen.cameras.values():
                    list(episode.images(name))
            ended[True] += 1
        except UserError as e:
            assert 0 < len(str(e)) < 4000
            ended[False] += 1
    assert ended[False] > 40 < sum(ended.values())


# ------------------------------------------------------------------------------------------- the real simulator


@pytest.mark.libero
def test_what_the_simulator_does_is_recognised(tmp_path: Path) -> None:
    """The joints say which observation belongs to which action, the fingers which command opens the gripper."""
    import h5py

    sim = make_simulator({"type": "libero_state", "task": KETCHUP.replace(" ", "_")})
    rng = np.random.default_rng(0)
    try:
        assert isinstance(sim, LiberoSimulator)
        for observed in ("before", "after"):
            seen, joints, states, actions = [], [], [], []
            observation = sim.reset(0)
            for t in range(16):
                action = np.append(rng.uniform(-0.5, 0.5, 6), -1.0 if t < 6 else 1.0)
                states.append(sim.env.sim.get_state().flatten())
                actions.append(action)
                if observed == "after":
                    observation = sim.step(action).observation
                robot = sim.env.robots[0]
                joints.append(sim.env.sim.data.qpos[robot._ref_joint_pos_indexes].copy())
                seen.append(observation[STATE_KEY][:8])
                if observed == "before":
                    observation = sim.step(action).observation
            with h5py.File(tmp_path / f"{observed}.hdf5", "w") as file:
                demo = file.create_group("data/demo_0")
                demo["actions"], demo["states"] = np.stack(actions), np.stack(states)
                demo["obs/joint_states"] = np.stack(joints)
                demo["obs/ee_states"], demo["obs/gripper_states"] = np.stack(seen)[:, :6], np.stack(seen)[:, 6:]
    finally:
        sim.close()
    for observed in ("before", "after"):
        recording = LiberoHdf5(tmp_path / f"{observed}.hdf5")
        assert recording.notes["observed"] == f"{observed} the action in its row"
        found = survey(recording.read(False), layout(recording, {f"{IMAGE}": "none", WRIST: "none"}, "x"), "x")
        assert found.opens == "low"
        assert found.state_low[3] > 2  # a gripper that points down turns about an axis with positive x
