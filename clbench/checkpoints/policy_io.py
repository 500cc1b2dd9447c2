"""Policies with their processors, as LeRobot checkpoint folders: full weights, or an adapter over a base folder."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import draccus
import torch
from huggingface_hub.constants import CONFIG_NAME
from lerobot.configs import PreTrainedConfig
from lerobot.policies import PreTrainedPolicy, make_pre_post_processors
from lerobot.policies.factory import get_policy_class
from lerobot.utils.constants import POLICY_POSTPROCESSOR_DEFAULT_NAME, POLICY_PREPROCESSOR_DEFAULT_NAME

import clbench.policies  # noqa: F401 (registers our policies)
from clbench import registry
from clbench.adapters import clare, lora
from clbench.checkpoints import trusted
from clbench.checkpoints.base import adapter_base
from clbench.config.policy_types import BF16, kept_in, own_keys
from clbench.config.reading import fit
from clbench.config.schema import Config
from clbench.errors import UserError, nearest
from clbench.io import read_json
from clbench.policies import precision
from clbench.tensor_files import tensor_shapes
from clbench.terminal import tell


@dataclass
class LoadedPolicy:
    """A policy and its processing pipelines. `path` is the folder it came from."""

    policy: PreTrainedPolicy
    preprocessor: Any
    postprocessor: Any
    path: str


def policy_config(section: dict[str, Any], device: str) -> PreTrainedConfig:
    """Build a LeRobot policy configuration from the `policy` section; raises UserError for unknown types and keys."""
    values = own_keys(section)
    kind = values.pop("type", None)
    known = _known(kind)
    if not isinstance(kind, str) or kind not in known:
        raise UserError(f"unknown policy type '{kind}'.{nearest(str(kind), known)}")
    cls = PreTrainedConfig.get_choice_class(kind)
    names = {f.name for f in fields(cls)}
    for key in values:
        if key not in names:
            raise UserError(f"unknown key 'policy.{key}' for {kind}.{nearest(key, names)}")
    hints = get_type_hints(cls)
    values = {k: fit(v, hints[k], f"policy.{k}") for k, v in values.items()}
    values.update(device=device, push_to_hub=False)
    try:
        config = cls(**{k: _tuples(v, hints[k]) for k, v in values.items()})
        draccus.decode(cls, values)  # `cls` accepted values of the wrong type
        return with_attention(config)
    except Exception as e:  # LeRobot's policies raise all kinds of errors for invalid values
        text = " ".join(str(e).split()) or type(e).__name__
        raise UserError(f"the policy section is not valid: {text}") from e


_warned: list[str] = []  # attention implementations that were replaced, each said once


def with_attention(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration, with `attn_implementation` sdpa where it asks for flash attention that this machine lacks."""
    wanted = getattr(config, "attn_implementation", None)
    if not isinstance(wanted, str) or not wanted.startswith("flash_attention"):
        return config
    reason = _no_flash(wanted)
    if reason is not None:
        if wanted not in _warned:
            _warned.append(wanted)
            tell(f"warning: policy.attn_implementation={wanted}: {reason}; sdpa is used instead.")
        config.attn_implementation = "sdpa"  # type: ignore[attr-defined]
    return config


def _no_flash(wanted: str) -> str | None:
    """Why flash attention cannot be used here; None: it can."""
    module = {"flash_attention_3": "flash_attn_interface"}.get(wanted, "flash_attn")
    if importlib.util.find_spec(module) is None:
        return f"the package {module} is not installed"
    if not torch.cuda.is_available():
        return "it needs a CUDA device"
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as e:  # built for another torch or CUDA
        return f"the package {module} cannot be imported ({' '.join(str(e).split())[:200]})"
    return None


def _tuples(value: Any, kind: Any) -> Any:
    """A list as the tuple that a field declares, possibly beside None: draccus writes no list in its place."""
    declared = [kind, *get_args(kind)]
    takes = any(get_origin(k) is tuple or k is tuple for k in declared)
    return tuple(value) if isinstance(value, list) and takes else value


def _known(kind: object) -> Collection[str]:
    """The policy types that LeRobot knows, with `kind` among them if clbench or an installed package has it."""
    if isinstance(kind, str) and kind in registry.names("policies"):
        registry.load("policies", kind)  # registers it with LeRobot
    choices: Collection[str] = PreTrainedConfig.get_known_choices()
    return choices


def save_policy(loaded: LoadedPolicy, folder: Path, *, adapter_only: bool = False) -> None:
    """Write configuration, processors and (unless an adapter was already written there) all weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = loaded.policy.config
    before = config.use_peft, config.pretrained_path
    config.use_peft, config.pretrained_path = adapter_only, None
    try:
        if adapter_only:
            config._save_pretrained(folder)
        else:
            with lora.taken_out(loaded.policy), _own_memory(loaded.policy):
                loaded.policy.save_pretrained(folder)
    finally:
        config.use_peft, config.pretrained_path = before
    loaded.preprocessor.save_pretrained(folder)
    loaded.postprocessor.save_pretrained(folder)


@contextlib.contextmanager
def _own_memory(policy: PreTrainedPolicy) -> Iterator[None]:
    """Inside the block, parameters that are parts of a larger buffer (under ZeRO-2) are copies on the CPU: safetensors
    cannot save parts."""
    parts = [p for p in policy.parameters() if p.untyped_storage().nbytes() != p.numel() * p.element_size()]
    buffers = [p.data for p in parts]
    for p in parts:
        p.data = p.data.to("cpu", copy=True)
    try:
        yield
    finally:
        for p, data in zip(parts, buffers, strict=True):
            p.data = data


def load_policy(folder: Path | str, device: str = "cpu", overrides: dict[str, Any] | None = None) -> LoadedPolicy:
    """Load a LeRobot checkpoint folder, with CLARE or PEFT adapters where it has them.

    Raises:
        UserError: the folder is missing, incomplete or damaged, of an unknown policy type, or holds something that is
            built only if the user trusts it (trusted.py).
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a LeRobot checkpoint folder: it has no config.json.")
    try:
        trusted.check_checkpoint(folder)  # first: a configuration may fetch what it names as soon as it is made
        pipelines = _processors(folder)
        config = read_policy_config(folder, device)
        for key, value in (overrides or {}).items():
            if key not in {f.name for f in fields(config)}:
                raise UserError(f"unknown key 'policy.{key}' for {config.type}.")
            setattr(config, key, fit(value, get_type_hints(type(config))[key], f"policy.{key}"))
        config.__post_init__()  # checks them
        trusted.check_steps(config, folder, pipelines)
        adapter = folder / "adapter_config.json"
        policy = _load_weights(config, folder) if not adapter.is_file() else _load_adapter(config, folder)
        pre, post = make_pre_post_processors(
            config,
            pretrained_path=str(folder),
            preprocessor_overrides={"device_processor": {"device": device}},
        )
    except UserError:
        raise
    except (Exception, SystemExit) as e:  # LeRobot and PEFT raise all kinds of errors for a damaged folder
        raise UserError(f"cannot load the policy in {folder}: {' '.join(str(e).split()) or type(e).__name__}") from e
    return LoadedPolicy(policy, pre, post, str(folder))


def keep_in_dtype(policy: PreTrainedPolicy, config: Config) -> None:
    """Keep what a run's policy does not train in the type that policy.dtype names (policies/precision.py)."""
    if kept_in(config) == BF16:
        precision.keep_frozen(policy, torch.bfloat16)


def read_policy_config(folder: Path, device: str) -> PreTrainedConfig:
    """The configuration of a LeRobot checkpoint folder, for `device`.

    `PreTrainedConfig.from_pretrained` does the same but leaves a temporary file behind each time.
    """
    path = folder / CONFIG_NAME
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a policy configuration: it is not a JSON object.")
    kind = values.pop("type", None)
    known = _known(kind)
    if not isinstance(kind, str) or kind not in known:
        raise UserError(f"{path} has an unknown policy type {kind!r}.{nearest(str(kind), known)}")
    try:
        return with_attention(draccus.decode(PreTrainedConfig.get_choice_class(kind), {**values, "device": device}))
    except draccus.utils.ParsingError as e:
        if e.__cause__ is None:
            raise
        raise UserError(f"{path}: {' '.join(str(e.__cause__).split())}") from e  # why the class refused its values


def _processors(folder: Path) -> dict[Path, list[dict[str, Any]]]:
    """The steps of both processors by file; raises UserError where one would import a class or read from elsewhere.

    LeRobot imports whatever a step's "class" names and calls it with the step's settings, so
    {"class": "subprocess.Popen", …} would run a program: only steps that are registered by name are loaded.
    """
    found = {}
    for name in (POLICY_PREPROCESSOR_DEFAULT_NAME, POLICY_POSTPROCESSOR_DEFAULT_NAME):
        path = folder / f"{name}.json"
        described = read_json(path)
        steps = described.get("steps") if isinstance(described, dict) else None
        if not isinstance(steps, list) or not all(isinstance(s, dict) for s in steps):
            raise UserError(f"{path} is not a processor: it has no list of steps.")
        for step in steps:
            state = step.get("state_file", "x")
            if not isinstance(step.get("registry_name"), str) or "class" in step:
                raise UserError(f"{path}: a step has no registry_name; a class named by a file is never imported.")
            if not isinstance(state, str) or "/" in state or "\0" in state or not state:
                raise UserError(f"{path}: state_file {state!r} is not a file name in that folder.")
            if "state_file" in step:
                tensor_shapes(folder / state)
        found[path] = steps
    return found


def _load_weights(config: PreTrainedConfig, folder: Path) -> PreTrainedPolicy:
    try:
        shapes = tensor_shapes(folder / "model.safetensors")
    except UserError as e:
        raise UserError(f"cannot load the policy in {folder}: {e}") from e
    check = getattr(config, "check_weights", None)  # of policies that can check their sizes against weights
    if check is not None and not check(shapes):
        raise UserError(f"{folder / 'config.json'} claims more weights than model.safetensors holds.")
    quiet = contextlib.redirect_stdout(io.StringIO())  # LeRobot prints where it loads from
    with quiet, trusted.no_backbone_weights(config):
        return get_policy_class(config.type).from_pretrained(folder, config=config, strict=True)


def _load_adapter(config: PreTrainedConfig, folder: Path) -> PreTrainedPolicy:
    tensor_shapes(folder / lora.WEIGHTS_FILE)  # PEFT would fall back to a pickle
    policy = _load_weights(config, adapter_base(folder))
    described = read_json(folder / "adapter_config.json")
    if described.get("peft_type") == "CLARE":
        clare.load_adapter(policy, folder)
        return policy
    if described.get("peft_type") == "LORA" and lora.is_ours(policy, described):
        lora.load(policy, folder)
        return policy
    from peft import PeftModel

    return PeftModel.from_pretrained(policy, str(folder))  # type: ignore[return-value]


def pick_device(name: str) -> str:
    """Turn "auto" into an available device."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
