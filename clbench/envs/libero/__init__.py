"""LIBERO: the simulator on states, the same with camera images, its tasks and its assets."""
