"""Configuration of DiT-Dec."""

from __future__ import annotations

from dataclasses import dataclass

from lerobot.configs import PreTrainedConfig

from clbench.policies.dit.configuration import DitConfig


@PreTrainedConfig.register_subclass("dit_dec")
@dataclass
class DitDecConfig(DitConfig):
    """DiT-Dec after CLARE (arXiv 2601.09512): the observation reaches the decoder only through `cond_proj`."""
