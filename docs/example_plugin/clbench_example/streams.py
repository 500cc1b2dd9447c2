"""A stream defined in code."""


def points_reversed():
    """The points' two tasks, the right one first."""
    return {
        "dataset": {
            "name": "example_points_reversed",
            "data": "example_points",
            "env": {"type": "example_point", "max_steps": 50},
            "tasks": ["go-right", "go-left"],
        }
    }
