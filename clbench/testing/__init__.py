"""Tests that a plugin's author runs on a new method, and the toy data that they train on (needs pytest)."""

from clbench.testing.algorithms import AlgorithmTests
from clbench.testing.cases import Case
from clbench.testing.plain import PLAIN_SGD, PlainRun
from clbench.testing.same import assert_same_run, files
from clbench.testing.toy import make_toy_data, make_toy_root, toy_config

__all__ = [
    "PLAIN_SGD",
    "AlgorithmTests",
    "Case",
    "PlainRun",
    "assert_same_run",
    "files",
    "make_toy_data",
    "make_toy_root",
    "toy_config",
]
