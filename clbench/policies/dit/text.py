"""Language without a hub: an instruction becomes hashed word ids, embedded by a frozen random table.

Words are lower-cased alphanumeric runs; id = 1 + BLAKE2b(word) mod (vocabulary - 1); 0 is padding.
The same words get the same ids on every machine, so nothing has to be downloaded or fitted.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from lerobot.configs import FeatureType, PipelineFeatureType, PolicyFeature
from lerobot.lerobot_types import TransitionKey
from lerobot.processor import ObservationProcessorStep, ProcessorStepRegistry
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from torch import Tensor


@lru_cache(maxsize=65536)
def word_ids(text: str, vocab_size: int, max_words: int) -> tuple[int, ...]:
    """Return `max_words` ids in [0, vocab_size), padded with 0 on the right; longer texts are cut."""
    words = re.findall(r"[a-z0-9]+", text.lower())[:max_words]
    ids = [
        1 + int.from_bytes(hashlib.blake2b(w.encode(), digest_size=8).digest(), "big") % (vocab_size - 1) for w in words
    ]
    return tuple(ids + [0] * (max_words - len(ids)))


@dataclass
@ProcessorStepRegistry.register(name="clbench_hashed_words")
class HashedWordsProcessorStep(ObservationProcessorStep):
    """Add `observation.language.tokens` (B, max_words) int64 and its mask (B, max_words) bool from `task`."""

    vocab_size: int = 4096
    max_words: int = 16

    def observation(self, observation: dict[str, Any]) -> dict[str, Any]:
        complementary = self.transition.get(TransitionKey.COMPLEMENTARY_DATA) or {}
        task = complementary.get("task")
        if task is None:
            raise ValueError("the batch has no `task` text: the policy needs a language instruction.")
        texts = [task] if isinstance(task, str) else list(task)
        tokens = torch.tensor([word_ids(t, self.vocab_size, self.max_words) for t in texts], dtype=torch.int64)
        return {**observation, OBS_LANGUAGE_TOKENS: tokens, OBS_LANGUAGE_ATTENTION_MASK: tokens != 0}

    def get_config(self) -> dict[str, Any]:
        return {"vocab_size": self.vocab_size, "max_words": self.max_words}

    def transform_features(
        self, features: dict[PipelineFeatureType, dict[str, PolicyFeature]]
    ) -> dict[PipelineFeatureType, dict[str, PolicyFeature]]:
        shape = (self.max_words,)
        for key in (OBS_LANGUAGE_TOKENS, OBS_LANGUAGE_ATTENTION_MASK):
            features[PipelineFeatureType.OBSERVATION][key] = PolicyFeature(FeatureType.LANGUAGE, shape)
        return features


def frozen_word_table(vocab_size: int, dim: int) -> Tensor:
    """Return the (vocab_size, dim) table: row 0 zero, other rows ~ N(0, 1), from its own fixed seed."""
    table = torch.randn(vocab_size, dim, generator=torch.Generator().manual_seed(20260901))
    table[0] = 0.0
    return table
