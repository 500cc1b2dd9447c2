"""The scripted LIBERO expert: its geometry everywhere, its skills where LIBERO is installed."""

from types import SimpleNamespace

import numpy as np
import pytest

from clbench.data.experts.libero import CLOSED, OPEN, STEP_M, STEP_RAD, LiberoExpert, Scene
from clbench.data.experts.libero_geometry import (
    DOWN,
    MAX_WIDTH,
    axis_rotation,
    box_points,
    clear_corners,
    collisions,
    cylinder_points,
    distance_to_segment,
    highest_along,
    plan_grasps,
    rotation_vector,
    segments,
    shortest_escape,
    thin_out,
    top_down,
    wrist_collisions,
    yaw_rotation,
)

BASE = np.array([-0.6, 0.0])
NOTHING = np.zeros((0, 3))


def bowl(radius: float, height: float, middle: np.ndarray) -> np.ndarray:
    """Points on an open, straight-walled bowl with a wall of 5 mm, standing at `middle`."""
    walls = [cylinder_points(r, height / 2.0) for r in (radius, radius - 0.005)]
    wall = np.concatenate([w[np.linalg.norm(w[:, :2], axis=1) > radius - 0.0051] for w in walls])
    floor = cylinder_points(radius - 0.006, 0.002) - [0.0, 0.0, height / 2.0 - 0.002]
    return np.concatenate([wall, floor]) + middle


@pytest.mark.parametrize("angle", [0.0, 1e-9, 0.3, 1.5, 3.0, np.pi - 1e-9, np.pi])
def test_the_rotation_vector_undoes_a_rotation(angle: float) -> None:
    for axis in np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.6, 0.0, -0.8], [1.0, 1.0, 1.0] / np.sqrt(3.0)]):
        vector = rotation_vector(axis_rotation(axis, angle))
        assert np.linalg.norm(vector) == pytest.approx(angle, abs=1e-6)
        again = axis_rotation(axis if angle == 0.0 else vector / max(np.linalg.norm(vector), 1e-12), angle)
        assert np.allclose(again, axis_rotation(axis, angle), atol=1e-6)


def test_a_top_down_gripper_points_down_and_opens_along_f() -> None:
    for yaw in np.linspace(-np.pi, np.pi, 7):
        rotation = top_down(yaw)
        assert np.allclose(rotation[:, 0], [-np.sin(yaw), np.cos(yaw), 0.0])
        assert np.allclose(rotation[:, 2], [0.0, 0.0, -1.0])
        assert np.linalg.det(rotation) == pytest.approx(1.0)
        assert np.allclose(yaw_rotation(yaw) @ DOWN, rotation)


def test_points_on_a_box_lie_on_its_surface_close_together() -> None:
    half = np.array([0.03, 0.02, 0.01])
    points = box_points(half, spacing=0.008)
    assert np.allclose(np.abs(points).max(axis=0), half)
    assert np.isclose((half - np.abs(points)).min(axis=1), 0.0).all()
    gaps = np.diff(np.unique(points[:, 0].round(6)))
    assert gaps.max() <= 0.008 + 1e-6


def test_points_on_a_cylinder_lie_on_its_surface() -> None:
    points = cylinder_points(0.03, 0.05)
    radius = np.linalg.norm(points[:, :2], axis=1)
    on_mantle = np.isclose(radius, 0.03)
    on_lid = np.isclose(np.abs(points[:, 2]), 0.05)
    assert (on_mantle | on_lid).all()
    assert radius.max() <= 0.03 + 1e-9


def test_thinning_keeps_one_point_per_cube() -> None:
    rng = np.random.default_rng(0)
    points = rng.uniform(-0.05, 0.05, (5000, 3))
    kept = thin_out(points, 0.02)
    assert len(kept) <= 6**3
    assert {tuple(p) for p in kept} <= {tuple(p) for p in points}


def test_distance_to_a_segment_and_to_a_point() -> None:
    points = np.array([[0.5, 0.2], [-0.3, 0.4], [2.0, 0.0]])
    start, end = np.array([0.0, 0.0]), np.array([1.0, 0.0])
    assert np.allclose(distance_to_segment(points, start, end), [0.2, 0.5, 1.0])
    assert np.allclose(distance_to_segment(points, start, start), np.linalg.norm(points, axis=1))


def test_the_highest_point_along_a_way() -> None:
    points = np.array([[0.5, 0.01, 0.3], [0.5, 0.5, 0.9], [-0.5, 0.0, 0.8]])
    assert highest_along(points, np.zeros(3), np.array([1.0, 0.0, 0.0]), 0.05) == 0.3
    assert highest_along(points, np.zeros(3), np.array([0.1, 0.0, 0.0]), 0.05) == -np.inf
    assert highest_along(NOTHING, np.zeros(3), np.ones(3), 0.05) == -np.inf


def test_values_fall_into_segments_at_gaps() -> None:
    assert segments(np.array([0.3, 0.0, 0.01, 0.32]), 0.05) == [(0.0, 0.01), (0.3, 0.32)]
    assert segments(np.array([0.7]), 0.05) == [(0.7, 0.7)]
    assert segments(np.zeros(0), 0.05) == []


def test_the_open_gripper_collides_where_fingers_and_palm_are() -> None:
    u = np.array([0.0, 0.05, -0.05, 0.05, 0.05, 0.0, 0.2])
    v = np.array([0.0, 0.0, 0.0, 0.03, 0.0, 0.02, 0.0])
    z = np.array([0.0, 0.0, 0.0, 0.0, -0.05, 0.05, 0.05])
    hit = [collisions(u[i : i + 1], v[i : i + 1], z[i : i + 1]) for i in range(len(u))]
    assert hit == [0, 1, 1, 0, 0, 1, 0]


@pytest.mark.parametrize("yaw", [0.0, 0.4, -0.7])
def test_a_box_is_grasped_across_its_narrow_side_through_its_middle(yaw: float) -> None:
    middle = np.array([0.1, -0.05, 0.93])
    half = np.array([0.05, 0.02, 0.03])
    points = box_points(half, 0.006) @ yaw_rotation(yaw).T + middle
    grasp = plan_grasps(points, NOTHING, BASE)[0]
    off = (grasp.yaw - yaw + np.pi / 2) % np.pi - np.pi / 2  # fingers open along the box's y axis
    assert abs(off) < np.deg2rad(11)
    assert np.linalg.norm(grasp.position[:2] - middle[:2]) < 0.01
    assert 0.035 < grasp.width < 0.055
    assert middle[2] < grasp.position[2] < middle[2] + 0.03


def test_what_is_too_wide_has_no_grasp() -> None:
    assert plan_grasps(box_points(np.array([0.08, 0.08, 0.03])), NOTHING, BASE) == []


def test_a_bowl_is_grasped_at_its_wall_square_to_it() -> None:
    middle = np.array([0.0, 0.1, 0.93])
    grasp = plan_grasps(bowl(0.075, 0.06, middle), NOTHING, BASE)[0]
    radial = grasp.position[:2] - middle[:2]
    assert np.linalg.norm(radial) == pytest.approx(0.0725, abs=0.006)
    opening = np.array([-np.sin(grasp.yaw), np.cos(grasp.yaw)])
    assert abs(radial @ opening) / np.linalg.norm(radial) > np.cos(np.deg2rad(15))
    assert grasp.width < 0.03


def test_a_grasp_keeps_away_from_obstacles() -> None:
    middle = np.array([0.0, 0.0, 0.93])
    points = bowl(0.075, 0.06, middle)
    free = plan_grasps(points, NOTHING, BASE)[0]
    direction = (free.position - middle) / np.linalg.norm(free.position[:2] - middle[:2])
    wall = box_points(np.array([0.06, 0.06, 0.15])) + middle + 0.145 * np.array([*direction[:2], 0.0])
    beside = plan_grasps(points, wall, BASE)[0]
    assert np.linalg.norm(beside.position - free.position) > 0.04
    opening, across = top_down(beside.yaw)[:, 0], top_down(beside.yaw)[:, 1]
    rest = wall - beside.position
    assert collisions(rest @ opening, rest @ across, rest[:, 2]) == 0


def test_no_grasp_is_wider_than_the_gripper() -> None:
    grasps = plan_grasps(cylinder_points(0.03, 0.05), NOTHING, BASE)
    assert grasps
    assert all(grasp.width <= MAX_WIDTH for grasp in grasps)
    assert [grasp.cost for grasp in grasps] == sorted(grasp.cost for grasp in grasps)


def test_the_wrist_is_above_and_behind_the_hand() -> None:
    to_base = np.array([-2.0, 0.0])
    for point, hit in [([-0.1, 0.0, 0.15], 1), ([0.1, 0.0, 0.15], 0), ([-0.1, 0.0, 0.05], 0), ([-0.1, 0.1, 0.15], 0)]:
        assert wrist_collisions(np.array([point]), to_base) == hit


def test_a_way_turns_where_the_straight_one_is_blocked() -> None:
    start, end = np.array([0.0, 0.0]), np.array([0.2, 0.3])
    assert [list(c) for c in clear_corners(start, end, np.zeros((0, 2)), 0.05)] == [[0.2, 0.3]]
    beside_x = np.array([[0.1, 0.15], [0.15, 0.02]])  # blocks the straight way, and x before y
    assert [list(c) for c in clear_corners(start, end, beside_x, 0.05)] == [[0.0, 0.3], [0.2, 0.3]]
    everywhere = np.array([[0.1, 0.15], [0.1, 0.0], [0.0, 0.15]])
    assert clear_corners(start, end, everywhere, 0.05)[-1] is end


def test_the_shortest_escape_is_away_from_the_others() -> None:
    middle = np.array([0.1, 0.1])
    assert not shortest_escape(middle).any()
    assert not shortest_escape(middle, (np.zeros((0, 2)), 0.05)).any()
    assert not shortest_escape(middle, (np.array([[0.2, 0.1]]), 0.05)).any()
    near = (np.array([[0.12, 0.1]]), 0.05)
    assert np.allclose(shortest_escape(middle, near), [-0.04, 0.0])  # of the shifts of 4 cm, the one with most room
    grid = np.stack(np.meshgrid(np.arange(-0.3, 0.6, 0.02), np.arange(-0.3, 0.6, 0.02)), -1).reshape(-1, 2)
    assert not shortest_escape(middle, (grid, 0.05)).any()  # nowhere to go


def test_the_shortest_escape_keeps_a_distance_of_its_own_from_each_set() -> None:
    middle = np.array([0.1, 0.1])
    above, beside = np.array([[0.12, 0.1]]), np.array([[0.0, 0.1]])
    shift = shortest_escape(middle, (above, 0.03), (beside, 0.08))
    spot = middle + shift
    assert np.linalg.norm(spot - above[0]) > 0.03
    assert np.linalg.norm(spot - beside[0]) > 0.08
    assert np.linalg.norm(shift) < 0.05


class FreeHand:
    """A hand without a robot: each action moves it by a third of what it asks for, as the real controller does."""

    def __init__(self) -> None:
        self.hand, self.hand_rotation = np.array([0.1, 0.2, 1.2]), top_down(0.7)

    def apply(self, action: np.ndarray) -> None:
        turn = action[3:6] * STEP_RAD / 3.0
        angle = float(np.linalg.norm(turn))
        self.hand = self.hand + action[:3] * STEP_M / 3.0
        if angle > 0.0:
            self.hand_rotation = axis_rotation(turn / angle, angle) @ self.hand_rotation


def free_expert() -> tuple[LiberoExpert, FreeHand]:
    expert, scene = LiberoExpert(SimpleNamespace()), FreeHand()
    expert.scene = scene  # type: ignore[assignment]
    return expert, scene


def test_a_motion_arrives_in_spite_of_noise_and_stays_within_the_actions_range() -> None:
    expert, scene = free_expert()
    rng = np.random.default_rng(0)
    target, rotation = np.array([-0.1, 0.0, 1.0]), top_down(-0.5)
    motion = expert._move(target, rotation, near=0.006, near_rad=0.08)
    for steps in range(80):  # noqa: B007
        try:
            action = next(motion)
        except StopIteration as end:
            assert end.value is True
            break
        assert np.abs(action).max() <= 1.0
        assert action[6] == OPEN
        scene.apply(np.clip(action + rng.normal(0.0, 0.1, 7), -1.0, 1.0))
    assert steps < 50
    assert np.linalg.norm(scene.hand - target) < 0.006


def test_a_motion_that_is_stuck_gives_up() -> None:
    expert, _ = free_expert()
    motion = expert._move(np.array([0.5, 0.5, 1.0]), top_down(0.0), steps=80, patience=10)
    with pytest.raises(StopIteration) as end:
        for _ in range(40):
            next(motion)  # nothing moves
    assert end.value.value is False


def test_actions_follow_the_present_state_not_a_plan() -> None:
    expert, scene = free_expert()
    motion = expert._move(np.array([0.1, 0.2, 1.0]), top_down(0.7))
    assert next(motion)[2] < 0.0
    scene.hand = np.array([0.1, 0.2, 0.8])  # pushed below the target
    assert next(motion)[2] > 0.0


def test_grasping_closes_the_fingers_and_holds_still() -> None:
    expert, scene = free_expert()
    actions = list(expert._grasp(scene.hand_rotation))
    assert all(action[6] == CLOSED for action in actions)
    assert np.allclose([action[:6] for action in actions], 0.0)


@pytest.mark.libero
@pytest.mark.parametrize(
    ("suite", "index"),
    [
        ("libero_goal", 0),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("libero_object", 0), ("libero_spatial", 5), ("libero_goal", 3), ("libero_goal", 5), ("libero_10", 3),
                ("libero_10", 9),
            )
        ),
    ],
)  # fmt: skip
def test_the_expert_reaches_the_goal_in_spite_of_noise(suite: str, index: int) -> None:
    from clbench.data.make import run_episode
    from clbench.envs.libero.tasks import MAX_STEPS, suite_tasks
    from clbench.envs.making import make_simulator

    simulator = make_simulator({"type": "libero_state", "task": suite_tasks(suite)[index]})
    try:
        expert = LiberoExpert(simulator)
        _, actions, success = run_episode(simulator, expert, 0, MAX_STEPS[suite], 0, 0.1, np.random.default_rng(0))
    finally:
        simulator.close()
    assert success
    assert np.abs(actions).max() <= 1.0


@pytest.mark.libero
@pytest.mark.slow
def test_only_what_is_under_a_roof_is_put_in_from_the_side() -> None:
    from clbench.envs.libero.tasks import suite_tasks
    from clbench.envs.making import make_simulator

    microwave = "KITCHEN_SCENE6_put_the_yellow_and_white_mug_in_the_microwave_and_close_it"
    open_above = [("libero_object", 0), ("libero_goal", 1), ("libero_goal", 3), ("libero_goal", 9), ("libero_10", 5)]
    for task in [microwave, *(suite_tasks(suite)[index] for suite, index in open_above)]:
        simulator = make_simulator({"type": "libero_state", "task": task})
        try:
            simulator.reset(0)
            scene = Scene(simulator.env.env)
            region = next(goal[2] for goal in scene.goals if goal[0] in ("in", "on"))
            cavity = scene.cavity(region)
            centre = scene.region(region)[0]
        finally:
            simulator.close()
        if task != microwave:
            assert cavity is None, task
            continue
        assert cavity is not None
        assert np.allclose(cavity.out, [0.0, -1.0, 0.0])  # its door is on the robot's right
        assert (cavity.low < centre).all() and (centre < cavity.high).all()
        assert np.allclose(cavity.high - cavity.low, [0.207, 0.154, 0.144], atol=0.003)
