"""The toy data and configuration of clbench.testing, where this suite imports them from."""

from clbench.testing.toy import PRETRAIN, STREAM, TASKS, make_toy_data, make_toy_root, toy_config

__all__ = ["PRETRAIN", "STREAM", "TASKS", "make_toy_data", "make_toy_root", "toy_config"]
