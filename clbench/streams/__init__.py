"""Task streams: what is learned in which order, from which data, and tested in which simulator."""

from clbench.streams.stream import Task, TaskStream, Visit, build_stream

__all__ = ["Task", "TaskStream", "Visit", "build_stream"]
