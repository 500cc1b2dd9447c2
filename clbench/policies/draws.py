"""Losses of LeRobot's policies under random numbers from outside, one small adapter per policy type.

LeRobot's policies draw their noise inside `forward`, from the global generator, and most return one mean over a batch.
An adapter separates the two without changing LeRobot:

    draw = adapter.sample(n, generator)      everything that is random in n losses
    adapter.losses(module, batch, draw)      ℓ(θ; x_i) of every sample, (n,), in one pass

where ℓ(θ; x_i) is what the policy's own `forward` returns for sample i alone when it draws row i of `draw`
(tests/test_draws.py). `adapter_of` says which policies have one; any other is run one sample after the other under a
seed of its own (view.py), except where `refusal` says that this would not be a loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clbench.data.frames import Batch
from clbench.seeding import seeded

ACTION, PAD, IMAGES = "action", "action_is_pad", "observation.images"
ADAPTERS: dict[str, type[Adapter]] = {}


class Adapter(ABC):
    """The loss of one policy under draws from outside.

    Args:
        policy: a policy of LeRobot. Its parameters may be replaced later, and layers of it wrapped.
    """

    kinds: ClassVar[tuple[str, ...]]  # policy types

    def __init_subclass__(cls) -> None:
        ADAPTERS.update(dict.fromkeys(cls.kinds, cls))

    def __init__(self, policy: Any) -> None:
        self.policy, self.config = policy, policy.config

    @classmethod
    def why_not(cls, config: Any) -> str | None:
        """Why a policy with these settings has no loss per sample in one pass; None: it has."""
        return None

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw for n losses, on the CPU: by name, (n, …)."""

    @abstractmethod
    def losses(self, module: nn.Module, batch: Batch, draw: dict[str, Tensor]) -> Tensor:
        """ℓ(θ; x_i), (n,), for a processed batch. `module`: the policy, or its compiled form."""


def adapter_of(policy: Any) -> Adapter | None:
    """The policy's adapter; None: it has none, or not with its settings."""
    config = getattr(policy, "config", None)
    cls = ADAPTERS.get(getattr(config, "type", ""))
    return None if cls is None or cls.why_not(config) is not None else cls(policy)


def refusal(policy: Any) -> str | None:
    """Why the loss of a single sample cannot be computed for a comparison; None: it can."""
    if getattr(getattr(policy, "config", None), "type", "") != "vqbet":
        return None
    if bool(policy.vqbet.action_head.vqvae_model.discretized):
        return None
    return (
        "VQ-BeT changes its codes of actions whenever it computes a loss, in its first "
        f"{policy.config.n_vqvae_training_steps} steps (policy.n_vqvae_training_steps): let them be learned in "
        "pretraining, or use a method that trains all weights and compares no losses"
    )


def resumed(policy: Any, losses: int) -> None:
    """Tell a policy how many losses were computed in training before it was loaded, where it counts them and does not
    save the count: VQ-BeT, while it learns its codes."""
    if getattr(getattr(policy, "config", None), "type", "") == "vqbet":
        policy.vqbet.action_head.vqvae_model.optimized_steps = losses


def _generated(generator: torch.Generator, shape: tuple[int, ...], time: Any) -> dict[str, Tensor]:
    """Noise (n, …) ~ N(0, 1), and times (n,) from the policy's own function, which draws from the global generator."""
    noise = torch.randn(shape, generator=generator)
    with seeded("time", int(torch.randint(2**62, (), generator=generator))):
        return {"noise": noise, "time": time(shape[0])}


# ---- flow matching with replaceable samplers ------------------------------------------------------


class SmolVLA(Adapter):
    """SmolVLA takes noise and time as arguments: mean over unpadded steps of (v_θ(x_t, t | o) − (ε − a))²."""

    kinds: ClassVar[tuple[str, ...]] = ("smolvla",)

    def sample(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        shape = (n, self.config.chunk_size, self.config.max_action_dim)
        return _generated(generator, shape, lambda n: self.policy.model.sample_time(n, "cpu"))

    def losses(self, module: nn.Module, batch: Batch, draw: dict[str, Tensor]) -> Tensor:
        device = batch[ACTION].device
        noise, time = draw["noise"].to(device), draw["time"].to(device)
        losses: Tensor = module(batch, noise=noise, time=time, reduction="none")[0]
        return losses


class Pi0(SmolVLA):
    """π0 and π0.5 draw through two methods of their model, replaced while a loss is computed. Padded steps count."""

    kinds = ("pi0", "pi05")

    def losses(self, module: nn.Module, batch: Batch, draw: dict[str, Tensor]) -> Tensor:
        with self._drawing(draw):
            losses: Tensor = module(batch, reduction="none")[0]
        return losses

    @contextmanager
    def _drawing(self, draw: dict[str, Tensor]) -> Iterator[None]:
        model = self.policy.model
        model.sample_noise = lambda shape, device: draw["noise"].to(device)
        model.sample_time = lambda n, device: draw["time"].to(device)
        try:
            yield
        finally:
            del model.sample_noise, model.sample_time


# ---- denoising with a scheduler ------------------------------------------------------------------


class Diffusion(Adapter):
    """Diffusion Policy: mean of (ε_θ(a_t, t | o) − ε)², or of (a_θ − a)² where the network predicts actions."""

    kinds = ("diffusion",)

    @classmethod
    def why_not(cls, config: Any) -> str | None:
        if config.image_features and not config.use_group_norm:
            return "batch normalisation makes a sample's loss depend on its companions (policy.use_group_norm=true)"
        if config.image_features and config.crop_shape is not None and config.crop_is_random:
            return "one random crop for a whole batch (policy.crop_is_random=false; augment.crop is per sample)"
        return None

    def sample(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        noise = torch.randn(n, self.config.horizon, self.config.action_feature.shape[0], generator=generator)
        return {"noise": noise, "time": torch.randint(self.config.num_train_timesteps, (n,), generator=generator)}

    def losses(self, module: nn.Module, batch: Batch, draw: dict[str, Tensor]) -> Tensor:
        model = self.policy.diffusion
        condition = model._prepare_global_conditioning(self._stacked(batch))

        def network(noisy: Tensor, time: Tensor) -> Tensor:
            return model.unet(noisy, time, global_cond=condition)  # type: ignore[no-any-return]

        return self._denoised(model.noise_scheduler, network, batch, draw)

    def _stacked(self, batch: Batch) -> Batch:
        """With the cameras as one tensor (n, steps, cameras, C, H, W)."""
        if not self.config.image_features:
            return batch
        return {**batch, IMAGES: torch.stack([batch[key] for key in self.config.image_features], dim=-4)}

    def _denoised(self, scheduler: Any, network: Any, batch: Batch, draw: dict[str, Tensor]) -> Tensor:
        actions = batch[ACTION]
        noise, time = draw["noise"].to(actions.device), draw["time"].to(actions.device)
        predicted = network(scheduler.add_noise(actions, noise, time), time)
        target = noise if self.config.prediction_type == "epsilon" else actions
        return self._mean(F.mse_loss(predicted, target, reduction="none"), batch)

    def _mean(self, losses: Tensor, batch: Batch) -> Tensor:
        """Of each sample (n,), for losses (n, steps, A): over all steps, or over those that are not padded."""
        if not self.config.do_mask_loss_for_padding or PAD not in batch:
            return losses.flatten(1).mean(1)
        return masked_mean(losses, batch[PAD])


class MultiTaskDiT(Diffusion):
    """The same objective, or flow matching: (v_θ(x_t, t | o) − (a − (1 − σ) ε))² with x_t = t a + (1 − (1 − σ) t) ε."""

    kinds = ("multi_task_dit",)

    @classmethod
    def why_not(cls, config: Any) -> str | None:
        if config.image_features and config.image_crop_shape is not None and config.image_crop_is_random:
            return "one random crop for a whole batch (policy.image_crop_is_random=false; augment.crop is per sample)"
        return None

    def sample(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        if self.config.is_diffusion:
            return super().sample(n, generator)
        shape = (n, self.config.horizon, self.config.action_feature.shape[0])
        return _generated(generator, shape, lambda n: self.policy.objective._sample_timesteps(n, torch.device("cpu")))

    def losses(self, module: nn.Module, batch: Batch, draw: dict[str, Tensor]) -> Tensor:
        policy, actions = self.policy, batch[ACTION]
        condition = policy.observation_encoder.encode(self._stacked(batch))

        def network(noisy: Tensor, time: Tensor) -> Tensor:
            return policy.noise_predictor(noisy, time, conditioning_vec=condition)  # type: ignore[no-any-return]

        if self.config.is_diffusion:
            return self._denoised(policy.objective.noise_scheduler, network, batch, draw)
        noise, time = draw["noise"].to(actions.device), draw["time"].to(actions.device)
        t, rest = time.view(-1, 1, 1), 1 - self.config.sigma_min
        predicted = network(t * actions + (1 - rest * t) * noise, time)
        return self._mean(F.mse_loss(predicted, actions - rest * noise, reduction="none"), batch)


# ---- a variational autoencoder -------------------------------------------------------------------


class ACT(Adapter):
    """ACT: mean over unpadded steps of |â − a|, plus β KL(q(z | a, s) ‖ N(0, I)), with z = μ + σ ε.

    ACT draws ε inside its network. Its latent input is replaced on the way into the projection that reads it, from μ
    and σ as the network computed them.
    """

    kinds = ("act",)

    def sample(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"noise": torch.randn(n, self.config.latent_dim, generator=generator)}

    def losses(self, module: nn.Module, batch: Batch, draw: dict[str, Tensor]) -> Tensor:
        if self.config.image_features:
            batch = {**batch, IMAGES: [batch[key] for key in self.config.image_features]}
        with self._drawing(draw["noise"]):
            actions, (mean, log_variance) = self.policy.model(batch)
        losses = masked_mean(F.l1_loss(batch[ACTION], actions, reduction="none"), batch[PAD])
        if log_variance is None:  # without the encoder, or in evaluation mode
            return losses
        kl = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(-1)
        return losses + self.config.kl_weight * kl

    @contextmanager
    def _drawing(self, noise: Tensor) -> Iterator[None]:
        model, size = self.policy.model, self.config.latent_dim
        seen: list[Tensor] = []

        def replaced(projection: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
            if not seen:
                return None  # the latent is zero
            mean, log_variance = seen[-1][:, :size], seen[-1][:, size:]
            return ((mean + log_variance.div(2).exp() * noise.to(mean)).to(args[0].dtype),)

        handles = [model.encoder_latent_input_proj.register_forward_pre_hook(replaced)]
        if self.config.use_vae:
            encoder = model.vae_encoder_latent_output_proj
            handles.append(encoder.register_forward_hook(lambda layer, args, out: seen.append(out)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def masked_mean(losses: Tensor, pad: Tensor) -> Tensor:
    """Σ of losses (n, steps, A) over the steps that are not padded (n, steps), by their number times A, (n,)."""
    kept = ~pad[..., None]
    count = kept.flatten(1).sum(1) * losses.shape[-1]
    return (losses * kept).flatten(1).sum(1) / count.clamp(min=1)
