"""CLARE's layers (Römer, Zhang, Schoellig 2026, arXiv 2601.09512) as a PEFT method on unmodified PEFT.

A ClareLayer stands in the place of a frozen layer and holds adapters A_1 … A_a, discriminators D_1 … D_d and a link
D_j → adapter:

    adapter        out = base(x) + W_up · ReLU(W_down x + b) + b'
    discriminator  autoencoder d → hidden → latent → hidden → d with ReLU;  e_j(x) = mean (x - D_j(x))²
    routing        j* = argmin_j e_j(x), per sample, at every forward; the adapter linked to D_j* is used

e is the mean over features, and over tokens of a sequence. Discriminators of a layer are evaluated together as
batched products, and each row gathers its adapter's weights, so there is no loop over samples or tasks.

`ClareConfig` is the JSON that CLARE's README shows, read and written by PEFT as `adapter_config.json`; saving and
loading go through PEFT's own functions, so `PeftModel.from_pretrained` reads a checkpoint too.
Shape suffixes: B samples, L tokens, D features, N = B·L rows, J discriminators.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import peft.mapping
import torch
from peft import PeftConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from clbench.adapters import clare_release
from clbench.adapters.clare_parts import (
    DISCRIMINATORS,
    Adapter,
    CopyAdapter,
    Discriminator,
    LinearsAdapter,
    fusable,
    kl_to_standard_normal,
)
from clbench.adapters.lora import check_trainable
from clbench.errors import UserError, nearest
from clbench.io import read_json
from clbench.tensor_files import read_tensors

ADAPTER = "default"  # PEFT's name for an adapter when there is one
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_PARTS = 10_000  # adapters, or discriminators, of one layer
PREFIX = "base_model.model."  # of every key in PEFT's weight files
NOT_READ = {"peft_version", "_module_configs"}  # the latter says target_modules and the sizes once more
ONE_PATTERN = (
    "CLARE's target_modules must be one regular expression, and all its layers have the same sizes here: join several "
    "patterns by |."
)


# Keys that the paper's repository does not have, or has for one type alone. A file has those that differ from these.
_OWN_DISCRIMINATOR = {"beta": 1.0, "latent_activation": "relu", "statistics": "first_batch"}
_OWN_ADAPTER = {"lora_layers": "whole"}


def _discriminator_defaults() -> dict[str, Any]:
    return {
        "type": "autoencoder",
        "batch_first": True,
        "feature_dim": None,
        "feature_fusion": False,
        "fused_feature_dim": None,
        "hidden_dim": 256,
        "latent_dim": 128,
        "num_tokens": None,
        "lora_rank": 32,
        "lora_alpha": 32,
        "use_lora": False,
        "use_momentum": True,
        "momentum": 0.1,
        "max_batches_tracked": 2000,
        **_OWN_DISCRIMINATOR,
    }


def _adapter_defaults() -> dict[str, Any]:
    return {"hidden_dim": 1024, "lora_rank": 32, "lora_alpha": 32, "use_lora": False, **_OWN_ADAPTER}


@dataclass
class ClareConfig(PeftConfig):
    """`adapter_config.json` of a CLARE checkpoint.

    Attributes:
        target_modules: regular expression over module names (full match) of the layers that may expand.
        num_learned_task: tasks learned so far.
        feature_dim, out_feature_dim: input and output width of the layers; null = read from each layer.
        batch_first: inputs are (B, L, D); false: (L, B, D). discriminator_cfg.batch_first must be the same.
        use_trainable_copy: adapters are copies of the base layer.
        add_zero_init_conv_layer: what an adapter adds passes through a linear map that starts at zero.
        structure: "layer name.number" → [adapters, discriminators].
        links: "layer name.number" → for every discriminator the index of its adapter.
        discriminator_cfg, func_adapter_cfg: sizes and options (clare_parts.py); unknown keys and values are errors.
    """

    target_modules: Any = None
    batch_first: bool = True
    num_learned_task: int = 0
    feature_dim: int | None = None
    out_feature_dim: int | None = None
    use_trainable_copy: bool = False
    add_zero_init_conv_layer: bool = False
    structure: dict[str, list[int]] = field(default_factory=dict)
    links: dict[str, list[int]] = field(default_factory=dict)
    discriminator_cfg: dict[str, Any] = field(default_factory=_discriminator_defaults)
    func_adapter_cfg: dict[str, Any] = field(default_factory=_adapter_defaults)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "CLARE"  # type: ignore[assignment]
        for name, given in (
            ("target_modules", self.target_modules if self.target_modules is not None else ""),
            ("discriminator_cfg", self.discriminator_cfg),
            ("func_adapter_cfg", self.func_adapter_cfg),
            ("structure", self.structure),
            ("links", self.links),
        ):
            if not isinstance(given, str if name == "target_modules" else dict):
                must = f"{name} must be a mapping." if name != "target_modules" else ONE_PATTERN
                raise UserError(f"CLARE configuration: {must}")
        for name, given, known in (
            ("discriminator_cfg", self.discriminator_cfg, _discriminator_defaults()),
            ("func_adapter_cfg", self.func_adapter_cfg, _adapter_defaults()),
        ):
            for key in given:
                if key not in known:
                    raise UserError(f"CLARE configuration: unknown key {name}.{key}.{nearest(key, known)}")
            known.update(given)
            setattr(self, name, known)
        self._check_kinds()
        self._check_sizes()
        self._check_structure()

    def _check_kinds(self) -> None:
        d, a = self.discriminator_cfg, self.func_adapter_cfg
        for name, value, known in (
            ("discriminator_cfg.type", d["type"], tuple(DISCRIMINATORS)),
            ("discriminator_cfg.latent_activation", d["latent_activation"], ("relu", "none")),
            ("discriminator_cfg.statistics", d["statistics"], ("first_batch", "zero_one")),
            ("func_adapter_cfg.lora_layers", a["lora_layers"], ("whole", "linears")),
        ):
            if value not in known:
                raise UserError(f"CLARE configuration: {name} is {value!r} but must be one of {', '.join(known)}.")
        for name, value in (
            ("batch_first", self.batch_first),
            ("use_trainable_copy", self.use_trainable_copy),
            ("add_zero_init_conv_layer", self.add_zero_init_conv_layer),
            *((f"discriminator_cfg.{k}", d[k]) for k in ("batch_first", "feature_fusion", "use_lora", "use_momentum")),
            ("func_adapter_cfg.use_lora", a["use_lora"]),
        ):
            if not isinstance(value, bool):
                raise UserError(f"CLARE configuration: {name} must be true or false but is {value!r}.")
        inner = a["use_lora"] and a["lora_layers"] == "linears"
        for wrong, message in (
            (self.batch_first != d["batch_first"], "batch_first and discriminator_cfg.batch_first differ: both see the "
             "same input, so set both alike"),
            (self.use_trainable_copy and a["use_lora"], "use_trainable_copy and func_adapter_cfg.use_lora exclude each "
             "other: an adapter is a copy or low-rank"),
            (self.add_zero_init_conv_layer and inner, "add_zero_init_conv_layer needs an adapter beside the layer, and "
             "func_adapter_cfg.lora_layers: linears puts it inside; LoRA starts at zero anyway"),
            (d["use_lora"] and d["type"] != "autoencoder", f"discriminator_cfg.use_lora is for type autoencoder, not "
             f"{d['type']}"),
            (d["feature_fusion"] and d["num_tokens"] is None, "discriminator_cfg.feature_fusion needs num_tokens, the "
             "number of tokens of the layers' inputs"),
        ):  # fmt: skip
            if wrong:
                raise UserError(f"CLARE configuration: {message}.")

    def _check_sizes(self) -> None:
        d, a = self.discriminator_cfg, self.func_adapter_cfg
        for name, value in (
            ("discriminator_cfg.hidden_dim", d["hidden_dim"]),
            ("discriminator_cfg.latent_dim", d["latent_dim"]),
            ("discriminator_cfg.lora_rank", d["lora_rank"]),
            ("discriminator_cfg.num_tokens", 1 if d["num_tokens"] is None else d["num_tokens"]),
            ("discriminator_cfg.fused_feature_dim", 1 if d["fused_feature_dim"] is None else d["fused_feature_dim"]),
            ("discriminator_cfg.max_batches_tracked", d["max_batches_tracked"]),
            ("func_adapter_cfg.hidden_dim", a["hidden_dim"]),
            ("func_adapter_cfg.lora_rank", a["lora_rank"]),
        ):
            if type(value) is not int or value < 1:
                raise UserError(f"CLARE configuration: {name} must be a positive integer but is {value!r}.")
        for name, value in (("discriminator_cfg.lora_alpha", d["lora_alpha"]), ("discriminator_cfg.beta", d["beta"]),
                            ("func_adapter_cfg.lora_alpha", a["lora_alpha"])):  # fmt: skip
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise UserError(f"CLARE configuration: {name} must be a number from 0 on but is {value!r}.")
        if not isinstance(d["momentum"], int | float) or not 0 < d["momentum"] <= 1:
            raise UserError(
                f"CLARE configuration: discriminator_cfg.momentum must be in (0, 1] but is {d['momentum']}."
            )

    def _check_structure(self) -> None:
        for key, counts in self.structure.items():
            good = isinstance(counts, list | tuple) and len(counts) == 2
            if not good or not all(type(n) is int and 0 <= n <= MAX_PARTS for n in counts):
                raise UserError(f"CLARE configuration: structure of layer {key} is not two counts up to {MAX_PARTS}.")
            adapters, discriminators = counts
            links = self.links.get(key, list(range(discriminators)) if adapters == discriminators else None)
            if links is None or len(links) != discriminators or any(not 0 <= i < adapters for i in links):
                raise UserError(
                    f"CLARE configuration: layer {key} has {adapters} adapters and {discriminators} discriminators, "
                    f"and links {links}, which do not fit together."
                )
            self.links[key] = links

    def to_dict(self) -> dict[str, Any]:
        """The keys of the paper's repository, and those of ours that have another value than their default."""
        values = super().to_dict()
        for section, own in (("discriminator_cfg", _OWN_DISCRIMINATOR), ("func_adapter_cfg", _OWN_ADAPTER)):
            values[section] = {k: v for k, v in values[section].items() if k not in own or v != own[k]}
        return values


def z_scores(errors_JB: Tensor, mean_J: Tensor, std_J: Tensor, absolute: bool = False) -> Tensor:
    """z_j = mean over samples of (e_j(x) - μ_j) / σ_j, (J,); `absolute`: of its absolute value, as released."""
    off = errors_JB.sub(mean_J[:, None]).abs() if absolute else errors_JB - mean_J[:, None]
    return (off / std_J.clamp(min=1e-12)[:, None]).mean(1)


def layer_dims(layer: nn.Module, name: str) -> tuple[int, int]:
    """Input and output width of a layer: its own `in_features`/`out_features`, else its first and last Linear's."""
    if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
        return int(layer.in_features), int(layer.out_features)  # type: ignore[arg-type]
    linears = [m for m in layer.modules() if isinstance(m, nn.Linear)]
    if not linears:
        raise UserError(f"CLARE cannot adapt layer '{name}' ({type(layer).__name__}): it has no linear layer.")
    return linears[0].in_features, linears[-1].out_features


class ClareLayer(nn.Module, BaseTunerLayer):
    """A frozen base layer with adapters and discriminators; see the module's docstring.

    `forced`: index of the adapter that every row uses (training); None = routed per row.
    `route`: (B,) adapters chosen at the last routed forward; `inputs`: the last input while `capturing`.
    """

    adapter_layer_names = ("clare_adapters", "clare_discriminators")

    def __init__(self, base_layer: nn.Module, name: str, config: ClareConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._active_adapter = [ADAPTER]
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.name = name
        self.config = config
        self.dim_in, self.dim_out = layer_dims(base_layer, name)
        for label, want, have in (
            ("feature_dim", config.feature_dim, self.dim_in),
            ("discriminator_cfg.feature_dim", config.discriminator_cfg["feature_dim"], self.dim_in),
            ("out_feature_dim", config.out_feature_dim, self.dim_out),
        ):
            if want is not None and want != have:
                raise UserError(
                    f"CLARE configuration: {label} is {want}, layer '{name}' has {have}. Set it to null to read it "
                    "from the layer."
                )
        self.inner = [m for m in base_layer.modules() if isinstance(m, nn.Linear)] if self.lora_inside else []
        if self.lora_inside and any(isinstance(m, nn.MultiheadAttention) for m in base_layer.modules()):
            raise UserError(
                f"CLARE: layer '{name}' holds torch's MultiheadAttention, whose one weight for a whole batch cannot "
                "differ from sample to sample: choose other target_modules, or lora_layers: whole."
            )
        self.clare_adapters = nn.ModuleDict({ADAPTER: nn.ModuleList()})
        self.clare_discriminators = nn.ModuleDict({ADAPTER: nn.ModuleList()})
        self.links: list[int] = []
        self.forced: int | None = None
        self.capturing: Capture | None = None
        self.route: Tensor | None = None
        self._stacked_size = (0, 0)
        self._stacked_params: list[nn.Parameter] = []
        self._stack_key: tuple[Any, ...] = ()
        self._stacks: dict[str, Tensor] = {}

    @property
    def adapters(self) -> nn.ModuleList:
        return self.clare_adapters[ADAPTER]  # type: ignore[return-value]

    @property
    def discriminators(self) -> nn.ModuleList:
        return self.clare_discriminators[ADAPTER]  # type: ignore[return-value]

    @property
    def lora_inside(self) -> bool:
        """Whether adapters are low-rank products in every linear layer inside the base layer."""
        cfg = self.config.func_adapter_cfg
        return bool(cfg["use_lora"] and cfg["lora_layers"] == "linears")

    def add_adapter(self) -> Any:
        reference = next(self.base_layer.parameters())
        cfg, zero = self.config.func_adapter_cfg, self.config.add_zero_init_conv_layer
        adapter: nn.Module
        if self.lora_inside:
            adapter = LinearsAdapter(self.inner, cfg)
        elif self.config.use_trainable_copy:
            adapter = CopyAdapter(self.base_layer, self.dim_out, zero)
        else:
            adapter = Adapter(self.dim_in, self.dim_out, cfg, zero)
        self.adapters.append(adapter.to(reference.device))
        return adapter

    def add_discriminator(self, link: int) -> Discriminator:
        assert 0 <= link < len(self.adapters)
        reference = next(self.base_layer.parameters())
        cfg = self.config.discriminator_cfg
        discriminator = DISCRIMINATORS[cfg["type"]](self.dim_in, cfg)
        self.discriminators.append(discriminator.to(reference.device))
        self.links.append(link)
        return discriminator

    # ---- routing --------------------------------------------------------------------------------
    def _stacked(self) -> dict[str, Tensor]:
        """All adapters' and discriminators' weights, stacked; rebuilt when any of them has changed."""
        size = (len(self.adapters), len(self.discriminators))
        if size != self._stacked_size:  # walking the modules costs milliseconds with 40 tasks
            self._stacked_size = size
            self._stacked_params = [*self.adapters.parameters(), *self.discriminators.parameters()]
        params = self._stacked_params
        key = (params[0].data_ptr(), *[p._version for p in params])
        if key != self._stack_key:
            s: dict[str, Tensor] = {}
            found: list[Any] = list(self.discriminators)
            for i in range(len(found[0].layers)):
                _stack(s, f"{i}", [d.layers[i] for d in found])
            for name in ("fusion", "logvar"):
                if getattr(found[0], name, None) is not None:
                    _stack(s, name, [getattr(d, name) for d in found])
            adapters: list[Any] = list(self.adapters)
            if self.lora_inside:
                for i in range(len(self.inner)):
                    _stack(s, f"down{i}", [a.down[i] for a in adapters])
                    _stack(s, f"up{i}", [a.up[i] for a in adapters])
            elif not self.config.use_trainable_copy:
                for name in ("down", "up", *(["zero"] if self.config.add_zero_init_conv_layer else [])):
                    _stack(s, name, [getattr(a, name) for a in adapters])
            s["links"] = torch.tensor(self.links, device=params[0].device)
            self._stack_key, self._stacks = key, s
        return self._stacks

    @torch.no_grad()
    def errors(self, x: Tensor) -> Tensor:
        """e_j(x) of every discriminator, (J, B), for x (B, …, D)."""
        s = self._stacked()
        newest: Any = self.discriminators[-1]
        B, J = x.shape[0], s["w0"].shape[0]
        x = x.float()
        rows = x.reshape(-1, x.shape[-1])  # (N, D), or (J, B, D) of the fused tokens
        if "wfusion" in s:
            x_BF = fusable(x, s["wfusion"].shape[1])
            rows = torch.baddbmm(s["bfusion"], x_BF.expand(J, -1, -1), s["wfusion"])
        h, logvar, latent = rows.expand(J, -1, -1), None, None
        for i, relu in enumerate(newest.relus):
            h = h.relu_() if relu else h
            if i == 1 and "wlogvar" in s:
                logvar = torch.baddbmm(s["blogvar"], h, s["wlogvar"])
            h = torch.baddbmm(s[f"b{i}"], h, s[f"w{i}"])
            if i == 1 and logvar is not None:
                latent = kl_to_standard_normal(h, logvar).view(J, B, -1).mean(-1)
        error = (h - rows).square_().view(J, B, -1).mean(-1)
        return error if latent is None else error + newest.beta / rows.shape[-1] * latent

    def _choose(self, x: Tensor) -> Tensor:
        """The adapter of every sample of x (B, …, D): (B,). Keeps it as `route`."""
        with torch.autocast(x.device.type, enabled=False):
            self.route = self._stacked()["links"][self.errors(x).argmin(0)]
        return self.route

    def _routed(self, x: Tensor) -> Tensor:
        """What the chosen adapters add for x (B, …, D)."""
        route = self._choose(x)
        if self.config.use_trainable_copy:
            return self._copies(x, route)
        with torch.autocast(x.device.type, enabled=False):
            x_BLD = x.float().reshape(x.shape[0], -1, x.shape[-1])
            h = self._gathered(x_BLD, "down")
            adapter: Adapter = self.adapters[0]  # type: ignore[assignment]
            out = adapter.scale * self._gathered(h.relu_() if adapter.relu else h, "up")
            if adapter.zero is not None:
                out = self._gathered(out, "zero")
        return out.reshape(*x.shape[:-1], -1)

    def _gathered(self, x_BLD: Tensor, part: str) -> Tensor:
        s = self._stacks
        weight = s[f"w{part}"][self.route]
        return torch.baddbmm(s[f"b{part}"][self.route], x_BLD, weight) if f"b{part}" in s else x_BLD @ weight

    def _copies(self, x: Tensor, route: Tensor) -> Tensor:
        """The outputs of the chosen copies of the base layer, each for all of its samples at once."""
        out: Tensor | None = None
        for i in route.unique().tolist():
            rows = (route == i).nonzero()[:, 0]
            part = self._batch_first(self.adapters[i](self._batch_first(x[rows])))
            out = part.new_zeros(x.shape[0], *part.shape[1:]) if out is None else out
            out = out.index_copy(0, rows, part)
        assert out is not None
        return out

    def _batch_first(self, x: Tensor) -> Tensor:
        """A sequence (L, B, D) as (B, L, D), or the other way round, where the layer takes the former."""
        return x if self.config.batch_first or x.ndim != 3 else x.transpose(0, 1)

    @contextmanager
    def _low_rank_inside(self, which: int | Tensor) -> Iterator[None]:
        """Adapter `which`, or (B,) the adapter of each sample, in the linear layers of the base layer."""
        with ExitStack() as stack:
            for i, linear in enumerate(self.inner):
                stack.callback(linear.register_forward_hook(partial(self._add_low_rank, which, i)).remove)
            yield

    def _add_low_rank(self, which: int | Tensor, i: int, linear: nn.Module, args: Any, out: Tensor) -> Tensor:
        adapter: Any = self.adapters[which if isinstance(which, int) else 0]
        if isinstance(which, int):
            return out + adapter.added(i, args[0].to(adapter.down[i].weight.dtype)).to(out.dtype)
        x = self._batch_first(args[0])
        if x.shape[0] != len(which):
            raise UserError(
                f"CLARE: a linear layer inside '{self.name}' sees {x.shape[0]} rows for {len(which)} samples, so they "
                "cannot have an adapter each: choose other target_modules, or lora_layers: whole."
            )
        with torch.autocast(x.device.type, enabled=False):
            h = self._gathered(x.float().reshape(x.shape[0], -1, x.shape[-1]), f"down{i}")
            added = adapter.scale * self._gathered(h, f"up{i}")
        return out + self._batch_first(added.reshape(*x.shape[:-1], -1)).to(out.dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.capturing is not None:
            self.capturing.record(self, self._batch_first(x))
        d = self.config.discriminator_cfg
        if d["feature_fusion"]:  # before adapters train for discriminators that cannot be made
            fusable(self._batch_first(x), d["num_tokens"] * self.dim_in)
        plain = self._disable_adapters or len(self.adapters) == 0
        if self.lora_inside and not plain:
            with self._low_rank_inside(self._choose(self._batch_first(x)) if self.forced is None else self.forced):
                return self.base_layer(x, *args, **kwargs)
        out = self.base_layer(x, *args, **kwargs)
        if plain:
            return out
        if self.forced is not None:
            adapter: Any = self.adapters[self.forced]
            return out + adapter(x.to(adapter.dtype)).to(out.dtype)
        return out + self._batch_first(self._routed(self._batch_first(x))).to(out.dtype)


def _stack(into: dict[str, Tensor], name: str, layers: Sequence[Any]) -> None:
    """Weights (J, D_in, D_out) and biases (J, 1, D_out) of one linear layer of each, as w`name` and b`name`."""
    into[f"w{name}"] = torch.stack([m.weight.detach() for m in layers]).transpose(1, 2)
    if layers[0].bias is not None:
        into[f"b{name}"] = torch.stack([m.bias.detach() for m in layers])[:, None]


class _AllCapturedError(Exception):
    """Ends a forward pass once every layer has been seen; never leaves `capture`."""


class Capture:
    """Collects the inputs of layers during one forward pass."""

    def __init__(self, layers: Sequence[ClareLayer]) -> None:
        self.want = {layer.name for layer in layers}
        self.inputs: dict[str, Tensor] = {}

    def record(self, layer: ClareLayer, x: Tensor) -> None:
        self.inputs.setdefault(layer.name, x.detach())

    def complete(self) -> bool:
        return self.inputs.keys() == self.want


@contextmanager
def capturing(layers: Sequence[ClareLayer]) -> Iterator[Capture]:
    """Collect each layer's first input of the forward pass inside the block; what follows the last one is skipped."""
    capture = Capture(layers)
    handles = [layer.register_forward_hook(lambda m, a, o: _stop(capture), with_kwargs=False) for layer in layers]
    for layer in layers:
        layer.capturing = capture
    try:
        yield capture
    except _AllCapturedError:
        assert capture.complete()
    finally:
        for layer, handle in zip(layers, handles, strict=True):
            layer.capturing = None
            handle.remove()
    if not capture.complete():
        missing = sorted(capture.want - capture.inputs.keys())
        raise UserError(f"CLARE: the policy's forward pass never reached {', '.join(missing)}.")


def _stop(capture: Capture) -> None:
    if capture.complete():
        raise _AllCapturedError


class ClareTuner(BaseTuner):
    """PEFT's side of it: replaces the target modules by ClareLayers with the configured structure."""

    prefix = "clare_"
    tuner_layer_cls = ClareLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (PEFT's attribute)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if adapter_name != ADAPTER:
            raise UserError(f"CLARE keeps all its adapters under one name, '{ADAPTER}', not '{adapter_name}'.")
        assert isinstance(peft_config, ClareConfig)
        layer = ClareLayer(target, current_key, peft_config)
        for key, (adapters, _) in peft_config.structure.items():
            if re.sub(r"\.\d+$", "", key) != current_key:
                continue
            for _ in range(adapters):
                layer.add_adapter()
            for link in peft_config.links[key]:
                layer.add_discriminator(link)
        self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f".{adapter_name}.", ".", 1)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)
        new_module.train(child.training)


def register() -> None:
    """Make PEFT know CLARE: its mappings are plain dictionaries keyed by the type's name."""
    peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["CLARE"] = ClareConfig  # type: ignore[index]
    peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING["CLARE"] = ClareTuner  # type: ignore[index]
    peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING["CLARE"] = ClareTuner.prefix  # type: ignore[index]


register()


def clare_layers(policy: nn.Module) -> list[ClareLayer]:
    """The policy's ClareLayers in the order of its modules (shallowest first)."""
    return [m for m in policy.modules() if isinstance(m, ClareLayer)]


def inject(policy: nn.Module, config: ClareConfig) -> list[ClareLayer]:
    """Put ClareLayers into the policy, freeze everything, and return them."""
    names = [n for n, _ in policy.named_modules()]
    pattern = config.target_modules
    try:
        hits = [n for n in names if isinstance(pattern, str) and re.fullmatch(pattern, n)]
    except re.error as e:
        raise UserError(f"CLARE: target_modules '{pattern}' is not a regular expression: {e}.") from e
    if not hits:
        raise UserError(f"CLARE: target_modules '{pattern}' matches no module of the policy.")
    check_trainable(policy, hits, f"CLARE: target_modules '{pattern}'")
    unknown = [k for k in config.structure if re.sub(r"\.\d+$", "", k) not in (hits or names)]
    if unknown:
        raise UserError(f"CLARE configuration: structure names '{unknown[0]}', which is no targeted layer.")
    inject_adapter_in_model(config, policy, ADAPTER)
    policy.requires_grad_(False)
    return clare_layers(policy)


def update_config(config: ClareConfig, layers: Sequence[ClareLayer], learned: int) -> None:
    """Write the layers' present structure into the configuration."""
    config.num_learned_task = learned
    config.structure = {
        f"{layer.name}.{i}": [len(layer.adapters), len(layer.discriminators)] for i, layer in enumerate(layers)
    }
    config.links = {f"{layer.name}.{i}": list(layer.links) for i, layer in enumerate(layers)}


def save_adapter(policy: nn.Module, config: ClareConfig, folder: Path, base_path: str) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`."""
    config.base_model_name_or_path = base_path
    config.inference_mode = True
    config.save_pretrained(str(folder))
    state = {
        PREFIX + k: v
        for k, v in get_peft_model_state_dict(policy, adapter_name=ADAPTER, save_embedding_layers=False).items()
    }
    save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, folder / WEIGHTS_FILE)


def read_config(path: Path) -> ClareConfig:
    """A CLARE JSON, or that in a folder, as the description of a run that has learned nothing yet.

    Raises:
        UserError: it is none, or has unknown keys or values, or several patterns for its layers.
    """
    path = path / "adapter_config.json" if path.is_dir() else path
    values = read_json(path)
    if not isinstance(values, dict) or values.get("peft_type") != "CLARE":
        raise UserError(f'{path} is no CLARE configuration ("peft_type": "CLARE").')
    known = ClareConfig.__dataclass_fields__
    unknown = sorted(set(values) - set(known) - NOT_READ)
    if unknown:
        raise UserError(f"{path}: unknown key '{unknown[0]}'.{nearest(unknown[0], known)}")
    if not isinstance(values.get("target_modules"), str):
        raise UserError(f"{path}: {ONE_PATTERN}")
    # The structure in such a file describes somebody's finished run; ours starts with none.
    values.update(structure={}, links={}, num_learned_task=0, auto_mapping=None)
    return ClareConfig(**{k: v for k, v in values.items() if k in known})


def load_adapter(policy: nn.Module, folder: Path) -> ClareConfig:
    """Rebuild the structure of a saved adapter in a base policy and load its weights, also of the released code."""
    state = read_tensors(folder / WEIGHTS_FILE)
    config: PeftConfig
    if clare_release.wrote(state):
        values, state = clare_release.converted(read_json(folder / "adapter_config.json"), state, policy, folder)
        config = ClareConfig(**{k: v for k, v in values.items() if k in ClareConfig.__dataclass_fields__})
    else:
        config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, ClareConfig):
        raise UserError(f"{folder} holds a {config.peft_type} adapter, not CLARE's.")
    _check_sizes(config, state, folder)
    inject(policy, config)
    expected = {
        PREFIX + k for k in get_peft_model_state_dict(policy, adapter_name=ADAPTER, save_embedding_layers=False)
    }
    if state.keys() != expected:
        odd = sorted(state.keys() ^ expected)
        raise UserError(f"{folder / WEIGHTS_FILE} does not match its adapter_config.json (for example {odd[0]}).")
    set_peft_model_state_dict(policy, state, adapter_name=ADAPTER)
    policy.requires_grad_(False)
    return config


def _check_sizes(config: ClareConfig, state: dict[str, Tensor], folder: Path) -> None:
    """Raise UserError when the configuration claims more than the weights hold, before memory is taken for it."""
    parts = sum(sum(counts) for counts in config.structure.values())
    widest = max((n for t in state.values() for n in t.shape), default=0)
    d, a = config.discriminator_cfg, config.func_adapter_cfg
    widths = [d[key] for key in DISCRIMINATORS[d["type"]].widths]
    if not config.use_trainable_copy:  # a copy's widths are the base layer's
        widths.append(a["lora_rank"] if a["use_lora"] else a["hidden_dim"])
    if d["use_lora"]:
        widths.append(d["lora_rank"])
    if d["feature_fusion"]:
        widths += [d["fused_feature_dim"] or 1, d["num_tokens"]]
    if parts > len(state) or (parts and max(widths) > widest):
        raise UserError(f"{folder / 'adapter_config.json'} claims more than {WEIGHTS_FILE} holds.")
