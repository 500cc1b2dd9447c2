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

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft.mapping
import torch
import torch.nn.functional as F
from peft import PeftConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from clbench.errors import UserError, nearest
from clbench.tensor_files import read_tensors

ADAPTER = "default"  # PEFT's name for an adapter when there is one
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_PARTS = 10_000  # adapters, or discriminators, of one layer
PREFIX = "base_model.model."  # of every key in PEFT's weight files


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
    }


def _adapter_defaults() -> dict[str, Any]:
    return {"hidden_dim": 1024, "lora_rank": 32, "lora_alpha": 32, "use_lora": False}


@dataclass
class ClareConfig(PeftConfig):
    """`adapter_config.json` of a CLARE checkpoint.

    Attributes:
        target_modules: regular expression over module names (full match) of the layers that may expand.
        num_learned_task: tasks learned so far.
        feature_dim, out_feature_dim: input and output width of the layers; null = read from each layer.
        structure: "layer name.number" → [adapters, discriminators].
        links: "layer name.number" → for every discriminator the index of its adapter.
        discriminator_cfg, func_adapter_cfg: sizes and options; a value that is not supported is an error.
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
                raise UserError(f"CLARE configuration: {name} must be {'text' if name[0] == 't' else 'a mapping'}.")
        for name, given, known in (
            ("discriminator_cfg", self.discriminator_cfg, _discriminator_defaults()),
            ("func_adapter_cfg", self.func_adapter_cfg, _adapter_defaults()),
        ):
            for key in given:
                if key not in known:
                    raise UserError(f"CLARE configuration: unknown key {name}.{key}.{nearest(key, known)}")
            known.update(given)
            setattr(self, name, known)
        d, a = self.discriminator_cfg, self.func_adapter_cfg
        unsupported = [
            name
            for name, bad in (
                ("batch_first: false", not (self.batch_first and d["batch_first"])),
                ("use_trainable_copy: true", self.use_trainable_copy),
                ("add_zero_init_conv_layer: true", self.add_zero_init_conv_layer),
                (f"discriminator_cfg.type: {d['type']}", d["type"] != "autoencoder"),
                ("discriminator_cfg.feature_fusion: true", d["feature_fusion"]),
                ("discriminator_cfg.use_lora: true", d["use_lora"]),
            )
            if bad
        ]
        if unsupported:
            raise UserError(f"CLARE configuration: {', '.join(unsupported)} is not supported.")
        for name, value in (
            ("discriminator_cfg.hidden_dim", d["hidden_dim"]),
            ("discriminator_cfg.latent_dim", d["latent_dim"]),
            ("discriminator_cfg.max_batches_tracked", d["max_batches_tracked"]),
            ("func_adapter_cfg.hidden_dim", a["hidden_dim"]),
            ("func_adapter_cfg.lora_rank", a["lora_rank"]),
        ):
            if not isinstance(value, int) or value < 1:
                raise UserError(f"CLARE configuration: {name} must be a positive integer, is {value!r}.")
        if not isinstance(d["momentum"], int | float) or not 0 < d["momentum"] <= 1:
            raise UserError(f"CLARE configuration: discriminator_cfg.momentum must be in (0, 1], is {d['momentum']}.")
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


class Adapter(nn.Module):
    """W_up · ReLU(W_down x + b) + b'  (or LoRA: α/r · B A x). Initialised like any Linear, not to zero."""

    def __init__(self, dim_in: int, dim_out: int, cfg: dict[str, Any]) -> None:
        super().__init__()
        lora = bool(cfg["use_lora"])
        hidden = cfg["lora_rank"] if lora else cfg["hidden_dim"]
        self.down = nn.Linear(dim_in, hidden, bias=not lora)
        self.up = nn.Linear(hidden, dim_out, bias=not lora)
        self.relu, self.scale = not lora, (cfg["lora_alpha"] / cfg["lora_rank"] if lora else 1.0)
        if lora:
            nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.down(x)
        return self.scale * self.up(F.relu(h) if self.relu else h)


class Discriminator(nn.Module):
    """Autoencoder with the running mean μ and standard deviation σ of its error on its own task."""

    mean: Tensor
    std: Tensor
    batches: Tensor

    def __init__(self, dim: int, cfg: dict[str, Any]) -> None:
        super().__init__()
        h, z = cfg["hidden_dim"], cfg["latent_dim"]
        self.layers = nn.ModuleList([nn.Linear(dim, h), nn.Linear(h, z), nn.Linear(z, h), nn.Linear(h, dim)])
        self.momentum = cfg["momentum"] if cfg["use_momentum"] else None
        self.max_batches = cfg["max_batches_tracked"]
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x) if i == 0 else layer(F.relu(x))
        return x

    def error(self, x: Tensor) -> Tensor:
        """e(x) per sample (B,), for x (B, …, D)."""
        return (x - self(x)).square().flatten(1).mean(1)

    @torch.no_grad()
    def track(self, error_B: Tensor) -> None:
        """Fold one batch of errors into μ and σ: with momentum m, μ ← (1-m) μ + m·mean; else the mean of all."""
        if int(self.batches) >= self.max_batches:
            return
        self.batches += 1
        m = 1.0 / int(self.batches) if self.momentum is None or int(self.batches) == 1 else self.momentum
        error_B = error_B.float()
        self.mean.lerp_(error_B.mean(), m)
        self.std.lerp_(error_B.std() if len(error_B) > 1 else error_B.new_zeros(()), m)


def z_scores(errors_JB: Tensor, mean_J: Tensor, std_J: Tensor) -> Tensor:
    """z_j = mean over samples of (e_j(x) - μ_j) / σ_j, signed, (J,)."""
    return ((errors_JB - mean_J[:, None]) / std_J.clamp(min=1e-12)[:, None]).mean(1)


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

    def add_adapter(self) -> Adapter:
        reference = next(self.base_layer.parameters())
        adapter = Adapter(self.dim_in, self.dim_out, self.config.func_adapter_cfg)
        self.adapters.append(adapter.to(reference.device))
        return adapter

    def add_discriminator(self, link: int) -> Discriminator:
        assert 0 <= link < len(self.adapters)
        reference = next(self.base_layer.parameters())
        discriminator = Discriminator(self.dim_in, self.config.discriminator_cfg)
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
            for i in range(4):
                layers: list[Any] = [d.layers[i] for d in self.discriminators]  # type: ignore[union-attr,index]
                s[f"w{i}"] = torch.stack([m.weight.detach() for m in layers]).transpose(1, 2)
                s[f"b{i}"] = torch.stack([m.bias.detach() for m in layers])[:, None]
            for part in ("down", "up"):
                linears: list[nn.Linear] = [getattr(a, part) for a in self.adapters]
                s[part] = torch.stack([m.weight.detach() for m in linears]).transpose(1, 2)
                if linears[0].bias is not None:
                    s[f"{part}_b"] = torch.stack([m.bias.detach() for m in linears])[:, None]
            s["links"] = torch.tensor(self.links, device=params[0].device)
            self._stack_key, self._stacks = key, s
        return self._stacks

    @torch.no_grad()
    def errors(self, x: Tensor) -> Tensor:
        """e_j(x) of every discriminator, (J, B), for x (B, …, D)."""
        s = self._stacked()
        rows_ND = x.reshape(-1, x.shape[-1]).float()
        J = s["w0"].shape[0]
        h = rows_ND.expand(J, -1, -1)
        for i in range(4):
            h = torch.baddbmm(s[f"b{i}"], h if i == 0 else h.relu_(), s[f"w{i}"])
        return (h - rows_ND).square_().view(J, x.shape[0], -1).mean(-1)

    def _routed(self, x: Tensor) -> Tensor:
        s = self._stacked()
        with torch.autocast(x.device.type, enabled=False):
            self.route = s["links"][self.errors(x).argmin(0)]
            x_BLD = x.float().reshape(x.shape[0], -1, x.shape[-1])
            h = self._gathered(x_BLD, "down")
            adapter: Adapter = self.adapters[0]  # type: ignore[assignment]
            out = self._gathered(h.relu_() if adapter.relu else h, "up")
        return (adapter.scale * out).reshape(*x.shape[:-1], -1)

    def _gathered(self, x_BLD: Tensor, part: str) -> Tensor:
        s = self._stacks
        weight = s[part][self.route]
        return torch.baddbmm(s[f"{part}_b"][self.route], x_BLD, weight) if f"{part}_b" in s else x_BLD @ weight

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.capturing is not None:
            self.capturing.record(self, x)
        out = self.base_layer(x, *args, **kwargs)
        if self._disable_adapters or not self.adapters:
            return out
        if self.forced is not None:
            adapter: Any = self.adapters[self.forced]
            return out + adapter(x.to(adapter.down.weight.dtype)).to(out.dtype)
        return out + self._routed(x).to(out.dtype)


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


def load_adapter(policy: nn.Module, folder: Path) -> ClareConfig:
    """Rebuild the structure of a saved adapter in a base policy and load its weights."""
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, ClareConfig):
        raise UserError(f"{folder} holds a {config.peft_type} adapter, not CLARE's.")
    state = read_tensors(folder / WEIGHTS_FILE)
    _check_sizes(config, state, folder)
    inject(policy, config)
    expected = {
        PREFIX + k for k in get_peft_model_state_dict(policy, adapter_name=ADAPTER, save_embedding_layers=False)
    }
    if state.keys() != expected:
        odd = sorted(state.keys() ^ expected)
        raise UserError(f"{folder / WEIGHTS_FILE} does not fit its adapter_config.json (for example {odd[0]}).")
    set_peft_model_state_dict(policy, state, adapter_name=ADAPTER)
    policy.requires_grad_(False)
    return config


def _check_sizes(config: ClareConfig, state: dict[str, Tensor], folder: Path) -> None:
    """Raise UserError when the configuration claims more than the weights hold, before memory is taken for it."""
    parts = sum(sum(counts) for counts in config.structure.values())
    widest = max((n for t in state.values() for n in t.shape), default=0)
    d, a = config.discriminator_cfg, config.func_adapter_cfg
    widths = [d["hidden_dim"], d["latent_dim"], a["lora_rank"] if a["use_lora"] else a["hidden_dim"]]
    if parts > len(state) or (parts and max(widths) > widest):
        raise UserError(f"{folder / 'adapter_config.json'} claims more than {WEIGHTS_FILE} holds.")
