"""Data sets in the formats that `clbench data import` reads, byte by byte: TFRecord files of RLDS, and LIBERO's HDF5.

Nothing here uses clbench's own readers, TensorFlow or protobuf.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = 8
KETCHUP, SOUP = "pick up the ketchup and place it in the basket", "pick up the alphabet soup and place it in the basket"


def crc32c(data: bytes) -> int:
    """A bit at a time, as RFC 3720 defines it."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = (register >> 1) ^ (0x82F63B78 * (register & 1))
    return register ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def tfrecord(payloads: Sequence[bytes]) -> bytes:
    heads = [struct.pack("<Q", len(p)) for p in payloads]
    return b"".join(h + masked(h) + p + masked(p) for h, p in zip(heads, payloads, strict=True))


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def message(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def feature(values: Sequence[Any] | np.ndarray, packed: bool = True) -> bytes:
    """A tf.train.Feature of byte strings, floats or whole numbers."""
    if isinstance(values, np.ndarray):
        values = values.ravel().tolist()
    if isinstance(values[0], bytes):
        return message(1, b"".join(message(1, v) for v in values))
    if isinstance(values[0], float):
        parts = [struct.pack("<f", v) for v in values]
        return message(2, message(1, b"".join(parts)) if packed else b"".join(varint(1 << 3 | 5) + p for p in parts))
    numbers = [varint(int(v)) for v in values]
    return message(3, message(1, b"".join(numbers)) if packed else b"".join(varint(1 << 3) + n for n in numbers))


def example(features: Mapping[str, bytes]) -> bytes:
    entries = [message(1, message(1, name.encode()) + message(2, content)) for name, content in features.items()]
    return message(1, b"".join(entries))


def encoded(image: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------------- RLDS


def tensor(shape: Sequence[int], dtype: str = "float32", encoding: str = "none") -> dict[str, Any]:
    return {
        "pythonClassName": "tensorflow_datasets.core.features.tensor_feature.Tensor",
        "tensor": {"shape": {"dimensions": [str(n) for n in shape]} if shape else {}, "dtype": dtype,
                   "encoding": encoding},
    }  # fmt: skip


def image(height: int = SIZE, width: int = SIZE, channels: int = 3, dtype: str = "uint8") -> dict[str, Any]:
    return {
        "pythonClassName": "tensorflow_datasets.core.features.image_feature.Image",
        "image": {"shape": {"dimensions": [str(height), str(width), str(channels)]}, "dtype": dtype,
                  "encodingFormat": "jpeg"},
    }  # fmt: skip


TEXT = {"pythonClassName": "tensorflow_datasets.core.features.text_feature.Text", "text": {}}


def nested(features: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
        "featuresDict": {"features": dict(features)},
    }


def libero_features() -> dict[str, Any]:
    """What a step of the modified LIBERO sets has."""
    return {
        "observation": nested(
            {"image": image(), "wrist_image": image(), "state": tensor([8]), "joint_state": tensor([7])}
        ),
        "action": tensor([7]),
        "discount": tensor([]),
        "reward": tensor([]),
        "is_first": tensor([], "bool"),
        "is_last": tensor([], "bool"),
        "is_terminal": tensor([], "bool"),
        "language_instruction": TEXT,
    }


def libero_episode(text: str, seed: int, frames: int = 5) -> dict[str, Any]:
    """Arrays of one episode as LIBERO's simulator shows it: a gripper that closes at +1 after it was opened at -1."""
    rng = np.random.default_rng(seed)
    gripper = np.where(np.arange(frames) < frames // 2, -1.0, 1.0)
    change = np.where(gripper < 0, 0.006, -0.006)
    opening = 0.02 + np.concatenate([[0.0], np.cumsum(change)[:-1]])
    pose = np.concatenate([rng.normal(size=(frames, 3)), np.tile([3.1, 0.2, -0.1], (frames, 1))], axis=1)
    return {
        "image": rng.integers(0, 256, (frames, SIZE, SIZE, 3), dtype=np.uint8),
        "wrist_image": rng.integers(0, 256, (frames, SIZE, SIZE, 3), dtype=np.uint8),
        "state": np.concatenate([pose, opening[:, None], -opening[:, None]], axis=1).astype(np.float32),
        "action": np.concatenate([rng.uniform(-0.9, 0.9, (frames, 6)), gripper[:, None]], axis=1).astype(np.float32),
        "text": text,
    }


def libero_record(episode: Mapping[str, Any], kind: str = "PNG", **changes: bytes | None) -> bytes:
    """The record of an episode; `changes`: other features in place of these, None = none (names with __ for /)."""
    frames = len(episode["action"])
    first, last = np.arange(frames) == 0, np.arange(frames) == frames - 1
    features: dict[str, bytes | None] = {
        "steps/observation/image": feature([encoded(i, kind) for i in episode["image"]]),
        "steps/observation/wrist_image": feature([encoded(i, kind) for i in episode["wrist_image"]]),
        "steps/observation/state": feature(episode["state"].astype(float)),
        "steps/observation/joint_state": feature(np.zeros((frames, 7))),
        "steps/action": feature(episode["action"].astype(float)),
        "steps/discount": feature(np.ones(frames)),
        "steps/reward": feature(last.astype(float)),
        "steps/is_first": feature(first.astype(int)),
        "steps/is_last": feature(last.astype(int)),
        "steps/is_terminal": feature(last.astype(int)),
        "steps/language_instruction": feature([episode["text"].encode()] * frames),
        "episode_metadata/file_path": feature([b"/somewhere/demo.hdf5"]),
        **{name.replace("__", "/"): value for name, value in changes.items()},
    }
    return example({name: value for name, value in features.items() if value is not None})


def write_rlds(
    folder: Path,
    shards: Sequence[Sequence[bytes]],
    steps: Mapping[str, Any] | None = None,
    name: str = "libero_object",
    split: str = "train",
) -> Path:
    """Write a set as TFDS lays it out: `shards` of records, `steps` the features of a step."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{name}-{split}.tfrecord-{i:05d}-of-{len(shards):05d}" for i in range(len(shards))]
    for shard, records in zip(names, shards, strict=True):
        (folder / shard).write_bytes(tfrecord(records))
    info = {
        "fileFormat": "tfrecord", "moduleName": "libero.libero_dataset_builder", "name": name, "version": "1.0.0",
        "releaseNotes": {"1.0.0": "Initial release."},
        "splits": [{"filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}", "name": split,
                    "numBytes": "1", "shardLengths": [str(len(records)) for records in shards]}],
    }  # fmt: skip
    (folder / "dataset_info.json").write_text(json.dumps(info))
    features = nested(
        {
            "steps": {
                "pythonClassName": "tensorflow_datasets.core.features.dataset_feature.Dataset",
                "sequence": {"feature": nested(steps or libero_features()), "length": "-1"},
            },
            "episode_metadata": nested({"file_path": TEXT}),
        }
    )
    (folder / "features.json").write_text(json.dumps(features))
    return folder


# ------------------------------------------------------------------------------------------------- LIBERO's HDF5


def write_hdf5(
    path: Path, episodes: Sequence[Mapping[str, Any]], observed: str = "after", convention: str | None = "opengl"
) -> Path:
    """Write episodes as LIBERO's create_dataset.py ("after") or OpenVLA's regenerated files ("before") have them.

    The rows of a file are (observation, action). "before": those of the episode. "after": observation t + 1 beside
    action t, so that the first observation is nowhere; a last one is made up.
    """
    import h5py

    turn = {"opengl": (slice(None, None, -1), slice(None, None, -1)), "opencv": (slice(None), slice(None, None, -1))}
    rows, columns = turn[convention or "opengl"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        if observed == "after":
            data.attrs["problem_info"] = json.dumps({"language_instruction": "Pick it up as the BDDL file says"})
            data.attrs["num_demos"] = len(episodes)
        if convention is not None and observed == "after":
            data.attrs["macros_image_convention"] = convention
        for i, episode in enumerate(episodes):
            frames = len(episode["action"])
            joints = np.cumsum(np.full((frames + 1, 7), 0.1), axis=0)
            late = slice(1, None) if observed == "after" else slice(0, frames)

            def seen(values: np.ndarray, late: slice = late) -> np.ndarray:
                return np.concatenate([values, values[-1:]])[late]

            demo = data.create_group(f"demo_{i}")
            obs = demo.create_group("obs")
            obs["agentview_rgb"] = seen(episode["image"])[:, rows, columns]
            obs["eye_in_hand_rgb"] = seen(episode["wrist_image"])[:, rows, columns]
            obs["ee_states"] = seen(episode["state"].astype(np.float64))[:, :6]
            obs["ee_pos"], obs["ee_ori"] = obs["ee_states"][:, :3], obs["ee_states"][:, 3:]
            obs["gripper_states"] = seen(episode["state"].astype(np.float64))[:, 6:]
            obs["joint_states"] = joints[late] - 0.003  # as old as robosuite's observations
            demo["actions"] = episode["action"].astype(np.float64)
            demo["states"] = np.concatenate(
                [np.arange(frames)[:, None], joints[:frames], np.ones((frames, 20))], axis=1
            )
    return path
