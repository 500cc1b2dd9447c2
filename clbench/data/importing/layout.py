"""Which feature of a recording becomes which feature of the new data set: the format's defaults, and `--map`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from clbench.data.importing.recording import IMAGE, NUMBER, TEXT, Feature, Recording
from clbench.data.source import ACTION_KEY, IMAGES
from clbench.envs.base import STATE_KEY
from clbench.errors import UserError, nearest

TASK = "task"
NONE = "none"


@dataclass(frozen=True)
class Layout:
    """Features of the recording, by what they become. Several for the state or the action are put one after the other.

    `task` None: every episode has the instruction that the user gives.
    """

    cameras: Mapping[str, str]
    state: tuple[str, ...]
    action: tuple[str, ...]
    task: str | None

    def as_map(self) -> dict[str, str]:
        """The same as `--map` takes it."""
        numbers = {STATE_KEY: self.state, ACTION_KEY: self.action}
        joined = {key: "+".join(parts) or NONE for key, parts in numbers.items()}
        return {**self.cameras, **joined, TASK: self.task or NONE}


def parse_maps(given: list[str]) -> dict[str, str]:
    """Return KEY → FEATURE of options KEY=FEATURE; UserError for anything else."""
    found: dict[str, str] = {}
    for item in given:
        key, equals, feature = item.partition("=")
        fits = key in (STATE_KEY, ACTION_KEY, TASK) or (key.startswith(IMAGES) and key != IMAGES and "/" not in key)
        if not equals or not feature or not fits:
            raise UserError(
                f"--map {item}: give KEY=FEATURE, where KEY is {STATE_KEY}, {ACTION_KEY}, {TASK} or {IMAGES}NAME."
            )
        if key in found:
            raise UserError(f"--map gives {key} twice.")
        found[key] = feature
    return found


def layout(recording: Recording, maps: Mapping[str, str], instruction: str | None) -> Layout:
    """Choose the features.

    Args:
        maps: as from `parse_maps`; FEATURE may be several joined by "+", or "none".
        instruction: what every episode without a text is given.

    Raises:
        UserError: a feature is not there, of another kind, or neither there nor mapped; nothing can be seen.
    """
    features, defaults = recording.features, recording.defaults
    chosen: dict[str, tuple[str, ...]] = {}
    for key, text in maps.items():
        chosen[key] = () if text == NONE else tuple(text.split("+"))
        kind = {TASK: TEXT, STATE_KEY: NUMBER, ACTION_KEY: NUMBER}.get(key, IMAGE)
        for name in chosen[key]:
            _check(recording, key, name, kind)
        if kind != NUMBER and len(chosen[key]) > 1:
            raise UserError(f"--map {key}={text}: only the state and the action can be put together of several.")
    taken = {name for names in chosen.values() for name in names}
    cameras = {k: n for k, n in defaults.cameras.items() if k not in chosen and n not in taken and n in features}
    cameras |= {key: names[0] for key, names in chosen.items() if key.startswith(IMAGES) and names}
    state = chosen[STATE_KEY] if STATE_KEY in chosen else _numbers(recording, STATE_KEY, defaults.state)
    action = chosen[ACTION_KEY] if ACTION_KEY in chosen else _numbers(recording, ACTION_KEY, defaults.action)
    if not action:
        raise UserError(
            f"--map {ACTION_KEY}={NONE}: a policy learns actions, and without them there is nothing to learn."
        )
    if not state and not cameras:
        raise UserError(f"nothing would be seen: neither images nor a state are mapped. {_has(features)}")
    if TASK in chosen:
        task = next(iter(chosen[TASK]), None)
    else:
        task = next((n for n in defaults.task if n in features and features[n].kind == TEXT), None)
    if task is None and instruction is None:
        raise UserError(
            f"no instruction was found in {recording.folder} ({' or '.join(defaults.task)}). Give its feature with "
            f"--map {TASK}=FEATURE, or one text for all episodes with --instruction TEXT. {_has(features)}"
        )
    return Layout(cameras, state, action, task)


def _numbers(recording: Recording, key: str, alternatives: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    features = recording.features
    for names in alternatives:
        if all(name in features and features[name].kind == NUMBER for name in names):
            return names
    wanted = " or ".join("+".join(names) for names in alternatives)
    leave = f", or leave it out with --map {key}={NONE}" if key == STATE_KEY else ""
    raise UserError(
        f"the data in {recording.folder} has no {wanted}, from which {key} would come. Name the feature with "
        f"--map {key}=FEATURE (join several with +){leave}. {_has(features)}"
    )


def _check(recording: Recording, key: str, name: str, kind: str) -> None:
    features = recording.features
    if name not in features:
        raise UserError(
            f"--map {key}={name}: the data in {recording.folder} has no such feature.{nearest(name, features)}"
        )
    if features[name].kind != kind:
        what = {IMAGE: "images with 3 channels in uint8", NUMBER: "numbers", TEXT: "a text"}[kind]
        raise UserError(f"--map {key}={name}: it has to be {what}, and is {features[name]}.")


def _has(features: Mapping[str, Feature]) -> str:
    return f"It has {'; '.join(f'{name}: {feature}' for name, feature in features.items())}."


def unused(recording: Recording, chosen: Layout) -> list[str]:
    """The recording's features that nothing comes from."""
    used = {*chosen.cameras.values(), *chosen.state, *chosen.action, chosen.task}
    return [name for name in recording.features if name not in used]
