"""What may be built from a file: policy types, processor steps and adapters that run and fetch no foreign code or data.

A checkpoint's JSON names a policy type, processor steps and settings, and LeRobot builds whatever they are. Some types
fetch models that a setting names from a hub, or pass a folder to transformers with `trust_remote_code=True`, which runs
the Python files in it. So:

- policy types in `BUILT`, with the settings there null, are built from any file, and so are those of installed packages
  that declare it (policy_types.FROM_FILES);
- of processor steps only those that the policy's own factory makes, with its settings (`check_steps`);
- of adapters CLARE's and LoRA's, with settings that import nothing (`check_checkpoint`);
- anything else only from a folder that the user named on the command line, or, for a fresh policy, a type named there:
  `--trust CHECKPOINT|RUN|TYPE`. No file can grant this. Ranks and a sweep's commands get the flag, evaluation processes
  get `given()` with their settings.

tests/test_loaders.py lists every loader in the installed LeRobot, transformers' entry points and PEFT, and its guard.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clbench.config.dit import IMAGE, TEXT, model_folder
from clbench.config.dit import TYPES as OWN
from clbench.config.policy_types import BUILT, RISKS, risk, types, wants_trust
from clbench.errors import UserError, nearest
from clbench.io import read_json
from clbench.paths import model_root, named_folder, results_root

# torchvision fetches what this setting of these types names. A checkpoint contains all weights itself.
BACKBONE_TYPES = ("act", "diffusion", "vqbet")
BACKBONE_WEIGHTS = "pretrained_backbone_weights"
BACKBONE_DEFAULT = "ResNet18_Weights.IMAGENET1K_V1"

# Settings of steps that depend on the data and the machine. Any other must be as the policy's factory sets it.
_NORMALIZER = ("eps", "features", "norm_map", "normalize_observation_keys")
FREE_SETTINGS: dict[str, tuple[str, ...]] = {
    "device_processor": ("device", "float_dtype"),
    "normalizer_processor": _NORMALIZER,
    "rename_observations_processor": ("rename_map",),
    "unnormalizer_processor": _NORMALIZER,
}

HARMLESS = ("clbench_centre_crop",)  # steps of ours that any policy may have

# PEFT's settings of LoRA that change which layers it adapts and how. Any other must be off or PEFT's default:
# some import modules (megatron_core), read files (corda_config, lora_ga_config) or load other adapters (arrow_config).
LORA_SETTINGS = (
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_bias",
    "lora_dropout", "modules_to_save", "peft_type", "peft_version", "r", "rank_pattern", "revision", "target_modules",
    "task_type", "use_dora", "use_rslora",
)  # fmt: skip
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]{1,100})?", re.ASCII)
LORA_DEFAULTS = {"megatron_core": "megatron.core", "qalora_group_size": 16}
LORA_INITS = re.compile(r"gaussian|orthogonal|olora|pissa(_niter_\d+)?")


@dataclass(frozen=True)
class Trust:
    """What the user trusts: folders with everything in them, policy types for fresh policies, models on a hub."""

    folders: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    models: tuple[str, ...] = ()


NOTHING = Trust()
_given = NOTHING


def given() -> Trust:
    """What the command line trusts."""
    return _given


def trust(what: Trust) -> None:
    """Replace what is trusted, in this process."""
    global _given
    _given = what


def trust_also(*folders: Path) -> None:
    trust(replace(_given, folders=(*_given.folders, *(str(f.resolve()) for f in folders))))


@contextmanager
def trusting(names: Sequence[str]) -> Iterator[None]:
    """Trust what `--trust` names, inside the block, and nothing else.

    Raises:
        UserError: a name is not a folder, run or policy type, nor could it be a model on a hub.
    """
    before = _given
    trust(_resolved(names))
    try:
        yield
    finally:
        trust(before)


def _resolved(names: Sequence[str]) -> Trust:
    folders, kinds, models = [], [], []
    for name in names:
        places = [Path(name).expanduser(), results_root() / name, named_folder(name, model_root())]
        found = next((p for p in places if name and p.is_dir()), None)
        if found is not None:
            folders.append(str(found.resolve()))
        is_kind = name in RISKS or (name in types() and wants_trust(name))
        if is_kind:  # even if a folder (say, models/smolvla) has that name
            kinds.append(name)
        if found is None and not is_kind and HUB_NAME.fullmatch(name):
            models.append(name)
        elif found is None and not is_kind:
            raise UserError(
                f"--trust {shlex.quote(name)}: no checkpoint folder, run or policy type has that name."
                f"{nearest(name, RISKS)}"
            )
    return Trust(tuple(folders), tuple(kinds), tuple(models))


def trusts(folder: Path) -> bool:
    """Whether the user trusts this folder, or one that it lies in."""
    return any(folder.resolve().is_relative_to(f) for f in _given.folders)


def _unless_trusted(folder: Path, what: str) -> None:
    """Raise UserError saying what is wrong and how to trust the folder, unless it is trusted."""
    if trusts(folder):
        return
    whole = folder
    if folder.name == "policy" and folder.parent.parent.name in ("checkpoints", "training_state"):
        whole = folder.parents[2]  # the run, whose other checkpoints are like this one
    raise UserError(f"{what} If you trust whoever made it, pass --trust {shlex.quote(str(whole))}")


def check_checkpoint(folder: Path) -> None:
    """Raise UserError if a checkpoint's policy type or adapter is built only for a user who trusts it.

    Only JSON is read. An adapter's base is built with the adapter's configuration, so that is checked for both.
    """
    described = read_json(folder / "config.json")
    adapter = folder / "adapter_config.json"
    _check_type(described, folder, folder / "config.json")
    if not adapter.is_file():
        return
    settings = read_json(adapter)
    if not isinstance(settings, dict):
        raise UserError(f"{adapter} is not an adapter configuration: it is not a JSON object.")
    _check_adapter(settings, folder)
    base = settings.get("base_model_name_or_path")
    if isinstance(base, str) and base:
        _check_type(described, Path(base), folder / "config.json")


def _check_type(described: Any, folder: Path, file: Path) -> None:
    kind = described.get("type") if isinstance(described, dict) else None
    if not isinstance(kind, str):
        raise UserError(f"{file} is not a policy configuration: it names no policy type.")
    reason = _risk(kind, described)
    if reason is not None:
        similar = "" if kind in types() else nearest(kind, types())
        _unless_trusted(folder, f"{file}: {reason}, so it is not built from a file.{similar}")


def _risk(kind: str, settings: dict[str, Any]) -> str | None:
    """Why a policy is not built without the user's consent; None: it is."""
    if kind not in BUILT:
        why = risk(kind)
        return None if why is None else f"policy type {kind!r} {why}"
    named = [key for key in BUILT[kind] if settings.get(key) is not None]
    if named and kind in OWN:
        return f"policy type {kind!r} with {named[0]} reads a model from another place"
    return f"policy type {kind!r} with {named[0]} {RISKS[kind]}" if named else None


def _check_adapter(settings: dict[str, Any], folder: Path) -> None:
    kind, file = settings.get("peft_type"), folder / "adapter_config.json"
    if kind == "CLARE":
        return
    if kind != "LORA":
        _unless_trusted(folder, f"{file}: adapters of type {kind!r} may read other files, so they are not built.")
        return
    for key, value in settings.items():
        if key in LORA_SETTINGS or not value or LORA_DEFAULTS.get(key) == value:
            continue
        if key == "init_lora_weights" and (value is True or LORA_INITS.fullmatch(str(value))):
            continue
        what = f"{file}: the setting {key!r} may import modules or read files, so it is not taken from a file."
        _unless_trusted(folder, what)


def check_steps(config: Any, folder: Path, pipelines: dict[Path, list[dict[str, Any]]]) -> None:
    """Raise UserError for a processor step that the policy's own factory does not make, or makes with other settings.

    Args:
        config: the policy's configuration, as read from `folder`.
        pipelines: the preprocessor's file, then the postprocessor's, with their steps.
    """
    if trusts(folder):
        return
    from lerobot.policies import make_pre_post_processors

    for made, (file, steps) in zip(make_pre_post_processors(config), pipelines.items(), strict=True):
        own: dict[str, list[dict[str, Any]]] = {}
        for step in json.loads(json.dumps(made.get_config()["steps"], default=str)):
            own.setdefault(step.get("registry_name", ""), []).append(step["config"])
        for step in steps:
            name, settings = step["registry_name"], step.get("config", {})
            if name in HARMLESS:
                continue
            if name not in own:
                what = f"{file}: policy type {config.type!r} has no step {name!r}; only its own are built from a file."
                _unless_trusted(folder, what)
            if not isinstance(settings, dict):
                raise UserError(f"{file}: the settings of step {name!r} are not a JSON object.")
            for key, value in settings.items():
                if key not in FREE_SETTINGS.get(name, ()) and all(value != s.get(key, ...) for s in own[name]):
                    what = f"{file}: policy type {config.type!r} has no step {name!r} with {key!r} = {value!r:.80}."
                    _unless_trusted(folder, what)


@contextmanager
def no_backbone_weights(config: Any) -> Iterator[None]:
    """Inside the block, a policy is built without fetching a backbone's weights, as it is about to get its own."""
    before = getattr(config, BACKBONE_WEIGHTS, None)
    if before is None:
        yield
        return
    setattr(config, BACKBONE_WEIGHTS, None)
    try:
        yield
    finally:
        setattr(config, BACKBONE_WEIGHTS, before)


def check_start(policy: dict[str, Any]) -> None:
    """Raise UserError if a `policy` section starts from a checkpoint, or a type, that the user has to trust first."""
    if policy.get("path"):
        folder = named_folder(str(policy["path"]), model_root())
        if (folder / "config.json").is_file():
            check_checkpoint(folder)
        return
    kind = str(policy.get("type"))
    if kind in OWN:
        return
    reason = _risk(kind, policy) if kind in types() else None  # an unknown one gets its own message
    if reason is not None and kind not in _given.types:
        raise UserError(f"{reason}. If that is what you want, pass --trust {kind}")


def fetched(policy: dict[str, Any], images: bool) -> str | None:
    """What a fresh policy fetches, as a line for the user; None: nothing.

    Raises:
        UserError: LeRobot would fetch weights that the configuration does not name.
    """
    kind = str(policy.get("type"))
    if kind in OWN:
        named = [policy.get(f"{what}_encoder_path") for what in (IMAGE, TEXT)]
        hub = [str(n) for n in named if n is not None and model_folder(str(n)) is None]
        are = "is" if len(hub) == 1 else "are"
        return f"{' and '.join(hub)} {are} fetched from the hub, unless in its cache." if hub else None
    if kind in _given.types:
        return f"policy type {kind!r} {risk(kind)}; what is not cached is fetched now." if kind in RISKS else None
    if kind not in BACKBONE_TYPES or not images:
        return None
    if BACKBONE_WEIGHTS not in policy:
        raise UserError(
            f"policy type {kind!r} fetches {BACKBONE_DEFAULT} from download.pytorch.org by default. Choose: "
            f"policy.{BACKBONE_WEIGHTS}=null starts the backbone from scratch, ={BACKBONE_DEFAULT} fetches it."
        )
    named = policy[BACKBONE_WEIGHTS]
    return None if named is None else f"{named} is fetched from download.pytorch.org, unless it is in torch's cache."
