"""The run folder: configuration, manifest, checkpoints after each visit."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from reprlib import repr as shown
from typing import Any

import clbench
from clbench.checkpoints.base import find_base
from clbench.checkpoints.whole import DESCRIPTION, damage, write_whole
from clbench.config import policy_types
from clbench.config.compose import to_dict, to_yaml
from clbench.config.schema import Config, DatasetConfig, PretrainDataConfig, base_origin
from clbench.envs.making import family, other_python, simulator_versions
from clbench.errors import UserError, nearest
from clbench.io import OF_A_RUN, read_json, refuse_links, write_json, write_text
from clbench.numerics import numerics
from clbench.paths import INSTALLED, PROJECT_ROOT, data_root, model_root, named_folder, results_root
from clbench.redaction import redact, redact_command, secrets_of
from clbench.streams.stream import Task, TaskStream, pretraining_tasks
from clbench.terminal import tell

PACKAGES = ("torch", "lerobot", "accelerate", "peft", "transformers", "numpy", "metaworld", "mujoco", "hf-libero",
            "robosuite", "bddl", "deepspeed")  # fmt: skip


MAX_RUN_ID_BYTES = 200
OTHER_FOLDERS = {"reports": "reports of several runs", "sweeps": "the logs of sweeps"}  # next to the runs
MAX_VISITS = 1000
PEFT_COPY = "peft_config.json"  # of algorithm.peft_cfg_path
MAX_EPISODE_STEPS = 1_000_000


def versions() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    found = {"clbench": clbench.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """The project's revision, "+" when the tree has changes, or None outside a repository."""
    if INSTALLED:  # a repository around the installed packages is somebody else's
        return None
    try:
        run = subprocess.run(
            ["git", "-C", str(PROJECT_ROOT), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() or None


def run_folder(run: str | Path) -> Path:
    """Find an existing run by id (under the results root) or by path."""
    path = Path(run)
    if not (path / "manifest.json").is_file():
        path = results_root() / str(run)
    if not (path / "manifest.json").is_file():
        root = results_root()
        known = [p.parent.name for p in root.glob("*/manifest.json")]
        raise UserError(f"no run '{run}' under {root}.{nearest(str(run), known)}")
    refuse_links(path)
    return path


def as_argument(folder: Path) -> str:
    """A run's name for use in a command, quoted for a shell: its id under the results root, else its folder."""
    here = folder.parent.resolve() == results_root().resolve()
    return shlex.quote(folder.name if here else str(folder))


def results_folder(run_id: str, output_dir: str | None) -> Path:
    """Where a run with that name belongs."""
    plain = run_id.isprintable() and len(run_id.encode("utf-8", "replace")) <= MAX_RUN_ID_BYTES
    if not plain or not run_id or run_id in (".", "..") or "/" in run_id or "\\" in run_id:
        raise UserError(f"run id {run_id[:MAX_RUN_ID_BYTES]!r} must be a plain folder name.")
    if run_id.casefold() in OTHER_FOLDERS:
        raise UserError(f"run id {run_id!r}: the folder of that name is for {OTHER_FOLDERS[run_id.casefold()]}.")
    return (Path(output_dir).expanduser() if output_dir else results_root()) / run_id


def place_of_run(run_id: str, output_dir: str | None, resume: bool) -> tuple[Path, bool]:
    """The folder of a run to be trained, and whether it holds a run already; raises UserError if it cannot be used."""
    folder = results_folder(run_id, output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, not a run's folder. Choose another --run-id.")
    exists = folder.exists() and any(p.name in OF_A_RUN for p in folder.iterdir())
    if exists:
        refuse_links(folder)
    if exists and not resume:
        raise UserError(
            f"run '{run_id}' exists already ({folder}). Continue it with --resume, or choose another --run-id."
        )
    return folder, exists


def new_run_folder(run_id: str, output_dir: str | None, resume: bool) -> tuple[Path, bool]:
    """Make the folder of a run to be trained, unless it exists; returns it and whether it holds a run already."""
    folder, exists = place_of_run(run_id, output_dir, resume)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as e:  # ValueError: a NUL in the path
        what = e.strerror if isinstance(e, OSError) else e
        raise UserError(f"cannot write into {folder}: {what}. Choose another output_dir.") from e
    return folder, exists


def absolute(value: Any, name: bool = True) -> Any:
    """A path made absolute. `name`: one without a slash is not a path."""
    if not isinstance(value, str) or not value or (name and "/" not in value):
        return value
    return str(Path(value).expanduser().absolute())


def absolute_paths(config: Config) -> Config:
    """The same with absolute paths, so that a run can resume from any directory. Bare names are found by root."""
    d, policy, algorithm = config.dataset, dict(config.policy), dict(config.algorithm)
    pretrain = None if d.pretrain is None else _with_data(d.pretrain, absolute)
    if "path" in policy:
        policy["path"] = absolute(policy["path"])
    for key in ("image_encoder_path", "text_encoder_path"):
        named = policy.get(key)
        if isinstance(named, str) and named_folder(named, model_root()).is_dir():  # else a name on a hub
            policy[key] = absolute(named)
    if "peft_cfg_path" in algorithm:
        algorithm["peft_cfg_path"] = absolute(algorithm["peft_cfg_path"], name=False)
    return replace(
        config, output_dir=absolute(config.output_dir, name=False), policy=policy, algorithm=algorithm,
        dataset=replace(_with_data(d, absolute), pretrain=pretrain),
    )  # fmt: skip


def _with_data[Part: (DatasetConfig, PretrainDataConfig)](part: Part, place: Callable[[str], str]) -> Part:
    """The same with the folders of its data sets replaced by `place` of them."""
    sets = [replace(one, data=place(one.data)) for one in part.sets]
    return replace(part, data=place(part.data), sets=sets)


def moved(config: Config, folder: Path) -> Config:
    """The configuration of the run in `folder`; what is no longer in its place is looked up in the current roots."""
    d, policy, algorithm = config.dataset, dict(config.policy), dict(config.algorithm)
    pretrain = None if d.pretrain is None else _with_data(d.pretrain, _moved_data)
    if policy.get("path") and not (named_folder(str(policy["path"]), model_root()) / "config.json").is_file():
        base = {**read_manifest(folder)["base"], "path": str(policy["path"])}
        with contextlib.suppress(UserError):  # reported where it is needed
            policy["path"] = str(find_base(base, folder, f"run {folder.name} is"))
    peft = algorithm.get("peft_cfg_path")
    if peft and not Path(str(peft)).is_file() and (folder / PEFT_COPY).is_file():
        algorithm["peft_cfg_path"] = str(folder / PEFT_COPY)
    return replace(
        config, policy=policy, algorithm=algorithm, dataset=replace(_with_data(d, _moved_data), pretrain=pretrain)
    )


def _moved_data(data: str) -> str:
    here = data_root() / Path(data).name
    if "/" not in data or (Path(data).expanduser() / "meta").is_dir() or not (here / "meta").is_dir():
        return data
    tell(f"note: {data} does not exist; the data set of that name in {data_root()} is used, if it is the same.")
    return str(here.absolute())


def write_description(
    folder: Path,
    run_id: str,
    config: Config,
    stream: TaskStream,
    *,
    base: dict[str, Any],
    session: dict[str, Any],
    files: list[str],
) -> None:
    """Write config.yaml and manifest.json; adds `session` (how the run is started or continued) to the earlier ones."""
    from clbench.algorithms.build import algorithm_classes

    own_base = base_origin(config) == "pretrained"
    before = read_json(folder / "manifest.json") if (folder / "manifest.json").is_file() else {}
    goes_on = bool(session["k"] or session["phase"]) and isinstance(before, dict) and "heldout" in before
    if goes_on:  # the base's data may by now be on another machine
        outside = {key: before[key] for key in ("heldout", "heldout_data") if key in before}
    else:
        heldout, heldout_data = pretraining_tasks(config.dataset, config.render) if own_base else ([], None)
        outside = {
            "heldout": describe_columns(heldout),
            "heldout_data": None if heldout_data is None else heldout_data.description,
        }
    if config.algorithm.get("peft_cfg_path"):
        _keep(Path(config.algorithm["peft_cfg_path"]), folder / PEFT_COPY)
    algorithm = config.algorithm["name"]
    version = numerics(policy_types.type_of(config.policy))
    env_type = config.dataset.env_type
    elsewhere = simulator_versions(env_type) if other_python(env_type) else {}
    earlier = before.get("sessions", []) if isinstance(before, dict) else []
    write_text(folder / "config.yaml", to_yaml(config))
    secrets = secrets_of(asdict(config))
    session = {**session, "command": redact_command(session["command"], secrets)}
    described = redact(
        {
            "format": 1,
            "run_id": run_id,
            "algorithm": algorithm if isinstance(algorithm, str) else "+".join(algorithm),
            "algorithm_config": {
                **{k: v for cls in algorithm_classes(config) for k, v in asdict(cls.Config()).items()},
                **{k: v for k, v in to_dict(config)["algorithm"].items() if k != "name"},
            },
            "lora": asdict(config.lora),
            "policy": config.model,
            "dataset": stream.name,
            "privileged": family(env_type).privileged,
            "render": (stream.columns[0].env or {}).get("render"),
            "seed": config.seed,
            "mode": stream.mode,
            "visits": describe_columns(stream.columns),
            "checkpoints": [v.task for v in stream.visits],
            "data_fingerprint": stream.fingerprint,
            "data": stream.data,
            **outside,
            "base": base,
            "versions": versions() | elsewhere,
            "numerics": _numerics(before, version) if goes_on else version,
            "git_revision": git_revision(),
            "command": session["command"],
            "sessions": [*earlier, {**session, "time": round(time.time(), 3), "git_revision": git_revision()}],
            "config_files": files,
        },
        secrets,
    )
    write_json(folder / "manifest.json", described)


def _numerics(before: dict[str, Any], now: int) -> int | str | None:
    """The numerics version of a resumed run; if an earlier version began it, both."""
    began = before.get("numerics")
    if began in (None, now):
        return began
    tell(f"warning: this run was begun by a version with different numerics ({began}; this one has {now}).")
    return f"{began}, then {now}" if isinstance(began, int) else str(began)


def _keep(file: Path, copy: Path) -> None:
    """Copy a small JSON file that a configuration names, in case the run resumes where the original is missing."""
    if file != copy:
        write_json(copy, read_json(file))


def describe_columns(tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """Evaluation columns in the manifest's form."""
    return [
        {
            "k": j,
            "task": t.name,
            "instruction": t.instruction,
            "data": str(t.root),
            "episodes": len(t.episodes),
            "data_task": {"index": t.task_index, "instruction": t.text, "frames": t.frames},
            "env": None if t.env is None else {**t.env, "max_steps": t.max_steps},
            "expert_success": t.expert_success,
            **({"parts": [_describe_part(p) for p in t.parts]} if t.parts else {}),
            **({"held_out": [{"data": str(p.root), "episodes": list(p.episodes)} for p in t.held_out]}
               if t.held_out else {}),
        }
        for j, t in enumerate(tasks)
    ]


def _describe_part(part: Task) -> dict[str, Any]:
    return {
        "data": str(part.root), "episodes": len(part.episodes), "instruction": part.instruction,
        "data_task": {"index": part.task_index, "frames": part.frames},
    }  # fmt: skip


def checkpoint_folder(folder: Path, k: int) -> Path:
    return folder / "checkpoints" / f"task_{k:02d}"


def finished_visits(folder: Path) -> int:
    """How many visits, counted from the first, have a complete checkpoint."""
    k = 0
    while (checkpoint_folder(folder, k) / DESCRIPTION).is_file():
        k += 1
    return k


def save_checkpoint(folder: Path, k: int, fill: Callable[[Path], dict[str, Any]], size: Callable[[], int]) -> None:
    """Let `fill` write visit k's checkpoint and return what describes it; it exists completely or not at all."""
    write_whole(checkpoint_folder(folder, k), lambda temporary: {"k": k, **fill(temporary)}, size)


def checkpoint_damage(folder: Path, k: int) -> str | None:
    """Why the checkpoint in visit k's place is not the one that was saved there; None when every byte is unchanged."""
    here = checkpoint_folder(folder, k)
    reason = damage(here)
    if reason is not None:
        return reason
    described = read_checkpoint(here)
    if described.get("k", k) != k:
        return f"it is a copy of task_{described['k']:02d}" if type(described["k"]) is int else "it has no valid 'k'"
    tasks = read_manifest(folder)["checkpoints"]
    task = tasks[k] if k < len(tasks) else None
    return None if described.get("task", task) == task else f"it learned {described['task']}, but visit {k} is {task}"


def whole_checkpoints(folder: Path) -> int:
    """How many visits, counted from the first, have an undamaged checkpoint.

    A damaged last one is reported and left out; the run makes it again. Raises UserError for one in the middle.
    """
    count = finished_visits(folder)
    for k in range(count):
        reason = checkpoint_damage(folder, k)
        if reason is None:
            continue
        here = checkpoint_folder(folder, k)
        if k < count - 1:
            raise UserError(
                f"{here} is damaged ({reason}), and later tasks have checkpoints. Restore the file from a copy, or "
                f"remove the checkpoints from {here.name} on to train again from there."
            )
        tell(f"warning: {here} is damaged ({reason}); it will be made again.")
        return k
    return count


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed training process left half-written. Only for the holder of the run's lock."""
    for pattern in (".*.tmp", ".probe-*", "checkpoints/.*.partial", "checkpoints/.*.old"):
        for path in folder.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The run's manifest; UserError when it is missing, or lacks what evaluation needs."""
    path = folder / "manifest.json"
    manifest = read_json(path)
    need = {"visits": list, "checkpoints": list, "mode": str, "base": dict}
    for key, kind in need.items():
        if not isinstance(manifest, dict) or not isinstance(manifest.get(key), kind):
            raise UserError(f"{path} is damaged: it has no valid '{key}'.")
    modes = ("sequential", "multitask", "singletask")
    base = manifest["base"].get("path")
    for key, good in (
        ("mode", manifest["mode"] in modes),
        ("base", base is None or (isinstance(base, str) and base.isprintable())),
        ("visits", _are_columns(manifest["visits"])),
        ("heldout", _are_columns(manifest.get("heldout") or [])),
        ("checkpoints", len(manifest["checkpoints"]) <= MAX_VISITS),
    ):
        if not good:
            raise UserError(f"{path} is damaged: it has no valid '{key}'.")
    _check_order(manifest, path)
    return manifest


def _check_order(manifest: dict[str, Any], path: Path) -> None:
    """Raise UserError where the manifest's visits are not in the order that they state."""
    for key in ("visits", "heldout"):
        columns = manifest.get(key)
        listed = [c for c in columns if isinstance(c, dict)] if isinstance(columns, list) else []
        for j, column in enumerate(listed):
            if column.get("k", j) != j:
                raise UserError(
                    f"{path} is damaged: '{key}' are out of order: {shown(column.get('task'))} is in place {j} but "
                    f"says that it is number {shown(column['k'])}."
                )
    visited, saved = [c["task"] for c in manifest["visits"]], list(map(str, manifest["checkpoints"]))
    if saved != visited and sorted(saved) == sorted(visited):
        raise UserError(f"{path} is damaged: its 'checkpoints' and 'visits' name the same tasks in different orders.")


def _are_columns(value: Any) -> bool:
    """Whether these are columns as `describe_columns` writes them, as far as an evaluation relies on them."""
    if not isinstance(value, list) or len(value) > MAX_VISITS:
        return False
    for c in value:
        if not isinstance(c, dict) or not all(isinstance(c.get(n), str) for n in ("task", "instruction")):
            return False
        env = c.get("env", False)
        if env is None:  # a stream without a simulator
            continue
        if not isinstance(env, dict):
            return False
        steps = env.get("max_steps")
        if not all(isinstance(env.get(n), str) for n in ("type", "task")) or type(steps) is not int:
            return False
        if not 1 <= steps <= MAX_EPISODE_STEPS:
            return False
    return True


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """A checkpoint's description; UserError when it is damaged."""
    description = read_json(folder / DESCRIPTION)
    if not isinstance(description, dict):
        raise UserError(f"{folder / DESCRIPTION} is damaged: it is not a JSON object.")
    return description
