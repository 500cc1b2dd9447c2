"""What decides a run's numbers besides its seed, so that runs that differ in it are neither averaged nor compared.

Taken from the run's config.yaml and manifest.json, and from the settings of its evaluation. Whatever changes no weight,
or only the last bits of sums (threads, ranks, devices, logs, paths), does not count, nor does which cells were
evaluated: a metric that lacks some reports that itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from reprlib import repr as shown
from typing import TYPE_CHECKING, Any

from clbench.checkpoints.changes import FREE_ON_RESUME
from clbench.config.compose import load_yaml
from clbench.config.reading import flatten
from clbench.config.schema import Config, LoraConfig
from clbench.errors import UserError
from clbench.evaluation.records import EPISODE_SEEDS
from clbench.evaluation.seeds import CONSECUTIVE
from clbench.io import read_json
from clbench.metrics import Record
from clbench.metrics.cli import evaluated_counts

if TYPE_CHECKING:
    from clbench.report.runs import Run

# Keys of config.yaml that do not count, or whose outcome is recorded elsewhere: the manifest records the algorithm,
# LoRA, the base, the data and how images were drawn; the episodes record their own settings.
ELSEWHERE = (
    *FREE_ON_RESUME, "seed", "model", "algorithm.", "lora.", "pretrain.", "render.", "policy.path", "dataset.name",
    "dataset.data", "dataset.repo_id", "dataset.revision", "dataset.tasks", "dataset.task_order",
    "dataset.libero_order", "dataset.env.", "dataset.make.", "dataset.pretrain",
)  # fmt: skip
# What a reference run (joint or single-task training) has to share with the runs measured against it.
OF_REFERENCES = ("policy.", "base.", "pretrain.", "data", "render.", "dataset.env.", "eval.steps_after_success")
BASE = ("tasks", "data_fingerprint", "mixed_precision", "instructions", "exclude_episodes")  # for a base made here
DEFAULT = "(default)"  # for a policy key that a configuration does not name
MAX_SHOWN = 6


def deciding(run: Run) -> dict[str, Any]:
    """Key → value of everything that decides the run's numbers, as far as it is known."""
    manifest = run.manifest
    found = _base(manifest)
    path = run.path / "config.yaml"
    if path.is_file():
        try:
            given = load_yaml(path)
        except UserError as error:  # results are still worth reporting
            run.notes.append(f"the configuration is left out: {error}")
            given = {}
        if given:
            flat = flatten(asdict(Config(model=""))) | flatten(given)
            found |= {k: v for k, v in flat.items() if not k.startswith(ELSEWHERE)}
    found |= {f"algorithm.{k}": v for k, v in flatten(_dict(manifest, "algorithm_config")).items()}
    found |= {f"lora.{k}": v for k, v in (asdict(LoraConfig()) | _dict(manifest, "lora")).items()}
    found |= {f"render.{k}": v for k, v in flatten(_dict(manifest, "render")).items()}
    if manifest.get("data_fingerprint") is not None:
        found["data"] = manifest["data_fingerprint"]
    if "privileged" in manifest:
        found["privileged"] = manifest["privileged"]
    if manifest.get("numerics") is not None:
        found["numerics"] = manifest["numerics"]
    found["changed at --resume"] = _changed(manifest)
    found |= _evaluated(run.record, "eval.episodes", "dataset.env.max_steps")
    if run.record.heldout is not None:
        held = _evaluated(run.record.heldout, "eval.heldout_episodes", "dataset.pretrain.make.max_steps")
        found |= {k: v for k, v in held.items() if k not in found}
    limits = [_dict(v, "env").get("max_steps") for v in _list(manifest, "visits")]
    if limits and None not in limits:
        found.setdefault("dataset.env.max_steps", _one(limits, run.record.tasks))
    return found


def differing(runs: Sequence[Run], keys: tuple[str, ...] = ("",)) -> dict[str, list[Any]]:
    """Deciding keys that start with one of `keys` and differ between the runs: key → the runs' values.

    A key that a run lacks (an option added later) counts as its default, or not at all if that is not known.
    """
    known = [run.deciding for run in runs]
    found = {}
    whole = all("base.sha256" in d for d in known)  # then a base's name does not matter
    for key in sorted({k for d in known for k in d if k.startswith(keys)} - ({"base.name"} if whole else set())):
        absent = [key not in d for d in known]
        default: list[Any] = []
        if any(absent) and key.startswith("policy."):
            default = [DEFAULT]
        elif any(absent) and key.startswith("algorithm."):
            default = _default(runs[absent.index(True)], key.removeprefix("algorithm."))
        values = [d.get(key, default[0] if default else None) for d in known if key in d or default]
        if any(v != values[0] for v in values):
            found[key] = values
    return found


def listed(found: dict[str, list[Any]]) -> str:
    """Keys with their values, in words."""
    texts = []
    for key, values in list(found.items())[:MAX_SHOWN]:
        different = [v for i, v in enumerate(values) if v not in values[:i]]
        texts.append(f"{key} ({', '.join(shown(v) for v in different[:4])})")
    more = len(found) - len(texts)
    return ", ".join(texts) + (f" and {more} more" if more > 0 else "")


def _dict(value: Any, key: str) -> dict[str, Any]:
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}


def _list(value: Any, key: str) -> list[Any]:
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, list) else []


def _one(limits: list[Any], tasks: list[str]) -> Any:
    """The limit of all tasks, or each task's."""
    return limits[0] if all(v == limits[0] for v in limits) else dict(zip(tasks, limits, strict=False))


def _base(manifest: dict[str, Any]) -> dict[str, Any]:
    """The recipe of a base made here, or the name of a given one."""
    base = _dict(manifest, "base")
    if base.get("kind") == "given":
        found = {"base.name": base.get("name") or Path(str(base.get("path"))).name}
        return found | ({"base.sha256": base["sha256"]} if "sha256" in base else {})
    found = {f"policy.{k}": v for k, v in flatten(_dict(base, "policy")).items()}
    found |= {f"pretrain.{k}": v for k, v in flatten(_dict(base, "pretrain")).items()}
    return found | {f"base.{k}": base[k] for k in BASE if k in base}


def _changed(manifest: dict[str, Any]) -> list[Any]:
    """What was changed when the run was resumed: (visit, key, new value)."""
    found = []
    for session in _list(manifest, "sessions"):
        for key, values in _dict(session, "changed").items():
            if not key.startswith(FREE_ON_RESUME):
                now = values[-1] if isinstance(values, list) and values else values
                found.append([session.get("k"), key, now])
    return found


def _evaluated(record: Record, episodes: str, limit: str) -> dict[str, Any]:
    """The settings of the episodes; `episodes` and `limit` are the keys for their number and maximum length."""
    found: dict[str, Any] = {}
    counts = evaluated_counts(record)
    if counts:
        found[episodes] = max(counts)  # an evaluation that was stopped has fewer in some cells
    path = record.source / "settings.json" if record.source is not None else None
    settings = read_json(path) if path is not None and path.is_file() else {}
    for key in ("seed", "steps_after_success"):
        if isinstance(settings, dict) and key in settings:
            found[f"eval.{key}"] = settings[key]
    if isinstance(settings, dict) and settings:
        found["the rule of episode seeds"] = settings.get(EPISODE_SEEDS, CONSECUTIVE)
    limits = _list(settings, "max_steps")
    return found | ({limit: _one(limits, record.tasks)} if limits else {})


def _default(run: Run, key: str) -> list[Any]:
    """[the default of an algorithm's key], or [] if it is not known."""
    from clbench.registry import algorithm_class

    for name in str(run.manifest.get("algorithm")).split("+"):
        try:
            options = inspect.signature(algorithm_class(name).Config).parameters  # type: ignore[attr-defined]
        except UserError:  # from a package that is not installed here
            continue
        if key in options and options[key].default is not inspect.Parameter.empty:
            return [options[key].default]
    return []
