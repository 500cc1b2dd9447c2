"""Adapters written by CLARE's released code (github.com/utiasDSL/clare), in our names.

Their `adapter_model.safetensors` names weights `LAYER.clare_func_adapters.i.…` and `LAYER.clare_discriminators.j.…`,
with PEFT's prefix and, in some files, `.default` after either; LAYER starts with `policy.` or `_policy.`, the wrapper
around their policies, and goes on as their modules are named (`converted_name` has ours).

`structure` in `adapter_config.json` has one entry for every layer, "NAME.NUMBER" → [adapters, discriminators]: with
groups `layer_name` and `layer_id` in `target_modules` what they match, else the matched text and 0. The adapter that a
discriminator belongs to is stored among the weights, as `connected_adapter_indices`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from clbench.errors import UserError

PREFIX = "base_model.model."
PART = re.compile(r"(?P<layer>.+)\.clare_(?P<kind>func_adapters|discriminators)\.(default\.)?(?P<i>\d+)\.(?P<name>.+)")
LINK = "connected_adapter_indices"
NOT_READ = ("task_id", "connected_adapter_task_id", LINK)
STATISTICS = {"running_mean": "mean", "running_std": "std", "num_batches_tracked": "batches"}
# Linear layers of each type of discriminator, in the order of the chain.
CHAINS = {
    "autoencoder": ("encoder.0", "encoder.2", "decoder.0", "decoder.2"),
    "autoencoder_small": ("encoder", "decoder"),
    "vae": ("encoder.0", "enc_mu", "decoder.0", "decoder.2"),
}
LOW_RANK = ("encoder_down", "encoder_up", "decoder_down", "decoder_up")
OTHERS = {"enc_logvar": "logvar", "fusion_layer": "fusion"}
# Modules of their policies (`ditflow_mt`, `dit_mt`) → those of ours of layout paper, one rule after the other.
RENAMED = (
    (r"^dit_flow\.", "model."),
    (r"^model\.noise_net\.encoder\.", "model.obs_encoder."),
    (r"^model\.noise_net\.", "model.velocity_net."),
    (r"^model\.language_encoder\.clip_model\b", "model.obs_encoder.encoders.text.model"),
    (r"^model\.pretrained_rgb_encoder\._model\b", "model.obs_encoder.encoders.image.model"),
    (r"^model\.language_embedding_projection\b", "model.obs_encoder.text_proj"),
    (r"^model\.rgb_embedding_projection\b", "model.obs_encoder.image_proj"),
    (r"^model\.robot_state_encoder\.1\b", "model.obs_encoder.state_proj"),
    (r"^model\.env_state_encoder\.1\b", "model.obs_encoder.env_state_proj"),
    (r"^(model\.velocity_net)\.time_net\.out_net\b", r"\1.time.mlp"),
    (r"^(model\.velocity_net)\.ac_proj\b", r"\1.proj_in"),
    (r"^(model\.velocity_net)\.dec_pos\b", r"\1.position"),
    (r"^(model\.velocity_net)\.eps_out\.adaLN_modulation\.1\b", r"\1.modulation"),
    (r"^(model\.velocity_net)\.eps_out\.linear\b", r"\1.proj_out"),
    (r"^(model\.velocity_net)\.decoder\.layers\b", r"\1.blocks"),
    *(
        (rf"^(model\.(?:obs_encoder\.layers|velocity_net\.blocks)\.\d+)\.{theirs}\b", rf"\1.{ours}")
        for theirs, ours in (
            (r"self_attn\.out_proj", "attention.out"),
            ("self_attn", "attention"),
            ("mlp", "ffn"),
            ("attn_mod(ulate|1)", "modulate1"),
            ("mlp_mod(ulate|1)", "modulate2"),
            (r"attn_(gate|mod2)\.scale", "gate1"),
            (r"mlp_(gate|mod2)\.scale", "gate2"),
        )
    ),
)


def converted_name(module: str) -> str:
    """Our name of a module of their policies (or of its weights); of other policies' modules the name itself."""
    for theirs, ours in RENAMED:
        module = re.sub(theirs, ours, module)
    return module


def wrote(state: dict[str, Tensor]) -> bool:
    """Whether the released code wrote these weights."""
    return any(".clare_func_adapters." in name for name in state)


def converted(
    values: Any, state: dict[str, Tensor], policy: nn.Module, folder: Path
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights in our form.

    Args:
        values: the contents of `adapter_config.json`.
        state: the contents of `adapter_model.safetensors`.
        policy: the base, whose modules have the layers' names, without the wrapper's.
        folder: where they are, for messages.

    Returns:
        the keys of a ClareConfig, with `structure`, `links` and the released behaviour (`lora_layers: linears`,
        `latent_activation: none`, `statistics: zero_one`), and the weights in our names.

    Raises:
        UserError: a name that the released code does not write, a layer that the policy does not have, or a
            `structure` that does not describe the weights.
    """
    if not isinstance(values, dict) or not isinstance(values.get("target_modules"), str):
        raise UserError(f"{folder / 'adapter_config.json'}: CLARE's target_modules must be one regular expression.")
    found = [(name, PART.fullmatch(name.removeprefix(PREFIX))) for name in state]
    foreign = sorted(name for name, match in found if match is None)
    if foreign:
        raise UserError(f"{folder}: '{foreign[0]}' is not the name of a weight that CLARE's released code writes.")
    parts = [(match, state[name]) for name, match in found if match is not None]
    names = _names(policy, list(dict.fromkeys(match["layer"] for match, _ in parts)), folder)
    discriminator = {**(values.get("discriminator_cfg") or {}), "latent_activation": "none", "statistics": "zero_one"}
    adapter = {**(values.get("func_adapter_cfg") or {}), "lora_layers": "linears"}
    ours: dict[str, Tensor] = {}
    counts = {layer: [0, 0] for layer in names}
    links: dict[str, dict[int, int]] = {layer: {} for layer in names}
    for match, tensor in parts:
        layer, i, name = match["layer"], int(match["i"]), match["name"]
        discriminates = match["kind"] == "discriminators"
        if i >= len(state):
            raise UserError(f"{folder}: '{match[0]}' has a number too large for the file's {len(state)} weights.")
        counts[layer][discriminates] = max(counts[layer][discriminates], i + 1)
        if discriminates and name == LINK:
            links[layer][i] = int(tensor)
        if name in NOT_READ:
            continue
        if discriminates:
            kind, own = "clare_discriminators", _of_discriminator(name, discriminator)
        else:
            kind, own = "clare_adapters", _of_adapter(name, values, policy.get_submodule(names[layer]))
        if own is None:
            raise UserError(f"{folder}: '{match[0]}' does not fit the kinds that adapter_config.json names.")
        ours[f"{PREFIX}{names[layer]}.{kind}.{i}.{own}"] = tensor.reshape(()) if own in STATISTICS.values() else tensor
    _check_structure(values, counts, links, folder)
    keys = {layer: f"{names[layer]}.{i}" for i, layer in enumerate(names)}
    return {
        **values,
        "target_modules": "|".join(map(re.escape, names.values())),
        "auto_mapping": None,
        "add_zero_init_conv_layer": False,  # the released code reads it and adds no such layer
        "discriminator_cfg": discriminator,
        "func_adapter_cfg": adapter,
        "structure": {keys[layer]: n for layer, n in counts.items()},
        "links": {keys[layer]: [links[layer][j] for j in range(n[1])] for layer, n in counts.items()},
    }, ours


def _names(policy: nn.Module, layers: list[str], folder: Path) -> dict[str, str]:
    """Layers as named in the file → the policy's modules, in the policy's order."""
    modules = {name: i for i, (name, _) in enumerate(policy.named_modules())}
    found = {}
    for layer in layers:
        own = re.sub(r"^_?policy\.", "", layer)
        name = next((n for n in (layer, own, converted_name(own)) if n in modules), None)
        if name is None:
            raise UserError(
                f"{folder} has adapters for a layer '{own}', which the base policy does not have: it was trained "
                "on another policy."
            )
        found[layer] = name
    return dict(sorted(found.items(), key=lambda item: modules[item[1]]))


def _of_discriminator(name: str, cfg: dict[str, Any]) -> str | None:
    """Our name of a discriminator's weight, or None."""
    if name in STATISTICS:
        return STATISTICS[name]
    module, _, kind = name.rpartition(".")
    if module in OTHERS:
        return f"{OTHERS[module]}.{kind}"
    if cfg.get("use_lora"):
        module, _, factor = module.rpartition("_")
        return f"layers.{LOW_RANK.index(module)}.{factor.lower()}.{kind}" if module in LOW_RANK else None
    chain = CHAINS.get(cfg.get("type", "autoencoder"), ())
    return f"layers.{chain.index(module)}.{kind}" if module in chain else None


def _of_adapter(name: str, values: dict[str, Any], base: nn.Module) -> str | None:
    """Our name of an adapter's weight, or None."""
    if (values.get("func_adapter_cfg") or {}).get("use_lora"):
        match = re.fullmatch(r"layer_wise_lora_adapters\.(\w+)\.lora_([ab])\.weight", name)
        linears = [n.replace(".", "_") or "self" for n, m in base.named_modules() if isinstance(m, nn.Linear)]
        if match is None or match[1] not in linears:
            return None
        return f"{'down' if match[2] == 'a' else 'up'}.{linears.index(match[1])}.weight"
    if values.get("use_trainable_copy"):
        return f"copy.{name}"
    module, _, kind = name.rpartition(".")
    return {"down_proj": f"down.{kind}", "up_proj": f"up.{kind}"}.get(module)


def _check_structure(
    values: dict[str, Any], counts: dict[str, list[int]], links: dict[str, dict[int, int]], folder: Path
) -> None:
    """Raise UserError if `structure` or the links contradict the weights."""
    keys = {layer: _key(layer, values["target_modules"], folder) for layer in counts}
    structure = values.get("structure") or {}
    for layer, (adapters, discriminators) in counts.items():
        key = keys[layer]
        said = structure.get(key) if isinstance(structure, dict) else None
        shared = list(keys.values()).count(key) > 1  # the released code counts such layers under one key
        if said is None or (not shared and list(said) != [adapters, discriminators]):
            raise UserError(
                f"{folder}: structure has {said} for '{key}', but the weights of '{layer}' are {adapters} adapters and "
                f"{discriminators} discriminators."
            )
        missing = sorted(set(range(discriminators)) - links[layer].keys())
        if missing or any(not 0 <= a < adapters for a in links[layer].values()):
            raise UserError(f"{folder}: '{layer}' has a discriminator without an adapter ({LINK}).")


def _key(layer: str, pattern: str, folder: Path) -> str:
    """The key of `structure` for a layer."""
    try:
        match = re.search(pattern, layer)
    except re.error as e:
        raise UserError(f"{folder}: target_modules '{pattern}' is not a regular expression: {e}.") from e
    if match is None:
        raise UserError(f"{folder}: target_modules '{pattern}' does not match the layer '{layer}' of the weights.")
    groups = match.groupdict()
    if {"layer_name", "layer_id"} <= groups.keys():
        return f"{groups['layer_name']}.{int(groups['layer_id'] or 0)}"
    return f"{match[0]}.0"
