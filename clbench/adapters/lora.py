"""LoRA (Hu et al. 2021, arXiv 2106.09685) through PEFT, added to a policy in place: W x + (α / r) · B A x.

A policy keeps its class and its methods; the targeted linear layers are replaced by PEFT's. Modules that train along
(`lora.also_train`: heads, mostly) train in place. Checkpoints are ordinary PEFT adapters (adapter_config.json,
adapter_model.safetensors) over the base's folder; such modules are in them whole, as PEFT's `modules_to_save`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from clbench.config.policy_types import LEROBOT
from clbench.config.schema import LoraConfig
from clbench.errors import UserError
from clbench.tensor_files import read_tensors

ADAPTER = "default"
PREFIX = "base_model.model."
WEIGHTS_FILE = "adapter_model.safetensors"


def lora_layers(policy: nn.Module) -> dict[str, LoraLayer]:
    """The policy's LoRA layers by name."""
    return {n: m for n, m in policy.named_modules() if isinstance(m, LoraLayer)}


def targets(policy: nn.Module, config: LoraConfig) -> str:
    """The regular expression of the layers to adapt: the configuration's, else the policy's own default."""
    if config.target_modules is not None:
        return config.target_modules
    pattern = _own_defaults(policy).get("target_modules") or _facts(policy, "lora")
    if not pattern:
        raise UserError(
            f"policy '{getattr(policy, 'name', type(policy).__name__)}' has no default layers for LoRA: set "
            "lora.target_modules to a regular expression over module names."
        )
    if not isinstance(pattern, str):  # PEFT's list form: module name suffixes
        pattern = rf"(.*\.)?({'|'.join(map(re.escape, pattern))})"
    return pattern


def also_trained(policy: nn.Module, config: LoraConfig) -> list[str]:
    """Full names of the modules that train along: those that the configuration names, else the policy's own default.

    A module inside another one of them is left out.

    Raises:
        UserError: the pattern matches no module, or not one that has weights.
    """
    names = [n for n, m in policy.named_modules() if n and next(m.parameters(), None) is not None]
    if config.also_train is not None:
        pattern = config.also_train
        found = [n for n in names if pattern and re.fullmatch(pattern, n)]
        if pattern and not found:
            raise UserError(f"lora.also_train '{pattern}' matches no module of the policy that has weights.")
    elif own := _own_defaults(policy).get("modules_to_save"):  # PEFT's form: ends of names
        found = [n for n in names if any(n == end or n.endswith(f".{end}") for end in own)]
    else:
        pattern = _facts(policy, "also_train")
        found = [n for n in names if pattern and re.fullmatch(pattern, n)]
    return [n for n in found if not any(n.startswith(f"{other}.") for other in found)]


def _own_defaults(policy: nn.Module) -> dict[str, Any]:
    """What the policy's class says about PEFT."""
    own = getattr(policy, "_get_default_peft_targets", lambda: None)()
    return own if isinstance(own, dict) else {}


def _facts(policy: nn.Module, key: str) -> str:
    kind = getattr(getattr(policy, "config", None), "type", "")
    return str(getattr(LEROBOT[kind], key)) if kind in LEROBOT else ""


def inject(policy: nn.Module, config: LoraConfig) -> None:
    """Put fresh LoRA layers into the policy and freeze everything else but the modules that train along.

    Draws from the global generator.
    """
    pattern = targets(policy, config)
    try:
        hits = [n for n, _ in policy.named_modules() if re.fullmatch(pattern, n)]
    except re.error as e:
        raise UserError(f"lora.target_modules '{pattern}' is not a regular expression: {e}.") from e
    if not hits:
        raise UserError(f"lora.target_modules '{pattern}' matches no module of the policy.")
    check_trainable(policy, hits, f"lora.target_modules '{pattern}'")
    whole = also_trained(policy, config)
    check_trainable(policy, whole, "lora.also_train")
    both = [n for n in hits if _inside(n, whole)]
    if both:
        raise UserError(
            f"'{both[0]}' would have a LoRA adapter (lora.target_modules '{pattern}') and train completely "
            f"(lora.also_train: {', '.join(whole)[:200]}): choose one."
        )
    settings: Any = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=pattern
    )
    try:
        inject_adapter_in_model(settings, policy, ADAPTER)
    except ValueError as e:
        text = " ".join(str(e).split())
        raise UserError(f"LoRA cannot be added to what lora.target_modules '{pattern}' matches: {text[:300]}") from e
    policy.peft_config[ADAPTER].modules_to_save = whole or None  # type: ignore[index, union-attr, operator]
    train_only(policy)


def check_trainable(policy: nn.Module, names: Iterable[str], what: str) -> None:
    """Raise UserError if `what` chose a module in a part that the policy keeps frozen: nothing there would learn."""
    for part in getattr(policy, "frozen_parts", ()):
        inside = [n for n in names if f"{n}.".startswith(f"{part}.")]
        if inside:
            raise UserError(
                f"{what} matches {inside[0]}, which is in a frozen encoder, where nothing learns: leave {part} out, or "
                f"set policy.{part.rpartition('.')[2]}_encoder_trained=true."
            )


def train_only(policy: nn.Module) -> None:
    """Let the LoRA parameters and the modules that train along train, and nothing else."""
    whole = _whole(policy)
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(".lora_" in name or _inside(name, whole))


def _whole(policy: nn.Module) -> list[str]:
    """Names of the modules that train along."""
    config: Any = getattr(policy, "peft_config", {}).get(ADAPTER)
    return list(getattr(config, "modules_to_save", None) or [])


def _inside(name: str, modules: Iterable[str]) -> bool:
    return any(name == m or name.startswith(f"{m}.") for m in modules)


def _whole_state(policy: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers of the modules that train along, by full name."""
    return {f"{n}.{k}": v for n in _whole(policy) for k, v in policy.get_submodule(n).state_dict().items()}


def merge(policy: nn.Module) -> None:
    """Add every LoRA product to its layer's weight, W ← W + (α / r) B A, and remove the LoRA layers."""
    for name, layer in lora_layers(policy).items():
        layer.merge(safe_merge=True)  # type: ignore[operator]
        parent, _, child = name.rpartition(".")
        setattr(policy.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(policy, "peft_config"):
        del policy.peft_config


@contextmanager
def taken_out(policy: nn.Module) -> Iterator[None]:
    """Inside the block, the policy without its LoRA layers. Modules that train along stay as they are now."""
    layers = lora_layers(policy)

    def put(modules: Mapping[str, nn.Module]) -> None:
        for name, module in modules.items():
            parent, _, child = name.rpartition(".")
            setattr(policy.get_submodule(parent), child, module)

    put({n: layer.get_base_layer() for n, layer in layers.items()})
    try:
        yield
    finally:
        put(layers)  # type: ignore[arg-type]


def save(policy: nn.Module, folder: Path, base_path: str) -> None:
    """Write the LoRA layers as a PEFT adapter over the base in `base_path`."""
    config: Any = policy.peft_config[ADAPTER]  # type: ignore[index]
    before = config.base_model_name_or_path, config.inference_mode
    config.base_model_name_or_path, config.inference_mode = base_path, True
    try:
        config.save_pretrained(str(folder))
    finally:
        config.base_model_name_or_path, config.inference_mode = before
    state = get_peft_model_state_dict(policy, adapter_name=ADAPTER, save_embedding_layers=False)
    state |= _whole_state(policy)
    save_file({PREFIX + k: v.detach().cpu().contiguous() for k, v in state.items()}, folder / WEIGHTS_FILE)


def load(policy: nn.Module, folder: Path) -> None:
    """Load a saved LoRA adapter, and the modules that trained along, into its base policy."""
    config: Any = PeftConfig.from_pretrained(str(folder))
    whole, config.modules_to_save = config.modules_to_save, None
    config.inference_mode = False
    state = read_tensors(folder / WEIGHTS_FILE)
    ranks = {t.shape[0] for name, t in state.items() if ".lora_" in name and t.ndim}
    claimed = [getattr(config, "r", 0), *(getattr(config, "rank_pattern", None) or {}).values()]
    if not all(type(r) is int and 0 < r <= max(ranks, default=0) for r in claimed):  # memory for it is allocated next
        raise UserError(f"{folder / 'adapter_config.json'} claims a rank that {WEIGHTS_FILE} does not have.")
    inject_adapter_in_model(config, policy, ADAPTER)
    policy.peft_config[ADAPTER].modules_to_save = whole or None  # type: ignore[index, union-attr, operator]
    own = get_peft_model_state_dict(policy, adapter_name=ADAPTER, save_embedding_layers=False)
    mine = _whole_state(policy)
    _check_names(folder, state, (PREFIX + k for k in (*own, *mine)))
    state = {k.removeprefix(PREFIX): v for k, v in state.items()}
    for name, value in mine.items():
        if value.shape != state[name].shape:
            shapes = f"{tuple(state[name].shape)}, not {tuple(value.shape)} as in the base"
            raise UserError(f"{folder / WEIGHTS_FILE}: {name} has shape {shapes}.")
        value.copy_(state.pop(name))
    set_peft_model_state_dict(policy, state, adapter_name=ADAPTER)
    train_only(policy)


def is_ours(policy: nn.Module, described: Any) -> bool:
    """Whether a LoRA adapter's description (adapter_config.json) names the modules that trained along by full names."""
    whole = described.get("modules_to_save") or []
    names = {n for n, _ in policy.named_modules()}
    return isinstance(whole, list) and all(isinstance(n, str) and n in names for n in whole)


def _check_names(folder: Path, have: Iterable[str], want: Iterable[str]) -> None:
    odd = sorted(set(have) ^ set(want))
    if odd:
        raise UserError(f"{folder / WEIGHTS_FILE} does not match its adapter_config.json (for example {odd[0]}).")
