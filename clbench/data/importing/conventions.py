"""Rotations and grippers as LIBERO's simulator has them: axis-angle, and -1 opens, +1 closes.

A state that has a rotation is position (3), rotation, and whatever else there is. An action's last number is the
gripper's command.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from clbench.envs.libero.simulator import axis_angle
from clbench.errors import UserError

POSITION = 3
ROTATIONS = {"axis_angle": 3, "quaternion_xyzw": 4, "quaternion_wxyz": 4, "euler_xyz": 3}  # how many numbers
OPENS, CLOSES = -1.0, 1.0
MOVED = 0.01  # metres by which fingers move in all, where they show something
FINGER = 0.06  # metres; a finger of LIBERO's robot moves by 0.04
_GRIPPER = re.compile(r"open=([-+]?\d+(?:\.\d+)?),close=([-+]?\d+(?:\.\d+)?)\Z")


@dataclass(frozen=True)
class Gripper:
    """Which command opens the gripper, and which closes it."""

    opens: float
    closes: float

    def __str__(self) -> str:
        return f"open={self.opens:g},close={self.closes:g}"

    def converted(self, commands: np.ndarray) -> np.ndarray:
        """Return commands (n,) as LIBERO has them: `opens` becomes -1, `closes` +1, what is between them likewise."""
        return OPENS + (CLOSES - OPENS) * (commands - self.opens) / (self.closes - self.opens)


LIBERO_GRIPPER = Gripper(OPENS, CLOSES)


def parse_gripper(text: str) -> Gripper:
    """Return what "open=1,close=0" means; UserError for anything else."""
    found = _GRIPPER.match(text)
    if found is None or float(found[1]) == float(found[2]):
        raise UserError(f"--gripper {text}: say which commands open and close it, as in --gripper open=1,close=0.")
    return Gripper(float(found[1]), float(found[2]))


def opening_command(commands: np.ndarray, changes: np.ndarray) -> str | None:
    """Say whether the lower or the higher commands open the gripper, by how its fingers move; None: unknown.

    Args:
        commands: (n,), of two kinds: below and above the middle of their range.
        changes: (n,), by how much the fingers' distance grew in the step after each command, in metres.
    """
    if len(commands) == 0 or commands.min() == commands.max():
        return None
    high = commands > (commands.min() + commands.max()) / 2
    low_grows, high_grows = float(changes[~high].sum()), float(changes[high].sum())
    alike = min(low_grows, high_grows) > MOVED or max(low_grows, high_grows) < -MOVED
    if alike or abs(low_grows - high_grows) < MOVED:
        return None
    return "low" if low_grows > high_grows else "high"


def rotated(states: np.ndarray, rotation: str) -> np.ndarray:
    """Return states (n, S) with their rotation as axis-angle, as LeRobot and LIBERO compute it (angle in [0, 2π]).

    Args:
        rotation: how they have it. Euler angles are roll, pitch and yaw about fixed axes x, y, z in radians. Of the two
            quaternions that they leave open, the first is the one that turns about an axis with positive x, as for a
            gripper that points down in LIBERO, and each further one the nearer to the one before.
    """
    if rotation == "axis_angle":
        return states
    end = POSITION + ROTATIONS[rotation]
    given = states[:, POSITION:end]
    if rotation == "quaternion_wxyz":
        given = given[:, [1, 2, 3, 0]]
    elif rotation == "euler_xyz":
        given = _continuous(_quaternions(given))
    angles = np.stack([axis_angle(q) for q in given]) if len(given) else np.zeros((0, 3))
    return np.concatenate([states[:, :POSITION], angles, states[:, end:]], axis=1)


def _quaternions(angles: np.ndarray) -> np.ndarray:
    """Quaternions xyzw (n, 4) of roll, pitch, yaw (n, 3): R = Rz(yaw) Ry(pitch) Rx(roll)."""
    (cr, cp, cy), (sr, sp, sy) = np.cos(angles / 2).T, np.sin(angles / 2).T
    return np.stack(
        [
            sr * cp * cy - cr * sp * sy,
            cr * sp * cy + sr * cp * sy,
            cr * cp * sy - sr * sp * cy,
            cr * cp * cy + sr * sp * sy,
        ],
        axis=1,
    )


def _continuous(quaternions: np.ndarray) -> np.ndarray:
    """The same rotations, without a jump from one quaternion to its negative."""
    found = quaternions.copy()
    if len(found) and found[0, 0] < 0:
        found[0] *= -1
    for i in range(1, len(found)):
        if found[i] @ found[i - 1] < 0:
            found[i] *= -1
    return found
