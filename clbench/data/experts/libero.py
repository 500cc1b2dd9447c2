"""A scripted expert for LIBERO, acting on the simulator's full state: demonstrations without downloads.

The expert reads the goal's predicates and joins skills until they hold:

    In, On              pick the object, carry it over what is in the way, lower it, let go
    Open, Close         pull or push the handle's front along the drawer's rail; push a door about its hinge
    Turnon, Turnoff     grip the knob and turn the wrist
    (In a drawer)       open it first, after moving aside what it would hide
    (On the table)      drag what is flat, a plate, instead of lifting it
    (In under a roof)   grip what sticks out, a handle, with the hand leaning, and put it in from the side; what has
                        nothing to grip there, e.g. a book, cannot be put under a roof

A skill is a generator of actions. It runs until it is done, but stores no trajectory: every action is computed from
the state at that moment, as

    translation = clip(GAIN · position error / 0.05 m),  rotation = clip(TURN_GAIN · rotation error / 0.5 rad)

so noise on the executed actions is corrected at the next step. A skill that fails (the object slipped, a target is
out of reach) ends, and the goals that do not hold are tried again.

Actions (7,) in [-1, 1] are those of robosuite's OSC_POSE controller with its defaults: displacement of the grip site
in the world frame (1 is 5 cm), rotation vector in the world frame (1 is 0.5 rad), gripper (1 closes, -1 opens).
Lengths are metres, angles radians, positions in the world frame.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from clbench.data.experts.base import Experts
from clbench.data.experts.libero_geometry import (
    DOWN,
    PALM_HALF_WIDTH,
    TIP_DEPTH,
    Grasp,
    axis_rotation,
    box_points,
    clear_corners,
    cylinder_points,
    highest_along,
    plan_grasps,
    rotation_vector,
    shortest_escape,
    thin_out,
    top_down,
)
from clbench.envs.base import Expert

OPEN, CLOSED = -1.0, 1.0

GAIN = 2.2  # the controller reaches about a third of its target within a step, so this is far from overshooting
TURN_GAIN = 1.6
MAX_TURN = 0.5  # of the controller's range: faster turns disturb the position
STEP_M, STEP_RAD = 0.05, 0.5  # what an action of 1 asks for
CLOSE_STEPS = 9  # until the fingers have closed (or opened) and are pressing
CLEARANCE = 0.025  # between what moves and what it passes over
DRAWER_OPEN = 0.15  # LIBERO calls a drawer open from 0.14
IN_FRONT = 0.025  # things go into a drawer this far in front of its middle: the drawers above have handles
UP = np.array([0.0, 0.0, 1.0])
LEAN = np.pi / 3.0  # of the hand that reaches under a roof, from pointing down
REAR_GAP = 0.012  # between what is put under a roof and the wall behind it
LEAST_ROOM = 0.05  # between floor and roof, for something to be put into a room
APART = 0.12  # between two things on the same region, e.g. two pots on a stove

Skill = Generator[np.ndarray, None, bool]  # yields actions; returns whether it achieved its purpose
Goal = list[str]  # a predicate and its arguments, e.g. ["in", "milk_1", "basket_1_contain_region"]


@dataclass(frozen=True)
class Cavity:
    """A box-shaped room with a roof: its lowest and highest corner (3,), and the direction (3,) out of it."""

    low: np.ndarray
    high: np.ndarray
    out: np.ndarray


class Scene:
    """What the expert knows about a simulator: where everything is now.

    Shapes are the collision geoms, as points on their surfaces. They are sampled once per body and moved with it.
    """

    def __init__(self, env: Any) -> None:
        self.env = env  # LIBERO's BDDL domain, a robosuite environment
        self.model = env.sim.model._model
        self.data = env.sim.data._data
        self.goals: list[Goal] = [[str(word) for word in state] for state in env.parsed_problem["goal_state"]]
        self._points_of_body: dict[int, np.ndarray] = {}
        self._grip_site = self.model.site("gripper0_grip_site").id
        self.base_xy: np.ndarray = self.data.body("robot0_base").xpos[:2].copy()

    # The robot.

    @property
    def hand(self) -> np.ndarray:
        """Position (3,) of the grip site, between the finger pads."""
        return self.data.site_xpos[self._grip_site].copy()

    @property
    def hand_rotation(self) -> np.ndarray:
        """Orientation (3, 3) of the grip site."""
        return self.data.site_xmat[self._grip_site].reshape(3, 3).copy()

    # Goals.

    def holds(self, goal: Goal) -> bool:
        """Whether a goal predicate is true now."""
        return bool(self.env._eval_predicate(goal))

    # Things.

    def is_thing(self, name: str) -> bool:
        """Whether `name` is an object or a fixture, rather than a region."""
        return name in self.env.obj_body_id

    def origin(self, name: str) -> np.ndarray:
        """Origin (3,) of an object's or fixture's body, which is the point that LIBERO's predicates use."""
        return self.data.xpos[self.env.obj_body_id[name]].copy()

    def points(self, name: str) -> np.ndarray:
        """Points (N, 3) on the surface of an object or fixture."""
        return self.points_below(self.env.obj_body_id[name])

    def points_below(self, root: int, without: int | None = None) -> np.ndarray:
        """Points (N, 3) on the surfaces of a body and all bodies attached to it, except those that a joint moves."""
        bodies = [body for body in range(root, self.model.nbody) if self._is_below(body, root)]
        if without is not None:
            moved = int(self.model.jnt_bodyid[without])
            bodies = [body for body in bodies if not self._is_below(body, moved)]
        return np.concatenate([self._body_points(body) for body in bodies])

    def obstacles(self, *without: str) -> np.ndarray:
        """Points (N, 3) on all objects and fixtures except those named."""
        parts = [self.points(name) for name in self.env.obj_body_id if name not in without]
        return np.concatenate([np.zeros((0, 3)), *parts])

    def bottom(self, name: str) -> float:
        """Height of an object's lowest point."""
        return float(self.points(name)[:, 2].min())

    def top(self, name: str) -> float:
        """Height of an object's highest point."""
        return float(self.points(name)[:, 2].max())

    # Regions.

    def region(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Centre (3,), orientation (3, 3) and half sizes (3,) of a region."""
        site = self.model.site(name).id
        return (
            self.data.site_xpos[site].copy(),
            self.data.site_xmat[site].reshape(3, 3).copy(),
            self.model.site_size[site].copy(),
        )

    def parent(self, region: str) -> str | None:
        """The object or fixture that a region belongs to; None for the table."""
        name = getattr(self.env.object_sites_dict[region], "parent_name", None)
        return name if name is not None and self.is_thing(name) else None

    def cavity(self, region: str) -> Cavity | None:
        """The room that a region is in if it has a roof, e.g. a microwave's; None if it is open above."""
        parent = self.parent(region)
        if parent is None or self.joint_of(region) is not None:
            return None
        centre, rotation, half = self.region(region)
        extent = np.abs(rotation @ half)
        points = self.points_below(self.env.obj_body_id[parent], without=self.joint_of(parent))  # a door is not a wall
        over = points[(np.abs(points - centre)[:, :2] < 0.5 * extent[:2]).all(axis=1)]
        above, below = over[over[:, 2] > centre[2], 2], over[over[:, 2] < centre[2], 2]
        if not len(above) or not len(below) or above.min() - below.max() < LEAST_ROOM:
            return None
        floor, roof = float(below.max()), float(above.min())
        walls = points[(points[:, 2] > floor + 0.02) & (points[:, 2] < roof - 0.02)] - centre
        low, high = -extent, extent.copy()
        openings = []
        for axis in (0, 1):
            ahead = walls[np.abs(walls[:, 1 - axis]) < 0.5 * extent[1 - axis], axis]
            for bounds, sign in ((low, -1.0), (high, 1.0)):
                to_walls = sign * ahead[sign * ahead > 0.0]
                if len(to_walls):
                    bounds[axis] = sign * to_walls.min()
                else:
                    openings.append(sign * np.eye(3)[axis])
        if not openings:
            return None
        out = max(openings, key=lambda direction: float(direction[:2] @ (self.base_xy - centre[:2])))
        return Cavity(np.array([*(centre + low)[:2], floor]), np.array([*(centre + high)[:2], roof]), out)

    # Joints of drawers, doors and knobs.

    def joint_of(self, name: str) -> int | None:
        """The joint that moves a region or an articulated fixture, e.g. a drawer's; None if nothing moves it."""
        if self.is_thing(name):
            body = self.env.obj_body_id[name]
            joints = [j for j in range(self.model.njnt) if self._is_below(int(self.model.jnt_bodyid[j]), body)]
            joints = [j for j in joints if self.model.jnt_type[j] >= 2]  # 2 slides, 3 turns
            return joints[0] if len(joints) == 1 else None
        body = int(self.model.site_bodyid[self.model.site(name).id])
        first, count = int(self.model.body_jntadr[body]), int(self.model.body_jntnum[body])
        return first if count == 1 and self.model.jnt_type[first] >= 2 else None

    def joint_value(self, joint: int) -> float:
        """A joint's position: metres for a drawer, radians for a door or knob."""
        return float(self.data.qpos[self.model.jnt_qposadr[joint]])

    def joint_axis(self, joint: int) -> np.ndarray:
        """Axis (3,) of a joint in the world."""
        return self.data.xaxis[joint].copy()

    def joint_anchor(self, joint: int) -> np.ndarray:
        """Position (3,) of a joint in the world."""
        return self.data.xanchor[joint].copy()

    def joint_points(self, joint: int) -> np.ndarray:
        """Points (N, 3) on what a joint moves."""
        return self.points_below(int(self.model.jnt_bodyid[joint]))

    def joint_boxes(self, joint: int) -> np.ndarray:
        """Centres (N, 3) of the collision geoms that a joint moves."""
        body = int(self.model.jnt_bodyid[joint])
        return np.stack([self.data.geom_xpos[g].copy() for g in self._geoms(body)])

    def closing(self, joint: int, point: np.ndarray) -> np.ndarray:
        """Direction (3,) in which a point on what a joint moves goes when the joint goes to 0."""
        axis = self.joint_axis(joint)
        forward = axis if self.slides(joint) else np.cross(axis, point - self.joint_anchor(joint))
        return -np.sign(self.joint_value(joint)) * forward / np.linalg.norm(forward)

    def opening(self, joint: int) -> np.ndarray:
        """Direction (3,) in which a drawer opens: towards negative values of its joint."""
        return -self.joint_axis(joint)

    def slides(self, joint: int) -> bool:
        """Whether a joint slides (a drawer's) rather than turns (a door's)."""
        return int(self.model.jnt_type[joint]) == 2

    def push_point(self, joint: int) -> np.ndarray:
        """Where to push what a joint moves (3,), in its own body's frame.

        A drawer: the middle of its front. A door: near its free edge, high enough for the palm to stay above it.
        """
        points = self.joint_points(joint)
        if self.slides(joint):
            inwards = self.closing(joint, points[0])
            front = points[points @ inwards < (points @ inwards).min() + 0.004]
            point = (front.max(axis=0) + front.min(axis=0)) / 2.0
        else:
            anchor = self.joint_anchor(joint)
            radius = np.linalg.norm((points - anchor)[:, :2], axis=1)
            edge = points[np.abs(radius - 0.85 * radius.max()) < 0.01]
            inwards = self.closing(joint, edge.mean(axis=0))
            point = edge[int(np.argmin(edge @ inwards))].copy()
            point[2] = points[:, 2].max() - 0.02
        body = int(self.model.jnt_bodyid[joint])
        return (point - self.data.xpos[body]) @ self.data.xmat[body].reshape(3, 3)

    def carried(self, joint: int, local: np.ndarray) -> np.ndarray:
        """Where a point on what a joint moves, given in its body's frame, is now."""
        body = int(self.model.jnt_bodyid[joint])
        return self.data.xpos[body] + self.data.xmat[body].reshape(3, 3) @ local

    def _is_below(self, body: int, root: int) -> bool:
        while body > root:  # MuJoCo numbers parents before children
            body = int(self.model.body_parentid[body])
        return body == root

    def _geoms(self, body: int) -> list[int]:
        """The geoms of a body that can touch something."""
        first, count = int(self.model.body_geomadr[body]), int(self.model.body_geomnum[body])
        return [g for g in range(first, first + count) if self.model.geom_contype[g] or self.model.geom_conaffinity[g]]

    def _body_points(self, body: int) -> np.ndarray:
        position, rotation = self.data.xpos[body], self.data.xmat[body].reshape(3, 3)
        if body not in self._points_of_body:
            world = [self._geom_points(geom) for geom in self._geoms(body)]
            local = (np.concatenate([np.zeros((0, 3)), *world]) - position) @ rotation
            self._points_of_body[body] = thin_out(local)
        return position + self._points_of_body[body] @ rotation.T

    def _geom_points(self, geom: int) -> np.ndarray:
        size, kind = self.model.geom_size[geom], int(self.model.geom_type[geom])
        if kind == 6:  # box; large ones, the walls of furniture, need fewer points
            local = box_points(size, spacing=0.006 if size.max() < 0.08 else 0.012)
        elif kind in (3, 5):  # capsule, cylinder
            local = cylinder_points(size[0], size[1])
        elif kind == 2:  # sphere: the cylinder around it is close enough
            local = cylinder_points(size[0], size[0])
        elif kind == 7:  # mesh
            mesh = int(self.model.geom_dataid[geom])
            first, count = int(self.model.mesh_vertadr[mesh]), int(self.model.mesh_vertnum[mesh])
            local = self.model.mesh_vert[first : first + count]
        else:
            local = np.zeros((0, 3))
        return self.data.geom_xpos[geom] + local @ self.data.geom_xmat[geom].reshape(3, 3).T


class LiberoExpert:
    """The expert for one episode: call it once per control step, after the reset, with whatever was observed.

    Make a new one for each episode. It looks at `simulator.env` and ignores the observation.
    """

    def __init__(self, simulator: Any) -> None:
        self._simulator = simulator
        self._actions: Generator[np.ndarray, None, None] | None = None
        self._grip = OPEN

    def __call__(self, observation: Any) -> np.ndarray:
        """Return the action (7,) float32 in [-1, 1] for the state the simulator is in."""
        if self._actions is None:
            self.scene = Scene(self._simulator.env.env)
            self._actions = self._episode()
        return np.clip(next(self._actions), -1.0, 1.0).astype(np.float32)

    # The plan.

    def _episode(self) -> Generator[np.ndarray, None, None]:
        """Achieve the goals in a sensible order, repeatedly as long as one does not hold."""
        order = {"open": 0, "turnon": 1, "turnoff": 1, "on": 2, "in": 2, "up": 2, "close": 3}
        goals = sorted(self.scene.goals, key=lambda goal: order[goal[0].lower()])
        while True:
            goal = next((goal for goal in goals if not self.scene.holds(goal)), None)
            if goal is not None:
                yield from self._achieve(goal)
            yield from self._wait(1)

    def _achieve(self, goal: Goal) -> Skill:
        predicate, name = goal[0].lower(), goal[1]
        if predicate in ("in", "on"):
            return (yield from self._bring(name, goal[2]))
        if predicate == "up":
            return (yield from self._pick(name, lift=0.2))
        joint = self.scene.joint_of(name)
        if joint is None:
            raise ValueError(f"the expert does not know how to reach the goal {goal}.")
        if predicate == "open":
            return (yield from self._pull_drawer(joint))
        if predicate == "close":
            return (yield from self._push_shut(joint))
        return (yield from self._turn_knob(joint, on=predicate == "turnon"))

    # Motions.

    def _towards(self, position: np.ndarray, rotation: np.ndarray, speed: float = 1.0) -> np.ndarray:
        """Return the action (7,) that moves the grip site towards a pose, at most at `speed` (1 is the fastest)."""
        return self._along(position - self.scene.hand, rotation, speed)

    def _along(self, error: np.ndarray, rotation: np.ndarray, speed: float = 1.0) -> np.ndarray:
        """Return the action (7,) that moves the grip site by `error` (3,) and to an orientation."""
        move = GAIN * error / STEP_M
        move = move / max(1.0, float(np.abs(move).max()) / speed)  # shortened, not bent
        turn = TURN_GAIN * rotation_vector(rotation @ self.scene.hand_rotation.T) / STEP_RAD
        turn = turn / max(1.0, float(np.abs(turn).max()) / MAX_TURN)
        return np.concatenate([move, turn, [self._grip]])

    def _move(
        self,
        target: np.ndarray | Callable[[], np.ndarray],
        rotation: np.ndarray,
        *,
        near: float = 0.006,
        near_rad: float = 0.08,
        steps: int = 80,
        speed: float = 1.0,
        patience: int = 10,
        error: Callable[[], np.ndarray] | None = None,
    ) -> Skill:
        """Move the grip site to `target`, or until `error` vanishes, and return whether it got there.

        Gives up after `steps`, or when the distance has not shrunk by a millimetre for `patience` steps.
        """
        best, since = np.inf, 0
        for _ in range(steps):
            if error is not None:
                rest = error()
            else:
                rest = (target() if callable(target) else target) - self.scene.hand
            angle = float(np.linalg.norm(rotation_vector(rotation @ self.scene.hand_rotation.T)))
            distance = float(np.linalg.norm(rest))
            if distance < near and angle < near_rad:
                return True
            left = max(0.0, distance - near) + 0.1 * max(0.0, angle - near_rad)  # 0.1 m per rad
            if left < best - 0.001:
                best, since = left, 0
            else:
                since += 1
            if since >= patience:
                return False
            yield self._along(rest, rotation, speed)
        return False

    def _wait(self, steps: int, rotation: np.ndarray | None = None) -> Skill:
        """Stay where the hand is."""
        position = self.scene.hand
        rotation = self.scene.hand_rotation if rotation is None else rotation
        for _ in range(steps):
            yield self._towards(position, rotation)
        return True

    def _grasp(self, rotation: np.ndarray) -> Skill:
        self._grip = CLOSED
        return (yield from self._wait(CLOSE_STEPS, rotation))

    def _let_go(self, rotation: np.ndarray, back: np.ndarray) -> Skill:
        """Open the fingers and retreat by `back` (3,)."""
        self._grip = OPEN
        yield from self._wait(CLOSE_STEPS - 3, rotation)
        return (yield from self._move(self.scene.hand + back, rotation, near=0.03, near_rad=9.0, steps=30))

    def _go_above(self, target: np.ndarray, rotation: np.ndarray, height: float = 0.0) -> Skill:
        """Move the empty, top-down hand above `target`: up over what is in the way, then across.

        `height` is the least height of the grip site above the target on arrival.
        """
        start = self.scene.hand
        over = highest_along(self.scene.obstacles(), start, target, radius=0.07) + TIP_DEPTH + CLEARANCE
        z = max(over, target[2] + height)
        if start[2] < z - 0.03:
            yield from self._move(np.array([*start[:2], z]), rotation, near=0.03, near_rad=9.0)
        return (yield from self._move(np.array([*target[:2], z]), rotation, near=0.015, near_rad=0.12))

    # Skills.

    def _pick(self, name: str, lift: float = 0.1) -> Skill:
        """Grasp an object from above and lift it; return whether it came along."""
        tried: list[Grasp] = []
        for _ in range(4):
            grasp = self._choose_grasp(name, tried)
            if grasp is None:
                return False
            tried.append(grasp)
            self._grip = OPEN
            yield from self._go_above(grasp.position, grasp.rotation, height=0.06)
            yield from self._move(grasp.position, grasp.rotation, near=0.005, steps=45)
            yield from self._grasp(grasp.rotation)
            before = self.scene.origin(name)[2]
            yield from self._come_out(name, grasp.rotation)
            up = self.scene.hand + np.array([0.0, 0.0, lift])
            yield from self._move(up, grasp.rotation, near=0.02, near_rad=9.0, steps=40)
            if self.scene.origin(name)[2] > before + lift / 2.0:
                return True
            yield from self._let_go(grasp.rotation, np.array([0.0, 0.0, 0.05]))
        return False

    def _come_out(self, name: str, rotation: np.ndarray) -> Skill:
        """Pull the held object sideways from under what hangs over it, e.g. an open drawer."""
        points, others = self.scene.points(name), self.scene.obstacles(name)
        middle = (points[:, :2].max(axis=0) + points[:, :2].min(axis=0)) / 2.0
        radius = float(np.linalg.norm(points[:, :2] - middle, axis=1).max())
        above = others[others[:, 2] > points[:, 2].max() + 0.01]
        shift = shortest_escape(middle, (above[:, :2], radius + 0.005))
        if not shift.any():
            return True
        target = self.scene.hand + np.array([*(shift * (1.0 + 0.02 / np.linalg.norm(shift))), 0.01])
        return (yield from self._move(target, rotation, near=0.01, near_rad=9.0, speed=0.7))

    def _choose_grasp(self, name: str, tried: list[Grasp]) -> Grasp | None:
        """The cheapest grasp that differs from those tried; the cheapest of all if there is none."""
        grasps = plan_grasps(self.scene.points(name), self.scene.obstacles(name), self.scene.base_xy)
        for grasp in grasps:
            if all(
                np.linalg.norm(grasp.position - other.position) > 0.012 or abs(grasp.yaw - other.yaw) > 0.3
                for other in tried
            ):
                return grasp
        return grasps[0] if grasps else None

    def _place(self, name: str, target: np.ndarray, *, over: float = -np.inf, reach: float = 0.005) -> Skill:
        """Carry the held object over (x, y) of `target` (3,) and lower it until its bottom is at its z; let go.

        Args:
            over: the least height of the object's bottom on the way.
            reach: how close the origin must come to (x, y) before it is lowered.
        """
        rotation = self.scene.hand_rotation
        rotation = top_down(float(np.arctan2(rotation[1, 1], rotation[0, 1])))  # upright again, same yaw
        held_at = self.scene.origin(name) - self.scene.hand
        size = self.scene.points(name)[:, :2] - self.scene.origin(name)[:2]
        radius = float(np.linalg.norm(size, axis=1).max()) + 0.015

        def slipped() -> bool:
            return bool(np.linalg.norm(self.scene.origin(name) - self.scene.hand - held_at) > 0.06)

        def error(z: float) -> np.ndarray:
            origin = self.scene.origin(name)
            return np.array([target[0] - origin[0], target[1] - origin[1], z - self.scene.bottom(name)])

        obstacles = self.scene.obstacles(name)
        high = highest_along(obstacles, self.scene.origin(name), target, radius) + CLEARANCE
        high = max(high, over, target[2] + 0.03)
        if self.scene.bottom(name) < high - 0.02:
            rise = self.scene.hand + np.array([0.0, 0.0, high - self.scene.bottom(name)])
            yield from self._move(rise, rotation, near=0.02, near_rad=9.0)
        yield from self._move(
            target, rotation, error=lambda: error(max(high, self.scene.bottom(name))), near=0.02, near_rad=0.2
        )
        yield from self._move(target, rotation, error=lambda: error(high), near=reach + 0.003, near_rad=0.2, steps=30)
        if slipped():
            return False
        yield from self._move(target, rotation, error=lambda: error(target[2]), near=reach, near_rad=0.2, steps=50)
        return (yield from self._let_go(rotation, np.array([0.0, 0.0, 0.10])))

    def _bring(self, name: str, where: str) -> Skill:
        """Make `On name where` or `In name where` true."""
        scene = self.scene
        if scene.is_thing(where):  # on top of an object: a plate, a bowl
            if not (yield from self._pick(name)):
                return False
            return (yield from self._place(name, np.array([*scene.origin(where)[:2], self._floor_of(where)])))
        if scene.parent(where) is None and self._is_flat(name):
            return (yield from self._drag(name, scene.region(where)[0]))
        cavity = scene.cavity(where)
        if cavity is not None:
            return (yield from self._slide_in(name, cavity))
        joint = scene.joint_of(where)
        if joint is not None and abs(scene.joint_value(joint)) < DRAWER_OPEN - 0.03:
            yield from self._park(name, joint)
            yield from self._pull_drawer(joint)
        if not (yield from self._pick(name)):
            return False
        centre, rotation, half = scene.region(where)
        if joint is not None:
            centre = centre + IN_FRONT * scene.opening(joint)
        extent = np.abs(rotation @ half)
        parent = scene.parent(where)
        if joint is not None or (parent is not None and "contain" in where):  # a drawer, a basket, a caddy
            rim = self._rim(where, parent, joint)
            held = scene.hand[2] - scene.bottom(name)
            deepest = centre[2] - extent[2] + 0.005
            z = max(deepest, rim - held + 0.005)  # the palm stays above the rim
            return (yield from self._place(name, np.array([*centre[:2], z]), over=rim + CLEARANCE))
        sharing = [goal[1] for goal in scene.goals if goal[2:] == [where]]
        # Side by side, away from and towards the robot: there, the fingers have room to open sideways.
        centre[0] += (0.5 * (len(sharing) - 1) - sharing.index(name)) * min(APART, 1.6 * extent[0])
        return (yield from self._place(name, np.array([*centre[:2], centre[2] - extent[2]])))

    def _park(self, name: str, joint: int) -> Skill:
        """Pull aside an object that a drawer would hide when pulled out over it.

        Just far enough for the palm to reach its middle; `_come_out` does the rest once it is held.
        """
        scene = self.scene
        points = scene.points(name)
        middle = (points[:, :2].max(axis=0) + points[:, :2].min(axis=0)) / 2.0
        drawer = scene.joint_points(joint) + (DRAWER_OPEN + 0.02) * scene.opening(joint)
        above = (drawer[:, :2], PALM_HALF_WIDTH + 0.01)
        if not shortest_escape(middle, above).any():
            return True
        radius = float(np.linalg.norm(points[:, :2] - middle, axis=1).max())
        others = scene.obstacles(name)
        beside = (others[others[:, 2] < points[:, 2].max() + 0.02][:, :2], radius + 0.01)
        shift = shortest_escape(middle, above, beside)
        return (yield from self._drag(name, scene.origin(name) + np.array([*shift, 0.0])))

    def _slide_in(self, name: str, cavity: Cavity) -> Skill:
        """Grip an object at what sticks out towards the opening, a handle; put it under the roof from the side."""
        scene = self.scene
        inwards = -cavity.out
        lean = axis_rotation(np.cross(inwards, UP), LEAN)  # from pointing down towards inwards
        yaw = self._nearest_yaw(float(np.arctan2(inwards[1], inwards[0])))  # the fingers open sideways
        rotation = lean @ top_down(yaw)
        grasps = plan_grasps(
            scene.points(name) @ lean,  # as seen by a hand that points down
            np.zeros((0, 3)),
            scene.base_xy,
            yaws=[yaw],
            depths=(0.010, 0.018, 0.027),
        )
        if not grasps:
            return False
        position = lean @ grasps[0].position
        backwards = lean @ UP
        self._grip = OPEN
        yield from self._go_above(position + 0.08 * backwards, rotation, height=0.03)
        yield from self._move(position + 0.08 * backwards, rotation, near=0.012, near_rad=0.15)
        yield from self._move(position, rotation, near=0.005, near_rad=0.12, steps=45)
        yield from self._grasp(rotation)
        before = scene.bottom(name)
        side = np.cross(inwards, UP)
        rear = float(max(cavity.low @ inwards, cavity.high @ inwards)) - REAR_GAP

        def error(outside: float, above: float) -> np.ndarray:
            """Way of the object to the middle of the rear wall, `outside` metres before it and `above` the floor."""
            points = scene.points(name)
            middle = (points.max(axis=0) + points.min(axis=0)) / 2.0
            along = rear - outside - float((points @ inwards).max())
            aside = float(((cavity.low + cavity.high) / 2.0 - middle) @ side)
            return along * inwards + aside * side + (cavity.low[2] + above - float(points[:, 2].min())) * UP

        rise = scene.hand + (cavity.low[2] + 0.02 - before) * UP
        yield from self._move(rise, rotation, near=0.012, near_rad=9.0, steps=40)
        if scene.bottom(name) < before + 0.5 * (rise[2] - position[2]):
            yield from self._let_go(rotation, 0.05 * backwards)
            return False
        outside = abs(float((cavity.high - cavity.low) @ inwards)) + 0.01
        for ahead, above, near in ((outside, 0.02, 0.012), (0.0, 0.015, 0.008), (0.0, 0.0, 0.006)):
            way = partial(error, ahead, above)
            yield from self._move(rise, rotation, error=way, near=near, near_rad=0.2, steps=60)
        yield from self._let_go(rotation, 0.12 * cavity.out)
        return (yield from self._move(scene.hand + 0.1 * UP, rotation, near=0.03, near_rad=9.0))

    def _is_flat(self, name: str) -> bool:
        """Whether an object is so flat (a plate) that it would hang down from a grasp at its rim."""
        size = np.ptp(self.scene.points(name), axis=0)
        return bool(size[2] < 0.2 * size[:2].min())

    def _drag(self, name: str, target: np.ndarray) -> Skill:
        """Grip a flat object and drag it over the table, around others, until its origin is over (x, y) of `target`."""
        scene = self.scene
        grasp = self._choose_grasp(name, [])
        if grasp is None:
            return False
        self._grip = OPEN
        yield from self._go_above(grasp.position, grasp.rotation, height=0.06)
        yield from self._move(grasp.position, grasp.rotation, near=0.005, steps=45)
        yield from self._grasp(grasp.rotation)
        start, height = scene.origin(name), scene.hand[2] + 0.004  # eased, so that it does not press on the table
        width = float(np.ptp(scene.points(name)[:, :2], axis=0).max())
        others = scene.obstacles(name)
        low = others[(others[:, 2] > scene.bottom(name)) & (others[:, 2] < scene.top(name) + 0.10)]
        for corner in clear_corners(start[:2], target[:2], low[:, :2], width / 2.0 + 0.01):

            def error(corner: np.ndarray = corner) -> np.ndarray:
                return np.array([*(corner - scene.origin(name)[:2]), height - scene.hand[2]])

            yield from self._move(corner, grasp.rotation, error=error, near=0.01, near_rad=9.0, speed=0.7)
        return (yield from self._let_go(grasp.rotation, np.array([0.0, 0.0, 0.10])))

    def _floor_of(self, name: str) -> float:
        """Height of the surface that carries a thing put into the middle of an object: a plate's or bowl's inside."""
        points, middle = self.scene.points(name), self.scene.origin(name)
        inner = points[np.linalg.norm(points[:, :2] - middle[:2], axis=1) < 0.03]
        return float(inner[:, 2].max()) if len(inner) else self.scene.bottom(name)

    def _rim(self, region: str, parent: str | None, joint: int | None) -> float:
        """Height of the walls around a region that things are put into from above."""
        if joint is not None:
            return float(self.scene.joint_points(joint)[:, 2].max())
        assert parent is not None
        return self.scene.top(parent)

    def _pull_drawer(self, joint: int) -> Skill:
        """Grip a closed drawer's bar with the hand level, and pull it out along its rail."""
        scene = self.scene
        out = scene.opening(joint)
        centres = scene.joint_boxes(joint)
        bar = int(np.argmax(centres @ out))  # the handle is the foremost part
        across = np.cross(np.array([0.0, 0.0, 1.0]), out)  # the hand tilts about this, from pointing down to level
        level = axis_rotation(across, np.pi / 2.0 * 0.96) @ DOWN
        tilted = axis_rotation(across, np.pi / 4.0) @ DOWN

        def handle() -> np.ndarray:
            return scene.joint_boxes(joint)[bar]

        self._grip = OPEN
        start = scene.hand
        if start[2] < handle()[2] + 0.12:
            yield from self._move(np.array([*start[:2], handle()[2] + 0.15]), top_down(0.0), near=0.03, near_rad=9.0)
        before = handle() + 0.10 * out
        yield from self._move(before + np.array([0.0, 0.0, 0.10]), tilted, near=0.03, near_rad=0.3)
        yield from self._move(before, level, near=0.01, near_rad=0.12)
        yield from self._move(lambda: handle() + 0.004 * out, level, near=0.005, near_rad=0.12, steps=40)
        yield from self._grasp(level)
        goal = scene.hand + (DRAWER_OPEN + 0.04 + scene.joint_value(joint)) * out
        yield from self._move(goal, level, near=0.01, near_rad=9.0, speed=0.8)
        yield from self._let_go(level, 0.06 * out)
        yield from self._move(scene.hand + np.array([0.0, 0.0, 0.15]), tilted, near=0.03, near_rad=0.5, steps=40)
        return abs(scene.joint_value(joint)) > DRAWER_OPEN - 0.01

    def _push_shut(self, joint: int) -> Skill:
        """Push what a joint moves back to where the joint is 0: a drawer at its front, a door beside its edge."""
        scene = self.scene
        local = scene.push_point(joint)

        def contact() -> tuple[np.ndarray, np.ndarray]:
            point = scene.carried(joint, local)
            return point, scene.closing(joint, point)

        point, inwards = contact()
        # The fingers' opening is square to the push, so that the narrow side of the palm faces what is behind; in front
        # of a drawer the hand also leans back from the drawers above.
        rotation = top_down(self._nearest_yaw(float(np.arctan2(inwards[1], inwards[0]))))
        if scene.slides(joint):
            rotation = axis_rotation(np.cross(inwards, np.array([0.0, 0.0, 1.0])), np.pi / 5.0) @ rotation
        self._grip = CLOSED
        before = point - 0.06 * inwards
        yield from self._go_above(before, rotation, height=0.10)
        yield from self._move(before, rotation, near=0.012, near_rad=0.15)

        def error() -> np.ndarray:
            """Towards a point 3 cm behind the contact: the hand is always a bit late, and so presses."""
            point, inwards = contact()
            return point + 0.03 * inwards - scene.hand

        yield from self._move(point, rotation, error=error, near=0.001, near_rad=9.0, steps=120, speed=0.6, patience=25)
        return (yield from self._move(scene.hand - 0.06 * contact()[1], rotation, near=0.02, near_rad=9.0, steps=20))

    def _nearest_yaw(self, yaw: float) -> float:
        """The equivalent of a yaw (the gripper is symmetric) within [-π/4, 3π/4), the middle of the wrist's range."""
        return (yaw + np.pi / 4.0) % np.pi - np.pi / 4.0

    def _turn_knob(self, joint: int, on: bool) -> Skill:
        """Grip a knob from above and turn the wrist."""
        scene = self.scene
        points = scene.joint_points(joint)
        ridge = points[points[:, 2] > points[:, 2].max() - 0.012]
        grasps = plan_grasps(ridge, np.zeros((0, 3)), scene.base_xy, depths=(0.010,))
        if not grasps:
            return False
        pivot = scene.joint_anchor(joint)[:2]
        grasp = min(grasps[: len(grasps) // 4 + 1], key=lambda g: float(np.linalg.norm(g.position[:2] - pivot)))
        self._grip = OPEN
        yield from self._go_above(grasp.position, grasp.rotation, height=0.08)
        yield from self._move(grasp.position, grasp.rotation, near=0.005, steps=60, speed=0.5)
        yield from self._grasp(grasp.rotation)
        sign = (1.0 if on else -1.0) * float(np.sign(scene.joint_axis(joint)[2]))
        anchor = scene.hand
        for turned in np.arange(0.1, 1.5, 0.1).tolist():
            yield from self._move(anchor, top_down(grasp.yaw + sign * turned), near=0.02, steps=6)
        return (yield from self._let_go(scene.hand_rotation, np.array([0.0, 0.0, 0.12])))


_UNDER = "the scripted expert puts only things with a handle under a roof that has a floor of its own"


class LiberoExperts(Experts):
    """A scripted expert that looks into the simulator (privileged)."""

    cannot: Mapping[str, str] = {  # of libero_90
        "KITCHEN_SCENE7_open_the_microwave": "the scripted expert opens drawers, not doors",
        "KITCHEN_SCENE9_put_the_frying_pan_under_the_cabinet_shelf": _UNDER,
        "STUDY_SCENE4_pick_up_the_book_in_the_middle_and_place_it_on_the_cabinet_shelf": _UNDER,
        "STUDY_SCENE4_pick_up_the_book_on_the_right_and_place_it_on_the_cabinet_shelf": _UNDER,
        "STUDY_SCENE4_pick_up_the_book_on_the_right_and_place_it_under_the_cabinet_shelf": _UNDER,
    }

    def expert(self, task: str, simulator: Any) -> Expert:
        """Return the expert for one episode of a `LiberoSimulator`."""
        return LiberoExpert(simulator)
