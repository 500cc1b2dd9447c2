"""Image and text models of transformers as encoders of the DiT policies.

A model is described by a configuration (a plain dictionary, part of the policy's own) and starts with random weights,
or with those of a folder or hub. After that its weights are part of the policy's: a checkpoint needs neither. Only
safetensors are read, and only the model types of `clbench.config.dit.MODEL_TYPES` are built.

An encoder is always in evaluation mode: without dropout, and batch normalisation by its running statistics, so that a
loss is a function of its draw and samples are independent. A frozen one has no gradients; its parameters are never
trained. Shape suffixes: B batch, C channels, L tokens, E the encoder's width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clbench.config.dit import (
    IMAGE,
    IMAGENET,
    LITE,
    OUTPUTS,
    OWN,
    PACKAGED,
    TEXT,
    TRANSFORMERS,
    DitSettings,
    check_model,
    model_folder,
)
from clbench.errors import UserError
from clbench.io import read_json
from clbench.policies.dit import packaged

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Of transformers' configurations: what describes no model, or holds wherever it is built.
NOT_KEPT = ("architectures", "dtype", "id2label", "label2id", "problem_type", "task_specific_params", "torch_dtype",
            "transformers_version")  # fmt: skip
MOST_TOKENS = 2**20  # of a vocabulary
REMEMBERED = 4096  # texts whose features a frozen text encoder keeps in memory


# ---- where a model comes from -------------------------------------------------------------------
@contextmanager
def _one_line(path: str) -> Iterator[None]:
    """Whatever transformers raises about a model, as one UserError; what it logs about it is left out."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except UserError:
        raise
    except Exception as e:  # (transformers and the hub's client raise all kinds of errors)
        text = " ".join(str(e).split()) or type(e).__name__
        raise UserError(
            f"the encoder {path} cannot be read: {text[:400]} Without a hub, download the model elsewhere and give its "
            "folder."
        ) from e
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def read_description(kind: str, path: str) -> dict[str, Any]:
    """transformers' configuration of the image or text model in a folder or on a hub.

    Of a model for images and texts (CLIP, SigLIP), the part that is asked for.

    Raises:
        UserError: it cannot be read, or is of a type that is not built.
    """
    from transformers import AutoConfig

    folder = model_folder(path)
    with _one_line(path):
        config: Any = AutoConfig.from_pretrained(folder or path, trust_remote_code=False, local_files_only=bool(folder))
        config = getattr(config, "vision_config" if kind == IMAGE else "text_config", config)
        described = json.loads(json.dumps({**config.to_diff_dict(), "model_type": config.model_type}))
    described = {k: v for k, v in described.items() if k not in NOT_KEPT and not k.startswith("_")}
    try:
        check_model(kind, described)
    except ValueError as e:
        raise UserError(f"the encoder {path} is not built: {e}") from e
    return described


def read_colours(path: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of colours that a model expects removed: beside the model, else ImageNet's."""
    from transformers.utils import cached_file

    folder, name = model_folder(path), "preprocessor_config.json"
    if folder is None:
        with _one_line(path):
            found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    else:
        found = str(folder / name) if (folder / name).is_file() else None
    described = read_json(Path(found)) if found else {}
    mean, std = (described.get(k) if isinstance(described, dict) else None for k in ("image_mean", "image_std"))
    return (list(mean), list(std)) if mean and std else IMAGENET


def _transformers_config(described: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    values = dict(described)
    return AutoConfig.for_model(values.pop("model_type"), **values)


def _class_of(kind: str, model_type: str) -> Any:
    from transformers import AutoModel, AutoModelForTextEncoding
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES

    return (
        AutoModelForTextEncoding if kind == TEXT and model_type in MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES else AutoModel
    )


def build_model(kind: str, described: Mapping[str, Any], path: str | None = None, pooled: bool = False) -> nn.Module:
    """A model by its configuration, with random weights (from torch's generator) or, with `path`, those stored there.

    `pooled`: its pooled output is read, so a layer for that must be stored, too.

    Raises:
        UserError: the weights cannot be read, or there are none for a part of the model.
        ValueError: the configuration is of no model that is built, or transformers refuses it.
    """
    check_model(kind, described)
    config = _transformers_config(described)
    auto = _class_of(kind, str(described["model_type"]))
    if path is None:
        return auto.from_config(config, trust_remote_code=False)
    folder = model_folder(path)
    with _one_line(path):
        model, told = auto.from_pretrained(
            folder or path, config=config, trust_remote_code=False, use_safetensors=True, dtype=torch.float32,
            local_files_only=folder is not None, output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    lacking = sorted(n for n in told["missing_keys"] if pooled or not n.startswith("pooler."))
    wrong = sorted(n if isinstance(n, str) else n[0] for n in told["mismatched_keys"])
    if lacking and all(n.startswith("pooler.") for n in lacking) and not wrong:
        others = " or ".join(n for n in OUTPUTS[kind] if n != "pooled")
        raise UserError(
            f"the encoder {path} was stored without the layer that pools ({lacking[0]}): policy.{kind}_encoder_output "
            f"must be {others}."
        )
    if lacking or wrong:
        raise UserError(
            f"the encoder {path} has no fitting weights for {(lacking or wrong)[0]}: it is another model's."
        )
    return model


def _model_of(config: DitSettings, kind: str) -> tuple[nn.Module, dict[str, Any]]:
    """A policy's model and its configuration, which is filled in if it is pretrained and the policy is a fresh one."""
    name, described = getattr(config, f"{kind}_encoder"), getattr(config, f"{kind}_encoder_config")
    if name not in PACKAGED:
        pooled = getattr(config, f"{kind}_encoder_output") == "pooled"
        return build_model(kind, described, getattr(config, f"{kind}_encoder_path"), pooled), described
    model = _packaged_model(name)
    if described is None:
        packaged.load_weights(name, model)
        setattr(config, f"{kind}_encoder_config", dict(PACKAGED[name]))
    return model, PACKAGED[name]


def _packaged_model(name: str) -> nn.Module:
    """With random weights."""
    return packaged.EfficientNetLite0() if name == LITE else build_model(TEXT, PACKAGED[name])


def settle(config: DitSettings) -> None:
    """Fill in what is left to the models' folders: their configurations, and the colours that the image model expects.

    Raises:
        UserError: a folder cannot be read, or its model is not the one that the configuration describes.
    """
    for kind in (IMAGE, TEXT):
        key = f"{kind}_encoder"
        path, wanted = getattr(config, f"{key}_path"), getattr(config, f"{key}_config")
        if getattr(config, key) != TRANSFORMERS or path is None:
            continue
        found = read_description(kind, path)
        for name, value in (wanted or {}).items():
            if found.get(name, _default(found, name)) != value:
                raise UserError(
                    f"policy.{key}_config says {name}: {value}, but the model in {path} has "
                    f"{found.get(name, _default(found, name))}. Set policy.{key}_config=null to take what is there."
                )
        setattr(config, f"{key}_config", found)
        if kind == IMAGE and (config.image_encoder_mean is None or config.image_encoder_std is None):
            mean, std = read_colours(path)
            config.image_encoder_mean = config.image_encoder_mean or mean
            config.image_encoder_std = config.image_encoder_std or std


def _default(described: Mapping[str, Any], name: str) -> Any:
    """What a configuration that does not state a setting means by that."""
    return getattr(_transformers_config(described), name, None)


def vocabulary(described: Mapping[str, Any]) -> int:
    """How many tokens a text model knows."""
    return int(_default(described, "vocab_size"))


def fits(config: DitSettings, shapes: Mapping[str, tuple[int, ...]], prefix: str) -> bool:
    """Whether encoders' weights have these shapes, by name after `prefix`: checked before memory is taken for them."""
    for kind in (IMAGE, TEXT):
        name, described = getattr(config, f"{kind}_encoder"), getattr(config, f"{kind}_encoder_config")
        if name == OWN[kind]:
            continue
        start = f"{prefix}{kind}.model."
        have = {n.removeprefix(start): s for n, s in shapes.items() if n.startswith(start)}
        widest = max((n for s in have.values() for n in s), default=0)
        if any(n > max(widest, 65_536) for n in _integers(described)) or _depth(described) > len(have):
            return False
        with torch.device("meta"):
            model = _packaged_model(name) if name in PACKAGED else build_model(kind, described)
        if {n: tuple(p.shape) for n, p in model.state_dict().items()} != have:
            return False
    return True


def _integers(value: Any) -> Iterator[int]:
    if isinstance(value, int) and not isinstance(value, bool):
        yield value
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _integers(child)


def _depth(described: Mapping[str, Any]) -> int:
    """The layers that a configuration claims."""
    return sum(
        sum(_integers(v)) for k, v in described.items() if "layers" in k or "blocks" in k or k.startswith("depth")
    )


# ---- encoders -----------------------------------------------------------------------------------
@contextmanager
def _tried(what: str, remedy: str = "") -> Iterator[None]:
    """A model is tried with sizes that it may refuse, in many ways: then UserError, `what` with its words."""
    try:
        with torch.no_grad():
            yield
    except Exception as e:
        text = " ".join(str(e).split()) or type(e).__name__
        raise UserError(f"{what}: {text[:300]} {remedy}".rstrip()) from e


class Encoder(nn.Module):
    """A model with the parameters frozen unless `trained`; always in evaluation mode."""

    def __init__(self, model: nn.Module, trained: bool) -> None:
        super().__init__()
        self.model, self.trained = model, trained
        self.model.requires_grad_(trained)
        self.eval()

    def train(self, mode: bool = True) -> Encoder:
        """Has no effect: see the module's description."""
        return super().train(False)


class ImageEncoder(Encoder):
    """Images (B, C, h, w) in [0, 1] → features (B, n, E): n = side² squares of the patch grid, or one pooled vector.

    Attributes:
        n_features, width: n and E.
    """

    def __init__(self, config: DitSettings, shapes: Iterable[tuple[int, ...]]) -> None:
        """`shapes`: (C, h, w) of each camera's images; raises UserError where the model does not take such."""
        model, described = _model_of(config, IMAGE)
        super().__init__(model, config.image_encoder_trained)
        self.described = described
        self.pooled, self.side = config.image_encoder_output == "pooled", config.image_tokens_side
        self.size = config.image_encoder_size
        self.patch = None if config.image_encoder in PACKAGED else _default(described, "patch_size")
        mean = torch.tensor(config.image_encoder_mean or IMAGENET[0])[:, None, None]
        std = torch.tensor(config.image_encoder_std or IMAGENET[1])[:, None, None]
        self.register_buffer("mean", mean, persistent=False)  # part of the policy's configuration
        self.register_buffer("std", std, persistent=False)
        for shape in sorted(set(shapes)):
            what = f"image_encoder: the model ({described['model_type']}) does not take images of shape {shape}"
            with _tried(what, "policy.image_encoder_size=N resizes them for it."):
                found = self.features(torch.zeros(1, *shape))
            self.n_features, self.width = found.shape[1:]

    def settings(self) -> dict[str, Any]:
        """What its features depend on besides its weights, as JSON has it."""
        colours = {n: self.get_buffer(n).flatten().tolist() for n in ("mean", "std")}
        described = {n: v for n, v in self.described.items() if n not in NOT_KEPT}
        return {"model": described, "pooled": self.pooled, "side": self.side, "size": self.size, **colours}

    def forward(self, images: Tensor) -> Tensor:
        """Also (B, T, C, h, w) → (B, T · n, E): a few observation steps."""
        if images.ndim == 5:
            return self(images.flatten(0, 1)).unflatten(0, images.shape[:2]).flatten(1, 2)
        with torch.set_grad_enabled(self.trained and torch.is_grad_enabled()):
            return self.features(images)

    def features(self, images: Tensor) -> Tensor:
        x = images
        if self.size is not None:
            x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
        x = (x - self.get_buffer("mean")) / self.get_buffer("std")
        found = self.model(pixel_values=x)
        if self.pooled:
            vector = getattr(found, "pooler_output", None)
            if vector is None:
                raise ValueError("it has no pooled output: image_encoder_output must be grid.")
            return vector.flatten(1)[:, None].float()
        last = found.last_hidden_state
        if last.ndim == 3:
            last = self._grid(last, x.shape[-2], x.shape[-1])
        return F.adaptive_avg_pool2d(last.float(), self.side).flatten(2).transpose(1, 2)

    def _grid(self, tokens_BLE: Tensor, height: int, width: int) -> Tensor:
        """Patch tokens (B, L, E), which come last, as (B, E, rows, columns)."""
        length = tokens_BLE.shape[1]
        rows, columns = 0, 0
        if isinstance(self.patch, int):
            rows, columns = height // self.patch, width // self.patch
        if not 0 < rows * columns <= length or length > rows * columns + 16:  # patches are merged on the way
            rows = columns = math.isqrt(length)
            if rows * columns != length or height != width:
                raise ValueError(f"its {length} tokens are no grid: image_encoder_output must be pooled.")
        return tokens_BLE[:, length - rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))


class TextEncoder(Encoder):
    """Token ids (B, L) and their mask → features (B, n, E): n = L tokens, or one vector.

    A frozen one encodes every text by itself, once: what a text gives does not depend on its companions.

    Attributes:
        n_features, width: n and E.
    """

    def __init__(self, config: DitSettings) -> None:
        model, described = _model_of(config, TEXT)
        super().__init__(model, config.text_encoder_trained)
        self.output = config.text_encoder_output
        self._known: dict[tuple[tuple[int, ...], int], Tensor] = {}
        length = config.text_max_words
        ids = torch.ones(1, length, dtype=torch.int64)
        what = f"text_encoder: the model ({described['model_type']}) does not take text_max_words={length} tokens"
        with _tried(f"{what}, or has no output '{self.output}'"):
            found = self.features(ids, torch.ones_like(ids, dtype=torch.bool))
        self.n_features, self.width = found.shape[1:]

    def forward(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        return self.features(ids_BL, mask_BL) if self.trained else self._remembered(ids_BL, mask_BL)

    def features(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        found = self.model(input_ids=ids_BL, attention_mask=mask_BL.long())
        if self.output == "pooled":
            vector = getattr(found, "pooler_output", None)
            if vector is None:
                raise ValueError("it has no pooled output: text_encoder_output must be mean or tokens.")
            return vector[:, None].float()
        last = found.last_hidden_state.float()
        if self.output == "tokens":
            return last
        keep = mask_BL[..., None].to(last.dtype)
        return (last * keep).sum(1, keepdim=True) / keep.sum(1, keepdim=True).clamp(min=1)

    @torch.compiler.disable
    def _remembered(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        device = ids_BL.device
        rows = []
        for ids, length in zip(ids_BL.tolist(), mask_BL.sum(1).tolist(), strict=True):
            key = (tuple(ids), length)
            if key not in self._known:
                if len(self._known) >= REMEMBERED:
                    self._known.clear()
                # Not in inference mode: what is found there could not be used in training afterwards.
                with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
                    row = torch.tensor([ids], device=device)
                    mask = torch.arange(len(ids), device=device)[None] < length
                    self._known[key] = self.features(row, mask)[0]
            rows.append(self._known[key])
        return torch.stack(rows)

    def _apply(self, fn: Any, recurse: bool = True) -> TextEncoder:
        self._known.clear()  # of another device or type
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._known.clear()
        super()._load_from_state_dict(*args, **kwargs)


def frozen(config: DitSettings, kind: str) -> bool:
    """Whether a policy has a frozen encoder of this kind."""
    return getattr(config, f"{kind}_encoder") != OWN[kind] and not getattr(config, f"{kind}_encoder_trained")


def feature_key(key: str) -> str:
    """Where a batch has the encoder's features of an input (a camera, the instruction)."""
    return f"observation.features.{key.removeprefix('observation.')}"


# ---- tokenizers ---------------------------------------------------------------------------------
def read_tokenizer(path: str) -> str:
    """The JSON of the tokenizer beside a text model, in a folder or on a hub; raises UserError where there is none."""
    from transformers import AutoTokenizer

    folder = model_folder(path)
    if folder is not None and (folder / "tokenizer.json").is_file():
        return (folder / "tokenizer.json").read_text(encoding="utf-8")
    with _one_line(path):
        tokenizer: Any = AutoTokenizer.from_pretrained(
            folder or path, trust_remote_code=False, local_files_only=folder is not None
        )
        return tokenizer.backend_tokenizer.to_str()


def byte_tokenizer(described: Mapping[str, Any]) -> str:
    """The JSON of a tokenizer that needs nothing: every byte of a text is a token, between the model's own marks.

    Raises:
        ValueError: the model's vocabulary has no room for 256 bytes, or is absurdly large.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    config = _transformers_config(described)
    if config.vocab_size > MOST_TOKENS:
        raise ValueError(f"text_encoder_config: a vocabulary of {config.vocab_size} is beyond {MOST_TOKENS}.")
    marks: dict[str, int] = {}
    for name in ("pad", "bos", "eos"):
        number = getattr(config, f"{name}_token_id", None)
        if isinstance(number, int) and 0 <= number < config.vocab_size and number not in marks.values():
            marks[f"<{name}>"] = number
    free = (i for i in range(config.vocab_size) if i not in marks.values())
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {**dict(zip(letters, free, strict=False)), **marks}
    if len(vocabulary) < len(letters) + len(marks):
        raise ValueError(f"text_encoder_config: a vocabulary of {config.vocab_size} has no room for 256 bytes.")
    taken = set(vocabulary.values())
    vocabulary |= {f"<{i}>": i for i in range(config.vocab_size) if i not in taken}  # the library wants no gaps
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    around = [f"{m} " if m in marks else "" for m in ("<bos>", "<eos>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{around[0]}$A {around[1]}".strip(), special_tokens=list(marks.items())
    )
    tokenizer.enable_padding(pad_id=marks.get("<pad>", 0), pad_token="<pad>")
    return tokenizer.to_str()


def parsed_tokenizer(text: str, length: int) -> Tokenizer:
    """A tokenizer that gives every text exactly `length` tokens: cut there, or padded on the right.

    Raises:
        ValueError: the text is no tokenizer's JSON.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as e:  # (the library raises plain Exception)
        raise ValueError(f"it is not a tokenizer's JSON: {' '.join(str(e).split())[:200]}") from e
    padding = tokenizer.padding or {}
    pad = next((t for t in ("<pad>", "[PAD]", "<|endoftext|>") if tokenizer.token_to_id(t) is not None), None)
    token = padding.get("pad_token", pad or "<pad>")
    number = padding.get("pad_id", 0 if pad is None else tokenizer.token_to_id(pad))
    tokenizer.enable_padding(length=length, pad_id=number, pad_token=token)
    tokenizer.enable_truncation(max_length=length)
    return tokenizer


def largest_token(tokenizer: Tokenizer) -> int:
    """The largest id that a tokenizer gives."""
    ids: Iterable[int] = tokenizer.get_vocab(with_added_tokens=True).values()
    return max([*ids, (tokenizer.padding or {}).get("pad_id", 0)])
