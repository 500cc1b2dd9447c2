"""What differs between a configuration and the one that a run was started with, and which differences are allowed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clbench.checkpoints import training_state
from clbench.checkpoints.base import WEIGHTS, weights_digest
from clbench.checkpoints.run_folder import PEFT_COPY, absolute, absolute_paths, finished_visits, read_manifest
from clbench.checkpoints.whole import DESCRIPTION
from clbench.config.compose import load_yaml, to_dict
from clbench.config.reading import flatten
from clbench.config.schema import Config, PretrainDataConfig
from clbench.errors import UserError, nearest
from clbench.io import read_json
from clbench.paths import model_root, named_folder
from clbench.streams.stream import TaskStream, pretraining_data

# What may differ when a run is resumed: no weight changes (threads, ranks and devices change the last bits of sums).
FREE_ON_RESUME = (
    "log.", "eval.", "output_dir", "train.threads", "train.num_workers", "train.frame_cache_gb", "train.log_every",
    "train.strategy", "train.collective_timeout_s", "train.device", "train.save_every_", "train.compile",
    "train.on_nonfinite", "train.eval_during_training", "train.keep_weights_every_steps",
    "dataset.recipes",
)  # fmt: skip
AS_THE_DATA = ("render.fidelity", "render.size")  # null: as the training data; the trainer records what they were
# Keys that are paths: they may differ where what they name is the same.
PLACES = ("dataset.data", "dataset.sets", "dataset.pretrain.data", "dataset.pretrain.sets", "policy.path",
          "algorithm.peft_cfg_path")  # fmt: skip


def check_overrides(folder: Path, config: Config, allowed: Sequence[str]) -> None:
    """Raise UserError for changes that the run in `folder` may not resume with, as far as no algorithm is imported.

    `changes` checks everything: defaults of algorithms, and what paths name.
    """
    states = (folder / training_state.FOLDER).glob(f"*/{DESCRIPTION}")
    if not finished_visits(folder) and not any(states):
        return  # it starts from scratch
    then, now = _both(folder, config)
    _check_keys(allowed, config, then)
    differing = {k: [then[k], now[k]] for k in then.keys() & now.keys() if then[k] != now[k]}
    as_the_data = [k for k in AS_THE_DATA if now.get(k) is None]
    _refuse(folder, differing, [*allowed, *PLACES, *as_the_data])


def changes(folder: Path, config: Config, stream: TaskStream, allowed: Sequence[str]) -> dict[str, list[Any]]:
    """What differs from the settings that the run was started with: key → [then, now].

    Raises:
        UserError: something differs that changes weights and is not in `allowed`, or `allowed` names an unknown key.
    """
    differing = changed_values(folder, config)
    manifest = read_manifest(folder)
    moved = [k for k in differing if k in PLACES and _only_moved(differing[k])]
    for key in [k for k in moved if _same_there(k, folder, config, stream, manifest)]:
        del differing[key]  # it only moved
    fingerprint = manifest.get("data_fingerprint")
    if fingerprint != stream.fingerprint:
        differing.setdefault("dataset.data", [f"data {fingerprint}", f"data {stream.fingerprint}"])
    _check_keys(allowed, config, differing)
    _refuse(folder, differing, allowed)
    return differing


def changed_keys(folder: Path, config: Config, ignore: tuple[str, ...]) -> list[str]:
    """Keys whose values differ between config.yaml and `config`, without keys that start with one of `ignore`.

    A key that `config` leaves to the data (`AS_THE_DATA`) never counts as different.
    """
    changed = changed_values(folder, config)
    left = {k for k, (_, here) in changed.items() if k in AS_THE_DATA and here is None}
    return [k for k in changed if k not in left and not k.startswith(ignore)]


def changed_values(folder: Path, config: Config) -> dict[str, list[Any]]:
    """Keys whose values differ between config.yaml and `config`: key → [there, here].

    A key that config.yaml lacks (an option added later) counts as its default. Paths are compared as absolute paths.
    """
    then, now = _both(folder, config)
    then = {**_defaults(config), **then}
    return {k: [then.get(k), now.get(k)] for k in sorted(then.keys() | now.keys()) if then.get(k) != now.get(k)}


def _both(folder: Path, config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Dotted keys and their values, in config.yaml and in `config`, with absolute paths."""
    then, now = flatten(load_yaml(folder / "config.yaml")), flatten(to_dict(absolute_paths(config)))
    for key in then.keys() & set(PLACES):
        if key.endswith(".sets"):
            then[key] = [{**one, "data": absolute(one.get("data"))} for one in then[key]]
        else:
            then[key] = absolute(then[key], name=key != "algorithm.peft_cfg_path")
    return then, now


def _check_keys(allowed: Sequence[str], config: Config, others: Collection[str]) -> None:
    """Raise UserError for a name in `allowed` that is neither a key of the configuration nor among `others`.

    A key whose value is unchanged is not a mistake: the command was given again.
    """
    known = list(flatten(to_dict(config)))
    for key in allowed:
        if key not in others and key not in known:
            raise UserError(f"--allow-change {key}: no such key.{nearest(key, known)}")


def _refuse(folder: Path, differing: dict[str, list[Any]], allowed: Iterable[str]) -> None:
    free = set(allowed)
    refused = {k: v for k, v in sorted(differing.items()) if k not in free and not k.startswith(FREE_ON_RESUME)}
    if refused:
        listed = ", ".join(f"{k} (was {then!r}, is {now!r})" for k, (then, now) in refused.items())
        raise UserError(
            f"run '{folder.name}' was started with other settings: {listed}. Use the old ones, or another --run-id, "
            "or --allow-change KEY for each intended change."
        )


def _only_moved(values: list[Any]) -> bool:
    """Whether two values [then, now] of a key in PLACES differ in nothing but paths."""
    if not all(isinstance(v, list) for v in values):
        return True
    return [{**one, "data": ""} for one in values[0]] == [{**one, "data": ""} for one in values[1]]


def _same_there(key: str, folder: Path, config: Config, stream: TaskStream, manifest: dict[str, Any]) -> bool:
    """Whether a path in the configuration still names what the run began with."""
    base = manifest["base"]
    if key in ("dataset.data", "dataset.sets"):
        return bool(stream.fingerprint) and stream.fingerprint == manifest.get("data_fingerprint")
    if key in ("dataset.pretrain.data", "dataset.pretrain.sets"):
        return pretraining_data(config.dataset, config.render).fingerprint == base.get("data_fingerprint")
    if key == "policy.path":
        given = named_folder(str(config.policy.get("path")), model_root())
        return (given / WEIGHTS).is_file() and weights_digest(given) == base.get("sha256")
    copy, now = folder / PEFT_COPY, Path(str(config.algorithm.get("peft_cfg_path")))
    return copy.is_file() and now.is_file() and read_json(copy) == read_json(now)


def _defaults(config: Config) -> dict[str, Any]:
    """Defaults of the keys of `config`, including its algorithms' keys."""
    from clbench.algorithms.build import algorithm_classes

    known = flatten(asdict(Config(model="")))
    sections = ("train", "eval", "lora", "log", "render", "dataset")
    found = {k: v for k, v in known.items() if k.split(".")[0] in sections}
    found |= {f"dataset.pretrain.{k}": v for k, v in flatten(asdict(PretrainDataConfig())).items()}
    for cls in algorithm_classes(config):
        found |= {f"algorithm.{k}": v for k, v in asdict(cls.Config()).items()}
    present = flatten(to_dict(config))
    return {k: v for k, v in found.items() if k in present}
