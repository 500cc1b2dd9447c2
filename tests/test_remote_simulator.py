"""Simulators under another interpreter: the same episodes, and what happens when something is wrong with it."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clbench import registry
from clbench.data.experts.base import episode_expert
from clbench.data.make import TaskPlan, collect_task, make_dataset
from clbench.doctor import simulators as doctor_simulators
from clbench.envs import base, remote, wire
from clbench.envs.base import STATE_KEY, Simulator
from clbench.envs.making import family, make_simulator, simulator_versions
from clbench.errors import UserError
from tests import remote_backend
from tests.conftest import LIBERO_PYTHON

ROOT = Path(__file__).resolve().parents[1]
VARIABLE = "REMOTE_PYTHON"
SOUP = "pick_up_the_alphabet_soup_and_place_it_in_the_basket"
SIMULATORS, EXPERTS = "tests.remote_backend:Fake", "tests.remote_backend:FakeExperts"
START = (
    "import time\nfrom clbench import registry\nfrom clbench.envs.making import make_simulator\n"
    f"registry.OWN['simulators']['fake'] = '{SIMULATORS}'\n"
)


def spec(task: str = "plain") -> dict[str, Any]:
    return {"type": "fake", "task": task}


@pytest.fixture(autouse=True)
def _fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(registry.OWN["simulators"], "fake", SIMULATORS)
    monkeypatch.setitem(registry.OWN["experts"], "fake", EXPERTS)
    monkeypatch.delenv(VARIABLE, raising=False)
    yield
    for child in remote._children.values():
        child.end()
    remote._children.clear()


def script(path: Path, text: str) -> str:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have fake simulators in a child: this very interpreter, started by a script that lets it find `tests`."""
    text = f'PYTHONPATH={ROOT} exec {sys.executable} "$@"\n'
    monkeypatch.setenv(VARIABLE, script(tmp_path / "python", text))
    return os.environ[VARIABLE]


def here(task: str = "plain") -> Any:
    """The same simulator in this process."""
    return remote_backend.Simulator(task)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_for(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def pid_of(simulator: Simulator) -> int:
    assert isinstance(simulator, remote.RemoteSimulator)
    return simulator._child._process.pid


# The same episodes


def same(a: Any, b: Any) -> None:
    """Equal to the last bit, types included."""
    assert type(a) is type(b)
    if isinstance(a, np.ndarray):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, tuple):
        for x, y in zip(a, b, strict=True):
            same(x, y)
    else:
        assert a == b


def test_an_episode_is_the_same_bit_for_bit(other: str) -> None:
    there, ours = make_simulator(spec("images")), here("images")
    assert isinstance(there, remote.RemoteSimulator)
    for seed in (3, base.EVAL_SEED_BASE):
        same(there.reset(seed), ours.reset(seed))
        actions = np.random.default_rng(0).normal(size=(30, 4))
        for action in (*actions, *actions.astype(np.float32), np.arange(8)[::2]):
            same(there.step(action), ours.step(action))
        same(there.step_unseen(actions[0]), ours.step_unseen(actions[0]))
        same(there.render(32, 24), ours.render(32, 24))
    assert there.reset(1)[STATE_KEY].flags.writeable


def test_one_child_has_all_simulators(other: str) -> None:
    a, b = make_simulator(spec()), make_simulator(spec("images"))
    assert pid_of(a) == pid_of(b) != os.getpid()
    first = a.reset(5)
    b.reset(6)
    same(first, here().reset(5))
    a.close()
    a.close()  # harmless
    b.step(np.zeros(4))
    with pytest.raises(RuntimeError, match="closed"):
        a.reset(1)


def test_simulators_that_nobody_has_are_dropped(other: str) -> None:
    a, b = make_simulator(spec()), make_simulator(spec())
    number = b._number  # type: ignore[attr-defined]
    del b
    gc.collect()
    a.reset(0)
    with pytest.raises(remote.RemoteError, match=f"KeyError: {number}"):
        a._child.ask("reset", number=number, seed=0)  # type: ignore[attr-defined]


def test_experts_act_where_the_simulator_is(other: str) -> None:
    """What data making does, to the last bit, although the expert looks into the simulator and remembers."""
    job = TaskPlan("fake", "plain", 0, 3, 0.1, 2, 60, 4)
    found = collect_task(job)
    del os.environ[VARIABLE]
    want = collect_task(job)
    assert isinstance(found.episodes[0].states, np.ndarray)
    assert (found.attempts, found.ceiling_successes) == (want.attempts, want.ceiling_successes) and want.episodes
    for a, b in zip(found.episodes, want.episodes, strict=True):
        same((a.states, a.labels), (b.states, b.labels))


def test_threads_take_turns(other: str) -> None:
    simulators = [make_simulator(spec()) for _ in range(4)]
    found: dict[int, np.ndarray] = {}

    def play(i: int) -> None:
        simulators[i].reset(i)
        found[i] = np.stack([simulators[i].step(np.ones(4)).observation[STATE_KEY] for _ in range(50)])

    threads = [threading.Thread(target=play, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i in range(4):
        ours = here()
        ours.reset(i)
        want = np.stack([ours.step(np.ones(4)).observation[STATE_KEY] for _ in range(50)])
        np.testing.assert_array_equal(found[i], want)


def test_what_simulators_print_does_no_harm(other: str, capfd: pytest.CaptureFixture[str]) -> None:
    noisy, ours = make_simulator(spec("noisy")), here("noisy")
    noisy.reset(0), ours.reset(0)
    found = [noisy.step(np.ones(4)) for _ in range(3)]
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err.count("noise on the descriptor") == 3
    for step in found:
        same(step, ours.step(np.ones(4)))


def test_versions_are_the_childs(other: str) -> None:
    found = simulator_versions("fake")
    assert found.pop("simulator_python") == ".".join(map(str, sys.version_info[:3]))
    assert found.pop("simulator_numpy") == np.__version__ and found == {"physics": "1.0"}
    del os.environ[VARIABLE]
    assert simulator_versions("fake") == {"physics": "1.0"}


def test_nothing_of_this_process_reaches_the_child(tmp_path: Path, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment with numpy alone finds clbench, but neither what lies beside clbench nor beside its modules."""
    venv.create(tmp_path / "env", symlinks=True)
    (packages,) = (tmp_path / "env").glob("lib/*/site-packages")
    numpy_folder = Path(np.__file__).parent
    (packages / "numpy").symlink_to(numpy_folder)
    (packages / "numpy.libs").symlink_to(numpy_folder.with_name("numpy.libs"))
    (packages / "tests").mkdir()
    for name in ("__init__.py", "remote_backend.py"):
        (packages / "tests" / name).symlink_to(ROOT / "tests" / name)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "env/bin/python"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    monkeypatch.setenv("WHERE", str(tmp_path / "where"))
    simulator = make_simulator(spec("odd"))
    simulator.reset(0)
    simulator.step(np.array([6, 0, 0, 0]))  # asserts that there is no pytest
    simulator.step(np.array([5, 0, 0, 0]))
    executable, path, _ = eval((tmp_path / "where").read_text())
    assert executable == str(tmp_path / "env/bin/python")
    ours = (str(ROOT), str(ROOT / "clbench/envs"), str(Path(pytest.__file__).parent.parent), "")
    assert not set(ours) & set(path)


# What goes wrong in a simulator


def test_exceptions_arrive(other: str) -> None:
    simulator = make_simulator(spec("odd"))
    simulator.reset(0)
    with pytest.raises(ValueError) as wrong:
        simulator.step(np.zeros(3))
    assert str(wrong.value) == "an action has shape (4,), not (3,)." and "in step" in wrong.value.__notes__[0]
    with pytest.raises(NotImplementedError, match="odd has no pictures"):
        simulator.render(8, 8)
    with pytest.raises(remote.RemoteError) as raised:
        simulator.step(np.ones(4))
    assert str(raised.value) == "KeyError: 'the physics blew up'"
    (note,) = raised.value.__notes__
    assert f"{VARIABLE}={other}" in note and "remote_backend.py" in note and "in _odd" in note
    with pytest.raises(UserError, match=rf"^{VARIABLE}={other}: the simulator is not installed\. Install it\.$"):
        make_simulator(spec("missing"))
    with pytest.raises(UserError, match=r"has no task 'plane'\. Did you mean 'plain'"):
        make_simulator(spec("plane"))
    with pytest.raises(TypeError, match="object"):
        simulator.step(np.array([None]))
    simulator.step(np.zeros(4))  # it goes on


@pytest.mark.parametrize(("what", "how"), [(2, "was killed by SIGSEGV"), (3, r"ended its process \(exit status 3\)")])
def test_a_child_that_dies_takes_its_simulators_and_no_others(other: str, what: int, how: str) -> None:
    odd, plain = make_simulator(spec("odd")), make_simulator(spec())
    odd.reset(0), plain.reset(0)
    with pytest.raises(remote.SimulatorDied, match=f"{VARIABLE}={other}.* {how}"):
        odd.step(np.array([what, 0, 0, 0]))
    with pytest.raises(remote.SimulatorDied, match=how) as raised:
        plain.step(np.zeros(4))
    copy = pickle.loads(pickle.dumps(raised.value))
    assert str(copy) == str(raised.value) and copy.how == raised.value.how
    plain.close()
    again = make_simulator(spec())
    same(again.reset(4), here().reset(4))


def test_an_interrupted_call_ends_the_child(other: str) -> None:
    """Its answer would be taken for that of the next call."""
    odd = make_simulator(spec("odd"))
    odd.reset(0)
    pid = pid_of(odd)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            odd.step(np.array([4, 0, 0, 0]))
    finally:
        signal.signal(signal.SIGALRM, before)
    wait_for(lambda: gone(pid))
    with pytest.raises(remote.SimulatorDied, match="SIGKILL"):
        odd.reset(0)


@pytest.mark.parametrize("hanging", [False, True])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_ends_with_its_parent(other: str, hanging: bool, number: signal.Signals) -> None:
    """Even inside a call, and although the thread that made the simulator ended long before."""
    call = "s.step(np.array([4, 0, 0, 0]))" if hanging else "time.sleep(60)"
    code = START + (
        "import threading, numpy as np\n"
        "made = []\n"
        "t = threading.Thread(target=lambda: made.append(make_simulator({'type': 'fake', 'task': 'odd'})))\n"
        "t.start(); t.join(); s = made[0]; time.sleep(0.3); s.reset(0)\n"
        f"print(s._child._process.pid, flush=True)\n{call}\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(0.2)
        os.kill(pid, signal.SIGTERM)  # as from a terminal or a scheduler, to all: the parent decides
        os.kill(pid, signal.SIGINT)
        time.sleep(0.2)
        assert not gone(pid)
        parent.send_signal(number)
        parent.wait(10)
        wait_for(lambda: gone(pid), 5)


def test_a_child_ends_with_a_process_that_ends_by_itself(other: str) -> None:
    code = START + "s = make_simulator({'type': 'fake', 'task': 'plain'})\nprint(s._child._process.pid)\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=30)
    assert done.returncode == 0 and done.stderr == ""
    wait_for(lambda: gone(int(done.stdout)), 5)


def test_after_a_fork_there_is_another_child(other: str) -> None:
    code = START + (
        "import os\n"
        "s = make_simulator({'type': 'fake', 'task': 'plain'}); s.reset(0)\n"
        "if os.fork() == 0:\n"
        "    try: s.reset(0)\n"
        "    except RuntimeError as e: print(e, flush=True)\n"
        "    t = make_simulator({'type': 'fake', 'task': 'plain'}); t.reset(0)\n"
        "    print(t._child._process.pid != s._child._process.pid, flush=True)\n"
        "    os._exit(0)\n"
        "os.wait(); s.reset(1); print('on')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=30)
    assert done.stdout.splitlines() == ["this simulator was made in another process, before a fork.", "True", "on"]


# What goes wrong with the interpreter


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exit 7", r"cannot be used: it ended its process \(exit status 7\)\.$"),
        ("echo first; echo 'no such library' >&2; exit 1", "cannot be used: no such library.$"),
        (f'{sys.executable} "$@"; exit', r"cannot be used: a program between it and clbench started it.*exec"),
        (f'exec {sys.executable} -I -S "$@"', "cannot be used: numpy cannot be imported .*install it there"),
        ("echo still importing; sleep 60", "did not answer within 0.5 s: still importing"),
        (
            f'exec {sys.executable} -c "import sys; sys.version_info = (3, 9, 1); sys.argv[:1] = []; '
            'exec(sys.argv[1])" "$@"',
            "cannot be used: it is Python 3.9, and 3.10 or newer is needed",
        ),
    ],
)
def test_an_interpreter_that_does_not_answer(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "STARTUP_S", 0.5 if "sleep" in text else 60.0)
    program = script(tmp_path / "python", text + "\n")
    monkeypatch.setenv(VARIABLE, program)
    with pytest.raises(UserError, match=f"^{VARIABLE}={program} {message}"):
        make_simulator(spec())


def test_what_is_no_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").write_text("hello")
    wrong = script(tmp_path / "wrong", "")
    Path(wrong).write_bytes(b"\x7fELF no program")
    for value, message in (
        (str(tmp_path / "nowhere"), "is not a program that can be started. Name the Python interpreter"),
        (str(tmp_path), "is a folder. Name the Python interpreter .* e.g. "),
        (str(tmp_path / "text"), "is not a program that can be started"),
        (wrong, "cannot be started: Exec format error"),
        ("no-such-python", "is not a program"),
    ):
        monkeypatch.setenv(VARIABLE, value)
        with pytest.raises(UserError, match=f"^{VARIABLE}={value} {message}"):
            make_simulator(spec())
    monkeypatch.setenv(VARIABLE, "")  # the same as not set
    assert isinstance(make_simulator(spec()), remote_backend.Simulator)
    monkeypatch.setenv("PATH", str(tmp_path))
    script(tmp_path / "found", "exit 1")
    monkeypatch.setenv(VARIABLE, "found")
    assert remote.interpreter(VARIABLE) == str(tmp_path / "found")


def test_files_that_changed_meanwhile(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "PROTOCOL", 0)
    with pytest.raises(UserError, match="different clbench files than this process: they changed"):
        make_simulator(spec())


def test_it_is_said_before_anything_heavy_starts(
    other: str, tmp_path: Path, toy_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clbench.testing.toy import toy_config
    from clbench.training import trainer

    monkeypatch.setenv("LACKS", "1")
    monkeypatch.setattr(remote_backend, "TASKS", ["hammer-v3", "push-v3", "window-close-v3"])
    want = rf"^{VARIABLE}={other}: the simulator is not installed\. Install it\.$"
    with pytest.raises(UserError, match=want):
        make_dataset(
            tmp_path / "set", name="set", env_type="fake", tasks=["push-v3"], demos_per_task=1, seed=0, progress=False
        )
    assert not (tmp_path / "set").exists()
    monkeypatch.setattr(trainer, "ensure_base", lambda *a: pytest.fail("the base is trained"))
    config = toy_config(toy_data, {"name": "seqfft"}, "dataset.env.type=fake", f"output_dir={tmp_path}")
    with pytest.raises(UserError, match=want):
        trainer.train(config, "r")
    assert not (tmp_path / "r").exists()


def test_the_doctor_says_what_the_interpreter_has(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.OWN["simulators"], "libero_state", SIMULATORS)
    (found,) = doctor_simulators()
    assert found.state == "ok" and found.what.startswith(f"LIBERO under {VARIABLE}={other}: physics 1.0, simulator py")
    monkeypatch.setenv("LACKS", "1")
    (found,) = doctor_simulators()
    assert found.state == "note" and found.remedy == f"{VARIABLE}={other}: the simulator is not installed. Install it."


# LIBERO


@pytest.mark.skipif(importlib.util.find_spec("libero") is not None, reason="this interpreter has LIBERO")
def test_an_interpreter_without_libero_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIBERO_PYTHON", sys.executable)
    with pytest.raises(UserError, match=f"^LIBERO_PYTHON={sys.executable}: LIBERO is not installed"):
        make_simulator({"type": "libero_state", "task": SOUP})


def test_an_interpreter_whose_libero_lacks_assets_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "libero" / "libero" / "benchmark").mkdir(parents=True)
    program = script(tmp_path / "python", f'PYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    monkeypatch.setenv("LIBERO_PYTHON", program)
    monkeypatch.setenv("CLBENCH_LIBERO_ROOT", str(tmp_path / "root"))
    for name in ("robosuite", "mujoco", "bddl", "hf_libero"):
        if name == "hf_libero" and importlib.util.find_spec("libero") is None:
            with pytest.raises(UserError, match=rf"^LIBERO_PYTHON={program}: LIBERO is not installed as .* hf-libero"):
                simulator_versions("libero_state")
        about = tmp_path / f"{name}-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    want = rf"^LIBERO_PYTHON={program}: LIBERO's assets are not installed \(looked in {tmp_path}.*clbench data assets"
    with pytest.raises(UserError, match=want):
        simulator_versions("libero_state")


@pytest.mark.libero
@pytest.mark.slow
@pytest.mark.xdist_group("libero")
@pytest.mark.parametrize("seed", [base.EVAL_SEED_BASE + 3])
def test_an_episode_of_libero_is_the_same(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """And so is what its expert does, which looks into the simulator. $LIBERO_PYTHON, else this interpreter."""
    env = {"type": "libero_state", "task": SOUP}
    ours = make_simulator(env)
    monkeypatch.setenv("LIBERO_PYTHON", LIBERO_PYTHON or sys.executable)
    there = make_simulator(env)
    assert isinstance(there, remote.RemoteSimulator)
    observation = ours.reset(seed)
    same(there.reset(seed), observation)
    for action in np.random.default_rng(0).uniform(-1.2, 1.2, (20, 7)).astype(np.float32):
        same(there.step(action), ours.step(action))
    experts, observation = [episode_expert(env, s) for s in (there, ours)], ours.reset(seed)
    same(there.reset(seed), observation)
    success = False
    for _ in range(280):
        action = experts[0](observation)
        same(action, experts[1](observation))
        found = there.step(np.clip(action, -1, 1))
        same(found, ours.step(np.clip(action, -1, 1)))
        observation, success = found.observation, found.success
        if success:
            break
    assert success
    found, want = simulator_versions("libero_state"), family("libero_state").versions()
    assert found.items() >= want.items() and "simulator_python" in found
    there.close(), ours.close()


# Messages


def test_messages_bring_values_as_they_were() -> None:
    a, b = socket.socketpair()
    value = {"x": [1, 2.5, None, True, "ü\n", float("inf"), -0.0, 0.1 + 0.2], "t": (1, (np.zeros(2, ">i4"),)), "d": {}}
    value["big"] = np.random.default_rng(0).integers(0, 255, (700, 600, 3), dtype=np.uint8)
    value["mask"] = np.array([[True], [False]]).T
    sender = threading.Thread(target=lambda: wire.send(a, wire.pack(value)))
    sender.start()
    same(wire.receive(b), value)
    sender.join()
    wire.send(a, wire.pack(np.float32(0.1)))
    assert wire.receive(b) == float(np.float32(0.1))
    for wrong in ({1: 2}, {"$array": 0}, {"a": object()}, np.array(["text"]), np.array([None]), {1}, b"bytes"):
        with pytest.raises(TypeError):
            wire.pack(wrong)
    a.sendall(b"GET / HTTP/1.1\r\n")
    with pytest.raises(ValueError, match="does not begin a message"):
        wire.receive(b)
    a.sendall(wire._PREFIX.pack(wire._MARK, 100) + b"cut")
    a.close()
    b.setblocking(True)
    with contextlib.suppress(ValueError):
        wire.receive(b)
    with pytest.raises(EOFError):
        wire.receive(b)
    b.close()


def test_what_a_child_imports_is_written_for_the_oldest_python() -> None:
    """ruff checks the files that pyproject.toml names for it (test_quality): these must be all that are imported."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import clbench.envs.serve, clbench.envs.remote, clbench.envs.metaworld, clbench.envs.libero.images\n"
        "import clbench.data.experts.libero\n"
        "print('\\n'.join(m.__file__ for n, m in sys.modules.items() if n.startswith('clbench')))\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code, str(ROOT)], capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        path = Path(line).relative_to(ROOT / "clbench").with_suffix("").as_posix()
        top = "__init__ data/__init__ errors io launch paths registry stopping".split()
        assert path in top or path.startswith(("data/experts/", "envs/")), f"{path}: its Python version is not checked"
    text = (ROOT / "pyproject.toml").read_text()
    assert '"clbench/{__init__,data/__init__,errors,io,launch,paths,registry,stopping}.py" = "py310"' in text
    assert remote.OLDEST_PYTHON == (3, 10) and '"clbench/{data/experts,envs}/**/*.py" = "py310"' in text
