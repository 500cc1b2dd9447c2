"""A simulator type with LIBERO's tasks, a state and two cameras, for tests of data. It cannot be stepped."""

from clbench.envs.base import SimulatorFamily
from clbench.envs.libero import tasks as table


class CameraTasks(SimulatorFamily):
    """LIBERO's tasks without LIBERO."""

    fps, robot_type, state_dim, action_dim, max_steps = 20, "panda", 8, 7, 1000
    gripper_opens = -1.0
    cameras = {"observation.images.image": "agentview", "observation.images.image2": "robot0_eye_in_hand"}  # noqa: RUF012

    def tasks(self) -> list[str]:
        return table.task_names()

    def instruction(self, task: str) -> str:
        return table.task_instruction(task)

    def suite_of(self, task: str) -> str:
        return table.suite_of(task)
