"""LoRA (Hu et al. 2021, arXiv 2106.09685) through PEFT, added to a policy in place: W x + (α / r) · B A x.

A policy keeps its class and its methods; the targeted linear layers are replaced by PEFT's. Checkpoints are ordinary
PEFT adapters (adapter_config.json, adapter_model.safetensors) over the base's folder.
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
from torch import nn

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
    default = getattr(policy, "_get_default_peft_targets", lambda: None)()
    pattern = default.get("target_modules") if isinstance(default, dict) else None
    if not pattern:
        raise UserError(
            f"policy '{getattr(policy, 'name', type(policy).__name__)}' has no default layers for LoRA: set "
            "lora.target_modules to a regular expression over module names."
        )
    if not isinstance(pattern, str):  # PEFT's list form: module name suffixes
        pattern = rf"(.*\.)?({'|'.join(map(re.escape, pattern))})"
    return pattern


def inject(policy: nn.Module, config: LoraConfig) -> None:
    """Put fresh LoRA layers into the policy and freeze everything else. Draws from the global generator."""
    pattern = targets(policy, config)
    try:
        hits = [n for n, _ in policy.named_modules() if re.fullmatch(pattern, n)]
    except re.error as e:
        raise UserError(f"lora.target_modules '{pattern}' is not a regular expression: {e}.") from e
    if not hits:
        raise UserError(f"lora.target_modules '{pattern}' matches no module of the policy.")
    check_trainable(policy, hits, f"lora.target_modules '{pattern}'")
    settings: Any = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=pattern
    )
    try:
        inject_adapter_in_model(settings, policy, ADAPTER)
    except ValueError as e:
        text = " ".join(str(e).split())
        raise UserError(f"LoRA cannot be added to what lora.target_modules '{pattern}' matches: {text[:300]}") from e
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
    """Let the LoRA parameters train and nothing else."""
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(".lora_" in name)


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
    """Inside the block, the policy as it was before LoRA layers were added."""
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
    save_file({PREFIX + k: v.detach().cpu().contiguous() for k, v in state.items()}, folder / WEIGHTS_FILE)


def load(policy: nn.Module, folder: Path) -> None:
    """Load a saved LoRA adapter into its base policy."""
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False
    state = read_tensors(folder / WEIGHTS_FILE)
    ranks = {t.shape[0] for name, t in state.items() if ".lora_" in name and t.ndim}
    claimed = [getattr(config, "r", 0), *(getattr(config, "rank_pattern", None) or {}).values()]
    if not all(type(r) is int and 0 < r <= max(ranks, default=0) for r in claimed):  # memory for it is allocated next
        raise UserError(f"{folder / 'adapter_config.json'} claims a rank that {WEIGHTS_FILE} does not have.")
    inject_adapter_in_model(config, policy, ADAPTER)
    own = get_peft_model_state_dict(policy, adapter_name=ADAPTER, save_embedding_layers=False)
    _check_names(folder, state, (PREFIX + k for k in own))
    set_peft_model_state_dict(policy, {k.removeprefix(PREFIX): v for k, v in state.items()}, adapter_name=ADAPTER)
    train_only(policy)


def _check_names(folder: Path, have: Iterable[str], want: Iterable[str]) -> None:
    odd = sorted(set(have) ^ set(want))
    if odd:
        raise UserError(f"{folder / WEIGHTS_FILE} does not match its adapter_config.json (for example {odd[0]}).")
