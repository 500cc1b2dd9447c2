"""Pre- and post-processing of the DiT policies: words or tokens, device, causal normalisation."""

from __future__ import annotations

from typing import Any

import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.processor import (
    PolicyAction,
    PolicyProcessorPipeline,
    ProcessorStep,
    make_default_policy_processor_steps,
    make_policy_processor_pipelines,
)

from clbench.config.dit import MEAN_STD, MINILM, OWN, PACKAGED, TEXT
from clbench.policies.dit.configuration import DitConfig
from clbench.policies.dit.encoders import byte_tokenizer, read_tokenizer, settle, vocabulary
from clbench.policies.dit.packaged import minilm_tokenizer
from clbench.policies.dit.text import HashedWordsProcessorStep, TokenizerStep
from clbench.policies.normalization import RangeNormalizerStep, RangeUnnormalizerStep


def stable_stats(
    stats: dict[str, dict[str, Any]] | None, config: DitConfig
) -> dict[str, dict[str, torch.Tensor]] | None:
    """Return statistics that do not blow up on data they were not computed from.

    A dimension with std < `raw_below` (constant in the data) passes through raw: mean 0, std 1.
    Any other std is at least `std_floor`. Together with the model's clipping at ± `state_clip`, a base's
    statistics stay usable for every later task; they are computed once, from the pretraining tasks only,
    so no statistic ever sees a task before it is learned.
    """
    if stats is None:
        return None
    features = {**(config.input_features or {}), **(config.output_features or {})}
    out: dict[str, dict[str, torch.Tensor]] = {}
    for key, feature in features.items():
        if key not in stats:
            continue
        values = {n: torch.as_tensor(v, dtype=torch.float32).clone() for n, v in stats[key].items()}
        if feature.type is not FeatureType.VISUAL and "std" in values:
            raw = values["std"] < config.raw_below
            values["mean"] = torch.where(raw, torch.zeros_like(values["mean"]), values["mean"])
            floored = values["std"].clamp(min=config.std_floor)
            values["std"] = torch.where(raw, torch.ones_like(floored), floored)
        out[key] = values
    return out


def stats_of_steps(
    config: DitConfig, dataset_stats: dict[str, dict[str, Any]] | None
) -> tuple[dict[str, dict[str, torch.Tensor]] | None, dict[str, dict[str, Any]] | None]:
    """The data's statistics as LeRobot's steps have them, and as ours have (policies/normalization.py)."""
    scaled = scaled_features(config)
    if not scaled or dataset_stats is None:
        return stable_stats(dataset_stats, config), None
    return stable_stats({k: v for k, v in dataset_stats.items() if k not in scaled}, config), dataset_stats


def scaled_features(config: DitConfig) -> dict[str, PolicyFeature]:
    """What our steps scale; nothing under mean_std."""
    if config.normalization == MEAN_STD:
        return {}
    features = {**(config.input_features or {}), **(config.output_features or {})}
    return {k: f for k, f in features.items() if f.type is not FeatureType.VISUAL}


def language_step(config: DitConfig) -> ProcessorStep:
    """Hashed words, or the tokenizer of the text encoder: of its folder, else bytes."""
    if config.text_encoder == OWN[TEXT]:
        return HashedWordsProcessorStep(vocab_size=config.text_vocab_size, max_words=config.text_max_words)
    if config.text_encoder == MINILM:  # read before, by a fresh policy; a checkpoint's comes as the step's state
        return TokenizerStep(config.text_max_words, PACKAGED[MINILM]["vocab_size"], minilm_tokenizer())
    path = config.text_encoder_path
    if path is not None:
        settle(config)
    described = config.text_encoder_config
    assert described is not None
    size = vocabulary(described)
    return TokenizerStep(
        config.text_max_words, size, byte_tokenizer(described) if path is None else read_tokenizer(path)
    )


def make_dit_pre_post_processors(
    config: DitConfig, dataset_stats: dict[str, dict[str, torch.Tensor]] | None = None
) -> tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]],
    PolicyProcessorPipeline[PolicyAction, PolicyAction],
]:
    """Build the two pipelines: rename → batch → words → device → normalise, and unnormalise → cpu."""
    of_lerobots, of_ours = stats_of_steps(config, dataset_stats)
    steps = make_default_policy_processor_steps(config, of_lerobots)
    words = language_step(config)
    normalize: list[Any] = [steps.normalize]
    unnormalize: list[Any] = [steps.unnormalize]
    scaled = scaled_features(config)
    if scaled:
        actions = {k: f for k, f in scaled.items() if f.type is FeatureType.ACTION}
        normalize.append(RangeNormalizerStep(scaled, config.normalization, of_ours))
        unnormalize.insert(0, RangeUnnormalizerStep(actions, config.normalization, of_ours))
    return make_policy_processor_pipelines(
        input_steps=[steps.rename_observations, steps.add_batch_dim, words, steps.to_device, *normalize],
        output_steps=[*unnormalize, steps.to_cpu],
    )
