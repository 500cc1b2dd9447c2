"""Flow matching over action chunks (Lipman et al. 2023), as a LeRobot policy.

With actions a (normalised), noise ε ~ N(0, I) and time t ~ U(0, 1):

    x_t = (1 - t) ε + t a          target velocity  u = a - ε
    ℓ(θ; x) = mean over unpadded chunk steps and action dimensions of (v_θ(x_t, t | o) - u)²

Padded steps are those outside the episode (action_is_pad), padded dimensions those that a data set with shorter actions
than others' does not have (action_dim_is_pad). With `mask_padding: false` padded steps count as others do.

Acting integrates dx/dt = v_θ from noise at t = 0 to an action chunk at t = 1 with Euler steps; with `clip_sample` c > 0
x is clipped to ± c after each.

Under `objective: ddim` (Ho et al. 2020; Song et al. 2021) the network predicts the noise instead, at one of
N = `diffusion_steps` levels k = ⌊N t⌋ of the squared-cosine schedule (Nichol & Dhariwal 2021):

    ᾱ_k = Π_{i ≤ k} (1 − β_i)        β_i = min(1 − f((i + 1) / N) / f(i / N), 0.999)
    f(s) = cos²(π/2 · (s + 0.008) / 1.008)
    x_k = √ᾱ_k a + √(1 − ᾱ_k) ε,   target ε,   the network's time is k / N

and acting goes from noise down through levels k = N − N/S, …, N/S, 0, in S = `num_inference_steps` steps that draw
nothing: â = (x − √(1 − ᾱ_k) ε_θ) / √ᾱ_k, clipped to ± c; x ← √ᾱ_next â + √(1 − ᾱ_next) ε_θ, with ᾱ_next = 1 in the
last step.
Shape suffixes: B batch, H chunk, A action dimension.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection
from functools import lru_cache
from typing import Any

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies import PreTrainedPolicy
from lerobot.utils.constants import ACTION
from torch import Tensor, nn

from clbench.config.dit import DDIM, IMAGE, PAPER, TEXT
from clbench.policies.dit.configuration import DitConfig
from clbench.policies.dit.encoders import ImageEncoder, feature_key, frozen, settle
from clbench.policies.dit.layers import InputEncoders


@lru_cache
def noise_levels(n: int) -> Tensor:
    """ᾱ (n,) of the squared-cosine schedule, on the CPU: what is left of the action at every level of noise."""
    f = torch.cos((torch.arange(n + 1, dtype=torch.float64) / n + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - (1 - f[1:] / f[:-1]).clamp(max=0.999)).cumprod(0).float()


class FlowMatchingModel(nn.Module):
    """What a flow policy needs of its network: observation → context once, then velocities from it."""

    obs_encoder: InputEncoders

    def encode(self, batch: dict[str, Tensor]) -> Any:
        raise NotImplementedError

    def velocity(self, x_BHA: Tensor, t_B: Tensor, context: Any) -> Tensor:
        raise NotImplementedError

    def features(self, context: Any) -> Tensor:
        """The observation as one vector per sample, (B, D)."""
        raise NotImplementedError


class FlowMatchingPolicy(PreTrainedPolicy):
    """LeRobot policy around a FlowMatchingModel. Batches are processed (normalised, on device)."""

    config_class = DitConfig
    name = "dit"
    config: DitConfig
    outputs = ("prediction", "target", "mask", "features")  # besides the loss (clbench.policies.view)

    def __init__(self, config: PreTrainedConfig, **kwargs: Any) -> None:
        super().__init__(config)
        config.validate_features()
        self.config = config  # type: ignore[assignment]
        settle(self.config)
        self.model = self.build_model()
        self.reset()

    def build_model(self) -> FlowMatchingModel:
        raise NotImplementedError

    @property
    def action_dim(self) -> int:
        feature = self.config.action_feature
        assert feature is not None  # validate_features checked it
        return feature.shape[0]

    # ---- training -------------------------------------------------------------------------------
    def sample_draw(self, n: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Draw what the loss of `n` samples needs: noise (n, H, A) ~ N(0, 1) and time (n,) ~ U(0, 1), on CPU."""
        noise = torch.randn(n, self.config.chunk_size, self.action_dim, generator=generator)
        return {"noise": noise, "time": torch.rand(n, generator=generator)}

    def with_frozen_features(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A processed batch with the features of frozen encoders in the place of what they encode."""
        return self.model.obs_encoder.with_features(batch, frozen_only=True)

    @property
    def frozen_cameras(self) -> dict[str, str]:
        """Cameras whose images a frozen encoder encodes → where a batch has its features."""
        cameras = self.model.obs_encoder.cameras if frozen(self.config, IMAGE) else []
        return {camera: feature_key(camera) for camera in cameras}

    @property
    def image_encoder(self) -> ImageEncoder:
        """The image model, of policies that have one for all cameras."""
        found = self.model.obs_encoder.encoders[IMAGE]
        assert isinstance(found, ImageEncoder)
        return found

    @property
    def frozen_parts(self) -> tuple[str, ...]:
        """Names of the modules that are never trained."""
        return tuple(f"model.obs_encoder.encoders.{kind}" for kind in (IMAGE, TEXT) if frozen(self.config, kind))

    def per_sample_loss(self, batch: dict[str, Tensor], draw: dict[str, Tensor]) -> Tensor:
        """Return ℓ(θ; x) per sample, (B,), for the given draw."""
        return self._flow(batch, draw, {"loss"})["loss"]

    def _flow(self, batch: dict[str, Tensor], draw: dict[str, Tensor], want: Collection[str]) -> dict[str, Tensor]:
        """The outputs named by `want`: loss (B,), prediction v and target u (B, H, A), mask (B, H), features (B, D)."""
        found: dict[str, Tensor] = {}
        context = self.model.encode(batch)
        if "features" in want:
            found["features"] = self.model.features(context)
        if not set(want) - {"features"}:
            return found
        action_BHA = batch[ACTION]
        device = action_BHA.device
        noise_BHA = draw["noise"].to(device, non_blocking=True)
        t_B = draw["time"].to(device, non_blocking=True)
        if self.config.objective == DDIM:
            n = self.config.diffusion_steps
            level_B = (t_B * n).long().clamp(max=n - 1)
            kept_B11 = noise_levels(n).to(device)[level_B][:, None, None]
            x_BHA = kept_B11.sqrt() * action_BHA + (1 - kept_B11).sqrt() * noise_BHA
            u_BHA, t_B = noise_BHA, level_B.to(t_B.dtype) / n
        else:
            t_B11 = t_B[:, None, None]
            x_BHA = (1 - t_B11) * noise_BHA + t_B11 * action_BHA
            u_BHA = action_BHA - noise_BHA
        pad_BH = batch.get(f"{ACTION}_is_pad") if self.config.mask_padding else None
        if "target" in want:
            found["target"] = u_BHA
        pad_BA = batch.get(f"{ACTION}_dim_is_pad")
        if "mask" in want:
            found["mask"] = torch.ones_like(u_BHA[..., 0], dtype=torch.bool) if pad_BH is None else ~pad_BH
            if pad_BA is not None:
                found["mask"] = found["mask"][..., None] & ~pad_BA.to(device)[:, None]
        if not {"loss", "prediction"} & set(want):
            return found
        v_BHA = self.model.velocity(x_BHA, t_B, context)
        if "prediction" in want:
            found["prediction"] = v_BHA.float()
        if "loss" in want:
            squared_BHA = (v_BHA.float() - u_BHA).square()
            if pad_BA is None:
                error_BH = squared_BHA.mean(-1)
            else:
                keep_B1A = (~pad_BA).to(device, squared_BHA.dtype)[:, None]
                error_BH = (squared_BHA * keep_B1A).sum(-1) / keep_B1A.sum(-1).clamp(min=1)
            if pad_BH is None:
                found["loss"] = error_BH.mean(-1)
            else:
                keep_BH = (~pad_BH).to(error_BH.dtype)
                found["loss"] = (error_BH * keep_BH).sum(-1) / keep_BH.sum(-1).clamp(min=1)
        return found

    def forward(
        self,
        batch: dict[str, Tensor],
        reduction: str = "mean",
        draw: dict[str, Tensor] | None = None,
        want: Collection[str] = (),
    ) -> tuple[Tensor | None, dict[str, Any] | None]:
        """LeRobot's training entry: the loss under a fresh draw of the global generator, or under `draw`.

        With `want` (names in `outputs`, and "loss") the loss (B,), null unless requested, and the others by name.
        """
        if draw is None:
            draw = self.sample_draw(batch[ACTION].shape[0])
        if want:
            found = self._flow(batch, draw, want)
            return found.pop("loss", None), found
        loss_B = self.per_sample_loss(batch, draw)
        return (loss_B if reduction == "none" else loss_B.mean()), None

    # ---- acting ---------------------------------------------------------------------------------
    def reset(self) -> None:
        self._queue: deque[Tensor] = deque(maxlen=self.config.n_action_steps)
        self._seen: dict[str, deque[Tensor]] = {}

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Tensor], noise: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Return a normalised action chunk from the present step on, (B, at most H, A).

        `noise` (B, H, A) makes it a pure function of its input. Observations have shape (B, n_obs_steps, …), or (B, …)
        with one step.
        """
        self.eval()
        context = self.model.encode(batch)
        reference = next(v for k, v in batch.items() if k.startswith("observation.") and torch.is_tensor(v))
        if noise is None:
            noise = self.sample_draw(reference.shape[0])["noise"]
        x_BHA = noise.to(reference.device)
        acting = self._denoised if self.config.objective == DDIM else self._integrated
        return acting(x_BHA, context)[:, -self.config.chunk_start :]

    def _integrated(self, x_BHA: Tensor, context: Any) -> Tensor:
        n = self.config.num_inference_steps
        for i in range(n):
            t_B = torch.full((x_BHA.shape[0],), i / n, device=x_BHA.device)
            x_BHA = self._clipped(x_BHA + self.model.velocity(x_BHA, t_B, context).float() / n)
        return x_BHA

    def _denoised(self, x_BHA: Tensor, context: Any) -> Tensor:
        n, every = self.config.diffusion_steps, self.config.diffusion_steps // self.config.num_inference_steps
        kept = noise_levels(n).tolist()
        for k in range(n - every, -1, -every):
            t_B = torch.full((x_BHA.shape[0],), k / n, device=x_BHA.device)
            noise_BHA = self.model.velocity(x_BHA, t_B, context).float()
            action_BHA = self._clipped((x_BHA - (1 - kept[k]) ** 0.5 * noise_BHA) / kept[k] ** 0.5)
            after = kept[k - every] if k >= every else 1.0
            x_BHA = after**0.5 * action_BHA + (1 - after) ** 0.5 * noise_BHA
        return x_BHA

    def _clipped(self, x_BHA: Tensor) -> Tensor:
        limit = self.config.clip_sample
        return x_BHA.clamp(-limit, limit) if limit else x_BHA

    @torch.no_grad()
    def select_action(self, batch: dict[str, Tensor], noise: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Return one normalised action (B, A); predicts a new chunk every `n_action_steps` calls.

        The batch has the present observation, (B, …); those of the last steps are remembered until `reset`.
        """
        if self.config.n_obs_steps > 1:
            batch = self._remembered(batch)
        if not self._queue:
            chunk = self.predict_action_chunk(batch, noise=noise)
            self._queue.extend(chunk[:, : self.config.n_action_steps].transpose(0, 1))
        return self._queue.popleft()

    def _remembered(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch with the observations of the last steps, (B, n_obs_steps, …)."""
        steps, found = self.config.n_obs_steps, dict(batch)
        for key in self.config.input_features or {}:
            if key in batch:
                seen = self._seen.setdefault(key, deque([batch[key]] * steps, maxlen=steps))
                seen.append(batch[key])
                found[key] = torch.stack(list(seen), 1)
        return found

    # ---- LeRobot --------------------------------------------------------------------------------
    def get_optim_params(self) -> Any:
        return [p for p in self.parameters() if p.requires_grad]

    def _get_default_peft_targets(self) -> dict[str, Any]:
        layers = r"\.(q|kv|out|up|down|cond_proj)"
        if self.config.layout == PAPER:
            layers = r"\.(qk|v|out|linear1|linear2|cond_proj)"
        encoders = bool(self.model.obs_encoder.encoders)  # theirs may have such names, too
        return {"target_modules": (r"(?!.*\.encoders\.).*" if encoders else ".*") + layers}

    def _validate_peft_config(self, peft_config: Any) -> None:
        """Any PEFT configuration is accepted, even on a policy that was built in memory."""
