"""Configuration of DiT-EncDec."""

from __future__ import annotations

from dataclasses import dataclass

from lerobot.configs import PreTrainedConfig

from clbench.policies.dit.configuration import DitConfig


@PreTrainedConfig.register_subclass("dit_encdec")
@dataclass
class DitEncDecConfig(DitConfig):
    """DiT-EncDec after CLARE (arXiv 2601.09512): the decoder cross-attends to encoded observation and word tokens."""
