"""One registry for what a configuration names: algorithms, and through LeRobot the policies.

Third parties add an algorithm without touching this package: an installed distribution declares

    [project.entry-points."clbench.algorithms"]
    my_algo = "my_package.my_module:MyAlgorithm"

and `--algo my_algo` finds it. Listing names imports nothing heavy.
"""

from __future__ import annotations

import importlib
from importlib.metadata import EntryPoint, entry_points

from clbench.errors import UserError, nearest

ENTRY_POINTS = "clbench.algorithms"

ALGORITHMS: dict[str, str] = {
    "seqfft": "clbench.algorithms.seqfft:SeqFFT",
    "seqlora": "clbench.algorithms.seqlora:SeqLoRA",
    "er": "clbench.algorithms.er:ER",
    "mir": "clbench.algorithms.mir:MIR",
    "ewc": "clbench.algorithms.ewc:EWC",
    "packnet": "clbench.algorithms.packnet:PackNet",
    "clare": "clbench.algorithms.clare:CLARE",
    "multitask": "clbench.algorithms.multitask:Multitask",
    "singletask": "clbench.algorithms.singletask:SingleTask",
}


def third_party() -> dict[str, EntryPoint]:
    """Entry points of installed distributions, by name. A name that is already taken is an error."""
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=ENTRY_POINTS):
        if point.name in ALGORITHMS or (point.name in found and found[point.name].value != point.value):
            raise UserError(f"the algorithm name '{point.name}' of {point.value} is already taken; rename it.")
        found[point.name] = point
    return found


def algorithm_names() -> list[str]:
    """Every name that `--algo` takes."""
    return sorted([*ALGORITHMS, *third_party()])


def algorithm_class(name: str) -> type:
    """Import and return the algorithm class behind a name."""
    if name in ALGORITHMS:
        module, _, attribute = ALGORITHMS[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    points = third_party()
    if name not in points:
        raise UserError(f"unknown algorithm '{name}'.{nearest(name, algorithm_names())}")
    try:
        return points[name].load()
    except (ImportError, AttributeError) as e:
        raise UserError(f"the algorithm '{name}' ({points[name].value}) cannot be imported: {e}") from e
