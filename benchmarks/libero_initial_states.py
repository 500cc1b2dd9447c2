"""Where everything lies when an episode of LIBERO begins, and how two MuJoCo versions differ in that.

LIBERO's published initial states are taken a moment before things come to rest, so the physics has a part in them.
The first command, in one environment per version, keeps the poses at the beginning of episodes; the second prints for
each task what differs most. Needs LIBERO and its assets.

    python benchmarks/libero_initial_states.py --states 3 --json FILE
    python benchmarks/libero_initial_states.py --compare A B
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from common import run

from clbench.envs.base import EVAL_SEED_BASE
from clbench.envs.libero.tasks import suite_tasks
from clbench.envs.making import check_this_python, make_simulator, simulator_versions
from clbench.errors import UserError
from clbench.io import read_json, write_json

SUITES = ["libero_spatial", "libero_goal", "libero_object", "libero_10"]
FAR_MM = 10.0


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--suites", nargs="+", default=SUITES, help=f"suites (default {' '.join(SUITES)})")
    p.add_argument("--tasks", nargs="+", type=int, help="numbers of tasks within each suite (default all)")
    p.add_argument("--states", type=int, default=3, help="published states of each task (default 3)")
    p.add_argument("--json", type=Path, metavar="FILE", help="where the poses go")
    p.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"), help="print how two such files differ")
    args = p.parse_args()
    if (args.json is None) == (args.compare is None):
        p.error("either --json or --compare is needed.")
    return args


def poses(task: str, states: int) -> dict[str, list[list[float]]]:
    """Return for each object and fixture its pose at the beginning of each episode: xyz (m), quaternion wxyz."""
    simulator: Any = make_simulator({"type": "libero_state", "task": task})
    found: dict[str, list[list[float]]] = {}
    try:
        for state in range(states):
            simulator.reset(EVAL_SEED_BASE + state)
            data = simulator.env.sim.data
            for name, body in simulator.env.env.obj_body_id.items():
                found.setdefault(name, []).append([*data.body_xpos[body].tolist(), *data.body_xquat[body].tolist()])
    finally:
        simulator.close()
    return found


def measure(path: Path, suites: list[str], tasks: list[int] | None, states: int) -> None:
    check_this_python("libero_state")
    figures: dict[str, Any] = {"versions": simulator_versions("libero_state"), "states": states, "tasks": {}}
    for suite in suites:
        names = suite_tasks(suite)
        for index in range(len(names)) if tasks is None else tasks:
            task = names[index]
            figures["tasks"][task] = {"suite": suite, "index": index, "poses": poses(task, states)}
            write_json(path, figures, indent=None)
            print(f"{suite} {index} {task}", flush=True)


def compare(first: Path, second: Path) -> None:
    a, b = read_json(first), read_json(second)
    if a["states"] != b["states"]:
        raise UserError(f"{first} has {a['states']} states per task and {second} {b['states']}; keep as many of both.")
    print(f"A: MuJoCo {a['versions']['mujoco']}, B: MuJoCo {b['versions']['mujoco']}; {a['states']} states per task\n")
    print(f"| suite | # | task | furthest apart | mm | degrees | states with more than {FAR_MM:.0f} mm |")
    print("|---|---|---|---|---|---|---|")
    for task, row in a["tasks"].items():
        if task not in b["tasks"]:
            continue
        worst, far = (0.0, 0.0, "-"), np.zeros(a["states"], dtype=bool)
        for name, one in row["poses"].items():
            p, q = np.array(one), np.array(b["tasks"][task]["poses"][name])
            distances = 1000.0 * np.linalg.norm(p[:, :3] - q[:, :3], axis=1)
            far |= distances > FAR_MM
            cosine = np.clip(np.abs((p[:, 3:] * q[:, 3:]).sum(axis=1)), 0.0, 1.0)
            worst = max(worst, (float(distances.max()), float(np.degrees(2.0 * np.arccos(cosine)).max()), name))
        states = "all" if far.all() else ", ".join(str(k) for k in np.flatnonzero(far)) or "-"
        print(f"| {row['suite']} | {row['index']} | {task} | {worst[2]} | {worst[0]:.1f} | {worst[1]:.1f} | {states} |")


def main() -> None:
    args = arguments()
    if args.compare is not None:
        compare(*args.compare)
    else:
        measure(args.json, args.suites, args.tasks, args.states)


if __name__ == "__main__":
    run(main)
