"""LeRobot's policies that can be built here, tiny, on one camera: for tests and for the table in docs/policies.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from clbench.checkpoints.policy_io import LoadedPolicy, policy_config
from tests import tiny_models

SMALL_ACT = {
    "chunk_size": 4, "n_action_steps": 2, "dim_model": 32, "n_heads": 2, "dim_feedforward": 32, "n_encoder_layers": 1,
    "n_decoder_layers": 1, "n_vae_encoder_layers": 1, "latent_dim": 4, "pretrained_backbone_weights": None,
}  # fmt: skip
DIFFUSION = {
    "n_obs_steps": 2, "horizon": 4, "n_action_steps": 2, "drop_n_last_frames": 0, "down_dims": [16, 32],
    "diffusion_step_embed_dim": 16, "spatial_softmax_num_keypoints": 4, "use_group_norm": True,
    "pretrained_backbone_weights": None, "num_inference_steps": 2, "n_groups": 4,
}  # fmt: skip
VQBET = {
    "n_obs_steps": 2, "n_action_pred_token": 2, "action_chunk_size": 2, "n_vqvae_training_steps": 2, "crop_shape": None,
    "vqvae_embedding_dim": 8, "vqvae_enc_hidden_dim": 8, "gpt_input_dim": 16, "gpt_output_dim": 16,
    "gpt_hidden_dim": 16, "gpt_n_layer": 1, "gpt_n_head": 2, "gpt_block_size": 32, "use_group_norm": True,
    "spatial_softmax_num_keypoints": 4, "pretrained_backbone_weights": None,
}  # fmt: skip
DIT = {
    "n_obs_steps": 2, "horizon": 4, "n_action_steps": 2, "hidden_dim": 32, "num_layers": 1, "num_heads": 2,
    "timestep_embed_dim": 16, "image_resize_shape": [32, 32], "image_crop_shape": None, "tokenizer_max_length": 32,
    "num_inference_steps": 2, "num_integration_steps": 2, "dropout": 0.0,
}  # fmt: skip
SMOLVLA = {
    "chunk_size": 4, "n_action_steps": 2, "max_state_dim": 40, "max_action_dim": 8, "num_vlm_layers": 4,
    "resize_imgs_with_padding": [32, 32], "num_steps": 2, "tokenizer_max_length": 40, "pad_language_to": "max_length",
}  # fmt: skip
BUILT = ("act", "diffusion", "multi_task_dit", "smolvla", "vqbet")  # those that learn from demonstrations


def section(kind: str, folder: Path) -> dict[str, Any]:
    """The `policy` section of a tiny policy; what it reads from a hub is made in `folder`."""
    if kind == "smolvla":
        place = folder / "vlm"
        return {"type": kind, **SMOLVLA, "vlm_model_name": str(place if place.is_dir() else tiny_models.smolvlm(place))}
    if kind == "multi_task_dit":
        place = folder / "clip"
        name = str(place if place.is_dir() else tiny_models.clip(place))
        return {"type": kind, **DIT, "vision_encoder_name": name, "text_encoder_name": name}
    return {"type": kind, **{"act": SMALL_ACT, "diffusion": DIFFUSION, "vqbet": VQBET}[kind]}


def load(kind: str, folder: Path, **changes: Any) -> LoadedPolicy:
    """A tiny policy for one camera at 32 pixels, with random weights and unit statistics."""
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies import make_pre_post_processors
    from lerobot.policies.factory import get_policy_class

    config = policy_config({**section(kind, folder), **changes}, "cpu")
    config.input_features = {
        "observation.state": PolicyFeature(FeatureType.STATE, (4,)),
        "observation.image": PolicyFeature(FeatureType.VISUAL, (3, 32, 32)),
    }
    config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (4,))}
    torch.manual_seed(0)
    policy = get_policy_class(kind)(config)  # type: ignore[call-arg]
    unit = {"mean": torch.zeros(4), "std": torch.ones(4), "min": -torch.ones(4), "max": torch.ones(4)}
    pipelines = make_pre_post_processors(config, dataset_stats={"observation.state": unit, "action": unit})
    return LoadedPolicy(policy, *pipelines, "")


def batch(config: Any, n: int, seed: int = 0) -> dict[str, Any]:
    """A raw batch of n samples, some of which are padded at the end."""
    g = torch.Generator().manual_seed(seed)
    steps, length = config.observation_delta_indices, len(config.action_delta_indices)
    lead = (n,) if steps is None or len(steps) == 1 else (n, len(steps))
    return {
        "observation.state": torch.randn(*lead, 4, generator=g),
        "observation.image": torch.rand(*lead, 3, 32, 32, generator=g),
        "action": torch.rand(n, length, 4, generator=g) * 2 - 1,
        "action_is_pad": torch.arange(length) >= length - torch.arange(n)[:, None] % 3,
        "task": [("Push it", "Open a door")[i % 2] for i in range(n)],
    }
