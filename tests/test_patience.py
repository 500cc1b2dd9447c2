"""Long silences: what takes a while says so, from a thread that no forked child inherits."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import threading
from pathlib import Path

import pytest

from clbench import patience as module
from clbench.patience import patience
from clbench.stopping import Stop


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "quiet", False)
    monkeypatch.setattr(module, "FIRST_S", 0.01)
    monkeypatch.setattr(module, "EVERY_S", 0.01)


class Listener:
    """Takes lines; `hears` waits for one."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._heard = threading.Event()

    def __call__(self, line: str) -> None:
        self.lines.append(line)
        self._heard.set()

    def hears(self) -> bool:
        self._heard.clear()
        return self._heard.wait(30)


def test_what_takes_long_is_said_again_and_again_with_how_far_it_is() -> None:
    outer, inner = Listener(), Listener()
    with patience("saving", lambda: "2 of 3", say=outer):
        assert outer.hears() and outer.hears()
        with patience("checking", say=inner):  # it speaks for both
            assert inner.hears() and inner.hears()
        assert outer.hears()
    assert all(line.startswith("saving … ") and line.endswith(" s: 2 of 3") for line in outer.lines)
    assert all(line.startswith("checking … ") and line.endswith(" s") for line in inner.lines)


def test_what_is_quick_says_nothing_but_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_S", 60.0)
    heard = Listener()
    with patience("loading", say=heard), patience("reading", at_once=True, say=heard):
        pass
    assert heard.lines == ["reading …"]


def test_lines_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    asked = threading.Event()
    with patience("waiting", lambda: asked.set() or "\x1b[31mred"):  # type: ignore[func-returns-value]
        assert asked.wait(30)
    with patience("done", say=(after := Listener())):
        assert after.hears()  # so the line before it is out
    out, err = capsys.readouterr()
    assert out == "" and "waiting … " in err and "\x1b" not in err


def test_of_ranks_the_first_one_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Listener()
    monkeypatch.setenv("RANK", "1")
    with patience("waiting", at_once=True, say=heard):
        pass
    assert heard.lines == []


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_has_no_such_thread_and_can_start_its_own() -> None:
    heard = Listener()
    with patience("here", say=heard):
        assert heard.hears()
        pid = os.fork()
        if pid == 0:
            names = [t.name for t in threading.enumerate()]
            with patience("there", say=(child := Listener())):
                os._exit(0 if "patience" not in names and child.hears() and child.lines[0].startswith("there") else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert heard.hears(), "it goes on in the parent"


@pytest.mark.parametrize("signed", [False, True])
def test_a_run_that_waits_for_anothers_base_says_for_whose(
    signed: bool, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from clbench.errors import Interrupted
    from clbench.lock import sign
    from clbench.streams.stream import pretraining_tasks
    from clbench.testing.toy import toy_config
    from clbench.training import pretrain
    from clbench.training.backend import Backend

    monkeypatch.setenv("CLBENCH_CACHE_ROOT", str(tmp_path))
    config = toy_config(toy_data, {"name": "seqfft"})
    folder = pretrain.base_folder(config, pretraining_tasks(config.dataset, config.render)[1])
    log = folder.with_name(f".{folder.name}.training") / "log.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text("".join(json.dumps({"event": "step", "k": 0, "step": i, "loss": 1.0}) + "\n" for i in range(7)))
    stop, waits = Stop(), 0

    def wait(seconds: float) -> None:
        nonlocal waits
        waits += 1
        if "step 7 of 60" in (said := capsys.readouterr().err) or waits == 1000:
            stop.signal = signal.SIGTERM
        heard.append(said)
        threading.Event().wait(0.02)

    heard: list[str] = []
    monkeypatch.setattr(pretrain.time, "sleep", wait)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if signed:
            sign(lock.fileno())
        with pytest.raises(Interrupted, match="another run is making the base"):
            pretrain.ensure_base(config, Backend(config.train), stop)
    text = "".join(heard)
    assert text.count(f"another run is making the base {folder} (process {os.getpid()} on ") == 1
    assert (", since 20" in text) is signed and "waiting for the base that another run is making … " in text
    assert waits < 1000
