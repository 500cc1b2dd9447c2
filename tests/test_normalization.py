"""Normalisation to [−1, 1] by quantiles or ranges: the step itself, its checkpoints, a base that learned with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies import make_pre_post_processors
from lerobot.processor import ProcessorStepRegistry

from clbench.checkpoints.policy_io import load_policy, policy_config, save_policy
from clbench.config.dit import check_policy
from clbench.data.frames import StreamFrames
from clbench.data.statistics import compute, unscaled
from clbench.errors import UserError
from clbench.policies.normalization import RangeNormalizerStep, RangeUnnormalizerStep
from clbench.streams.stream import pretraining_tasks
from clbench.testing.toy import toy_config
from clbench.training.pretrain import frame_statistics, new_policy

ACTION = {"action": PolicyFeature(FeatureType.ACTION, (4,))}
BOTH = {"observation.state": PolicyFeature(FeatureType.STATE, (3,)), **ACTION}


def actions(n: int = 500) -> np.ndarray:
    """(n, 4): wide, constant, a gripper of −1 and 1, skewed."""
    rng = np.random.default_rng(0)
    gripper = np.where(rng.random(n) < 0.3, -1.0, 1.0)
    return np.stack([rng.normal(2, 3, n), np.full(n, 0.7), gripper, rng.exponential(0.01, n)], 1).astype(np.float32)


def steps(mode: str, values: np.ndarray) -> tuple[RangeNormalizerStep, RangeUnnormalizerStep]:
    stats = compute(lambda: [{"action": values}])
    return RangeNormalizerStep(ACTION, mode, stats), RangeUnnormalizerStep(ACTION, mode, stats)


@pytest.mark.parametrize(("mode", "ends"), [("quantiles", (0.01, 0.99)), ("min_max", (0, 1))])
def test_the_inverse_of_a_normalised_value_is_the_clipped_value(mode: str, ends: tuple[float, float]) -> None:
    values = actions()
    normalizer, unnormalizer = steps(mode, values)
    low, high = np.quantile(values.astype(np.float64), ends, axis=0)
    chunk = torch.from_numpy(np.concatenate([values, values * 5]))[:, None].repeat(1, 2, 1)  # (B, H, A)
    scaled = normalizer.normalised("action", chunk)
    back = unnormalizer.unnormalised("action", scaled).numpy()
    clipped = np.clip(chunk.numpy(), low, high)
    np.testing.assert_allclose(back[..., [0, 1, 3]], clipped[..., [0, 1, 3]], rtol=1e-5, atol=1e-6)
    width = np.where(high > low, high - low, 1)
    want = np.clip(2 * (chunk.numpy() - low) / width - 1, -1, 1)
    np.testing.assert_allclose(scaled.numpy()[..., [0, 3]], want[..., [0, 3]], rtol=1e-4, atol=1e-5)
    assert (scaled[..., 1] == 0).all()  # constant in the data
    assert torch.equal(scaled[..., 2], chunk[..., 2])  # the gripper, whatever is commanded
    assert np.array_equal(back[..., 2], chunk[..., 2].numpy())


def test_a_policys_outputs_beyond_the_range_go_on_in_a_straight_line() -> None:
    _, unnormalizer = steps("min_max", actions())
    low, high = actions().min(0)[0], actions().max(0)[0]
    found = unnormalizer.unnormalised("action", torch.tensor([[2.0, 0.3, 0.2, 0.0]]))
    assert found[0, 0] == pytest.approx(low + 1.5 * (high - low), rel=1e-5)
    assert found[0, 1:3].tolist() == pytest.approx([0.7, 0.2])


@pytest.mark.parametrize(
    ("values", "left_alone"),
    [
        ([-1, 1, 1], True), ([0, 1, 0], True), ([0, 0.996], True), ([-1, 0, 1], False), ([0.5, 0.5], False),
        ([0, 100.0], False), ([0, 0.04], False), ([0] * 500 + [1], True),
    ],
)  # fmt: skip
def test_two_values_in_the_unit_range_are_a_gripper_and_others_are_scaled(
    values: list[float], left_alone: bool
) -> None:
    column = np.array(values, dtype=np.float32)[:, None]
    assert unscaled(compute(lambda: [{"x": column}])["x"]).tolist() == [left_alone]


def test_without_word_of_which_values_there_are_nothing_is_masked() -> None:
    """LeRobot's stats.json, as lerobot-train hands it over, does not say it."""
    stats = {k: v for k, v in compute(lambda: [{"action": actions()}])["action"].items() if k != "binary"}
    step = RangeNormalizerStep(ACTION, "quantiles", {"action": stats})
    assert step.normalised("action", torch.tensor([[0.0, 0.7, 0.0, 0.0]]))[0, 2] == 0
    assert not step.state_dict()["action.mask"].any()


def test_a_step_is_the_same_after_its_state_has_been_stored(tmp_path: Path) -> None:
    step, _ = steps("quantiles", actions())
    other = ProcessorStepRegistry.get("clbench_normalizer")(**step.get_config())
    with pytest.raises(ValueError, match="no statistics of 'action'"):
        other.normalised("action", torch.zeros(1, 4))
    other.load_state_dict(step.state_dict())
    x = torch.randn(5, 4)
    assert torch.equal(step.normalised("action", x), other.normalised("action", x))
    with pytest.raises(ValueError, match=r"q01 of 'action' has shape \(3,\), not \(4,\)"):
        other.load_state_dict({k: v[:3] for k, v in step.state_dict().items()})
    with pytest.raises(ValueError, match="no q01"):
        other.load_state_dict({"action.mask": torch.zeros(4, dtype=torch.bool)})


def section(**changes: Any) -> dict[str, Any]:
    small = {
        "chunk_size": 4,
        "n_action_steps": 2,
        "d_model": 16,
        "n_heads": 2,
        "encoder_layers": 1,
        "decoder_layers": 1,
    }
    return {"type": "dit_dec", **small, **changes}


def test_a_base_learns_and_acts_by_quantiles_and_its_checkpoint_keeps_them(toy_data: Path, tmp_path: Path) -> None:
    config = toy_config(toy_data, {"name": "seqfft"}, "policy.normalization=quantiles")
    tasks, _ = pretraining_tasks(config.dataset)
    frames = StreamFrames([tuple(tasks)], policy_config(dict(config.policy), "cpu"))
    loaded = new_policy(dict(config.policy), frames, "cpu", 0)
    save_policy(loaded, tmp_path / "p")
    again = load_policy(tmp_path / "p")
    refs = torch.stack([torch.zeros(frames.length(0), dtype=torch.int64), torch.arange(frames.length(0))], 1)
    batch = frames.fetch(refs)
    for pipelines in (loaded, again):
        seen = pipelines.preprocessor(dict(batch))
        raw = batch["observation.state"].double().numpy()
        low, high = np.quantile(raw, 0.01, axis=0), np.quantile(raw, 0.99, axis=0)
        want = np.clip(2 * (raw - low) / (high - low) - 1, -1, 1)
        np.testing.assert_allclose(seen["observation.state"].numpy(), want, rtol=1e-4, atol=1e-5)
        assert seen["action"].abs().max() <= 1
        acts = pipelines.postprocessor(seen["action"][:, 0]).numpy()
        first = batch["action"][:, 0].double().numpy()  # of every chunk: all actions of the data
        ends = np.quantile(first, 0.01, axis=0), np.quantile(first, 0.99, axis=0)
        np.testing.assert_allclose(acts, np.clip(first, *ends), rtol=1e-4, atol=1e-5)


def test_presets_without_the_key_have_lerobots_step_alone(toy_data: Path) -> None:
    config = toy_config(toy_data, {"name": "seqfft"})
    tasks, _ = pretraining_tasks(config.dataset)
    policy = policy_config(dict(config.policy), "cpu")
    frames = StreamFrames([tuple(tasks)], policy)
    pre, post = (
        p.get_config()["steps"] for p in make_pre_post_processors(policy, dataset_stats=frame_statistics(frames))
    )
    assert [s["registry_name"] for s in pre][-1] == "normalizer_processor"
    assert [s["registry_name"] for s in post] == ["unnormalizer_processor", "device_processor"]
    assert set(frame_statistics(frames)["action"]) == {"mean", "std", "min", "max"}


def test_a_wrong_or_doubly_chosen_normalisation_is_refused() -> None:
    with pytest.raises(UserError, match="normalization must be one of mean_std, quantiles, min_max"):
        check_policy(section(normalization="quantile"))
    with pytest.raises(UserError, match="choose one of the two keys"):
        policy_config(section(normalization="min_max", normalization_mapping={"STATE": "QUANTILES"}), "cpu")
