"""Augmentation of images: what it does to pixels, and that it is part of a sample's draw."""

from __future__ import annotations

import colorsys
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clbench.checkpoints.policy_io import load_policy
from clbench.config.compose import check_values
from clbench.config.schema import AugmentConfig
from clbench.data.frames import StreamFrames, select
from clbench.errors import Interrupted, UserError
from clbench.policies.augment import Augmentation, CentreCropProcessorStep, centre_crop, window
from clbench.policies.view import PolicyView
from clbench.seeding import generator
from clbench.stopping import Stop
from clbench.streams.stream import build_stream
from clbench.testing.toy import PRETRAIN, STREAM, make_toy_data, toy_config
from clbench.training.trainer import train

TOP = "observation.images.top"


def changed(image: torch.Tensor, numbers: list[float], **how: float) -> torch.Tensor:
    batch = Augmentation(AugmentConfig(**how), [TOP])({TOP: image}, torch.tensor([[numbers]]))
    found: torch.Tensor = batch[TOP]
    return found


def picture(seed: int = 0, n: int = 1) -> torch.Tensor:
    return torch.rand(n, 3, 16, 16, generator=generator(seed))


def test_a_shift_moves_whole_pixels_and_repeats_the_edge() -> None:
    image = picture()
    moved = changed(image, [0.5, -1.0, 0, 0, 0, 0], shift=0.25)  # window 2 pixels to the right, 4 up
    padded = F.pad(image, (4, 4, 4, 4), mode="replicate")
    torch.testing.assert_close(moved, padded[..., 0:16, 6:22], atol=1e-5, rtol=0)
    assert torch.equal(changed(image, [0.0] * 6, shift=0.25), changed(image, [0.1] * 6, shift=0.25))  # rounded away


def test_a_crop_is_a_window_within_the_image_seen_at_its_size() -> None:
    ramp = torch.linspace(0, 1, 16).expand(1, 3, 16, 16).contiguous()  # grows by 1/15 a pixel to the right
    left, right = (changed(ramp, [u, 0.0, 0, 0, 0, 0], crop=0.25) for u in (-1.0, 1.0))
    at = (torch.arange(16) + 0.5) / 2 - 0.5  # pixels of a window of 8, seen at 16
    torch.testing.assert_close(left[0, 0, 5], at.clamp(min=0) / 15, atol=1e-5, rtol=0)
    torch.testing.assert_close(right[0, 0, 5], ((at + 8) / 15).clamp(max=1), atol=1e-5, rtol=0)
    middle = CentreCropProcessorStep(0.25).observation({TOP: ramp, "observation.state": torch.zeros(1, 2)})
    torch.testing.assert_close(middle[TOP], changed(ramp, [0.0] * 6, crop=0.25))
    assert torch.equal(middle["observation.state"], torch.zeros(1, 2))
    history = CentreCropProcessorStep(0.25).observation({TOP: ramp[:, None].repeat(2, 3, 1, 1, 1)})[TOP]
    assert history.shape == (2, 3, 3, 16, 16) and torch.equal(history[1, 2], middle[TOP][0])


def test_colours_are_changed_as_written() -> None:
    image = picture() * 0.4 + 0.3  # nothing is clipped
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    luminance = (image * weights).sum(1, keepdim=True)
    close = {"atol": 2e-4, "rtol": 0}  # YIQ's coefficients have four digits
    torch.testing.assert_close(changed(image, [0, 0, 1, 0, 0, 0], brightness=0.2), image * 1.2, **close)
    grey = luminance.mean()
    torch.testing.assert_close(changed(image, [0, 0, 0, -1, 0, 0], contrast=0.5), grey + 0.5 * (image - grey), **close)
    expected = luminance + 1.3 * (image - luminance)
    torch.testing.assert_close(changed(image, [0, 0, 0, 0, 1, 0], saturation=0.3), expected, **close)
    turned = changed(image, [0, 0, 0, 0, 0, 1], hue=0.5)  # half a circle: the opposite colour, as bright
    torch.testing.assert_close(turned, luminance - (image - luminance), **close)
    assert changed(image, [0, 0, 1, 0, 0, 0], brightness=1.0).max() <= 1


def test_a_hue_turns_as_in_yiq() -> None:
    colour = (0.5, 0.4, 0.45)
    y, i, q = colorsys.rgb_to_yiq(*colour)
    angle = 2 * np.pi * 0.1
    turned = colorsys.yiq_to_rgb(y, i * np.cos(angle) - q * np.sin(angle), i * np.sin(angle) + q * np.cos(angle))
    image = torch.tensor(colour)[None, :, None, None].expand(1, 3, 4, 4).contiguous()
    found = changed(image, [0, 0, 0, 0, 0, 1], hue=0.1)[0, :, 0, 0]
    np.testing.assert_allclose(found.numpy(), turned, atol=5e-3)  # Python rounds its coefficients otherwise


def test_samples_and_cameras_have_numbers_of_their_own_and_steps_share_them() -> None:
    augmentation = Augmentation(AugmentConfig(shift=0.3, hue=0.4), ["observation.images.b", TOP])
    numbers = augmentation.draw(64, generator(1))
    assert numbers.shape == (64, 2, 6) and numbers.min() < -0.9 and numbers.max() > 0.9
    history = picture(2)[:, None].repeat(64, 3, 1, 1, 1)
    out = augmentation({TOP: history, "observation.images.b": history[:, 0]}, numbers)
    assert torch.equal(out[TOP][:, 0], out[TOP][:, 2]) and not torch.equal(out[TOP][0], out[TOP][1])
    assert not torch.equal(out[TOP][:, 0], out["observation.images.b"])
    alone = augmentation({TOP: history[5:6], "observation.images.b": history[5:6, 0]}, numbers[5:6])
    torch.testing.assert_close(alone[TOP], out[TOP][5:6])


def test_a_window_of_the_whole_image_is_the_image() -> None:
    image = picture(n=3)
    torch.testing.assert_close(window(image, 1.0, torch.zeros(3, 2)), image, atol=1e-5, rtol=0)


def test_an_image_is_cropped_in_acting_and_not_by_both_in_training() -> None:
    class Pipeline:
        steps: list[Any]

    pipeline = Pipeline()
    pipeline.steps = ["normalise"]
    centre_crop(pipeline, 0.81)
    centre_crop(pipeline, 0.81)
    assert [type(s).__name__ for s in pipeline.steps] == ["CentreCropProcessorStep", "str"]
    centre_crop(pipeline, 1.0)
    assert pipeline.steps == ["normalise"]
    image = {TOP: picture()}
    assert CentreCropProcessorStep(0.5, training=True).observation(image) is image


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("augment.shift=0.7", "from 0 to 0.5"),
        ("augment.crop=0", "above 0 and at most 1"),
        ("augment.hue=-1", "0.5, is -1"),
    ],
)
def test_impossible_augmentation_is_refused(toy_data: Path, override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_values(toy_config(toy_data, {"name": "seqfft"}, override))


AUGMENTED = ("augment.shift=0.1", "augment.crop=0.81", "augment.brightness=0.3", "augment.hue=0.05", "pretrain.steps=3")


@pytest.fixture(scope="module")
def camera_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("camera")
    make_toy_data(root / "stream", STREAM, images=True)
    make_toy_data(root / "pretrain", PRETRAIN, images=True)
    return root


def camera_config(data: Path, algorithm: dict[str, Any], *overrides: str) -> Any:
    return toy_config(data, algorithm, "dataset.env=null", *overrides)


@pytest.mark.parametrize(
    "section", [{"name": "mir", "buffer_size_per_task": 10, "mir_refresh_interval": 1, "mir_candidate_size": 4,
                 "mir_top_k": 2}, {"name": "ewc"}]
)  # fmt: skip
def test_a_run_on_augmented_images_resumes_to_the_same_bytes(
    camera_data: Path, section: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLBENCH_CACHE_ROOT", str(tmp_path / "cache"))
    steps = ("train.save_every_steps=2", "dataset.task_order=[0,1]", *AUGMENTED)
    whole = train(camera_config(camera_data, section, f"output_dir={tmp_path}/whole", *steps), "r")
    config = camera_config(camera_data, section, f"output_dir={tmp_path}/parts", *steps)
    with monkeypatch.context() as patch:
        asked = iter([""] * 7 + ["a test"] * 9)
        patch.setattr(Stop, "reason", property(lambda self: next(asked)))
        with pytest.raises(Interrupted, match="in task 2, phase train"):
            train(config, "r")
    parts = train(config, "r", resume=True)
    for k in range(2):
        a, b = (f / f"checkpoints/task_0{k}/policy/model.safetensors" for f in (whole, parts))
        assert a.read_bytes() == b.read_bytes()
    steps = json.loads((whole / "checkpoints/task_00/policy/policy_preprocessor.json").read_text())["steps"]
    assert steps[0] == {"registry_name": "clbench_centre_crop", "config": {"area": 0.81}}
    loaded = load_policy(whole / "checkpoints/task_01/policy")  # such a step is built from a file
    assert isinstance(loaded.preprocessor.steps[0], CentreCropProcessorStep)


def test_a_loss_is_a_function_of_its_draw_whatever_the_batch(
    camera_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLBENCH_CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.setenv("CLBENCH_RESULTS_ROOT", str(tmp_path))
    config = camera_config(camera_data, {"name": "seqfft"}, *AUGMENTED, "train.steps=1")
    policy = load_policy(train(config, "run") / "checkpoints/task_00/policy")
    frames = StreamFrames([v.tasks for v in build_stream(config.dataset).visits], policy.policy.config)
    centre_crop(policy.preprocessor, 1.0)
    augmentation = Augmentation(config.augment, frames.cameras)
    view = PolicyView(policy.policy, policy.policy, policy.preprocessor, nullcontext, augmentation)
    batch = frames.fetch(torch.tensor([[0, i] for i in range(6)]))
    draw = view.draw(6, generator(3))
    together = view.per_sample(batch, draw)
    row = torch.tensor([4])
    torch.testing.assert_close(view.per_sample(select(batch, row), {n: v[row] for n, v in draw.items()}), together[row])
    other = view.per_sample(batch, {**draw, "augment": draw["augment"].flip(0)})
    assert (together - other).abs().max() > 1e-4
    plain = PolicyView(policy.policy, policy.policy, policy.preprocessor, nullcontext)
    assert "augment" not in plain.draw(6, generator(3))
    parameters = dict(policy.policy.named_parameters())
    fast, slow = (view.squared_gradients(batch, draw, parameters, vectorized=v) for v in (True, False))
    for name, value in fast.items():
        torch.testing.assert_close(value, slow[name], atol=1e-6, rtol=1e-3)
