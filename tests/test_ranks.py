"""Several ranks train what one process trains: 2 CPU ranks (gloo), DDP and the real DeepSpeed ZeRO-2.

fp32 and plain SGD: under AdamW, parameters whose true gradient is zero amplify rounding. The same global batch gives
the same training, so weights agree to rounding, and masks, choices and expansions exactly.
"""

from __future__ import annotations

import re
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from clbench import launch
from clbench.checkpoints.run_folder import checkpoint_folder
from clbench.checkpoints.state import load_state
from clbench.cli import main
from clbench.config.schema import TrainConfig
from clbench.errors import RankLost, UserError
from clbench.io import read_json, read_jsonl
from clbench.launch import check_port
from clbench.processes import start_command
from clbench.testing.toy import toy_config
from clbench.training import backend
from clbench.training.trainer import train
from tests.ranks import (
    PLAIN,
    RUNS,
    STRATEGIES,
    ParityRun,
    difference_and_move,
    overrides,
    train_alone,
    train_together,
    weights,
)

TOLERANCE = {"er-bf16": 1e-4}  # bf16 rounds halves of a batch in its own way: 1e-5 when measured, weights move by 8e-3
SHARED = pytest.mark.xdist_group("ranks")  # one process trains the runs once for all of these tests


# Variants of what others train: among the slow tests.
SLOW = {"seqlora", "agem", "er-append", "multitask", "singletask", "er-bf16", "rehearsal", "onpolicy", "weighted"}


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> list[ParityRun]:
    """All runs; without the slow ones where no test of theirs was selected."""
    cases = [i.callspec.params for i in request.session.items if hasattr(i, "callspec")]
    asked = {params.get("label") for params in cases if isinstance(params.get("label"), str)}
    return RUNS if asked & SLOW else [r for r in RUNS if r[0] not in SLOW]


@pytest.fixture(scope="module")
def alone(runs: list[ParityRun], toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs, by one process."""
    out = tmp_path_factory.mktemp("alone")
    train_alone(runs, toy_data, out)
    return out


@pytest.fixture(scope="module", params=STRATEGIES)
def together(
    request: pytest.FixtureRequest,
    runs: list[ParityRun],
    alone: Path,
    toy_data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, Path]:
    """The runs, by one pair of ranks."""
    out = tmp_path_factory.mktemp(request.param)
    train_together(runs, toy_data, out, request.param)
    label, section, own = next(r for r in RUNS if r[0] == "er-stopped")
    train(toy_config(toy_data, section, f"output_dir={out}", *overrides(own)), label, resume=True)
    return request.param, out


@SHARED
@pytest.mark.parametrize("label", [pytest.param(r[0], marks=[pytest.mark.slow] * (r[0] in SLOW)) for r in RUNS])
def test_ranks_train_what_one_process_trains(label: str, alone: Path, together: tuple[str, Path]) -> None:
    strategy, out = together
    difference, moved = difference_and_move(alone / label, out / label)
    print(f"parity {strategy} {label}: largest difference {difference:.1e}, largest move {moved:.1e}")  # pytest -s
    assert moved > 1e-3
    assert difference < TOLERANCE.get(label, 5e-6), difference


@SHARED
def test_ranks_make_the_same_collective_calls(runs: list[ParityRun], together: tuple[str, Path]) -> None:
    """The same functions with the same sizes and types in the same order: none depends on the rank."""
    strategy, out = together
    first, second = (read_json(out / f"collectives-{rank}.json") for rank in (0, 1))
    assert first.keys() == second.keys() == {r[0] for r in runs}
    for label in first:
        assert first[label] == second[label], label
        steps = len(events(out / label, "step"))
        sums = [call for call in first[label] if call[0] in ("all_reduce", "reduce", "reduce_scatter_tensor")]
        assert len(sums) >= steps > 0, label  # at least the gradients' of every step
    if strategy == "zero2":  # DeepSpeed's own calls are among them: the stepped parts of the weights
        assert any(call[0] in ("all_gather", "all_gather_into_tensor") for call in first["seqfft"])


def events(folder: Path, *names: str) -> list[dict[str, Any]]:
    return [r for r in read_jsonl(folder / "log.jsonl") if r["event"] in names]


@SHARED
def test_choices_masks_and_expansions_are_the_same(alone: Path, together: tuple[str, Path]) -> None:
    _, out = together
    for label, names, keys in (
        ("mir", ("mir_choice",), ("k", "step", "visits")),
        ("clare", ("clare_expansion",), ("k", "expanded", "adapter")),
        ("packnet", ("packnet_capacity",), ("k", "kept", "free")),
    ):
        a, b = ([{key: r[key] for key in keys} for r in events(root / label, *names)] for root in (alone, out))
        assert a and a == b, label
    a, b = (load_state(checkpoint_folder(root / "packnet", 1), "algorithm")["owner"] for root in (alone, out))
    assert all(torch.equal(a[n], b[n]) for n in a)
    a, b = (load_state(checkpoint_folder(root / "mir", 1), "algorithm")["chosen"] for root in (alone, out))
    assert torch.equal(a, b)
    a, b = (load_state(checkpoint_folder(root / "ewc", 1), "algorithm")["fisher"] for root in (alone, out))
    assert all(torch.allclose(a[n], b[n], rtol=1e-3, atol=1e-9) for n in a)


@SHARED
def test_a_nan_on_one_rank_leaves_the_step_out_on_all(alone: Path, together: tuple[str, Path]) -> None:
    for root in (alone, together[1]):
        assert [(r["k"], r["step"]) for r in events(root / "er-nan", "nonfinite")] == [(0, 2)]
        assert (0, 2) not in [(r["k"], r["step"]) for r in events(root / "er-nan", "step")]


@SHARED
def test_frozen_weights_stay_bit_identical_on_ranks(together: tuple[str, Path]) -> None:
    """Edits in after_step and after_backward take effect, under ZeRO-2's masters too."""
    _, out = together
    old, new = (weights(out / "packnet", k) for k in (0, 1))
    owner = load_state(checkpoint_folder(out / "packnet", 0), "algorithm")["owner"]
    for name, o in owner.items():
        assert torch.equal(new[name][o > 0], old[name][o > 0]), name
        assert not torch.equal(new[name], old[name])


@SHARED
def test_the_log_is_that_of_one_process(alone: Path, together: tuple[str, Path]) -> None:
    _, out = together
    for label in ("er", "ewc", "clare"):
        a, b = (events(root / label, "step") for root in (alone, out))
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert (x["k"], x["phase"], x["step"]) == (y["k"], y["phase"], y["step"])
            assert x["loss"] == pytest.approx(y["loss"], rel=1e-4)
            assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-3)


@SHARED
def test_a_checkpoint_of_ranks_resumes_on_one_process(together: tuple[str, Path], toy_data: Path, alone: Path) -> None:
    import shutil

    _, out = together
    copy = out / "resumed" / "ewc"
    shutil.copytree(out / "ewc", copy)
    shutil.rmtree(checkpoint_folder(copy, 1))
    label, section, own = next(r for r in RUNS if r[0] == "ewc")
    train(toy_config(toy_data, section, f"output_dir={copy.parent}", *overrides(own)), label, resume=True)
    one, two = weights(alone / "ewc", 1), weights(copy, 1)
    assert max(float((one[n] - two[n]).abs().max()) for n in one) < 5e-6


def toy_arguments(toy_data: Path, out: Path, *more: str) -> list[str]:
    """A toy run for the command line; what stands behind `--`."""
    return [
        f"output_dir={out}", f"dataset.data={toy_data}/stream", f"dataset.pretrain.data={toy_data}/pretrain",
        "dataset.tasks=[hammer-v3,push-v3]", "dataset.pretrain.tasks=[reach-v3,door-open-v3]", "pretrain.steps=2",
        "pretrain.batch_size=8", "train.batch_size=8", "train.steps=3", "train.threads=1", "log.progress=quiet", *more,
    ]  # fmt: skip


def test_the_command_trains_the_same_with_two_processes(toy_data: Path, tmp_path: Path) -> None:
    runs = {}
    own = toy_arguments(toy_data, tmp_path, *PLAIN[:3], "algorithm.fisher_batches=2")
    for name, flags in (("one", []), ("two", ["--nproc", "2"])):
        printed = tmp_path / f"{name}.txt"
        with printed.open("ab") as out:
            command = ["train", "--algo", "er,ewc", "--run-id", name, *flags, "--", *own]
            assert start_command(command, log=out).wait(300) == 0, printed.read_text()
        assert printed.read_text().count("trained:") == 1  # said once, not once per rank
        runs[name] = weights(tmp_path / name, 1)
    assert max(float((runs["one"][n] - v).abs().max()) for n, v in runs["two"].items()) < 5e-6


def test_a_rank_that_fails_ends_the_run(toy_data: Path, tmp_path: Path) -> None:
    """The other rank does not wait for ever, and what is printed first is why."""
    printed = tmp_path / "printed.txt"
    more = ("train.optimizer.lr=1e30", "train.optimizer.warmup_steps=0", "train.optimizer.grad_clip=0")
    own = toy_arguments(toy_data, tmp_path, *more)
    command = ["train", "--nproc", "2", "--algo", "seqfft", "--run-id", "r", "--", *own]
    with printed.open("ab") as out:
        assert start_command(command, log=out).wait(300) == 2
    said = printed.read_text()
    lines = [line for line in said.splitlines() if line.startswith(("clbench:", "rank"))]
    assert "is nan" in lines[0] or "is inf" in lines[0], said


class Rank:
    """Stands in for a process that ends with status `code` at its `polls`-th poll; None = when it is killed."""

    def __init__(self, code: int | None, polls: int = 1) -> None:
        self.code, self.polls, self.returncode = code, polls, None

    def poll(self) -> int | None:
        self.polls -= 1
        if self.polls <= 0 and self.returncode is None:
            self.returncode = self.code
        return self.returncode

    def wait(self, timeout: float = 0.0) -> int | None:
        return self.returncode

    def terminate(self) -> None:
        """It does not listen."""

    def kill(self) -> None:
        self.returncode = -9


KILLED = "was killed by SIGKILL (often: out of memory)"


@pytest.mark.parametrize(
    ("ranks", "says", "status"),
    [
        ([Rank(None), Rank(-9)], f"rank 1 {KILLED}", 1),
        ([Rank(69), Rank(-9)], f"rank 1 {KILLED}", 1),
        ([Rank(2), Rank(-9)], f"rank 1 {KILLED}", 1),
        ([Rank(69), Rank(2, polls=3)], "rank 1 failed (exit status 2)", 2),
        ([Rank(69), Rank(None), Rank(69)], "rank 1 did not answer", 69),
    ],
    ids=["killed", "killed and missed", "killed and seen", "failed and missed", "hung"],
)
def test_the_rank_to_blame_is_named(
    ranks: list[Any], says: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others, which waited for it, are ended however they wait."""
    monkeypatch.setattr(launch, "SETTLE_S", 1.0)
    assert launch._wait(ranks, []) == status
    assert capsys.readouterr().err == f"{says}; ending the other ranks.\n"
    assert None not in [r.returncode for r in ranks]


def test_a_signal_is_passed_on_to_all_ranks_once() -> None:
    """And one that it ends before it could listen counts as stopped."""
    got: list[tuple[int, int]] = []

    class Listening(Rank):
        def send_signal(self, number: int) -> None:
            got.append((len(got), number))
            self.returncode = 75 if len(got) == 1 else -number

    ranks: list[Any] = [Listening(None), Listening(None)]
    assert launch._wait(ranks, [15]) == 75
    assert got == [(0, 15), (1, 15)]


def test_a_port_in_use_is_said_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["train", "--nproc", "2", "--port", str(port)]) == 2
    assert f"--port {port} is in use by another program" in capsys.readouterr().err
    check_port(port)  # left just now, so free


def as_rank(monkeypatch: pytest.MonkeyPatch, **other: str) -> None:
    given = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in {**given, **other}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("given", "raised", "message"),
    [
        ({}, dist.DistNetworkError("The server socket … EADDRINUSE"), "127.0.0.1:29500, is in use by another program"),
        ({}, dist.DistStoreError("Timed out after 9 seconds waiting for clients"), "rank 1 did not meet the other 1"),
        ({}, dist.DistNetworkError("The client socket has timed out"), "Check that all were started"),
        ({"RANK": "7"}, None, "RANK=7 is not below WORLD_SIZE=2"),
        ({"MASTER_ADDR": ""}, None, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": "http"}, None, "MASTER_PORT=http"),
    ],
)
def test_ranks_that_do_not_meet(
    given: dict[str, str], raised: Exception | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def join(**_: Any) -> None:
        assert raised is not None
        raise raised

    as_rank(monkeypatch, **given)
    monkeypatch.setattr(backend, "PartialState", join)
    with pytest.raises(UserError, match=re.escape(message)):
        backend._meet(True, timedelta(seconds=9))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Read error [127.0.0.1]:14510: Connection reset by "
         "peer", "lost another rank, which has ended"),
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 20000ms for recv "
         "operation to complete", "it hangs"),
        ("NCCL error in: ProcessGroupNCCL.cpp, remote process exited or there was a network error", "has ended"),
    ],
)  # fmt: skip
def test_a_lost_rank_is_no_unexpected_error(text: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(monkeypatch)
    with pytest.raises(RankLost, match=why), backend.ranks_together():
        raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="shapes"), backend.ranks_together():
        raise RuntimeError("shapes do not match")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(RuntimeError, match=r"NCCL|gloo"), backend.ranks_together():
        raise RuntimeError(text)


def test_a_world_size_that_is_no_number(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert main(["train"]) == 2
    assert "WORLD_SIZE=two in the environment is not a number of ranks" in capsys.readouterr().err


def test_a_lock_that_a_killed_compiler_left_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's compiler waits for such a file for ever: a kill while DeepSpeed compiles would stop every later start."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert backend._left_by_a_compiler() == ""
    lock = tmp_path / "py312_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w"):
        assert backend._left_by_a_compiler() == "", "one compiles"
    assert backend._left_by_a_compiler().endswith(f"remove it: rm {lock}")


def test_a_process_trains_on_the_device_that_each_run_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a run on the other one. No device is touched here: torch only says that there is one."""
    devices = []
    for device in ("cpu", "cuda", "cpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda device=device: device == "cuda")
        devices.append(backend.Backend(TrainConfig(device=device)).device.type)
    assert devices == ["cpu", "cuda", "cpu"]
