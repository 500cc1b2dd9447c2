"""clbench: continual learning of robot policies, measured in simulators."""

__version__ = "0.1.0"
