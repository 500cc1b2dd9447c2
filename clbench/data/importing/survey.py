"""Reads all of a recording before anything is written, and determines what its numbers mean.

A recording that has what LIBERO's simulator shows (its two cameras, a state of eight or nine numbers, an action of
seven) becomes a LIBERO set: its state must end up as end-effector xyz, axis-angle and two finger positions in
metres, and its actions must lie in [-1, 1] with a gripper that opens at -1. Anything else is taken as it is, except for
conversions that were requested.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from clbench.data.importing.conventions import (
    FINGER,
    LIBERO_GRIPPER,
    POSITION,
    ROTATIONS,
    Gripper,
    opening_command,
    rotated,
)
from clbench.data.importing.layout import Layout
from clbench.data.importing.recording import Episode
from clbench.data.source import ACTION_KEY, ROUNDING
from clbench.envs.base import STATE_KEY
from clbench.envs.making import family
from clbench.errors import UserError

LIBERO = "libero"
HALF = 0.5  # between commands 0 and ±1
UNIT = 1e-3  # how far a quaternion's length is from 1 by rounding


@dataclass(frozen=True)
class Numbers:
    """One episode's states (T, S) and actions (T, A), float64, and its instructions (T). S is 0 without a state."""

    states: np.ndarray
    actions: np.ndarray
    texts: list[str]


@dataclass
class Survey:
    """What was found in all episodes.

    Attributes:
        shapes: camera → (height, width, 3) of its images.
        low, high: least and greatest actions (A,).
        commands, changes: the last number of each action, and by how much the fingers' distance then grew.
    """

    episodes: int = 0
    frames: int = 0
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    state_dim: int = 0
    action_dim: int = 0
    low: np.ndarray = field(default_factory=lambda: np.zeros(0))
    high: np.ndarray = field(default_factory=lambda: np.zeros(0))
    state_low: np.ndarray = field(default_factory=lambda: np.zeros(0))
    state_high: np.ndarray = field(default_factory=lambda: np.zeros(0))
    units: bool = True  # whether numbers 3 to 6 of every state make up a vector of length 1
    from_zero: str = ""  # the first episode whose gripper commands seem to range from 0 to 1
    commands: list[np.ndarray] = field(default_factory=list)
    changes: list[np.ndarray] = field(default_factory=list)

    @property
    def is_libero(self) -> bool:
        """Whether this is to become a LIBERO set."""
        libero = family(LIBERO)
        return (
            set(self.shapes) >= set(libero.cameras)
            and self.action_dim == libero.action_dim
            and self.state_dim in (libero.state_dim, libero.state_dim + 1)
        )

    @property
    def opens(self) -> str | None:
        """Which commands open the gripper, "low" or "high", by how its fingers move; None: unknown."""
        if not self.commands:
            return None
        return opening_command(np.concatenate(self.commands), np.concatenate(self.changes))


@dataclass(frozen=True)
class Conventions:
    """What the recording's numbers mean. `gripper` None: its commands are taken as they are."""

    gripper: Gripper | None
    rotation: str
    is_libero: bool

    def states(self, states: np.ndarray) -> np.ndarray:
        """Return the states (T, S) for the new set."""
        return rotated(states, self.rotation)

    def actions(self, actions: np.ndarray) -> np.ndarray:
        """Return the actions (T, A) for the new set."""
        if self.gripper in (None, LIBERO_GRIPPER):
            return actions
        converted = actions.copy()
        converted[:, -1] = self.gripper.converted(actions[:, -1])  # type: ignore[union-attr]
        return converted


def numbers(episode: Episode, chosen: Layout, instruction: str | None) -> Numbers:
    """Read an episode's numbers and texts; UserError where they are damaged, not finite or do not fit together."""
    actions = np.concatenate([episode.numbers(name) for name in chosen.action], axis=1)
    frames = len(actions)
    if not frames:
        raise UserError(f"{episode.where} has no frames that are followed by an action. Import the data without it.")
    parts = [episode.numbers(name) for name in chosen.state]
    for name, part in zip(chosen.state, parts, strict=True):
        _same_length(episode, name, len(part), frames)
    states = np.concatenate([np.zeros((frames, 0)), *parts], axis=1)
    for key, values in ((ACTION_KEY, actions), (STATE_KEY, states)):
        with np.errstate(over="ignore"):
            if not np.isfinite(values.astype(np.float32)).all():
                raise UserError(
                    f"{episode.where} has values for {key} that are not finite (as float32). Import the data "
                    "without that episode."
                )
    texts = [""] * frames if chosen.task is None else episode.texts(chosen.task, frames)
    if chosen.task is not None:
        _same_length(episode, chosen.task, len(texts), frames)
    texts = [" ".join(text.split()) or (instruction or "") for text in texts]
    if not all(texts):
        raise UserError(f"{episode.where} has an empty instruction. Give a text for such episodes: --instruction TEXT.")
    return Numbers(states, actions, texts)


def _same_length(episode: Episode, feature: str, found: int, frames: int) -> None:
    if found != frames:
        raise UserError(
            f"{episode.where} is damaged: '{feature}' has {found} values, the action {frames}. Copy the file again."
        )


def survey(episodes: Iterable[Episode], chosen: Layout, instruction: str | None) -> Survey:
    """Read all episodes, but only the first image of each; UserError for the first episode with a fault."""
    found = Survey()
    for episode in episodes:
        read = numbers(episode, chosen, instruction)
        _add(found, episode.where, read)
        for key, feature in chosen.cameras.items():
            _same_length(episode, feature, episode.count(feature), len(read.actions))
            image = next(episode.images(feature))
            check_size(found.shapes.setdefault(key, image.shape), episode.where, feature, 0, image)
    return found


def check_size(expected: tuple[int, ...], where: str, feature: str, number: int, image: np.ndarray) -> None:
    """Raise UserError for an image of another size than the set's first one."""
    if image.shape != expected:
        height, width = expected[:2]
        raise UserError(
            f"{where}: image {number} of '{feature}' is {image.shape[0]}×{image.shape[1]} pixels, the first one of the "
            f"data is {height}×{width}. All images of a camera must have the same size. Leave the camera out with "
            "--map, or import the data without that episode."
        )


def _add(found: Survey, where: str, read: Numbers) -> None:
    states, actions = read.states, read.actions
    if not found.episodes:
        found.state_dim, found.action_dim = states.shape[1], actions.shape[1]
        found.low, found.high = actions.min(0), actions.max(0)
        found.state_low, found.state_high = states.min(0), states.max(0)
    if (states.shape[1], actions.shape[1]) != (found.state_dim, found.action_dim):
        raise UserError(
            f"{where} has states of {states.shape[1]} and actions of {actions.shape[1]} numbers, those before it "
            f"{found.state_dim} and {found.action_dim}. Import the data without it."
        )
    found.episodes += 1
    found.frames += len(actions)
    found.low, found.high = np.minimum(found.low, actions.min(0)), np.maximum(found.high, actions.max(0))
    lowest, highest = actions[:, -1].min(), actions[:, -1].max()
    if -HALF <= lowest <= HALF < highest:
        found.from_zero = found.from_zero or where
    found.state_low = np.minimum(found.state_low, states.min(0))
    found.state_high = np.maximum(found.state_high, states.max(0))
    if found.state_dim >= POSITION + 4:
        lengths = np.linalg.norm(states[:, POSITION : POSITION + 4], axis=1)
        found.units = found.units and bool((np.abs(lengths - 1) < UNIT).all())
        fingers = states[:, -2] - states[:, -1]
        found.commands.append(actions[:-1, -1].astype(np.float32))
        found.changes.append(np.diff(fingers).astype(np.float32))


def conventions(found: Survey, gripper: Gripper | None, rotation: str | None) -> tuple[Conventions, list[str]]:
    """Determine what the numbers mean.

    Args:
        gripper, rotation: what the user says; None: nothing.

    Returns:
        The conventions, and warnings.

    Raises:
        UserError: they cannot be determined, or contradict the data; the message says which option to give.
    """
    if rotation is not None and found.state_dim < POSITION + ROTATIONS[rotation]:
        raise UserError(
            f"--rotation {rotation} is for a state of a position (3), a rotation ({ROTATIONS[rotation]}) and the rest; "
            f"this data's has {found.state_dim} numbers."
        )
    if rotation is not None and rotation.startswith("quaternion") and not found.units:
        raise UserError(
            f"--rotation {rotation}: numbers 3 to 6 of the state are not a quaternion: their length is not 1."
        )
    if not found.is_libero:
        return Conventions(gripper, rotation or "axis_angle", False), []
    _check_state(found, rotation)
    settled, warnings = _gripper(found, gripper)
    low, high = found.low.copy(), found.high.copy()
    low[-1], high[-1] = sorted(settled.converted(np.array([low[-1], high[-1]])))
    if low.min() < -1 - ROUNDING or high.max() > 1 + ROUNDING:
        at = int(np.argmax(np.maximum(-low, high)))
        raise UserError(
            f"number {at} of the action goes from {low[at]:.3g} to {high[at]:.3g}, and LIBERO's simulator takes [-1, 1]"
            + (f" (with --gripper {settled})" if at == found.action_dim - 1 else "")
            + ": these are not commands for its controller. To import them as they are, give one of the two "
            "cameras another name (--map)."
        )
    return Conventions(settled, rotation or "axis_angle", True), warnings


def _check_state(found: Survey, rotation: str | None) -> None:
    """Raise UserError unless the result is LIBERO's state: position, axis-angle, two finger positions."""
    libero = family(LIBERO)
    other = f"Map other features (--map {STATE_KEY}=A+B), or none (--map {STATE_KEY}=none)."
    given = ROTATIONS[rotation or "axis_angle"]
    if rotation is None and found.state_dim > libero.state_dim:
        about = "is a quaternion" if found.units else "is not LIBERO's axis-angle, which has 3 numbers"
        raise UserError(
            f"the state has {found.state_dim} numbers, so its rotation {about}. Say which one with --rotation "
            f"{' or '.join(r for r, n in ROTATIONS.items() if n == 4)}. {other}"
        )
    if rotation is None and found.units:
        raise UserError(
            "numbers 3 to 6 of the state have length 1 in every frame, so they are a quaternion, which leaves one "
            f"number where LIBERO has two finger positions. {other}"
        )
    if found.state_dim - given + ROTATIONS["axis_angle"] != libero.state_dim:
        raise UserError(
            f"with --rotation {rotation} the state would have {found.state_dim - given + ROTATIONS['axis_angle']} "
            f"numbers, and LIBERO's has {libero.state_dim}: position (3), axis-angle (3), two finger positions. {other}"
        )
    low, high = float(found.state_low[-2:].min()), float(found.state_high[-2:].max())
    if low < -FINGER or high > FINGER:
        raise UserError(
            f"the last two numbers of the state go from {low:.3g} to {high:.3g}. In LIBERO they are finger positions "
            f"in metres, within ±{FINGER}. {other}"
        )


def _gripper(found: Survey, given: Gripper | None) -> tuple[Gripper, list[str]]:
    """How the gripper is commanded, and warnings."""
    low, high = float(found.low[-1]), float(found.high[-1])
    opens = found.opens
    shown = None if opens is None else Gripper(*((low, high) if opens == "low" else (high, low)))
    moves = f"The fingers move as in --gripper {shown}" if shown else "The fingers do not show which"
    if given is not None:
        wrong = shown is not None and (given.opens < given.closes) != (shown.opens < shown.closes)
        return given, [f"warning: --gripper {given} is taken as given. {moves}."] if wrong else []
    if low < -HALF and found.from_zero:
        raise UserError(
            f"the gripper, the last number of an action, goes from 0 to 1 in {found.from_zero} and from {low:.3g} to "
            f"{high:.3g} in the data as a whole, which mixes two conventions. Import its parts separately, or state "
            f"that all of it follows LIBERO's: --gripper {LIBERO_GRIPPER}."
        )
    if low >= -HALF:
        raise UserError(
            f"the gripper, the last number of an action, goes from {low:.3g} to {high:.3g}. LIBERO's opens at "
            f"{LIBERO_GRIPPER.opens:g} and closes at {LIBERO_GRIPPER.closes:g}, so these numbers have another meaning. "
            f"State it with --gripper open=1,close=0 or --gripper open=0,close=1. {moves}."
        )
    if opens == "high":
        raise UserError(
            f"the gripper's fingers close when the last number of an action is low ({low:.3g}), while LIBERO's open at "
            f"{LIBERO_GRIPPER.opens:g}: the data counts the other way round. State it with --gripper {shown}. If the "
            f"fingers mislead, give --gripper {LIBERO_GRIPPER}."
        )
    return LIBERO_GRIPPER, []
