"""Whether two runs left the same: see clbench.testing.same."""

from clbench.testing.same import TIMES, assert_same_run, events, files

__all__ = ["TIMES", "assert_same_run", "events", "files"]
