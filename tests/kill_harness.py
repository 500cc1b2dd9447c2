"""Trains runs while killing them with SIGKILL, and compares what they leave with runs that never stopped.

    python -m tests.kill_harness PLAN.json

The plan: {"data", "out", "seed", "runs": [{"label", "section" (algorithm), "overrides", "ranks", "kills", "first"}]}.
Imports once and forks for every attempt, so that an attempt costs a second. Half of the kills come at a random moment,
half just before or after one of the calls that make files durable (fsync, rename, truncate, rmtree), in one of `PLACES`
after the other, beginning with the `first`-th. Prints one JSON object: label → {"kills", "in_saving", one for each
place, "resumed_within_a_task", "completed"}.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIGKILLED = -signal.SIGKILL
LIMIT_S = 300.0  # an attempt that takes longer hangs
# What is written, and what the path of a file of it has: the states of pretraining, the base itself, …
PLACES = {"pretraining": ".training", "base": "/bases/", "checkpoint": "/checkpoints/", "state": "/training_state/"}


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    import clbench.testing.toy  # noqa: F401 (imports are done before forking; nothing is computed here, so no thread runs)
    from clbench.testing.same import assert_same_run
    from clbench.training import trainer  # noqa: F401

    if any("zero2" in o for row in plan["runs"] for o in row["overrides"]):
        import deepspeed  # noqa: F401
    found: dict[str, dict[str, int]] = {}
    for row in plan["runs"]:
        label, kills = row["label"], row["kills"]
        rng = random.Random(f"{plan['seed']} {label}")
        run = Run(Path(plan["data"]), Path(plan["out"]), label, row["section"], row["overrides"], row["ranks"])
        assert run.attempt(saving=False) == 0, run.said()
        whole = run.folder.rename(run.folder.with_name("never_stopped"))  # the same path for both: files name the base
        began = time.monotonic()
        assert run.attempt() == 0, run.said()
        seconds, calls = time.monotonic() - began, Counter(run.calls())
        assert_same_run(whole / label, run.folder / label)  # saving changes nothing
        shutil.rmtree(run.folder)
        places = list(PLACES)[row["first"] :] + list(PLACES)[: row["first"]]
        tally = found[label] = dict.fromkeys(["kills", "in_saving", *PLACES, "resumed_within_a_task", "completed"], 0)
        in_saving = True
        while True:
            over = tally["kills"] >= kills
            place = places[tally["in_saving"] % len(places)]  # the same until it was hit
            status = run.attempt(
                at_call=(place, rng.randint(1, calls[place])) if in_saving and not over else None,
                after_s=rng.uniform(0, seconds) if not in_saving and not over else LIMIT_S,
                rng=rng,
            )
            tally["resumed_within_a_task"] += ", phase " in run.said()
            if status == SIGKILLED and not over:
                tally["kills"] += 1
                tally["in_saving"] += in_saving
                tally[place] += in_saving
                in_saving = bool(rng.getrandbits(1))
                continue
            assert status == 0, run.said()
            assert_same_run(whole / label, run.folder / label)
            assert weights(run.folder) == weights(whole)
            left = [p.name for p in run.folder.rglob(".*") if p.suffix in (".partial", ".old", ".training", ".tmp")]
            assert not left, f"left behind: {left}"
            tally["completed"] += 1
            if over:
                break
            shutil.rmtree(run.folder)
        shutil.rmtree(run.folder)
        shutil.rmtree(whole)
    print(json.dumps(found))


def weights(folder: Path) -> dict[str, str]:
    """Name → sha256 of all weights below a folder, the base's among them."""
    found = sorted(folder.rglob("*.safetensors"))
    assert any("bases" in p.parts for p in found)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


class Run:
    """One run of the plan, in folders of its own."""

    def __init__(
        self, data: Path, out: Path, label: str, section: dict[str, Any], overrides: list[str], ranks: int
    ) -> None:
        self.data, self.out, self.label, self.section, self.overrides = data, out, label, section, overrides
        self.ranks, self.folder = ranks, out / "run"

    def attempt(
        self,
        saving: bool = True,
        at_call: tuple[str, int] | None = None,
        after_s: float = LIMIT_S,
        rng: random.Random | None = None,
    ) -> int:
        """Train until the end or a kill; returns the exit status, negative for a signal."""
        from clbench.launch import free_port

        port, first = free_port(), 0 if rng is None else rng.randrange(self.ranks)
        after = rng is not None and bool(rng.getrandbits(1))
        ranks = [
            self._fork(saving, r, port, at_call if r == 0 else None, after) for r in range(self.ranks)
        ]  # rank 0 writes
        deadline = time.monotonic() + after_s
        codes: dict[int, int] = {}
        while len(codes) < self.ranks:
            for pid in ranks:
                if pid not in codes and (done := os.waitpid(pid, os.WNOHANG))[0]:
                    codes[pid] = os.waitstatus_to_exitcode(done[1])
            crashed = [c for c in codes.values() if c not in (0, SIGKILLED)]
            dead = SIGKILLED in codes.values()  # by its own call; or a crash, which is no kill
            if time.monotonic() > deadline or dead or crashed:
                for pid in [ranks[first], *ranks]:
                    if pid not in codes:
                        os.kill(pid, signal.SIGKILL)
                        time.sleep(0 if rng is None or self.ranks == 1 else rng.uniform(0, 0.2))
                        codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            time.sleep(0.005)
        assert after_s < LIMIT_S or time.monotonic() < deadline, f"an attempt hung: {self.said()}"
        return crashed[0] if crashed and not dead else min(codes.values())

    def _fork(self, saving: bool, rank: int, port: int, at_call: tuple[str, int] | None, after: bool) -> int:
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            os.environ["CLBENCH_CACHE_ROOT"] = str(self.folder / "cache")
            if self.ranks > 1:
                world = str(self.ranks)
                os.environ.update(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, CLBENCH_RANKS=world,
                    MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                )  # fmt: skip
            self.out.mkdir(parents=True, exist_ok=True)
            output = os.open(self._output(rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(output, 1)
            os.dup2(output, 2)
            calls = _count_calls(at_call, after)
            from clbench.testing.toy import toy_config
            from clbench.training.trainer import train

            own = [f"output_dir={self.folder}", *self.overrides]
            if saving:
                own.append("train.save_every_steps=1")
            train(toy_config(self.data, self.section, *own), self.label, resume=True)
            if rank == 0:
                (self.out / "calls").write_text(json.dumps(calls))
            status = 0
        except BaseException:  # noqa: BLE001 (the parent prints it)
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    def _output(self, rank: int) -> Path:
        return self.out / f"{rank}.out"

    def said(self) -> str:
        """What the last attempt printed."""
        return "".join(self._output(r).read_text() for r in range(self.ranks))

    def calls(self) -> list[str]:
        """Where the last attempt that ended made files durable, call by call."""
        found: list[str] = json.loads((self.out / "calls").read_text())
        return found


def _count_calls(at: tuple[str, int] | None, after: bool) -> list[str]:
    """Note the place of every call that makes files durable; kill this process before or after the n-th of a place."""
    made: list[str] = []

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{args[0]}") if isinstance(args[0], int) else str(args[0])
            made.append(next((place for place, part in PLACES.items() if part in path), "other"))
            now = at is not None and made[-1] == at[0] and made.count(at[0]) == at[1]
            if now and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if now:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return counted

    for module, name in ((os, "fsync"), (os, "replace"), (os, "ftruncate"), (shutil, "rmtree")):
        setattr(module, name, wrap(getattr(module, name)))
    return made


if __name__ == "__main__":
    main()
