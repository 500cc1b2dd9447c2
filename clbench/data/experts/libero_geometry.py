"""Geometry behind the scripted LIBERO expert: rotations, points on collision geoms, grasps, clear heights.

Pure functions of numpy arrays, no simulator. Lengths are metres and angles radians, in the world frame (z up)
unless stated otherwise. A top-down gripper of yaw ψ opens its fingers along f = (−sin ψ, cos ψ), and g = (cos ψ, sin ψ)
is the horizontal direction across them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# The grip site's orientation (columns are its axes in the world) when the gripper points down and ψ = 0.
DOWN = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])

# The open Panda gripper around its grip site, which lies between the finger pads.
HALF_OPENING = 0.040  # from the middle to the inner face of either finger
FINGER_THICKNESS = 0.022  # outwards from there
FINGER_HALF_WIDTH = 0.012  # across the fingers
TIP_DEPTH = 0.010  # how far the finger tips reach below the grip site
PALM_HEIGHT = 0.032  # from the grip site up to the palm
PALM_HALF_LENGTH = 0.105  # along the fingers' opening
PALM_HALF_WIDTH = 0.035  # across it
WRIST_HEIGHT = 0.10  # from the grip site up to the links behind the hand
WRIST_LENGTH = 0.20  # how far they reach back towards the base
WRIST_HALF_WIDTH = 0.07
PAD_MIDDLE = 0.0036  # from the grip site up to the middle of the finger pads
PAD_HALF_HEIGHT = 0.008
MAX_OBLIQUENESS = 0.45  # tangent of the angle at which the fingers slide off a face
MAX_WIDTH = 0.072  # the widest thing grasped: a margin of 4 mm on either side


def yaw_rotation(yaw: float) -> np.ndarray:
    """Return the rotation (3, 3) by `yaw` about the world's z axis."""
    return axis_rotation(np.array([0.0, 0.0, 1.0]), yaw)


def axis_rotation(axis: np.ndarray, angle: float) -> np.ndarray:
    """Return the rotation (3, 3) by `angle` about the unit vector `axis` (Rodrigues' formula)."""
    x, y, z = axis
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    return np.eye(3) + np.sin(angle) * cross + (1.0 - np.cos(angle)) * cross @ cross


def top_down(yaw: float) -> np.ndarray:
    """Return the grip site's orientation (3, 3) when the gripper points down with `yaw`."""
    return yaw_rotation(yaw) @ DOWN


def rotation_vector(rotation: np.ndarray) -> np.ndarray:
    """Return axis times angle (3,), the angle in [0, π], of a rotation (3, 3)."""
    vector = np.array(
        [rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]]
    )
    sine, cosine = np.linalg.norm(vector) / 2.0, (np.trace(rotation) - 1.0) / 2.0
    angle = float(np.arctan2(sine, cosine))
    if sine > 1e-6:
        return vector * (angle / (2.0 * sine))
    if cosine > 0.0:
        return vector / 2.0
    outer = (rotation + np.eye(3)) / 2.0  # half a turn: axis axisᵀ
    column = outer[:, int(np.argmax(np.diag(outer)))]
    return np.pi * column / np.linalg.norm(column)


def box_points(half: np.ndarray, spacing: float = 0.006) -> np.ndarray:
    """Return points (N, 3) on the surface of a box with half sizes `half` (3,), at most `spacing` apart."""
    axes = [np.linspace(-h, h, max(2, int(np.ceil(2.0 * h / spacing)) + 1)) for h in half]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    return grid[(np.abs(grid) >= np.asarray(half) - 1e-9).any(axis=1)]


def cylinder_points(radius: float, half_length: float, spacing: float = 0.006) -> np.ndarray:
    """Return points (N, 3) on a cylinder about z: its mantle and both lids, about `spacing` apart."""

    def ring(r: float, z: float) -> np.ndarray:
        angles = np.linspace(0.0, 2.0 * np.pi, max(8, int(np.ceil(2.0 * np.pi * r / spacing))), endpoint=False)
        return np.stack([r * np.cos(angles), r * np.sin(angles), np.full_like(angles, z)], axis=1)

    levels = np.linspace(-half_length, half_length, max(2, int(np.ceil(2.0 * half_length / spacing)) + 1))
    mantle = [ring(radius, z) for z in levels.tolist()]
    inner = np.arange(radius - spacing, 0.0, -spacing)
    lids = [ring(r, z) for r in inner.tolist() for z in (-half_length, half_length)]
    return np.concatenate(mantle + lids)


def thin_out(points: np.ndarray, spacing: float = 0.004) -> np.ndarray:
    """Return one of the points (N, 3) in each cube of side `spacing`, in order of first appearance."""
    _, first = np.unique(np.round(points / spacing).astype(np.int64), axis=0, return_index=True)
    return points[np.sort(first)]


def distance_to_segment(points_xy: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Return the distances (N,) of points (N, 2) from the segment between `start` and `end` (2,)."""
    along = end - start
    squared = float(along @ along)
    share = np.clip((points_xy - start) @ along / squared, 0.0, 1.0) if squared > 1e-12 else np.zeros(len(points_xy))
    return np.linalg.norm(points_xy - start - share[:, None] * along, axis=1)


def highest_along(points: np.ndarray, start: np.ndarray, end: np.ndarray, radius: float) -> float:
    """Return the largest z of the points (N, 3) within `radius` of the way from `start` to `end` seen from above.

    −inf when there are none.
    """
    if not len(points):
        return -np.inf
    near = points[distance_to_segment(points[:, :2], start[:2], end[:2]) < radius]
    return float(near[:, 2].max()) if len(near) else -np.inf


def clear_corners(start: np.ndarray, end: np.ndarray, others: np.ndarray, radius: float) -> list[np.ndarray]:
    """Return the turning points, `end` included, on the way from `start` (2,) to `end` (2,) for a disc of `radius`.

    The way is straight, or first along one axis and then along the other: the straight one if it keeps `radius` away
    from the points `others` (N, 2), else the one that stays furthest away from them.
    """

    def room(corners: list[np.ndarray]) -> float:
        legs = zip([start, *corners[:-1]], corners, strict=True)
        return min((float(distance_to_segment(others, a, b).min()) for a, b in legs if len(others)), default=np.inf)

    ways = [[end], [np.array([start[0], end[1]]), end], [np.array([end[0], start[1]]), end]]
    return next((way for way in ways if room(way) >= radius), max(ways, key=room))


def shortest_escape(middle: np.ndarray, *keep_away: tuple[np.ndarray, float]) -> np.ndarray:
    """Return the shortest shift (2,) of `middle` (2,) that brings it far enough away from everything.

    Args:
        keep_away: points (N, 2), and the distance to be kept from them; as many pairs as there are distances.

    Zero if it is far enough away already, or if no shift up to 20 cm achieves it.
    """
    pairs = [(points, distance) for points, distance in keep_away if len(points)]
    if not pairs:
        return np.zeros(2)
    angles = np.arange(0.0, 2.0 * np.pi, np.pi / 12.0)
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    for length in np.arange(0.0, 0.21, 0.02):
        spots = middle + length * directions
        room = np.stack([np.linalg.norm(points - spots[:, None], axis=2).min(axis=1) - d for points, d in pairs])
        if room.min(axis=0).max() > 0.0:
            return length * directions[int(np.argmax(room.min(axis=0)))]
    return np.zeros(2)


@dataclass(frozen=True)
class Grasp:
    """A top-down grasp: where the grip site goes (3,), the gripper's yaw, what it closes on, and its cost."""

    position: np.ndarray
    yaw: float
    width: float
    cost: float

    @property
    def rotation(self) -> np.ndarray:
        """The grip site's orientation (3, 3)."""
        return top_down(self.yaw)


def segments(values: np.ndarray, gap: float) -> list[tuple[float, float]]:
    """Return (first, last) of each run of sorted `values` in which neighbours are at most `gap` apart."""
    if not len(values):
        return []
    ordered = np.sort(values)
    cuts = np.flatnonzero(np.diff(ordered) > gap)
    starts = np.concatenate([[0], cuts + 1])
    ends = np.concatenate([cuts, [len(ordered) - 1]])
    return [(float(ordered[a]), float(ordered[b])) for a, b in zip(starts, ends, strict=True)]


def collisions(u: np.ndarray, v: np.ndarray, z: np.ndarray, give: float = 0.0) -> int:
    """Return how many points the open gripper would touch on its way straight down.

    Args:
        u, v, z: the points' coordinates (N,) along the opening, across it and up, from the grip site.
        give: how far the finger tips may press into what is below them: the controller is compliant.
    """
    apart = np.abs(u)
    fingers = (
        (apart > HALF_OPENING - 0.003)  # 3 mm inside, to allow for the error of the approach
        & (apart < HALF_OPENING + FINGER_THICKNESS)
        & (np.abs(v) < FINGER_HALF_WIDTH)
        & (z > give - TIP_DEPTH)
    )
    palm = (apart < PALM_HALF_LENGTH) & (np.abs(v) < PALM_HALF_WIDTH) & (z > PALM_HEIGHT)
    return int(np.count_nonzero(fingers | palm))


def wrist_collisions(points: np.ndarray, to_base: np.ndarray) -> int:
    """Return how many points (N, 3), seen from the grip site, are where the arm's wrist is.

    Above the hand the arm bends back towards the base, which is in direction `to_base` (2,).
    """
    back = to_base / np.linalg.norm(to_base)
    along, aside = points[:, :2] @ back, points[:, :2] @ np.array([-back[1], back[0]])
    beside = (along > -0.05) & (along < WRIST_LENGTH) & (np.abs(aside) < WRIST_HALF_WIDTH)
    return int(np.count_nonzero(beside & (points[:, 2] > WRIST_HEIGHT)))


def plan_grasps(
    points: np.ndarray,
    obstacles: np.ndarray,
    base_xy: np.ndarray,
    yaws: Sequence[float] | np.ndarray | None = None,
    depths: Sequence[float] = (0.003, 0.010, 0.018, 0.027),
) -> list[Grasp]:
    """Return grasps of an object from above, best first; empty if nothing on it is narrow enough.

    For every yaw, depth and lateral offset, the object's points between the finger pads fall into segments along
    the opening: the whole width of a box, or one wall of a bowl. Each segment that fits between the fingers, and that
    they reach without coming down on the object itself, is a candidate. Its cost adds up the causes of failure, in
    units of a probable failure:

        contacts of the open gripper with obstacles on the way down, walls oblique to the fingers, width, lever arm
        to the middle of the object, shallowness, turning the wrist, reaching far

    Args:
        points: the object's surface (N, 3).
        obstacles: surfaces of what must not be touched (M, 3).
        base_xy: the robot's base (2,).
        yaws: yaws to try; by default every 10° within ±90°.
        depths: depths of the grip site below the object's top, from which those that fit are tried.
    """
    if yaws is None:
        yaws = np.deg2rad(np.arange(-90.0, 90.0, 10.0))
    top, bottom = float(points[:, 2].max()), float(points[:, 2].min())
    middle = (points[:, :2].max(axis=0) + points[:, :2].min(axis=0)) / 2.0
    lowest = min(bottom + TIP_DEPTH, top - 0.003)
    heights = sorted({round(max(top - depth, lowest), 4) for depth in depths})
    reach = np.ptp(points[:, :2], axis=0).max() / 2.0 + WRIST_LENGTH
    near = obstacles[(np.abs(obstacles[:, :2] - middle) < reach).all(axis=1) & (obstacles[:, 2] > bottom - TIP_DEPTH)]
    found = []
    for yaw in yaws:
        f, g = np.array([-np.sin(yaw), np.cos(yaw)]), np.array([np.cos(yaw), np.sin(yaw)])
        u, v = points[:, :2] @ f, points[:, :2] @ g
        near_u, near_v = near[:, :2] @ f, near[:, :2] @ g
        for height in heights:
            level = np.abs(points[:, 2] - height - PAD_MIDDLE) < PAD_HALF_HEIGHT
            if not level.any():
                continue
            v_low, v_high = v[level].min(), v[level].max()
            steps = max(1, int((v_high - v_low) / 0.008) // 2)
            for offset in np.linspace(v_low, v_high, 2 * steps + 1):
                between = level & (np.abs(v - offset) < FINGER_HALF_WIDTH)
                thin, whole = segments(u[between], gap=0.03), segments(u[between], gap=MAX_WIDTH)
                for low, high in dict.fromkeys(thin + whole):
                    if high - low > MAX_WIDTH:
                        continue
                    centre = (low + high) / 2.0
                    xy = centre * f + offset * g
                    inside = between & (u >= low) & (u <= high)
                    if np.count_nonzero(inside) < 4:
                        continue
                    if collisions(u - centre, v - offset, points[:, 2] - height, give=0.004) > 2:
                        continue  # the fingers would come down on the object itself
                    oblique = _obliqueness(u[inside] - centre, v[inside] - offset)
                    if oblique > MAX_OBLIQUENESS:
                        continue
                    hits = collisions(near_u - centre, near_v - offset, near[:, 2] - height)
                    hits += wrist_collisions(near - np.array([*xy, height]), base_xy - xy)
                    found.append(
                        Grasp(
                            position=np.array([xy[0], xy[1], height]),
                            yaw=float(yaw),
                            width=high - low,
                            cost=(0.5 if hits else 0.0)
                            + 0.03 * min(hits, 200)
                            + 0.6 * oblique
                            + 4.0 * (high - low)
                            + 3.0 * float(np.linalg.norm(xy - middle))
                            + 8.0 * (height - heights[0])
                            + 0.2 * abs(float(yaw))
                            + 0.5 * float(np.linalg.norm(xy - base_xy)),
                        )
                    )
    return sorted(found, key=lambda grasp: grasp.cost)


def _obliqueness(u: np.ndarray, v: np.ndarray) -> float:
    """Return how oblique the two faces between the pads are: the mean |slope| of their outlines; 0 is square to them.

    A face's outline is taken as the extreme u on either side of v = 0.
    """
    left, right = u[v < 0.0], u[v >= 0.0]
    if not len(left) or not len(right):
        return 0.5  # only half a pad's width touches
    drift = abs(float(right.max() - left.max())) + abs(float(right.min() - left.min()))
    return drift / 2.0 / FINGER_HALF_WIDTH
