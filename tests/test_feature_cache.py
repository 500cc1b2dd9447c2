"""Features of a frozen image encoder, kept on disk: the same as made in a step, and made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from clbench.checkpoints.base import weights_digest
from clbench.checkpoints.policy_io import LoadedPolicy, policy_config
from clbench.data.frames import StreamFrames
from clbench.errors import Interrupted
from clbench.policies.dit.encoders import ImageEncoder
from clbench.policies.features import FrozenFeatures
from clbench.stopping import Stop
from clbench.streams.stream import build_stream
from clbench.testing.toy import PRETRAIN, STREAM, make_toy_data, toy_config
from clbench.training.pretrain import new_policy
from clbench.training.trainer import train

TOP, FEATURES = "observation.images.top", "observation.features.images.top"
MODEL = (
    "{model_type: dinov2, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, image_size: 32, patch_size: 8}"
)
REFS = torch.tensor([[0, 5], [0, 3], [1, 0], [1, 19]])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("features")
    make_toy_data(root / "stream", STREAM[:2], images=True)
    make_toy_data(root / "pretrain", PRETRAIN[:1], images=True)
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLBENCH_CACHE_ROOT", str(tmp_path / "cache"))
    return tmp_path / "cache"


def config(data: Path, out: Path, *overrides: str, algorithm: dict[str, Any] | None = None) -> Any:
    return toy_config(
        data, algorithm or {"name": "seqfft"}, "dataset.env=null", f"output_dir={out}",
        "policy.image_encoder=transformers",
        f"policy.image_encoder_config={MODEL}", "policy.image_tokens_side=2", f"dataset.tasks=[{','.join(STREAM[:2])}]",
        f"dataset.pretrain.tasks=[{PRETRAIN[0]}]", "pretrain.steps=2", *overrides,
    )  # fmt: skip


def frames_and_policy(data: Path, tmp_path: Path, **changes: Any) -> tuple[StreamFrames, LoadedPolicy]:
    made = config(data, tmp_path)
    section = {**made.policy, **changes}
    visits = [v.tasks for v in build_stream(made.dataset, render=made.render).visits]
    frames = StreamFrames(visits, policy_config(section, "cpu"))
    return frames, new_policy(section, frames, "cpu", 0)


def test_kept_features_are_the_encoders(data: Path, tmp_path: Path) -> None:
    frames, loaded = frames_and_policy(data, tmp_path)
    images = frames.fetch(REFS)
    assert frames.keep_features(FrozenFeatures(loaded.policy, loaded.preprocessor), 1.0)
    batch = frames.fetch(REFS)
    assert TOP not in batch and batch[FEATURES].shape == (4, 4, 16)
    found = loaded.policy.image_encoder(images[TOP].float() / 255)
    torch.testing.assert_close(batch[FEATURES], found, atol=1e-5, rtol=1e-5)
    draw = loaded.policy.sample_draw(4)
    with torch.no_grad():
        kept, made = (loaded.policy.per_sample_loss(_ready(loaded, b), draw) for b in (batch, images))
    torch.testing.assert_close(kept, made, atol=1e-5, rtol=1e-5)


def _ready(loaded: LoadedPolicy, batch: dict[str, Any]) -> dict[str, Any]:
    ready = {k: v.float() / 255 if k == TOP else v for k, v in batch.items()}
    return loaded.preprocessor(ready)  # type: ignore[no-any-return]


def test_features_are_made_once_per_encoder_and_damaged_ones_again(
    data: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    frames, loaded = frames_and_policy(data, tmp_path)
    encoder = FrozenFeatures(loaded.policy, loaded.preprocessor)
    frames.keep_features(encoder, 1.0)
    before = frames.fetch(REFS)[FEATURES].clone()
    files = sorted(cache.rglob("*.float32"))
    assert len(files) == 2 and files[0].stat().st_size == 60 * 4 * 16 * 4
    calls: list[int] = []
    features = ImageEncoder.features
    monkeypatch.setattr(ImageEncoder, "features", lambda self, x: calls.append(len(x)) or features(self, x))
    frames_and_policy(data, tmp_path)[0].keep_features(encoder, 1.0)
    calls.clear()
    frames.keep_features(encoder, 1.0)
    assert not calls
    spoiled = bytearray(files[0].read_bytes())
    spoiled[77] ^= 1
    files[0].write_bytes(spoiled)
    again = frames_and_policy(data, tmp_path)[0]
    again.keep_features(encoder, 1.0)
    assert "is damaged; encoding the images again" in capsys.readouterr().err
    assert torch.equal(again.fetch(REFS)[FEATURES], before)
    with torch.no_grad():  # other weights, other features
        next(loaded.policy.image_encoder.parameters()).add_(0.1)
    again.keep_features(FrozenFeatures(loaded.policy, loaded.preprocessor), 1.0)
    assert len(list(cache.rglob("*.float32"))) == 4 and not torch.equal(again.fetch(REFS)[FEATURES], before)


@pytest.mark.parametrize("changes", [{"image_encoder_mean": [0.5, 0.5, 0.5]}, {"image_encoder_size": 64}])
def test_another_transform_is_another_encoder(changes: dict[str, Any], data: Path, tmp_path: Path) -> None:
    one, other = (frames_and_policy(data, tmp_path, **c)[1] for c in ({}, changes))
    first, second = (FrozenFeatures(p.policy, p.preprocessor).identity(TOP) for p in (one, other))
    assert first != second and first == FrozenFeatures(one.policy, one.preprocessor).identity(TOP)


def test_features_that_take_too_much_room_are_made_in_every_step(
    data: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames, loaded = frames_and_policy(data, tmp_path)
    needed = 120 * 4 * 16 * 4
    encoder = FrozenFeatures(loaded.policy, loaded.preprocessor)
    assert not frames.keep_features(encoder, (needed - 1) / 1e9)
    assert "more than train.feature_cache_gb" in capsys.readouterr().err and not list(cache.rglob("*.float32"))
    assert TOP in frames.fetch(REFS)
    assert frames.keep_features(encoder, (needed + 1) / 1e9)


def weights(run: Path) -> list[str]:
    return [weights_digest(folder / "policy") for folder in sorted((run / "checkpoints").iterdir())]


def test_a_run_on_kept_features_is_that_without_up_to_rounding_and_resumes_exactly(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from clbench.tensor_files import read_tensors

    er = {"name": "er"}
    kept = train(config(data, tmp_path, algorithm=er), "kept")
    calls: list[int] = []
    features = ImageEncoder.features
    monkeypatch.setattr(ImageEncoder, "features", lambda self, x: calls.append(len(x)) or features(self, x))
    train(config(data, tmp_path, algorithm=er), "again")
    assert set(calls) == {1}  # what tries the model when a policy is made: no step encoded an image
    made = train(config(data, tmp_path, "train.feature_cache_gb=0", algorithm=er), "made")
    assert 8 in calls and weights(kept) == weights(tmp_path / "again")
    one, other = (read_tensors(r / "checkpoints" / "task_01" / "policy" / "model.safetensors") for r in (kept, made))
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-3, rtol=1e-2)
    assert all(torch.equal(one[n], other[n]) for n in one if ".encoders." in n)
    with monkeypatch.context() as patch:
        asked = iter([""] * 6 + ["a test"] * 9)
        patch.setattr(Stop, "reason", property(lambda self: next(asked)))
        with pytest.raises(Interrupted, match="in task 2, phase train"):
            train(config(data, tmp_path, algorithm=er), "cut")
    train(config(data, tmp_path, algorithm=er), "cut", resume=True)
    assert weights(kept) == weights(tmp_path / "cut")
    calls.clear()
    capsys.readouterr()
    train(config(data, tmp_path, "augment.shift=0.1"), "moved")
    assert 8 in calls and "its features cannot be kept: augment" in capsys.readouterr().err
