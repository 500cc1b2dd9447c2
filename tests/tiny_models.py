"""Tiny random models in the folders' layout of transformers: what LeRobot's larger policies read from a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token per byte, and the special ones; every text is between BOS and EOS."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for token in (BOS, EOS, PAD, *special.values()):
        vocabulary[token] = len(vocabulary)
    model = Tokenizer(BPE(vocabulary, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    ends = [(token, vocabulary[token]) for token in (BOS, EOS)]
    model.post_processor = processors.TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token=BOS, eos_token=EOS, pad_token=PAD, extra_special_tokens=special
    )


def smolvlm(folder: Path) -> Path:
    """A vision-language model for SmolVLA: four layers of width 32, images of 32 pixels in patches of 8."""
    from transformers import (
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
    )
    from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

    special = {
        "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>", "image_token": "<image>",
        "end_of_utterance_token": "<end_of_utterance>",
    }  # fmt: skip
    words = tokenizer(**special)
    text: dict[str, Any] = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(words),
        "pad_token_id": words.pad_token_id, "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id,
    }  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 8}  # fmt: skip
    config = SmolVLMConfig(
        vision_config=vision, text_config=text, scale_factor=2, pad_token_id=words.pad_token_id,
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    torch.manual_seed(0)
    SmolVLMForConditionalGeneration(config).save_pretrained(folder)
    SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(), tokenizer=words, video_processor=SmolVLMVideoProcessor(),
        image_seq_len=4, chat_template="{{ messages }}",
    ).save_pretrained(folder)  # fmt: skip
    return folder


def clip(folder: Path) -> Path:
    """A CLIP for MultiTaskDiT: one layer of width 16 each, images of 32 pixels. `clip` must be part of its path."""
    from transformers import CLIPConfig, CLIPModel

    words = tokenizer()
    size: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    size["num_hidden_layers"] = 1
    ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    config = CLIPConfig(
        text_config={**size, "vocab_size": len(words), "max_position_embeddings": 32, **ids},
        vision_config={**size, "image_size": 32, "patch_size": 8}, projection_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
