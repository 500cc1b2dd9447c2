"""From names, files and overrides to one checked configuration.

    base.yaml ← models/M ← datasets/D ← algorithms/A… ← recipes/M ← smoke ← dotlist overrides

Later wins, also among the recipe's sections for several algorithms. `--yaml` files replace the axes and the recipes.
An undefined key is an error that names the nearest valid one; values are read by the types of their keys (reading.py).

Files are treated as hostile: no tags, no aliases, no ${…} (docs/security.md). Overrides are the user's own and may
refer to other keys or to the environment as far as OmegaConf allows.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from clbench import registry
from clbench.config import folders, policy_types, recipes, streams_in_code
from clbench.config.data_sets import with_sets
from clbench.config.files import INVALID, load_yaml, one_line
from clbench.config.reading import clip, overlay, plain, read_overrides
from clbench.config.schema import HOLDOUT, PARTITIONS, Config, DatasetConfig, PretrainDataConfig, SetConfig, base_origin
from clbench.envs.base import SEEDS_PER_SPLIT, SPLITS
from clbench.envs.making import family
from clbench.envs.rendering import FIDELITIES, MAX_SIZE, MIN_SIZE
from clbench.errors import UserError, nearest
from clbench.redaction import redact, secrets_of

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
DATASET_ALIASES = {"libero_long": "libero_10", "libero_long_state": "libero_10_state"}  # LIBERO-Long is LIBERO-10


def available(kind: str) -> list[str]:
    """Names of the YAML files of a kind, in all folders (folders.py)."""
    return folders.names(kind)


def find(kind: str, name: str, known: Iterable[str] = ()) -> Path | None:
    """Return the YAML of `name` (of a kind, or a path); None if only the registry knows it."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    path = folders.find(kind, name) if kind != "datasets" else streams_in_code.find(name)[0]
    if path is not None:
        return path
    if name in set(known):
        return None
    if kind == "models":
        raise policy_types.unknown(name)
    label = {"algorithms": "algorithm", "datasets": "dataset"}[kind]
    raise UserError(f"unknown {label} '{name}'.{nearest(name, {*available(kind), *known})}")


def compose(
    *,
    model: str,
    algorithms: Sequence[str],
    dataset: str,
    registered: Iterable[str] = (),
    overrides: Sequence[str] = (),
    smoke: bool = False,
    source: str | None = None,
) -> tuple[Config, list[str]]:
    """Compose a run's configuration from the three axes; returns it and the names of the files that made it.

    `source`: the file that holds the overrides, which may not refer to other values or to the environment;
    None = the command line.
    """
    dataset = DATASET_ALIASES.get(dataset, dataset)
    files: list[Path | Described] = [folders.shipped("base.yaml")]
    for kind, names, known in (
        ("models", [model], policy_types.types()),
        ("datasets", [dataset], streams()),
        ("algorithms", algorithms, registered),
    ):
        for name in names:
            path = find(kind, name, known)
            if path is not None:
                files.append(path)
            elif kind == "datasets":
                files.append(Described(name))
    applied = recipes.apply(_preset(model, overrides, source), algorithms, _streams(dataset))
    head: dict[str, Any] = {"model": Path(model).stem, "algorithm": {"name": _name(algorithms)}}
    lines = [str(f) if isinstance(f, Described) else folders.shown(f) for f in files]
    if find("models", model, policy_types.types()) is None:
        head["policy"] = {"type": model}
        lines.insert(1, f"policy type {model} with its own defaults")
    config = _merge(files, [*(a.settings for a in applied), head], overrides, smoke, source)
    return config, [*lines, *(a.line for a in applied)]


@dataclass(frozen=True)
class Described:
    """A stream described by code, in the list of a configuration's files."""

    name: str

    def keys(self) -> dict[str, Any]:
        return streams_in_code.described(self.name)

    def __str__(self) -> str:
        return f"{registry.entries('streams')[self.name].origin}: stream {self.name}"


def streams() -> list[str]:
    """Names of the streams that are described by code."""
    return registry.names("streams")


def _streams(dataset: str) -> list[str]:
    """What recipes know a stream by: its file's name, then the family that the file names (`dataset.recipes`)."""
    family = _section(dataset).get("recipes")
    return [Path(dataset).stem, *([family] if family else [])]


def _section(stream: str) -> dict[str, Any]:
    """The `dataset` section of a stream, from its file or its code."""
    path = find("datasets", stream, streams())
    section = (load_yaml(path) if path is not None else streams_in_code.described(stream)).get("dataset")
    return section if isinstance(section, dict) else {}


def _preset(model: str, overrides: Sequence[str], source: str | None) -> str | None:
    """Whose recipes apply: the model's, or with a checkpoint those of the preset that it matches; None: nobody's."""
    file = find("models", model, policy_types.types())
    preset = load_yaml(file).get("policy", {}) if file is not None else {"type": model}
    policy = overlay(preset, read_overrides(overrides, Config, source).get("policy", {}))
    if policy.get("path") is not None:
        return recipes.preset_of(str(policy["path"]))
    return Path(model).stem if policy.get("type") == preset.get("type", model) else None


def compose_files(paths: Sequence[str], overrides: Sequence[str] = (), smoke: bool = False) -> tuple[Config, list[str]]:
    """Merge explicit YAML files left to right over base.yaml; the three axes are not used."""
    files = [folders.shipped("base.yaml"), *map(Path, paths)]
    return _merge(files, [], overrides, smoke), [folders.shown(f) for f in files]


def _name(algorithms: Sequence[str]) -> str | list[str]:
    stems = [Path(a).stem for a in algorithms]
    return stems[0] if len(stems) == 1 else stems


def _merge(
    files: Sequence[Path | Described],
    above: Sequence[dict[str, Any]],
    overrides: Sequence[str],
    smoke: bool,
    source: str | None = None,
) -> Config:
    layer: dict[str, Any] = {}
    for part in [*(f.keys() if isinstance(f, Described) else load_yaml(f) for f in files), *above]:
        layer = overlay(*with_base(layer, part))
    if smoke:
        section = layer.get("algorithm")
        named = section.get("name") if isinstance(section, dict) else None
        model = layer.get("model")
        models = [model] if isinstance(model, str) else []
        for name in dict.fromkeys(["base", *models, *([named] if isinstance(named, str) else named or [])]):
            short = folders.find("smoke", name)
            if short is not None:
                layer = _overlaid(layer, load_yaml(short))
    layer = with_sets(_overlaid(*with_base(layer, read_overrides(overrides, Config, source))))
    dataset = layer.get("dataset")
    if isinstance(dataset, dict) and dataset.get("env", {}) is None:
        dataset.setdefault("holdout", HOLDOUT)
    return to_config(_joined(Config, layer))


def with_base(below: dict[str, Any], above: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two layers, the upper one with a stream that its `dataset.pretrain` names written out: that stream's data and
    tasks, in the place of what the lower one has there. A section that has tasks of its own is written out already.

    Raises:
        UserError: there is no such stream, it names no tasks, or it is played in another simulator.
    """
    dataset = above.get("dataset")
    section = dataset.get("pretrain") if isinstance(dataset, dict) else None
    if not isinstance(dataset, dict) or not isinstance(section, dict) or section.get("stream") is None:
        return below, above
    if {"tasks", "make", "partial"} <= section.keys():
        return below, above
    given = dict(section)
    name = DATASET_ALIASES.get(given["stream"], given["stream"])
    try:
        read = _section(name)
    except UserError as e:
        raise UserError(f"dataset.pretrain: {e}") from e
    if not read.get("tasks"):
        raise UserError(f"dataset.pretrain: the stream '{clip(name)}' names no tasks that a base could learn.")
    theirs, own = (part.get("env", {}) for part in (read, overlay(below.get("dataset") or {}, dataset)))
    if own and theirs and own.get("type") != theirs.get("type"):
        raise UserError(
            f"dataset.pretrain: the stream '{clip(name)}' is of the simulator {theirs.get('type')}, this one of "
            f"{own.get('type')}: a base must see what the stream's policy sees."
        )
    keys = {f.name for f in fields(PretrainDataConfig)}
    written = {"partial": True, **{k: v for k, v in read.items() if k in keys}}
    lower = below.get("dataset")
    if isinstance(lower, dict) and "pretrain" in lower:
        below = {**below, "dataset": {k: v for k, v in lower.items() if k != "pretrain"}}
    return below, {**above, "dataset": {**dataset, "pretrain": overlay(written, given)}}


def _overlaid(layer: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`overlay`; a stream without a simulator stays so where a layer above it only limits a simulator's steps."""
    dataset = layer.get("dataset")
    if isinstance(dataset, dict) and dataset.get("env", {}) is None:
        limits = above.get("dataset", {}).get("env")
        if isinstance(limits, dict) and "type" not in limits:
            above = {**above, "dataset": {k: v for k, v in above["dataset"].items() if k != "env"}}
    return overlay(layer, above)  # type: ignore[no-any-return]


def _joined(config: Any, layer: dict[str, Any]) -> Any:
    """A configuration (or its class) overlaid with a layer. Only references to other values can still be wrong."""
    try:
        return OmegaConf.merge(OmegaConf.structured(config), layer)
    except INVALID as e:
        raise UserError(f"the configuration is not valid: {getattr(e, 'full_key', None) or ''} {one_line(e)}") from e


def read_config(path: Path) -> Config:
    """The configuration that a run has recorded."""
    return to_config(_joined(Config, load_yaml(path)))


def override(config: Config, overrides: Sequence[str]) -> Config:
    """Apply dotlist overrides to a composed configuration."""
    below = {"dataset": {"env": None if config.dataset.env is None else asdict(config.dataset.env)}}
    layer = with_sets(with_base(below, read_overrides(overrides, Config))[1])
    section = layer.get("dataset", {})
    if (section.get("pretrain") or {}).get("stream") is not None:  # another base in the place of its own
        config = replace(config, dataset=replace(config.dataset, pretrain=None))
    if config.dataset.sets and "sets" not in section and (section.get("data") or section.get("repo_id")):
        section["sets"] = []  # another set in the place of several
    return to_config(_joined(config, layer))


def to_config(config: Any) -> Config:
    """Resolve interpolations, check ranges, and return the dataclass."""
    try:
        missing = [k for k in sorted(map(str, OmegaConf.missing_keys(config))) if k != "model"]
        if missing:
            raise UserError(f"the configuration lacks {', '.join(missing)}.")
        if OmegaConf.is_missing(config, "model"):
            config.model = str(config.policy.get("type", "policy"))
        OmegaConf.resolve(config)
        obj = OmegaConf.to_object(config)
    except INVALID as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"the configuration is not valid: {one_line(e)}") from e
    assert isinstance(obj, Config)
    _check_lists(obj)
    check_values(obj)
    return obj


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain containers, without secrets (redaction.py)."""
    values = asdict(config)
    redacted = redact(values, secrets_of(values))
    assert isinstance(redacted, dict)
    return redacted


class _Dumper(yaml.SafeDumper):
    """Quotes every string that would be read as something else where its key's type is not known."""


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if isinstance(plain(text), str) else "'")


_Dumper.add_representer(str, _quoted)


def to_yaml(config: Config) -> str:
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def check_values(c: Config) -> None:
    """Raise UserError for values out of range, as far as the configuration alone shows it."""
    problems: list[str] = []

    def need(ok: bool, message: str) -> None:
        if not ok:
            problems.append(message)

    for label, section in (("train", c.train), ("pretrain", c.pretrain)):
        o = section.optimizer
        need(section.steps >= 1, f"{label}.steps must be at least 1 but is {section.steps}")
        need(section.batch_size >= 1, f"{label}.batch_size must be at least 1 but is {section.batch_size}")
        need(section.log_every >= 1, f"{label}.log_every must be at least 1 but is {section.log_every}")
        _choice(problems, f"{label}.optimizer.name", o.name, ("adamw", "sgd"))
        _choice(problems, f"{label}.optimizer.schedule", o.schedule, ("cosine", "constant"))
        need(0 < o.lr < math.inf, f"{label}.optimizer.lr must be positive and finite but is {o.lr}")
        need(0 <= o.weight_decay < math.inf, f"{label}.optimizer.weight_decay must not be negative")
        need(
            len(o.betas) == 2 and all(0 <= b < 1 for b in o.betas),
            f"{label}.optimizer.betas must be 2 in [0, 1)",
        )
        need(0 <= o.momentum < 1, f"{label}.optimizer.momentum must be in [0, 1)")
        need(o.warmup_steps >= 0, f"{label}.optimizer.warmup_steps must not be negative")
        need(0 <= o.final_lr_ratio <= 1, f"{label}.optimizer.final_lr_ratio must be in [0, 1]")
        need(0 <= o.grad_clip < math.inf, f"{label}.optimizer.grad_clip must not be negative (0 = off)")
    problems += _odd_numbers({f.name: getattr(c, f.name) for f in fields(c)})
    t, e, d = c.train, c.eval, c.dataset
    need(t.gradient_accumulation >= 1, "train.gradient_accumulation must be at least 1")
    if t.gradient_accumulation >= 1:
        need(
            t.batch_size % t.gradient_accumulation == 0,
            f"train.batch_size ({t.batch_size}) must be a multiple of "
            f"train.gradient_accumulation ({t.gradient_accumulation})",
        )
    _choice(problems, "train.optimizer_across_tasks", t.optimizer_across_tasks, ("fresh", "carried"))
    _choice(problems, "train.mixed_precision", t.mixed_precision, ("fp32", "bf16"))
    _choice(problems, "train.strategy", t.strategy, ("ddp", "zero2"))
    need(0 < t.collective_timeout_s < math.inf, "train.collective_timeout_s must be positive")
    need(t.save_every_steps is None or t.save_every_steps >= 1, "train.save_every_steps must be at least 1 (or null)")
    need(
        t.save_every_minutes is None or 0 < t.save_every_minutes < math.inf,
        "train.save_every_minutes must be positive (or null)",
    )
    parts, every = t.eval_during_training, t.keep_weights_every_steps
    need(parts is None or parts >= 1, f"train.eval_during_training must be at least 1 (or null) but is {parts}")
    need(every is None or every >= 1, f"train.keep_weights_every_steps must be at least 1 (or null) but is {every}")
    need(
        parts is None or parts <= max(1, t.steps),
        f"train.eval_during_training ({parts}) divides a task's steps, but train.steps is {t.steps}",
    )
    need(
        parts is None or d.env is not None,
        "train.eval_during_training plays episodes, but the stream has no simulator (dataset.env: null)",
    )
    _choice(problems, "train.on_nonfinite", t.on_nonfinite, ("stop", "skip"))
    _choice(problems, "train.device", t.device, ("auto", "cpu", "cuda"))
    _choice(problems, "eval.split", e.split, tuple(SPLITS))
    _choice(problems, "eval.curve_split", e.curve_split, tuple(SPLITS))
    _choice(problems, "eval.cells", e.cells, ("full", "lower", "last", "diagonal"))
    if c.render.fidelity is not None:
        _choice(problems, "render.fidelity", c.render.fidelity, FIDELITIES)
    _choice(problems, "render.mismatch", c.render.mismatch, ("refuse", "allow"))
    need(
        c.render.size is None or MIN_SIZE <= c.render.size <= MAX_SIZE,
        f"render.size must be between {MIN_SIZE} and {MAX_SIZE} pixels",
    )
    _choice(problems, "log.progress", c.log.progress, ("auto", "bar", "lines", "quiet"))
    need(t.num_workers >= 0, "train.num_workers must not be negative")
    need(t.threads is None or t.threads >= 1, "train.threads must be at least 1 (or null)")
    need(1 <= e.episodes <= 100_000, f"eval.episodes must be between 1 and 100000 but is {e.episodes}")
    most = max(e.episodes, e.heldout_episodes)
    need(
        0 <= e.seed <= SEEDS_PER_SPLIT - most,
        f"eval.seed must be between 0 and {SEEDS_PER_SPLIT - most} (a million minus the episodes) but is {e.seed}",
    )
    need(0 <= e.heldout_episodes <= 100_000, "eval.heldout_episodes must be between 0 and 100000")
    need(
        not e.heldout_episodes or base_origin(c) == "pretrained",
        "eval.heldout_episodes tests the base's own pretraining tasks: a given or random base has none here",
    )
    for key in ("target_modules", "also_train"):
        try:
            re.compile(getattr(c.lora, key) or "")
        except re.error as error:
            problems.append(f"lora.{key} is not a regular expression ({error})")
    need(len(set(e.views)) == len(e.views), "eval.views names a view twice")
    need(
        "blind" not in e.views or d.env is None or bool(family(d.env_type).cameras),
        f"eval.views=[blind] replaces what cameras see, and '{d.env_type}' has none",
    )
    for key in ("shift", "brightness", "contrast", "saturation", "hue"):
        value = getattr(c.augment, key)
        need(0 <= value <= (0.5 if key in ("shift", "hue") else 1), f"augment.{key} must be from 0 to "
             f"{'0.5' if key in ('shift', 'hue') else 1}, is {value}")  # fmt: skip
    need(0 < c.augment.crop <= 1, f"augment.crop must be above 0 and at most 1, is {c.augment.crop}")
    need(e.slots >= 1, "eval.slots must be at least 1")
    need(e.workers is None or e.workers >= 1, "eval.workers must be at least 1 (or null)")
    need(0 < e.step_timeout_s < math.inf, "eval.step_timeout_s must be positive")
    need(0 <= e.retries <= 1000, "eval.retries must be between 0 and 1000")
    need(e.steps_after_success >= 0, "eval.steps_after_success must not be negative")
    need(c.lora.rank >= 1, f"lora.rank must be at least 1 but is {c.lora.rank}")
    need(c.lora.alpha >= 1, f"lora.alpha must be at least 1 but is {c.lora.alpha}")
    need(0 <= c.lora.dropout < 1, f"lora.dropout must be in [0, 1) but is {c.lora.dropout}")
    need(d.env is None or d.env.max_steps >= 1, "dataset.env.max_steps must be at least 1")
    need(
        d.env is not None or (c.render.fidelity is None and c.render.size is None),
        "render.fidelity and render.size say how a simulator draws, but the stream has none (dataset.env: null)",
    )
    need(
        d.env is not None or e.heldout_episodes == 0,
        "eval.heldout_episodes are played in a simulator, but the stream has none (dataset.env: null)",
    )
    need(0 <= c.seed < 2**31, f"seed must be in [0, 2^31) but is {c.seed}")
    makes = [("dataset.make", d.make)]
    problems += _data_problems("dataset", d)
    _choice(problems, "dataset.partition", d.partition, PARTITIONS)
    need(
        d.env is None or d.partition in ("auto", "by_task_index"),
        f"dataset.partition={d.partition} is for streams without a simulator (dataset.env: null): a simulator's tasks "
        "are known by their instructions",
    )
    need(d.env is not None or all(8 <= n <= 4096 for n in d.resize.values()), "dataset.resize takes 8 to 4096 pixels")
    need(set(d.pad) <= {"observation.state", "action"}, "dataset.pad is for observation.state and action")
    need(all(1 <= n <= 10_000 for n in d.pad.values()), "dataset.pad takes widths from 1 to 10000")
    need(d.env is None or not (d.resize or d.pad),
         "dataset.resize and dataset.pad are for streams without a simulator (dataset.env: null)")  # fmt: skip
    need(0 <= d.holdout <= 0.5, f"dataset.holdout must be from 0 (nothing) to 0.5 but is {d.holdout}")
    need(0 <= d.holdout_seed < 2**31, f"dataset.holdout_seed must be in [0, 2^31) but is {d.holdout_seed}")
    need(e.stride >= 1, f"eval.stride must be at least 1 but is {e.stride}")
    need(
        d.env is None or not d.sets,
        "several data sets are for streams without a simulator (dataset.env: null)",
    )
    need(d.num_tasks is None or d.num_tasks >= 1, f"dataset.num_tasks must be at least 1 (or null), is {d.num_tasks}")
    if d.pretrain is not None:
        makes.append(("dataset.pretrain.make", d.pretrain.make))
        problems += _data_problems("dataset.pretrain", d.pretrain)
        overlap = sorted(set(d.tasks) & set(d.pretrain.tasks))
        need(
            not overlap,
            f"dataset.pretrain.tasks must be disjoint from the stream; both have {', '.join(overlap)}",
        )
        need(len(d.pretrain.tasks) >= 1 or d.env is None, "dataset.pretrain.tasks is empty")
        need(d.env is None or not d.pretrain.sets,
             "several data sets for the base are for streams without a simulator (dataset.env: null)")  # fmt: skip
    for label, m in makes:
        need(m.demos_per_task >= 1, f"{label}.demos_per_task must be at least 1")
        need(m.action_noise >= 0, f"{label}.action_noise must not be negative")
        need(m.tail_steps >= 0, f"{label}.tail_steps must not be negative")
        need(m.max_steps >= 1, f"{label}.max_steps must be at least 1")
        need(m.ceiling_episodes >= 0, f"{label}.ceiling_episodes must not be negative")
    name = c.algorithm.get("name")
    if name is None:
        problems.append("algorithm.name is missing (for example --algo clare)")
    elif not isinstance(name, str) and not (isinstance(name, list) and name and all(isinstance(n, str) for n in name)):
        problems.append(f"algorithm.name must be a name or a list of names but is {name!r}")
    elif isinstance(name, list) and len(set(name)) != len(name):
        problems.append(f"algorithm.name must be one name or a list of different names but is {name}")
    need(
        c.policy.get("init") in (None, "random"),
        f"policy.init must be random (or null) but is {c.policy.get('init')!r}",
    )
    need(
        not (c.policy.get("init") and c.policy.get("path")),
        "policy.init=random and policy.path exclude each other: a base is either random or given",
    )
    if "type" not in c.policy and "path" not in c.policy:
        problems.append("policy.type (or policy.path, a checkpoint folder) is missing")
    if problems:
        raise UserError("the configuration is not valid: " + clip("; ".join(problems), 2000) + ".")


def _data_problems(label: str, data: DatasetConfig | PretrainDataConfig | SetConfig) -> list[str]:
    """What is wrong with the keys that say which data set to read."""
    problems = []
    if not isinstance(data, SetConfig) and data.sets:
        if data.data or data.repo_id or data.revision or data.exclude_episodes:
            problems.append(f"{label}.sets names several data sets: leave {label}.data, repo_id, revision and "
                            "exclude_episodes to its entries")  # fmt: skip
        for i, one in enumerate(data.sets):
            problems += _data_problems(f"{label}.sets[{i}]", one)
            if not 0 < one.weight < math.inf:
                problems.append(f"{label}.sets[{i}].weight must be positive and finite but is {one.weight}")
        return problems
    if not data.data and not data.repo_id:
        problems.append(f"{label}.data (a folder) or {label}.repo_id (a data set on the hub) is missing")
    if data.repo_id is not None and REPO_ID.fullmatch(data.repo_id) is None:
        problems.append(
            f"{label}.repo_id must be OWNER/NAME (lerobot/libero_10_image) but is {clip(data.repo_id, 60)!r}"
        )
    if data.revision is not None and data.repo_id is None:
        problems.append(f"{label}.revision belongs to {label}.repo_id, which is not given")
    twice = [name for name, n in Counter(data.rename.values()).items() if n > 1]
    if twice:
        problems.append(f"{label}.rename gives several features the name {twice[0]}")
    return problems


def _check_lists(c: Config) -> None:
    """Raise UserError for a list or mapping inside a plain list, which OmegaConf lets through."""
    lists: dict[str, tuple[list[Any], Any]] = {
        "dataset.tasks": (c.dataset.tasks, str),
        "dataset.pretrain.tasks": ([] if c.dataset.pretrain is None else c.dataset.pretrain.tasks, str),
        "eval.views": (c.eval.views, str),
        "train.optimizer.betas": (c.train.optimizer.betas, int | float),
        "pretrain.optimizer.betas": (c.pretrain.optimizer.betas, int | float),
    }
    for key, (values, kind) in lists.items():
        if not all(isinstance(v, kind) for v in values):
            what = "names" if kind is str else "numbers"
            raise UserError(f"the configuration is not valid: {key} must be a list of {what}.")


def _odd_numbers(value: Any, key: str = "") -> list[str]:
    """Numbers that are not valid for any setting: not finite, or beyond 64 bits."""
    if is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in fields(value)}
    if isinstance(value, dict):
        return [p for k, v in value.items() for p in _odd_numbers(v, f"{key}.{k}".removeprefix("."))]
    if isinstance(value, list | tuple):
        return [p for i, v in enumerate(value) for p in _odd_numbers(v, f"{key}[{i}]")]
    if isinstance(value, float) and not math.isfinite(value):
        return [f"{key} must be a finite number"]
    if isinstance(value, int) and not abs(value) < 2**63:
        return [f"{key} must be a number of at most 63 bits"]
    return []


def _choice(problems: list[str], key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        problems.append(f"{key} is '{value}' but must be one of {', '.join(known)}")
