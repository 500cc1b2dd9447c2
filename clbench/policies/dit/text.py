"""Instructions as numbers: hashed words, or the tokens of a text encoder.

Without a text encoder an instruction becomes hashed word ids, embedded by a frozen random table. Words are lower-cased
alphanumeric runs; id = 1 + BLAKE2b(word) mod (vocabulary - 1); 0 is padding. The same words get the same ids on every
machine, so nothing has to be downloaded or fitted.

A text encoder's tokenizer is part of the checkpoint: its JSON is the state of a processor step.
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

from clbench.policies.dit.encoders import largest_token, parsed_tokenizer


@lru_cache(maxsize=65536)
def word_ids(text: str, vocab_size: int, max_words: int) -> tuple[int, ...]:
    """Return `max_words` ids in [0, vocab_size), padded with 0 on the right; longer texts are cut."""
    words = re.findall(r"[a-z0-9]+", text.lower())[:max_words]
    ids = [
        1 + int.from_bytes(hashlib.blake2b(w.encode(), digest_size=8).digest(), "big") % (vocab_size - 1) for w in words
    ]
    return tuple(ids + [0] * (max_words - len(ids)))


def instructions(transition: Any) -> list[str]:
    """The instructions of a batch, from `task`."""
    complementary = transition.get(TransitionKey.COMPLEMENTARY_DATA) or {}
    task = complementary.get("task")
    if task is None:
        raise ValueError("the batch has no `task` text: the policy needs a language instruction.")
    return [task] if isinstance(task, str) else list(task)


def language_features(
    features: dict[PipelineFeatureType, dict[str, PolicyFeature]], length: int
) -> dict[PipelineFeatureType, dict[str, PolicyFeature]]:
    """The features with ids and mask of `length` tokens."""
    for key in (OBS_LANGUAGE_TOKENS, OBS_LANGUAGE_ATTENTION_MASK):
        features[PipelineFeatureType.OBSERVATION][key] = PolicyFeature(FeatureType.LANGUAGE, (length,))
    return features


@dataclass
@ProcessorStepRegistry.register(name="clbench_hashed_words")
class HashedWordsProcessorStep(ObservationProcessorStep):
    """Add `observation.language.tokens` (B, max_words) int64 and its mask (B, max_words) bool from `task`."""

    vocab_size: int = 4096
    max_words: int = 16

    def observation(self, observation: dict[str, Any]) -> dict[str, Any]:
        texts = instructions(self.transition)
        tokens = torch.tensor([word_ids(t, self.vocab_size, self.max_words) for t in texts], dtype=torch.int64)
        return {**observation, OBS_LANGUAGE_TOKENS: tokens, OBS_LANGUAGE_ATTENTION_MASK: tokens != 0}

    def get_config(self) -> dict[str, Any]:
        return {"vocab_size": self.vocab_size, "max_words": self.max_words}

    def transform_features(
        self, features: dict[PipelineFeatureType, dict[str, PolicyFeature]]
    ) -> dict[PipelineFeatureType, dict[str, PolicyFeature]]:
        return language_features(features, self.max_words)


@dataclass
@ProcessorStepRegistry.register(name="clbench_tokenizer")
class TokenizerStep(ObservationProcessorStep):
    """Add `observation.language.tokens` (B, max_tokens) int64 and its mask (B, max_tokens) bool from `task`.

    Attributes:
        max_tokens: tokens of every instruction: longer ones are cut, shorter ones padded on the right.
        vocab_size: all ids are below it: the rows of the model's table.
        tokenizer: its JSON (of the library `tokenizers`), in a checkpoint the step's state.
    """

    max_tokens: int = 16
    vocab_size: int = 2**31
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        self._parsed = None if self.tokenizer is None else self._checked(self.tokenizer)

    def _checked(self, text: str) -> Any:
        parsed = parsed_tokenizer(text, self.max_tokens)
        if largest_token(parsed) >= self.vocab_size:
            raise ValueError(
                f"the tokenizer gives ids up to {largest_token(parsed)}, but the text encoder knows {self.vocab_size}: "
                "it is another model's."
            )
        return parsed

    def observation(self, observation: dict[str, Any]) -> dict[str, Any]:
        if self._parsed is None:
            raise ValueError("the step has no tokenizer: its state was not loaded.")
        found = self._parsed.encode_batch(instructions(self.transition))
        tokens = torch.tensor([e.ids for e in found], dtype=torch.int64)
        mask = torch.tensor([e.attention_mask for e in found], dtype=torch.bool)
        return {**observation, OBS_LANGUAGE_TOKENS: tokens, OBS_LANGUAGE_ATTENTION_MASK: mask}

    def get_config(self) -> dict[str, Any]:
        return {"max_tokens": self.max_tokens, "vocab_size": self.vocab_size}

    def state_dict(self) -> dict[str, Tensor]:
        if self.tokenizer is None:
            return {}
        return {"tokenizer": torch.frombuffer(bytearray(self.tokenizer.encode()), dtype=torch.uint8)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        stored = state.get("tokenizer")
        if set(state) != {"tokenizer"} or stored is None or stored.dtype != torch.uint8 or stored.ndim != 1:
            raise ValueError("the state of a tokenizer step is its JSON, as bytes.")
        text = stored.numpy().tobytes().decode()
        self._parsed, self.tokenizer = self._checked(text), text

    def transform_features(
        self, features: dict[PipelineFeatureType, dict[str, PolicyFeature]]
    ) -> dict[PipelineFeatureType, dict[str, PolicyFeature]]:
        return language_features(features, self.max_tokens)


def frozen_word_table(vocab_size: int, dim: int) -> Tensor:
    """Return the (vocab_size, dim) table: row 0 zero, other rows ~ N(0, 1), from its own fixed seed."""
    table = torch.randn(vocab_size, dim, generator=torch.Generator().manual_seed(20260901))
    table[0] = 0.0
    return table
