"""Recipes: settings that were tuned for a policy, one file per preset, recipes/POLICY.yaml, one section per algorithm.

tuned_for: [metaworld]                       # families of streams (`dataset.recipes`), or streams; absent: all
er:
  train: {optimizer: {lr: 1.0e-3}}           # keys of `train`, `algorithm` and `lora`
clare:
  algorithm: {adapter_lr: 6.0e-3}
  streams:
    metaworld_val: {algorithm: {adapter_lr: 3.0e-3}}   # over the rest of the section, for this stream or family

`like: NAME` takes the sections that a file lacks from another policy's. Files with the same name in several folders are
merged: of a section that several have, the first folder's counts, as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clbench.config import folders
from clbench.config.files import load_sections, load_yaml
from clbench.config.reading import flatten, overlay
from clbench.config.schema import LoraConfig, TrainConfig
from clbench.errors import UserError, nearest
from clbench.io import read_json
from clbench.paths import model_root, named_folder

RESERVED: dict[str, Any] = {"like": str, "tuned_for": list[str]}
NOT_STORED = ("init", "image_encoder_path", "text_encoder_path")  # keys of a preset that its checkpoints do not have
RELEASED = {
    "ditflow_mt": "dit_dec_base",
    "dit_mt": "dit_encdec_base",
}  # types of CLARE's released code → ours like them


@dataclass
class Settings:
    """What a recipe may set."""

    algorithm: dict[str, Any] = field(default_factory=dict)
    train: TrainConfig = field(default_factory=TrainConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class SectionKeys(Settings):
    """The keys of one algorithm's section."""

    streams: dict[str, Settings] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """One algorithm's section of one file.

    Attributes:
        tuned_for: the streams and families that it was tuned for; None = all.
    """

    keys: dict[str, Any]
    tuned_for: tuple[str, ...] | None
    folder: folders.Folder
    path: Path

    def settings(self, streams: Sequence[str]) -> dict[str, Any] | None:
        """What it sets on a stream, given by its name and then its family; None: it is not for that."""
        nested = self.keys.get("streams", {})
        own = next((nested[name] for name in streams if name in nested), None)
        if own is None and self.tuned_for is not None and not set(streams) & set(self.tuned_for):
            return None
        return overlay({k: v for k, v in self.keys.items() if k != "streams"}, own or {})


@dataclass(frozen=True)
class Applied:
    """What the recipe sets for one algorithm of a run: settings, and their description in the start line."""

    settings: dict[str, Any]
    line: str


def apply(policy: str | None, algorithms: Sequence[str], streams: Sequence[str]) -> list[Applied]:
    """The recipe's settings for each algorithm, in order; later ones win.

    A combination has a section of its own (`er+clare`), else each algorithm's.

    Args:
        policy: the preset's name; None: the policy is not a preset.
        streams: the stream's name, then its family, if it has one.
    """
    _refuse_old(policy, algorithms, streams)
    sections = _sections(policy) if policy is not None else {}
    together = "+".join(algorithms)
    applied: list[Applied] = []
    before: dict[str, tuple[Any, str]] = {}
    for name in [together] if together in sections else algorithms:
        settings = sections[name].settings(streams) if name in sections else None
        if settings is None:
            why = "the policy is not a preset" if policy is None else f"{policy} has no recipe for it here"
            applied.append(Applied({}, f"untuned defaults for {name} ({why})"))
            continue
        said = []
        for key, value in flatten(settings).items():
            other = before.get(key)
            instead = f" instead of {other[1]}'s {other[0]}" if other is not None and other[0] != value else ""
            said.append(f"{key}={value}{instead}")
            before[key] = value, name
        what = ", ".join(said) or "nothing besides its defaults"
        applied.append(Applied(settings, f"{folders.shown(sections[name].path)} {name} ({what})"))
    return applied


def _sections(policy: str, seen: tuple[str, ...] = ()) -> dict[str, Section]:
    """Every section for a policy, from all folders, and from the policies named by `like`.

    Raises:
        UserError: a file cannot be read, two plugins have the same section, `like` leads nowhere or in a circle.
    """
    found: dict[str, Section] = {}
    likes: list[str] = []
    for folder, path in folders.holders("recipes", policy):
        read = load_sections(path, SectionKeys, RESERVED)
        like, tuned_for = read.pop("like", None), read.pop("tuned_for", None)
        if like is not None:
            likes.append(like)
            if like in (*seen, policy):
                raise UserError(f"{folders.shown(path)}: like: {like} leads back to this file.")
            if not folders.holders("recipes", like):
                known = folders.names("recipes")
                raise UserError(f"{folders.shown(path)}: like: {like}: no such recipe.{nearest(like, known)}")
        for name, keys in read.items():
            _check(keys, name, path)
            other = found.get(name)
            if other is None:
                found[name] = Section(keys, None if tuned_for is None else tuple(tuned_for), folder, path)
            elif other.folder.kind == folder.kind == folders.PLUGIN:
                raise UserError(
                    f"the section {name} of recipes/{policy}.yaml is provided by {other.folder.origin} and by "
                    f"{folder.origin}. Uninstall one of them, or write the section into ./configs/recipes/{policy}.yaml"
                    " yourself."
                )
    for like in likes:
        found = {**_sections(like, (*seen, policy)), **found}
    return found


def _check(keys: dict[str, Any], name: str, path: Path) -> None:
    for settings in (keys, *keys.get("streams", {}).values()):
        if "name" in settings.get("algorithm", {}):
            raise UserError(f"{folders.shown(path)}: {name}: a recipe cannot name an algorithm; remove algorithm.name.")


def _refuse_old(policy: str | None, algorithms: Sequence[str], streams: Sequence[str]) -> None:
    """Raise UserError for a file in the old form of recipes, from before they were per policy."""
    for folder in folders.folders():
        for algorithm in {*algorithms, "+".join(algorithms)}:
            for stream in streams:
                path = folder.file("recipes", f"{algorithm}_{stream}")
                if path is None or path.stem == policy:
                    continue
                raise UserError(
                    f"{folders.shown(path)} is a recipe of the old form, ALGORITHM_STREAM.yaml. Recipes are now per "
                    f"policy: move its keys into recipes/{policy or 'POLICY'}.yaml, indented below "
                    f"'{algorithm}:' (those for {stream} alone below '{algorithm}:', 'streams:' and '{stream}:'), "
                    "and remove the file."
                )


def preset_of(path: str) -> str | None:
    """The preset whose settings a checkpoint has; if several match, the one with the most settings; else None.

    Of a policy that CLARE's released code wrote: the preset of the paper's size, whatever its own.

    Args:
        path: `policy.path`, a folder or a name under the model root.
    """
    try:
        described = read_json(named_folder(path, model_root()) / "config.json")
    except (UserError, OSError, ValueError):  # problems with a checkpoint are reported where it is opened
        return None
    if not isinstance(described, dict):
        return None
    if isinstance(described.get("type"), str) and described["type"] in RELEASED:
        return RELEASED[described["type"]]
    found: dict[str, int] = {}
    for name, (_, file) in folders.files("models").items():
        policy = {k: v for k, v in load_yaml(file).get("policy", {}).items() if k not in NOT_STORED}
        if "type" in policy and all(described.get(k) == v for k, v in policy.items()):
            found[name] = len(policy)
    return max(found, key=lambda name: found[name]) if found else None
