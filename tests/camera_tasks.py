"""A simulator type with LIBERO's tasks, a state and two cameras, for tests of data. It cannot be stepped."""

from clbench.envs.libero.tasks import suite_of, task_instruction, task_names

FPS, ROBOT_TYPE, STATE_DIM, ACTION_DIM, MAX_STEPS = 20, "panda", 8, 7, 1000
GRIPPER_OPENS = -1.0
CAMERAS = {"observation.images.image": "agentview", "observation.images.image2": "robot0_eye_in_hand"}

tasks, instruction = task_names, task_instruction

__all__ = ["suite_of"]
