"""What goes wrong while a run trains: damaged states, full disks, NaNs, signals, two writers, dying loaders."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from clbench.algorithms.hooks import CLAlgorithm, Context
from clbench.checkpoints.run_folder import checkpoint_folder
from clbench.checkpoints.training_state import StateKeeper
from clbench.checkpoints.whole import damage, write_whole
from clbench.config.schema import LogConfig, WandbConfig
from clbench.data.frames import StreamFrames, load_batches
from clbench.errors import RESUME_EXIT, Interrupted, UserError
from clbench.io import read_json, read_jsonl
from clbench.lock import held
from clbench.policies.view import PolicyView
from clbench.processes import start_command
from clbench.registry import ALGORITHMS
from clbench.stopping import Stop
from clbench.testing.same import assert_same_run, files
from clbench.testing.toy import STREAM, make_toy_data, toy_config
from clbench.training.log import RunLog
from clbench.training.trainer import train
from tests.algorithm_cases import SMALL_MIR
from tests.children import Process
from tests.test_ranks import toy_arguments

ROOT = Path(__file__).resolve().parents[1]
SLOW = pytest.mark.slow
STEPS = ("train.steps=6", "train.save_every_steps=2", "dataset.task_order=[0,1]")


# ---------------------------------------------------------------------------------------------- damaged states


@pytest.fixture(scope="module")
def stopped(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished run, and one that was stopped in the middle of its second task with two states."""
    out = tmp_path_factory.mktemp("stopped")
    section = {"name": "er", "buffer_size_per_task": 10}
    whole = train(toy_config(toy_data, section, f"output_dir={out}/whole", *STEPS), "r")
    with pytest.MonkeyPatch.context() as patch:
        asked = iter([""] * 10 + ["a test"] * 9)
        patch.setattr(Stop, "reason", property(lambda self: next(asked)))
        with pytest.raises(Interrupted, match="in task 2, phase train, after step 4"):
            train(toy_config(toy_data, section, f"output_dir={out}/part", *STEPS), "r")
    return whole, out / "part" / "r"


def resumed(toy_data: Path, part: Path, to: Path) -> Path:
    """A copy of the stopped run, to be damaged and resumed."""
    shutil.copytree(part, to / "r")
    return to / "r"


def go_on(toy_data: Path, to: Path, **kwargs: Any) -> Path:
    section = {"name": "er", "buffer_size_per_task": 10}
    return train(toy_config(toy_data, section, f"output_dir={to}", *STEPS), "r", resume=True, **kwargs)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, Callable[[Path], None]] = {"flipped": flip, "cut": cut, "missing": lambda p: p.unlink()}


@pytest.mark.parametrize("how", DAMAGES)
def test_every_damage_of_a_state_is_noticed(stopped: tuple[Path, Path], tmp_path: Path, how: str) -> None:
    state = stopped[1] / "training_state" / "01-train-000004"
    names = sorted(str(p.relative_to(state)) for p in state.rglob("*") if p.is_file())
    assert len(names) >= 9
    assert damage(state) is None
    for name in names:
        copy = tmp_path / "state"
        shutil.copytree(state, copy)
        DAMAGES[how](copy / name)
        assert damage(copy) is not None, name
        shutil.rmtree(copy)
    shutil.copytree(state, copy)
    (copy / "policy" / "more.json").write_text("{}")
    assert "more.json does not belong there" in str(damage(copy))


@pytest.mark.parametrize(("name", "how"), [("policy/model.safetensors", "flipped"), ("training.safetensors", "cut"),
                                           ("checkpoint.json", "missing"), ("algorithm.json", "flipped")])  # fmt: skip
def test_a_damaged_newest_state_is_named_and_the_one_before_is_used(
    stopped: tuple[Path, Path], toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, how: str
) -> None:
    run = resumed(toy_data, stopped[1], tmp_path)
    DAMAGES[how](run / "training_state" / "01-train-000004" / name)
    assert_same_run(stopped[0], go_on(toy_data, tmp_path))
    said = capsys.readouterr().err
    assert f"01-train-000004 is damaged ({'' if how == 'missing' else name}" in said
    assert "in task 2 of 2, phase train, after step 2" in said


def test_both_states_damaged_the_last_checkpoint_is_used(
    stopped: tuple[Path, Path], toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = resumed(toy_data, stopped[1], tmp_path)
    for state in (run / "training_state").glob("01-*"):
        flip(state / "training.safetensors")
    assert_same_run(stopped[0], go_on(toy_data, tmp_path))
    assert "resuming run 'r' after task 1 of 2" in capsys.readouterr().err


def test_a_torn_or_missing_pointer_to_the_newest_state(stopped: tuple[Path, Path], tmp_path: Path) -> None:
    copy = tmp_path / "training_state"
    shutil.copytree(stopped[1] / "training_state", copy)
    keeper = StateKeeper(tmp_path, None, None)
    for content in (b"01-train-000004\n", b"01-tr", b"\xff\xfe", b"../../etc", None):
        (copy / "LATEST").unlink()
        if content is not None:
            (copy / "LATEST").write_bytes(content)
        position = keeper.newest(1)
        assert position is not None and (position.phase, position.step) == ("train", 4)
        (copy / "LATEST").touch()


def test_a_damaged_checkpoint_is_made_again_or_named(
    stopped: tuple[Path, Path], toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(stopped[0], tmp_path / "r")
    flip(checkpoint_folder(tmp_path / "r", 1) / "algorithm.safetensors")
    assert_same_run(stopped[0], go_on(toy_data, tmp_path))
    assert "task_01 is damaged (algorithm.safetensors was changed); it will be made again" in capsys.readouterr().err
    flip(checkpoint_folder(tmp_path / "r", 0) / "policy" / "model.safetensors")
    with pytest.raises(UserError, match=r"task_00 is damaged .policy/model.safetensors was changed.*later tasks"):
        go_on(toy_data, tmp_path)


def test_a_damaged_last_checkpoint_is_made_again_though_a_later_state_is_whole(
    stopped: tuple[Path, Path], toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = resumed(toy_data, stopped[1], tmp_path)
    flip(checkpoint_folder(run, 0) / "algorithm.safetensors")
    assert_same_run(stopped[0], go_on(toy_data, tmp_path))
    said = capsys.readouterr().err
    assert "task_00 is damaged" in said and "from the start" in said
    assert damage(checkpoint_folder(run, 0)) is None


@pytest.mark.parametrize("end", [b"", b'{"event": "run_', b'{"event": "run_end", "seconds": 1.0}'])
def test_killed_after_its_last_checkpoint(
    stopped: tuple[Path, Path], toy_data: Path, tmp_path: Path, end: bytes
) -> None:
    """The last event is written again, whatever there is of it."""
    shutil.copytree(stopped[0], tmp_path / "r")
    log = tmp_path / "r" / "log.jsonl"
    log.write_bytes(
        log.read_bytes()[: read_json(checkpoint_folder(tmp_path / "r", 1) / "checkpoint.json")["log_bytes"]]
    )
    with log.open("ab") as f:
        f.write(end)
    assert_same_run(stopped[0], go_on(toy_data, tmp_path))


def test_what_kills_leave_is_cleared_away(stopped: tuple[Path, Path], toy_data: Path, tmp_path: Path) -> None:
    run = resumed(toy_data, stopped[1], tmp_path)
    leftovers = [
        run / "training_state" / ".01-train-000005.partial" / "policy",
        run / "checkpoints" / ".task_01.partial",
    ]
    for folder in leftovers:
        folder.mkdir(parents=True)
    (run / ".manifest.json.abc.tmp").write_text("half")
    go_on(toy_data, tmp_path)
    assert not [p for p in run.rglob(".*") if p.name != ".training.lock"]


def test_a_state_that_cannot_be_read_is_damaged(
    stopped: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import clbench.checkpoints.whole as module

    def broken(path: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(module, "sha256", broken)
    assert "cannot be read: Input/output error" in str(damage(stopped[1] / "training_state" / "01-train-000004"))


def test_a_state_made_elsewhere_by_hand_is_refused(tmp_path: Path) -> None:
    """A description that is sealed but is no training state's."""
    write_whole(tmp_path / "training_state" / "x", lambda f: {"k": "../..", "phase": 3}, lambda: 0)
    assert StateKeeper(tmp_path, None, None).newest(0) is None


@pytest.mark.parametrize(
    ("section", "own"),
    [
        pytest.param({"name": "seqfft"}, ["train.optimizer_across_tasks=carried"], marks=SLOW),
        pytest.param({"name": "multitask"}, ["lora.enabled=true", "lora.dropout=0.3", "lora.rank=2"], marks=SLOW),
        ({"name": "mir", **SMALL_MIR, "mir_refresh_interval": 3}, ["train.gradient_accumulation=2"]),
        pytest.param(
            {"name": "ewc", "ewc_lambda": 10.0, "fisher_batches": 2}, ["train.mixed_precision=bf16"], marks=SLOW
        ),
    ],
    ids=["carried", "dropout", "accumulation", "bf16"],
)
def test_stopped_again_and_again_with_other_settings(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: dict[str, Any], own: list[str]
) -> None:
    whole = train(toy_config(toy_data, section, f"output_dir={tmp_path}/whole", *own), "r")
    asked = itertools.cycle([*[""] * 4, "a test"])
    monkeypatch.setattr(Stop, "reason", property(lambda self: next(asked)))
    stops = 0
    while True:
        try:
            part = train(toy_config(toy_data, section, f"output_dir={tmp_path}/part", *own), "r", resume=True)
            break
        except Interrupted:
            stops += 1
    assert stops
    assert_same_run(whole, part)


# ---------------------------------------------------------------------------------------------- what may change


def test_changes_are_refused_allowed_and_recorded(
    stopped: tuple[Path, Path], toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = resumed(toy_data, stopped[1], tmp_path)
    section = {"name": "er", "buffer_size_per_task": 10}
    changed = toy_config(
        toy_data, section, f"output_dir={tmp_path}", *STEPS, "train.optimizer.lr=0.5", "train.threads=2"
    )
    with pytest.raises(UserError, match=r"train\.optimizer\.lr \(was 0\.001, is 0\.5\)") as refused:
        train(changed, "r", resume=True)
    assert "train.threads" not in str(refused.value)
    with pytest.raises(
        UserError,
        match=r"--allow-change train\.optimiser\.lr: no such key.*Did you mean 'train\.optimizer\.lr'",
    ):
        train(changed, "r", resume=True, allow_change=["train.optimiser.lr"])
    asked = iter([""] + ["a test"] * 2)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Stop, "reason", property(lambda self: next(asked)))
        train(changed, "r", resume=True, allow_change=["train.optimizer.lr"])
    train(changed, "r", resume=True, allow_change=["train.optimizer.lr"])  # a scheduler gives the same command again
    first, second, third = read_json(run / "manifest.json")["sessions"]
    assert first["changed"] == {} and (first["k"], first["step"]) == (0, 0)
    assert second["changed"]["train.optimizer.lr"] == [0.001, 0.5]
    assert second["changed"]["train.threads"] == [1, 2]
    assert (second["k"], second["phase"], second["step"]) == (1, "train", 4)
    assert third["changed"] == {} and (third["k"], third["step"]) == (1, 6)
    with pytest.raises(UserError, match=r"is complete: nothing is left to train with another train\.optimizer\.lr"):
        changed.train.optimizer.lr = 0.1
        train(changed, "r", resume=True, allow_change=["train.optimizer.lr"])


# ---------------------------------------------------------------------------------------------- one writer


def test_two_trainings_cannot_write_one_run(stopped: tuple[Path, Path], toy_data: Path, tmp_path: Path) -> None:
    run = resumed(toy_data, stopped[1], tmp_path)
    before = files(run)
    code = f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from clbench.lock import held\n"
    code += f"with held({str(run)!r}, 'training'): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"(?s)in use by another training: process {other.pid} .*kill {other.pid}"):
            go_on(toy_data, tmp_path)
        other.kill()
    assert {k: v for k, v in files(run).items() if ".lock" not in k} == before
    with held(run, "evaluation"):  # an evaluation beside a training is fine
        assert_same_run(stopped[0], go_on(toy_data, tmp_path))


# ---------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=SLOW), signal.SIGINT])
def test_a_signal_saves_and_asks_to_be_resumed(toy_data: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Through the command line, with two ranks for one of the signals."""
    ranks = ["--nproc", "2"] if number == signal.SIGTERM else []
    more = ("train.steps=100000", "train.save_every_minutes=null")
    printed = tmp_path / "printed.txt"
    with printed.open("ab") as out:
        arguments = ["train", "--algo", "er", "--run-id", "r", *ranks, "--", *toy_arguments(toy_data, tmp_path, *more)]
        process = start_command(arguments, log=out)
    log = tmp_path / "r" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and b'"step"' in log.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    if process.wait(120) is None:
        process.kill()
    said = printed.read_text()
    assert process.returncode == RESUME_EXIT, said
    last = said.strip().splitlines()[-1]
    assert f"stopped by {number.name} in task 1, phase train, after step" in last
    assert last.endswith(f"clbench train --resume {tmp_path / 'r'}" + (" --nproc 2" if ranks else ""))
    state = (tmp_path / "r" / "training_state" / "LATEST").read_text().strip()
    assert damage(tmp_path / "r" / "training_state" / state) is None
    assert not (tmp_path / "r" / ".training.lock").exists()


# ---------------------------------------------------------------------------------------------- disks


def go_on_with_small_files(toy_data: Path, out: Path) -> None:
    """In a process of its own: files may have 40 kB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
    try:
        go_on(toy_data, out)
    except UserError as e:
        print(e)
        sys.exit(2)


def test_a_full_disk_ends_the_run_with_its_states_whole(
    stopped: tuple[Path, Path], toy_data: Path, tmp_path: Path
) -> None:
    """A limit on the size of files stands for the full disk: writing past it fails in the middle of a file."""
    run = resumed(toy_data, stopped[1], tmp_path)
    before = files(run / "training_state")
    process = Process(tmp_path / "printed.txt", go_on_with_small_files, toy_data, tmp_path)
    said = process.finish(120)
    assert process.returncode == 2, said
    assert "cannot save" in said and "bytes" in said and "--resume" in said
    assert "needs about" in said
    assert files(run / "training_state") == before
    assert_same_run(stopped[0], go_on(toy_data, tmp_path))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    def fill(content: str) -> Callable[[Path], dict[str, Any]]:
        def write(folder: Path) -> dict[str, Any]:
            (folder / "a").write_text(content)
            return {}

        return write

    write_whole(tmp_path / "state", fill("old"), lambda: 3)
    before = files(tmp_path)

    original = getattr(os, call)

    def broken(*args: Any) -> Any:
        if call == "replace" and Path(args[1]) != tmp_path / "state":
            return original(*args)  # the small files' own
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, broken)
        with pytest.raises(UserError, match=rf"cannot save .*{os.strerror(code)}.* needs about 3 bytes.*--resume"):
            write_whole(tmp_path / "state", fill("new"), lambda: 3)
    assert files(tmp_path) == before and damage(tmp_path / "state") is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_under_the_log_is_one_message(tmp_path: Path) -> None:
    log = RunLog(tmp_path, LogConfig(), "r")
    log.event("step", loss=1.0)
    log._file.close()
    log._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115 (the log closes it)
    with pytest.raises(UserError, match=r"No space left on device\. Make space there, then continue with --resume"):
        log.event("step", loss=2.0)
    log.close()


# ---------------------------------------------------------------------------------------------- losses


def nan_at(monkeypatch: pytest.MonkeyPatch, calls: set[int]) -> None:
    """The policy's loss is NaN at these calls."""
    original, count = PolicyView.total, [0]

    def total(self: PolicyView, *args: Any) -> torch.Tensor:
        count[0] += 1
        return original(self, *args) * (float("nan") if count[0] in calls else 1.0)

    monkeypatch.setattr(PolicyView, "total", total)


def test_a_nan_stops_or_is_left_out(toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = [f"output_dir={tmp_path}", *STEPS]
    train(toy_config(toy_data, {"name": "seqfft"}, *config), "plain")  # and the base
    nan_at(monkeypatch, {3})
    with pytest.raises(UserError, match=r"loss is nan at task 1 .hammer-v3., phase train, step 2\..*on_nonfinite=skip"):
        train(toy_config(toy_data, {"name": "seqfft"}, *config), "stops")
    assert (tmp_path / "stops" / "training_state" / "00-train-000002").is_dir()
    nan_at(monkeypatch, {3})
    skip = "train.on_nonfinite=skip"
    folder = train(toy_config(toy_data, {"name": "seqfft"}, *config, skip), "skips")
    rows = read_jsonl(folder / "log.jsonl")
    assert [(r["k"], r["step"], r["in_a_row"]) for r in rows if r["event"] == "nonfinite"] == [(0, 2, 1)]
    assert [r["step"] for r in rows if r["event"] == "step" and r["k"] == 0] == [0, 1, 3, 4, 5]
    nan_at(monkeypatch, set(range(1000)))
    many = toy_config(toy_data, {"name": "seqfft"}, *config, skip, "train.steps=50")
    with pytest.raises(UserError, match="20 steps in a row"):
        train(many, "all")


def test_skipped_steps_in_a_row_are_counted_across_a_stop(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(out: str) -> Any:
        return toy_config(
            toy_data, {"name": "seqfft"}, f"output_dir={tmp_path}/{out}", *STEPS, "train.on_nonfinite=skip"
        )

    train(config("base"), "r")
    nan_at(monkeypatch, {2, 3, 4})
    whole = train(config("whole"), "r")
    monkeypatch.undo()
    nan_at(monkeypatch, {2, 3, 4})
    asked = iter(["", "", "a test", "a test"])
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Stop, "reason", property(lambda self: next(asked)))
        train(config("part"), "r")
    assert_same_run(whole, train(config("part"), "r", resume=True))


class Freezer(CLAlgorithm):
    """Trains the decoder alone: what is frozen at the start of a run stays so."""

    name = "freezer"

    def on_task_start(self, ctx: Context) -> None:
        if ctx.k == 0:
            for name, p in ctx.policy.named_parameters():
                p.requires_grad_("velocity_net" in name)


@SLOW
def test_frozen_parameters_stay_frozen(toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALGORITHMS, "freezer", f"{__name__}:Freezer")
    whole = train(toy_config(toy_data, {"name": "freezer"}, f"output_dir={tmp_path}/whole"), "r")
    asked = itertools.cycle([*[""] * 4, "a test"])  # between tasks too
    monkeypatch.setattr(Stop, "reason", property(lambda self: next(asked)))
    for _ in range(20):
        try:
            part = train(toy_config(toy_data, {"name": "freezer"}, f"output_dir={tmp_path}/part"), "r", resume=True)
            break
        except Interrupted:
            continue
    assert_same_run(whole, part)


def test_a_skipped_step_changes_neither_weights_nor_moments(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a constant learning rate, steps 0, 1 and 3 (2 left out) are what a plain loop over them gives."""
    from clbench.training.backend import Backend

    taken = []
    original = Backend.step

    def step(self: Backend, optimizer: torch.optim.Optimizer) -> None:
        original(self, optimizer)
        taken.append([{k: v.clone() for k, v in s.items()} for s in optimizer.state.values()])

    monkeypatch.setattr(Backend, "step", step)
    train(toy_config(toy_data, {"name": "seqfft"}, f"output_dir={tmp_path}", *STEPS), "plain")
    taken.clear()
    nan_at(monkeypatch, {3})
    train(
        toy_config(toy_data, {"name": "seqfft"}, f"output_dir={tmp_path}", *STEPS, "train.on_nonfinite=skip"), "skips"
    )
    assert [int(s[0]["step"]) for s in taken] == [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 6]
    assert all(bool(torch.isfinite(v).all()) for states in taken for s in states for v in s.values())


# ---------------------------------------------------------------------------------------------- helpers that die


def test_a_loader_that_dies_is_replaced(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from clbench.checkpoints.policy_io import policy_config
    from clbench.streams.stream import build_stream

    make_toy_data(tmp_path / "stream", STREAM, images=True)
    make_toy_data(tmp_path / "pretrain", ["reach-v3", "door-open-v3"], images=True)
    config = toy_config(tmp_path, {"name": "seqfft"})
    stream = build_stream(config.dataset)
    frames = StreamFrames([v.tasks for v in stream.visits], policy_config(config.policy, "cpu"), cache_gb=0)
    assert frames.decoded
    refs = [torch.tensor([[0, i], [1, i]]) for i in range(20)]
    want = list(load_batches(frames, iter(refs), 0))
    got = []
    for batch in load_batches(frames, iter(refs), 2):
        got.append(batch)
        if len(got) in (3, 11):
            os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
            time.sleep(0.3)  # a training step goes on undisturbed
        if len(got) == 6:  # a signal to the whole process group is not for them
            for child in multiprocessing.active_children():
                os.kill(child.pid or 0, signal.SIGTERM)
                os.kill(child.pid or 0, signal.SIGINT)
            time.sleep(0.3)
    assert capfd.readouterr().err.count("a data-loading process was killed by SIGKILL (often: out of memory)") == 2
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)


def test_a_logger_that_is_down_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from clbench.training import loggers

    def down(*_: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(loggers.Wandb, "__init__", down)
    log = RunLog(tmp_path, LogConfig(wandb=WandbConfig(enabled=True)), "r")
    log.event("step", loss=1.0)
    log.close()
    assert capsys.readouterr().err.count("wandb cannot be reached (no route to host); continuing without it") == 1
    assert read_jsonl(tmp_path / "log.jsonl")[0]["loss"] == 1.0

    class Closing(loggers.Logger):
        def __init__(self, *_: Any) -> None:
            pass

        def write(self, numbers: dict[str, Any], step: int) -> None:
            pass

        close = down  # type: ignore[assignment]

    monkeypatch.setattr(loggers, "Wandb", Closing)
    RunLog(tmp_path, LogConfig(wandb=WandbConfig(enabled=True)), "r").close()
    assert "wandb could not be closed (no route to host)" in capsys.readouterr().err


class FakeWandb(ModuleType):
    """What was asked of W&B."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.runs: list[dict[str, Any]] = []
        self.kept: list[tuple[str, str]] = []

    def init(self, **settings: Any) -> FakeWandb:
        self.runs.append(settings)
        return self

    def Artifact(self, name: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(add_dir=lambda folder: self.kept.append((name, folder)))

    def log_artifact(self, artifact: Any) -> None:
        pass

    def finish(self) -> None:
        pass


def test_wandb_runs_have_ids_of_their_own_and_files_beside_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    settings = WandbConfig(enabled=True, entity="team", group="sweep", tags=["quick"], artifacts=True)
    (tmp_path / "old" / "wandb").mkdir(parents=True)  # of a version that logged under the run's name
    for place in ("a", "a", "b", "old"):  # the second time it goes on
        log = RunLog(tmp_path / place, LogConfig(wandb=settings), "r", about={"seed": 3})
        log.checkpoint(1, tmp_path / place / "checkpoints" / "task_01")
        log.close()
    first, again, other, old = wandb.runs
    assert first == again and len({first["id"], other["id"], old["id"], "r"}) == 3 and old["id"] == "r"
    asked = {"project": "clbench", "entity": "team", "group": "sweep", "tags": ["quick"], "name": "r"}
    assert first.items() >= {**asked, "config": {"seed": 3}, "dir": str(tmp_path / ".loggers")}.items()
    assert wandb.kept[0] == ("r-task_01", str(tmp_path / "a/checkpoints/task_01"))
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["log.jsonl", "loggers.json"]


def test_pretraining_goes_on_where_it_was_stopped(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bases = []
    for name in ("whole", "stopped"):
        monkeypatch.setenv("CLBENCH_CACHE_ROOT", str(tmp_path / name))
        config = toy_config(toy_data, {"name": "seqfft"}, f"output_dir={tmp_path}/out-{name}")
        if name == "stopped":
            asked = iter([*[""] * 25, "a test", "a test"])
            with monkeypatch.context() as patch:
                patch.setattr(Stop, "reason", property(lambda self, asked=asked: next(asked)))
                with pytest.raises(Interrupted, match="in pretraining, after step 26"):
                    train(config, "r")
        train(config, "r", resume=True)
        (base,) = (tmp_path / name / "bases").glob("dit*")
        times = ("base.json", "log.jsonl", "checkpoint.json")
        bases.append({k: v for k, v in files(base).items() if k not in times})
        steps = [r["step"] for r in read_jsonl(base / "log.jsonl") if r["event"] == "step"]
        assert steps == [0, 59]
        assert not (base / "training_state").exists()
    assert bases[0] == bases[1]
    assert "from step 26 on" in capsys.readouterr().err
    assert_same_run(tmp_path / "out-whole" / "r", tmp_path / "out-stopped" / "r")
    flip(base / "model.safetensors")
    train(config, "again")
    assert "is damaged (model.safetensors was changed); it will be made again" in capsys.readouterr().err
    assert {k: v for k, v in files(base).items() if k not in times} == bases[0]
