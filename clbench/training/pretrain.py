"""The base: a policy trained once on tasks outside the stream, cached and shared by all algorithms and seeds.

A base's folder is named by a hash of everything it depends on: policy section, pretraining section, tasks, and
the data's fingerprint. A base made with other settings (a smoke run's, say) can never be mistaken for it.

A stream without pretraining tasks, or `policy.init=random`, gives a base with random weights (drawn from
pretrain.seed), whose normalisation statistics are those of all the stream's demonstrations.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from lerobot.configs import FeatureType, NormalizationMode, PreTrainedConfig
from lerobot.policies import make_pre_post_processors
from lerobot.policies.factory import get_policy_class
from lerobot.utils.feature_utils import dataset_to_policy_features

from clbench.algorithms.hooks import CLAlgorithm
from clbench.checkpoints import trusted
from clbench.checkpoints.base import file_digest, identity
from clbench.checkpoints.policy_io import LoadedPolicy, load_policy, pick_device, policy_config, save_policy
from clbench.checkpoints.run_folder import checkpoint_folder, versions
from clbench.checkpoints.state import load_state
from clbench.checkpoints.training_state import Position, StateKeeper
from clbench.checkpoints.whole import DESCRIPTION, damage, write_whole
from clbench.config.dit import RANGES, model_folder
from clbench.config.policy_types import own_keys, rounds
from clbench.config.schema import (
    Config,
    DatasetConfig,
    LogConfig,
    LoraConfig,
    PretrainDataConfig,
    TrainConfig,
    base_origin,
)
from clbench.data.frames import StreamFrames, used_features
from clbench.data.lerobot_set import BOOKKEEPING
from clbench.data.source import DataSource, check_every_byte, fps_note
from clbench.data.statistics import QUANTILES, compute
from clbench.envs.making import family
from clbench.errors import Interrupted, UserError, shortage
from clbench.io import read_json, write_json
from clbench.lock import NO_LOCKS, holder, sign
from clbench.paths import bases_root, model_root, named_folder
from clbench.patience import patience
from clbench.redaction import redact, secrets_of
from clbench.seeding import seeded
from clbench.stopping import Stop
from clbench.streams.stream import Task, TaskStream, Visit, pretraining_tasks, stream_tasks
from clbench.tensor_files import tensor_bytes, tensor_shapes
from clbench.terminal import tell
from clbench.training.backend import Backend, autocast_precision, say
from clbench.training.log import FILE as LOG_FILE
from clbench.training.saving import same_on_all
from clbench.training.visits import Trainer

BASE_RECORD = "base.json"

# Settings for acting: they may differ from those a given checkpoint was trained with.
ACTING = ("n_action_steps", "num_inference_steps")


def base_key(config: Config, data: DataSource) -> dict[str, Any]:
    """Everything a base depends on.

    The fingerprint of a set that clbench did not make omits its images, so for these the set and its features count.
    """
    policy = own_keys(config.policy)
    origin = ("repo_id", "commit") if data.description.get("repo_id") else ("root",)
    section: DatasetConfig | PretrainDataConfig
    if base_origin(config) == "random":
        section, tasks = config.dataset, list(data.tasks)
        made: dict[str, Any] = {"init": "random", "seed": config.pretrain.seed, "tasks": tasks}
    else:
        assert config.dataset.pretrain is not None
        section = config.dataset.pretrain
        tasks = list(data.tasks if section.partial else section.tasks)
        settings = {k: v for k, v in asdict(config.pretrain).items() if k != "log_every"}
        made = {"pretrain": settings, "tasks": tasks, "mixed_precision": autocast_precision(config.train)}
    if config.augment.active and base_origin(config) == "pretrained":
        made["augment"] = asdict(config.augment)
    return {
        "policy": policy,
        **made,
        "data_fingerprint": data.fingerprint,
        **({"encoders": encoders} if (encoders := _encoders(config.policy)) else {}),
        **{k: v for k in ("instructions", "exclude_episodes") if (v := getattr(section, k))},
        **({} if data.features is None else {"data": {k: data.description[k] for k in (*origin, "features")}}),
        **{k: v for k in ("resize", "pad") if (v := getattr(config.dataset, k))},
        **(
            {"holdout": [config.dataset.holdout, config.dataset.holdout_seed]}
            if config.dataset.holdout and section is config.dataset
            else {}
        ),
        **({"sets": [_which(d) for d in data.description["sets"]]} if "sets" in data.description else {}),
    }


def _encoders(policy: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The sha256 of what a policy's encoders are read from, where that is a local folder: key → file → its sum."""
    found = {}
    for key in ("image_encoder_path", "text_encoder_path"):
        folder = model_folder(str(policy[key])) if policy.get(key) else None
        if folder is not None:
            files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".txt") and p.is_file())
            found[key] = {p.name: file_digest(p) for p in files}
    return found


def _which(described: dict[str, Any]) -> dict[str, Any]:
    """What tells one of several sets apart, and how it is used."""
    origin = ("repo_id", "commit") if described.get("repo_id") else ("root",)
    return {k: described[k] for k in (*origin, "features", "weight", "episodes_excluded") if k in described}


def base_folder(config: Config, data: DataSource) -> Path:
    key = json.dumps(base_key(config, data), sort_keys=True)
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    random = base_origin(config) == "random"
    section = config.dataset if random else config.dataset.pretrain
    assert section is not None
    name = ("random-" if random else "") + (Path(section.repo_id or section.data).name or config.dataset.name)
    return bases_root() / f"{config.policy.get('type')}-{name}-{digest}"


def ensure_base(config: Config, backend: Backend, stop: Stop, progress: str = "auto") -> tuple[Path, dict[str, Any]]:
    """Return the base's folder, training it first if needed, and its description for the manifest.

    A pretraining run that was stopped or killed resumes from its newest state.
    """
    trusted.check_start(config.policy)
    if config.policy.get("path"):
        path = named_folder(str(config.policy["path"]), model_root())
        if not (path / "config.json").is_file():
            raise UserError(
                f"policy.path={path} is not a LeRobot checkpoint folder (it has no config.json). Download a model from "
                "a hub first, and give its local folder."
            )
        if (path / "adapter_config.json").is_file():
            raise UserError(f"policy.path={path} is an adapter over another base; only a full policy can be a base.")
        _check_given(path, config)
        _check_targets(config, _modules_of(path))
        return path.resolve(), {"path": str(path.resolve()), "kind": "given", **identity(path.resolve())}
    random = base_origin(config) == "random"
    tasks, data = (stream_tasks if random else pretraining_tasks)(config.dataset, config.render)
    own_word = config.policy.get("type") in trusted.given().types  # merely configuring such a type may fetch
    if not own_word:  # report errors before anything is made
        policy_config(dict(config.policy), "cpu")
        _fitted_config(dict(config.policy), _described_features(tasks[0]), "cpu")
    said = False
    folder = base_folder(config, data)
    if own_word:  # made by this same configuration
        trusted.trust_also(folder, _unfinished(folder))
    whole = backend.agree(_is_whole(folder))
    if not whole:
        images = config.dataset.env is None or bool(family(config.dataset.env_type).cameras)
        fetched = trusted.fetched(config.policy, images=images)
        if fetched is not None:
            say(backend, fetched)
    if not whole or backend.agree(_is_littered(folder)):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock_file = (folder.parent / f".{folder.name}.lock").open("a+")
        except OSError as e:
            raise UserError(
                f"the base cannot be made in {folder.parent}: {e.strerror}. Set CLBENCH_CACHE_ROOT to a writable "
                "folder."
            ) from e
        with lock_file as lock, ExitStack() as waiting:
            while not backend.agree(_locked(lock) if backend.is_main else True):
                if backend.any(bool(stop.reason))[0]:
                    raise Interrupted(
                        "stopped while another run is making the base. The same command continues from there."
                    )
                if not said:
                    say(backend, f"another run is making the base {folder} ({holder(lock.fileno())}); waiting for it")
                    so_far = partial(_progress, _unfinished(folder), config.pretrain.steps)
                    waiting.enter_context(patience("waiting for the base that another run is making", so_far))
                said = True
                time.sleep(1)
            waiting.close()
            if not backend.agree(_is_whole(folder)):
                if note := fps_note(data.description):
                    say(backend, note)
                (_draw if random else _pretrain)(config, tasks, data, folder, backend, stop, progress)
            elif backend.is_main:
                shutil.rmtree(_unfinished(folder), ignore_errors=True)
    _check_targets(config, _modules_of(folder))
    folder = folder.absolute()
    return folder, {"path": str(folder), "kind": base_origin(config), **identity(folder), **base_key(config, data)}


def _unfinished(folder: Path) -> Path:
    """Where a base is while it is being made."""
    return folder.with_name(f".{folder.name}.training")


def _is_littered(folder: Path) -> bool:
    """Whether a pretraining run that was killed after making the base left something to clean up."""
    return _unfinished(folder).is_dir() and os.access(folder.parent, os.W_OK)


def _progress(temporary: Path, steps: int) -> str:
    """How far another run's pretraining has got, by its log."""
    try:
        with (temporary / LOG_FILE).open("rb") as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - 4096))
            done = re.findall(rb'"event": "step",.*?"step": (\d+)', f.read())
    except OSError:  # it has not started, or has just ended
        return ""
    return f"step {int(done[-1]) + 1} of {steps}" if done else ""


def _is_whole(folder: Path) -> bool:
    """Whether a complete base exists; a damaged one is reported and made again."""
    if not (folder / BASE_RECORD).is_file():
        return False
    reason = damage(folder) if (folder / DESCRIPTION).is_file() else None  # earlier versions stored no checksums
    if reason is not None:
        tell(f"warning: the base {folder} is damaged ({reason}); it will be made again.")
    return reason is None


def _locked(lock: IO[str]) -> bool:
    """Lock a file, unless another process has; where a file system has no locks, go without."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as e:
        if e.errno not in NO_LOCKS:
            raise
    sign(lock.fileno())
    return True


def _check_given(path: Path, config: Config) -> None:
    """The policy section describes the checkpoint it starts from; only what acting needs may differ."""
    stored = read_json(path / "config.json")
    if not isinstance(stored, dict):
        raise UserError(f"policy.path={path}: its config.json is not a JSON object, so it is not a LeRobot checkpoint.")
    for key, value in config.policy.items():
        ours = key == "path" or (key == "dtype" and rounds(str(stored.get("type"))))
        if ours or key in ACTING or (key in stored and stored[key] == value):
            continue
        raise UserError(
            f"policy.path={path} has {key} {stored.get(key)!r}, but the configuration says {value!r}. Use "
            f"--model checkpoint, which takes everything from the checkpoint ({', '.join(ACTING)} may be overridden)."
        )
    drawn, wanted = _images_learned_from(path), {"fidelity": config.render.fidelity, "size": config.render.size}
    if drawn and family(config.dataset.env_type).cameras and drawn != wanted and config.render.mismatch != "allow":
        raise UserError(
            f"policy.path={path} learned from images drawn {drawn['fidelity']} at {drawn['size']} pixels, but this "
            f"stream's are drawn {wanted['fidelity']} at {wanted['size']}. Use another base, use data drawn like the "
            "base's, or set render.mismatch=allow."
        )


def _images_learned_from(path: Path) -> dict[str, Any] | None:
    """How the images that a checkpoint learned from were drawn; None where it had none, or clbench did not make it."""
    records = [path / BASE_RECORD]
    if path.resolve().parent.parent.name == "checkpoints":  # RUN/checkpoints/K/policy
        records.append(path.resolve().parents[2] / "manifest.json")
    for record in records:
        if record.is_file():
            described = read_json(record)
            return described.get("render") if isinstance(described, dict) else None
    return None


def check_inputs(base: Path, task: Task) -> None:
    """Raise UserError if a base needs features that the stream's data do not have.

    Images are compared only by name: a policy may accept any size.
    """
    described = read_json(task.root / "meta" / "info.json")["features"]
    have = {here: tuple(feature["shape"]) for here, feature in used_features(task, described).items()}
    wants = read_json(base / "config.json")
    problems = []
    for kind in ("input_features", "output_features"):
        for key, feature in (wants.get(kind) or {}).items():
            if key not in have:
                if "empty_camera" not in key:  # LeRobot's name for a camera that is left black
                    problems.append(f"{key} is missing")
            elif feature["type"] != FeatureType.VISUAL.value and tuple(feature["shape"]) != have[key]:
                problems.append(f"{key} has shape {have[key]}, not {tuple(feature['shape'])}")
    if problems:
        raise UserError(
            f"the data in {task.root} is not what the base {base} was trained for: {'; '.join(problems)}. Use data "
            "with the base's features (dataset.rename renames them), or another base."
        )


def _fitted_config(section: dict[str, Any], features: dict[str, Any], device: str) -> PreTrainedConfig:
    """The policy's configuration with the data's features; UserError if it is invalid or does not support those."""
    config = policy_config(section, device)
    found = dataset_to_policy_features(features)
    config.output_features = {k: f for k, f in found.items() if f.type is FeatureType.ACTION}
    config.input_features = {k: f for k, f in found.items() if k not in config.output_features}
    try:
        config.validate_features()
    except ValueError as e:
        raise _unfit(config.type, features, e) from e
    return config


def _unfit(kind: str, features: dict[str, Any], e: Exception) -> UserError:
    given = ", ".join(f"{k} {tuple(f['shape'])}" for k, f in features.items() if k not in BOOKKEEPING)
    text = " ".join(str(e).split()) or type(e).__name__
    return UserError(f"policy.type={kind} cannot be built for this stream's data ({given}): {text}")


def _described_features(task: Task) -> dict[str, Any]:
    """LeRobot's description of the features that are used from a task's data, by their names here."""
    described = read_json(task.root / "meta" / "info.json")["features"]
    return used_features(task, described)


def _check_targets(config: Config, modules: Iterable[str]) -> None:
    """Raise UserError if a given regular expression for layers matches none of the policy's modules."""
    names = set(modules)
    patterns = {"algorithm.target_modules": config.algorithm.get("target_modules")}
    if config.lora.enabled or "seqlora" in _names(config):
        patterns["lora.target_modules"] = config.lora.target_modules
        patterns["lora.also_train"] = config.lora.also_train or None
    for key, pattern in patterns.items():
        try:
            if not isinstance(pattern, str) or any(re.fullmatch(pattern, n) for n in names):
                continue
        except re.error as e:
            raise UserError(f"{key} '{pattern}' is not a regular expression: {e}.") from e
        raise UserError(
            f"{key} '{pattern}' matches no module of the policy. It must match full names, such as "
            f"{', '.join(sorted(names, key=lambda n: (-n.count('.'), n))[:3])}."
        )


def _names(config: Config) -> list[str]:
    name = config.algorithm.get("name")
    return [name] if isinstance(name, str) else list(name or [])


def _modules_of(base: Path) -> set[str]:
    """Names of the modules that have weights in a policy's folder, and of their parent modules."""
    names = tensor_shapes(base / "model.safetensors")
    return {".".join(parts[:n]) for parts in (name.split(".") for name in names) for n in range(1, len(parts))}


def new_policy(section: dict[str, Any], frames: StreamFrames, device: str, seed: int) -> LoadedPolicy:
    """A fresh policy for the data's features; normalisation statistics come from exactly these frames."""
    features = frames.parts(0)[0].features
    config = _fitted_config(section, features, device)
    try:
        with seeded("policy-init", seed):
            policy = get_policy_class(config.type)(config)  # type: ignore[call-arg]
        policy.to(device)
        pre, post = make_pre_post_processors(config, dataset_stats=frame_statistics(frames, takes_ranges(config)))
    except Exception as e:  # LeRobot's policies raise all kinds of errors for unsupported features
        if shortage(e) is not None:  # of memory, say
            raise
        raise _unfit(config.type, features, e) from e
    return LoadedPolicy(policy, pre, post, "")


def takes_ranges(config: PreTrainedConfig) -> bool:
    """Whether a policy's normalisation wants more than mean, std, min and max."""
    by_quantiles = {NormalizationMode.QUANTILES, NormalizationMode.QUANTILE10}
    return getattr(config, "normalization", None) in RANGES or not by_quantiles.isdisjoint(
        config.normalization_mapping.values()
    )


def frame_statistics(frames: StreamFrames, ranges: bool = False) -> dict[str, dict[str, torch.Tensor]]:
    """Mean, std (divided by n − 1), min and max of every low-dimensional feature over the frames of visit 0.

    `ranges`: also quantiles, and which dimensions are binary (data/statistics.py).
    """
    stats: dict[str, dict[str, torch.Tensor]] = {}
    columns: dict[str, np.ndarray] = {}
    parts = frames.parts(0)
    for key, feature in parts[0].features.items():
        if feature["dtype"] not in ("float32", "float64"):
            continue
        values = torch.cat([p.table.columns[key][p.frames] for p in parts]).double()
        stats[key] = {
            "mean": values.mean(0).float(),
            "std": values.std(0).float(),
            "min": values.amin(0).float(),
            "max": values.amax(0).float(),
        }
        if ranges:
            columns[key] = values.numpy()
    for key, found in (compute(lambda: [columns]) if columns else {}).items():
        shape = stats[key]["mean"].shape
        stats[key] |= {name: torch.from_numpy(found[name]).reshape(shape) for name in (*QUANTILES, "binary")}
    return stats


def _pretrain(
    config: Config,
    tasks: list[Task],
    data: DataSource,
    folder: Path,
    backend: Backend,
    stop: Stop,
    progress: str,
) -> None:
    if backend.is_main:
        check_every_byte(data.root, data.description, config.dataset.name)
    temporary = _unfinished(folder)
    keeper = StateKeeper(temporary, config.train.save_every_steps, config.train.save_every_minutes)
    position = _position(temporary, keeper) if backend.is_main else Position()
    position = same_on_all(position, backend)
    if backend.is_main and position == Position():
        shutil.rmtree(temporary, ignore_errors=True)
    visit = Visit(0, "pretraining", tuple(tasks))
    stream = TaskStream(f"pretraining of {config.dataset.name}", (visit,), tuple(tasks), "multitask")

    what = f"pretraining a base on {len(tasks)} tasks"

    def start() -> tuple[LoadedPolicy, StreamFrames]:
        device = pick_device(config.train.device)
        cache = config.train.frame_cache_gb
        frames = StreamFrames([tuple(tasks)], policy_config(dict(config.policy), device), cache)
        with patience("building the base policy"):
            loaded = new_policy(dict(config.policy), frames, device, config.pretrain.seed)
        _check_targets(config, (name for name, _ in loaded.policy.named_modules()))
        say(backend, f"{what} → {folder}")
        left_out = data.description.get("tasks_left_out", ())
        if left_out:
            say(backend, f"the base does without {len(left_out)} tasks, which {data.root} does not have, or not apart "
                         f"from another: {', '.join(left_out)}")  # fmt: skip
        return loaded, frames

    trainer = Trainer(
        _as_run(config, progress), CLAlgorithm(None), stream, temporary, folder.name, backend, folder, keeper, stop,
        start=start, again="The same command continues from there.", place="in pretraining",
    )  # fmt: skip
    if position.step:
        say(backend, f"{what}, from step {position.step} on → {folder}")
    if position.k == 0:
        with backend.making_a_base():
            trainer.run(position)

    done = checkpoint_folder(temporary, 0)

    def fill_base(base: Path) -> dict[str, Any]:
        for path in (done / "policy").iterdir():
            shutil.copyfile(path, base / path.name)
        shutil.copyfile(temporary / LOG_FILE, base / LOG_FILE)
        described = read_json(done / DESCRIPTION)
        seconds, parameters = round(float(described["seconds"]), 1), int(described["parameters_total"])
        _describe(base, config, tasks, data, seconds=seconds, parameters=parameters)
        return {}

    if backend.is_main:
        with patience("saving the base"):
            write_whole(folder, fill_base, lambda: sum(p.stat().st_size for p in (done / "policy").iterdir()))
        shutil.rmtree(temporary)
    backend.barrier()


def _draw(
    config: Config,
    tasks: list[Task],
    data: DataSource,
    folder: Path,
    backend: Backend,
    stop: Stop,
    progress: str,
) -> None:
    """Make a base with random weights."""
    why = "" if config.dataset.pretrain is not None else f": {config.dataset.name} has no pretraining tasks"
    say(backend, f"the base's weights are random{why} (policy.path=FOLDER starts from a checkpoint) → {folder}")
    if backend.is_main:
        began = time.monotonic()
        frames = StreamFrames([tuple(tasks)], policy_config(dict(config.policy), "cpu"), cache_gb=0)  # not read
        with patience("building the base policy"):
            loaded = new_policy(dict(config.policy), frames, "cpu", config.pretrain.seed)

        def fill_base(base: Path) -> dict[str, Any]:
            save_policy(loaded, base)
            parameters = sum(p.numel() for p in loaded.policy.parameters())
            seconds = round(time.monotonic() - began, 1)
            _describe(base, config, tasks, data, seconds=seconds, parameters=parameters)
            return {}

        write_whole(folder, fill_base, lambda: tensor_bytes(dict(loaded.policy.state_dict())))
    backend.barrier()


def _describe(
    base: Path, config: Config, tasks: list[Task], data: DataSource, *, seconds: float, parameters: int
) -> None:
    """Write the description of a base next to it."""
    described = {
        **base_key(config, data),
        "seconds": seconds,
        "parameters": parameters,
        "render": (tasks[0].env or {}).get("render"),
        "versions": versions(),
    }
    write_json(base / BASE_RECORD, redact(described, secrets_of(asdict(config))))


def _as_run(config: Config, progress: str) -> Config:
    """The configuration of a pretraining run: the run's, with `pretrain` in place of `train`."""
    p, t = config.pretrain, config.train
    train = TrainConfig(
        steps=p.steps, batch_size=p.batch_size, optimizer=p.optimizer, log_every=p.log_every,
        mixed_precision=t.mixed_precision, num_workers=t.num_workers, frame_cache_gb=t.frame_cache_gb,
        feature_cache_gb=t.feature_cache_gb, device=t.device, strategy=t.strategy,
        save_every_steps=t.save_every_steps, save_every_minutes=t.save_every_minutes, on_nonfinite=t.on_nonfinite,
    )  # fmt: skip
    policy = {k: v for k, v in config.policy.items() if k in ("type", *own_keys(config.policy))}  # it all trains
    return replace(config, seed=p.seed, policy=policy, train=train, lora=LoraConfig(), log=LogConfig(progress=progress))


def _position(temporary: Path, keeper: StateKeeper) -> Position:
    """How far a pretraining run has got: at its newest complete state, or done."""
    done = checkpoint_folder(temporary, 0)
    if (done / DESCRIPTION).is_file() and damage(done) is None:
        return Position(1, done)
    found = keeper.newest(0)
    if found is not None and "total_steps" not in load_state(found.source, "training"):  # type: ignore[arg-type]
        tell(f"note: {found.source} is from an earlier version of clbench; pretraining starts again.")
        return Position()
    return found or Position()


def load_base(path: Path, config: Config) -> LoadedPolicy:
    """Load the base onto the training device; for a given `policy.path`, other policy keys override its settings."""
    overrides = {}
    if config.policy.get("path"):
        overrides = {k: v for k, v in config.policy.items() if k in ACTING}
    return load_policy(path, pick_device(config.train.device), overrides)
