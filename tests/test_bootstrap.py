"""scripts/bootstrap.sh, with Python, uv and pip played by small shell scripts: nothing real is installed."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# All that the PATH holds in these tests, so that what this machine has installed plays no part.
TOOLS = (
    "bash env cat cut ln sha256sum sort readlink dirname mkdir rm mv find df awk sed tail sleep flock timeout"
).split()

# Plays Python 3.MINOR: answers bootstrap.sh's probes, makes environments, and notes every start in $FAKE_LOG.
FAKE_PYTHON = r"""#!{bash}
echo "python $0" >>"$FAKE_LOG"
minor={minor}
case "$*" in
    *importlib.metadata*) [[ -e ${{0%/bin/*}}/has-clbench ]] && echo "$0" ;;
    *version_info*) ((minor >= 12)) && echo "$minor" ;;
    "-m venv "*)
        venv=${{*: -1}}
        mkdir -p "$venv/bin"
        ln -s "$(readlink -f "$0")" "$venv/bin/python"
        echo "version = 3.$minor" >"$venv/pyvenv.cfg" ;;
    "-m ensurepip") exit 1 ;;
    "-m pip"*" install "*" -e . "*)
        echo "pip install clbench" >>"$FAKE_LOG"
        mkdir -p "${{0%/bin/*}}/lib/python3.$minor/site-packages/clbench-0.1.0.dist-info" ;;
    "-m pip"*" -r requirements.lock") echo "pip install lock" >>"$FAKE_LOG"; [[ -z ${{PIP_FAILS:-}} ]] ;;
    "-m pip"*" uv") exit 1 ;;
    *) exit 0 ;;
esac
"""

FAKE_UV = r"""#!{bash}
[[ $1 == --version ]] && exit 0
echo "uv $*" >>"$FAKE_LOG"
if [[ -n ${{UV_FAILS:-}} ]]; then
    echo "uv: no space left on the moon" >&2
    exit 2
fi
sleep "${{UV_SECONDS:-0}}"
[[ $* == *" -e . "* ]] && mkdir -p "${{4%/bin/*}}/lib/python3.12/site-packages/clbench-0.1.0.dist-info"
exit 0
"""

SOURCED = """
set -euo pipefail
source "$1"
_clb_system_folders() { :; }
clbench_bootstrap
printf "%s\\n" "$CLBENCH_PYTHON"
"""


@dataclass
class Project:
    """A copy of the project's skeleton beside a home directory and a PATH of its own."""

    root: Path
    home: Path
    bin: Path
    log: Path
    env: dict[str, str] = field(default_factory=dict)

    @property
    def venv(self) -> Path:
        return self.root / ".venv"

    @property
    def stamp(self) -> Path:
        return self.venv / ".clbench-stamp"

    def command(self, script: str = SOURCED) -> list[str]:
        return ["bash", "-c", script, "caller", str(self.root / "scripts/bootstrap.sh")]

    def run(self, script: str = SOURCED, **env: str) -> subprocess.CompletedProcess[str]:
        command, whole_env = self.command(script), self.env | env
        return subprocess.run(command, env=whole_env, cwd=self.root, text=True, capture_output=True)

    def start(self, **env: str) -> subprocess.Popen[str]:
        """The same without waiting, as a process group of its own."""
        return subprocess.Popen(
            self.command(),
            env=self.env | env,
            cwd=self.root,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def starts(self, what: str) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if line.startswith(what)]


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def fake_python(path: Path, minor: int) -> Path:
    return executable(path, FAKE_PYTHON.format(bash=shutil.which("bash"), minor=minor))


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """The skeleton, without any interpreter; `uv` succeeds unless told otherwise."""
    root, home, tools, own_bin = (tmp_path / name for name in ("project", "home", "tools", "bin"))
    for folder in (root / "scripts", home, tools, own_bin):
        folder.mkdir(parents=True)
    shutil.copy(ROOT / "scripts/bootstrap.sh", root / "scripts")
    for name in ("requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, root)
    for tool in TOOLS:
        program = shutil.which(tool)
        if program is None:
            pytest.skip(f"this system has no {tool}")
        (tools / tool).symlink_to(program)
    executable(own_bin / "uv", FAKE_UV.format(bash=shutil.which("bash")))
    log = tmp_path / "log"
    log.touch()
    env = {"PATH": f"{own_bin}:{tools}", "HOME": str(home), "FAKE_LOG": str(log)}
    return Project(root.resolve(), home, own_bin, log, env)


# ------------------------------------------------------------------------------------------------ installing


def test_installs_once_and_then_does_nothing(project: Project) -> None:
    fake_python(project.bin / "python3.12", 12)
    first = project.run()
    assert first.returncode == 0, first.stderr
    assert first.stdout.strip() == str(project.venv / "bin/python")
    assert "7 GB" in first.stderr
    lock, itself = project.starts("uv pip install")
    assert lock.endswith("-r requirements.lock")
    assert itself.endswith("-e . --no-deps --no-build-isolation")

    for name in ("uv", "pip", "pip3"):
        executable(project.bin / name, f'#!{shutil.which("bash")}\necho "LOUD $0" >>"$FAKE_LOG"; exit 99\n')
    project.log.write_text("")
    started = time.monotonic()
    second = project.run()
    elapsed_s = time.monotonic() - started
    assert second.returncode == 0, second.stderr
    assert second.stdout == first.stdout
    assert second.stderr == ""
    # One start: does the interpreter still run?
    assert project.log.read_text().splitlines() == [f"python {project.venv}/bin/python"]
    assert elapsed_s < 2, "a no-op takes well under a second, even on a busy machine"


@pytest.mark.parametrize("name", ["requirements.lock", "pyproject.toml"])
def test_a_change_of_what_is_installed_updates_the_environment(project: Project, name: str) -> None:
    fake_python(project.bin / "python3.12", 12)
    assert project.run().returncode == 0
    with (project.root / name).open("a") as file:
        file.write("\n# changed\n")
    project.log.write_text("")
    assert project.run().returncode == 0
    assert len(project.starts("uv pip install")) == 2
    assert not project.starts(f"python {project.bin}"), "the environment is kept"


def test_executed_it_prints_the_interpreter_alone(project: Project) -> None:
    fake_python(project.bin / "python3.12", 12)
    result = project.run('exec bash "$1"')
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{project.venv}/bin/python\n"


def test_the_caller_keeps_its_shell(project: Project) -> None:
    """Options, directory and traps of the sourcing script stay; the environment comes first on the PATH."""
    fake_python(project.bin / "python3.12", 12)
    script = (
        'cd /; source "$1"; before=$-; traps=$(trap); clbench_bootstrap && clbench_bootstrap; [[ $- == "$before" ]]; '
        '[[ $(trap) == "$traps" ]]; printf "%s\n" "$PWD" "$PATH" "$CLBENCH_ROOT"'
    )
    result = project.run(script)
    assert result.returncode == 0, result.stderr
    directory, path, root = result.stdout.splitlines()
    assert (directory, root) == ("/", str(project.root))
    assert path == f"{project.venv}/bin:{project.env['PATH']}", "added once, however often it is called"


def test_a_failed_install_leaves_no_stamp_and_the_next_call_continues(project: Project) -> None:
    fake_python(project.bin / "python3.12", 12)
    result = project.run(UV_FAILS="1", PIP_FAILS="1")
    assert result.returncode != 0
    assert result.stdout == ""
    assert "FAILED" in result.stderr
    assert "no space left on the moon" in result.stderr, "the log's last lines are shown"
    assert "falling back to pip" in result.stderr
    assert not project.stamp.exists()

    again = project.run()
    assert again.returncode == 0, again.stderr
    assert project.stamp.exists()


def test_pip_takes_over_from_a_uv_that_fails(project: Project) -> None:
    fake_python(project.bin / "python3.12", 12)
    result = project.run(UV_FAILS="1")
    assert result.returncode == 0, result.stderr
    assert "falling back to pip" in result.stderr
    assert project.starts("pip install") == ["pip install lock", "pip install clbench"]
    assert project.stamp.exists()


def test_without_uv_pip_installs_everything(project: Project) -> None:
    fake_python(project.bin / "python3.12", 12)
    (project.bin / "uv").unlink()
    result = project.run()
    assert result.returncode == 0, result.stderr
    assert "uv could not be had" in result.stderr
    assert project.starts("pip install") == ["pip install lock", "pip install clbench"]


def test_killed_while_installing(project: Project) -> None:
    fake_python(project.bin / "python3.12", 12)
    process = project.start(UV_SECONDS="30")
    deadline = time.monotonic() + 20
    while not project.starts("uv pip install") and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=10)
    assert project.starts("uv pip install")
    assert not project.stamp.exists()
    assert project.run().returncode == 0, "the lock went with the process"
    assert project.stamp.exists()


def test_two_at_the_same_time_install_once(project: Project) -> None:
    fake_python(project.bin / "python3.12", 12)
    processes = [project.start(UV_SECONDS="0.5") for _ in range(2)]
    outputs = [process.communicate(timeout=30) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert len(project.starts("uv pip install")) == 2, "the lock and clbench itself, once each"
    assert sum("waiting for it" in stderr for _, stderr in outputs) == 1


def test_a_moved_environment_is_made_anew(project: Project) -> None:
    fake_python(project.bin / "python3.12", 12)
    assert project.run().returncode == 0
    project.venv.rename(project.root / "elsewhere")
    leftover = project.root / "elsewhere/bin/pytest"
    leftover.touch()
    result = project.run(CLBENCH_VENV="elsewhere")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(project.root / "elsewhere/bin/python")
    assert not leftover.exists(), "its programs started the interpreter of the old place"


def test_an_unusable_environment_of_someone_else_is_not_touched(project: Project) -> None:
    fake_python(project.bin / "python3.12", 12)
    fake_python(project.venv / "bin/python", 11)
    (project.venv / "pyvenv.cfg").write_text("version = 3.11\n")
    result = project.run()
    assert result.returncode != 0
    assert "CLBENCH_VENV" in result.stderr
    assert (project.venv / "pyvenv.cfg").read_text() == "version = 3.11\n"
    elsewhere = project.run(CLBENCH_VENV=str(project.home / "venv"))
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert elsewhere.stdout.strip() == str(project.home.resolve() / "venv/bin/python")


# ---------------------------------------------------------------------------------------- looking for Python


@pytest.mark.parametrize(
    "place",
    [
        ".pyenv/versions/3.12.1/bin/python3.12",
        ".local/share/uv/python/cpython-3.12.8-linux-x86_64-gnu/bin/python3.12",
        ".asdf/installs/python/3.12.4/bin/python3",
        ".local/share/mise/installs/python/3.12.4/bin/python3",
        "miniconda3/envs/robots/bin/python3",
    ],
)
def test_finds_what_version_managers_hide(project: Project, place: str) -> None:
    """As on machines where `python3` is 3.11 and `python3.12` a shim that only prints an error."""
    shim = f'#!{shutil.which("bash")}\necho "not found; these versions have it: 3.12.1" >&2\nexit 127\n'
    executable(project.bin / "python3.12", shim)
    fake_python(project.bin / "python3", 11)
    fake_python(project.home / ".pyenv/versions/3.11.7/bin/python3.11", 11)
    expected = fake_python(project.home / place, 12)
    result = project.run()
    assert result.returncode == 0, result.stderr
    assert f"({expected})" in result.stderr


@pytest.mark.parametrize(
    ("minors", "chosen"), [((13, 12), 12), ((13, 11), 13), ((14, 13), 13), ((14,), 14), ((9, 11, 14), 14)]
)
def test_prefers_3_12_then_what_is_nearest(project: Project, minors: tuple[int, ...], chosen: int) -> None:
    for minor in minors:
        fake_python(project.home / f".pyenv/versions/3.{minor}.0/bin/python3", minor)
    result = project.run()
    assert result.returncode == 0, result.stderr
    assert f"/versions/3.{chosen}.0/bin/python3)" in result.stderr


def test_a_folder_named_in_pyenv_root(project: Project) -> None:
    expected = fake_python(project.root.parent / "elsewhere/versions/3.12.9/bin/python3.12", 12)
    result = project.run(PYENV_ROOT=str(project.root.parent / "elsewhere"))
    assert result.returncode == 0, result.stderr
    assert f"({expected})" in result.stderr


def test_without_any_python_it_says_what_to_install(project: Project) -> None:
    fake_python(project.bin / "python3", 11)
    result = project.run()
    assert result.returncode != 0
    assert result.stdout == ""
    assert "no usable Python 3.12" in result.stderr
    assert "uv python install 3.12" in result.stderr
    assert not project.starts("uv"), "nothing was tried"


# --------------------------------------------------------------------------------------------- the .env file


def test_env_file_is_read_and_never_run(project: Project, tmp_path: Path) -> None:
    fake_python(project.bin / "python3.12", 12)
    witness = tmp_path / "witness"
    (project.root / ".env").write_text(
        f"# a comment\nPLAIN=one two  # why\nexport QUOTED=\"a # b\"\nSINGLE='$HOME'\r\nHOMELY=~/data\n"
        f"SET=from the file\nEMPTY=\nCODE=$(touch {witness})`touch {witness}`\ntouch {witness}\n"
        f"; touch {witness}\nBAD-NAME=1\nX[$(touch {witness})]=1\nLAST=no newline"
    )
    names = ["PLAIN", "QUOTED", "SINGLE", "HOMELY", "SET", "EMPTY", "CODE", "LAST"]
    show = f'for name in {" ".join(names)}; do echo "${{!name-unset}}"; done'
    result = project.run(f'source "$1"; clbench_bootstrap; {show}', SET="before")
    assert result.returncode == 0, result.stderr
    assert dict(zip(names, result.stdout.splitlines(), strict=True)) == {
        "PLAIN": "one two",
        "QUOTED": "a # b",
        "SINGLE": "$HOME",
        "HOMELY": f"{project.home}/data",
        "SET": "before",
        "EMPTY": "unset",
        "CODE": f"$(touch {witness})`touch {witness}`",
        "LAST": "no newline",
    }
    assert not witness.exists()


def test_env_file_may_place_the_environment(project: Project, tmp_path: Path) -> None:
    fake_python(project.bin / "python3.12", 12)
    (project.root / ".env").write_text(f"CLBENCH_VENV={tmp_path}/other\n")
    assert project.run().stdout.strip() == str(tmp_path.resolve() / "other/bin/python")


def test_another_env_file_can_be_named(project: Project, tmp_path: Path) -> None:
    fake_python(project.bin / "python3.12", 12)
    (project.root / ".env").write_text("WHERE=project\n")
    (tmp_path / "mine").write_text("WHERE=mine\npython=not clbench's\nvenv=neither\n")
    show = 'source "$1"; clbench_bootstrap; echo "${WHERE-nowhere} ${python-} ${venv-}"'
    assert project.run(show).stdout == "project  \n"
    assert project.run(show, CLBENCH_ENV_FILE=str(tmp_path / "mine")).stdout == "mine not clbench's neither\n"
    assert project.run(show, CLBENCH_ENV_FILE="").stdout == "nowhere  \n"
    absent = project.run(CLBENCH_ENV_FILE=str(tmp_path / "absent"))
    assert absent.returncode == 2 and f"CLBENCH_ENV_FILE={tmp_path}/absent is not a readable file" in absent.stderr


def test_env_example_names_every_variable_that_users_may_set() -> None:
    named = set(re.findall(r"^# ([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    read = set()
    for path in (*(ROOT / "clbench").rglob("*.py"), *(ROOT / "scripts").glob("*.sh")):
        read |= set(re.findall(r"""(?:environ\S*?["']|getenv\(["']|\$\{)([A-Z_]+)""", path.read_text()))
    ours = {name for name in read if name.startswith(("CLBENCH_", "LIBERO_", "HF_", "WANDB_", "MUJOCO_"))}
    within = {"CLBENCH_ROOT", "CLBENCH_PYTHON", "LIBERO_CONFIG_PATH"}  # set by clbench itself, for its own processes
    in_the_environment = {"CLBENCH_ENV_FILE"}  # in the file it would come too late; the first lines tell of it
    assert ours >= {"CLBENCH_DEBUG", "HF_LEROBOT_HOME", "MUJOCO_GL"}
    assert ours - within - in_the_environment <= named


def test_env_example_only_names_variables_in_comments() -> None:
    """Copied as it is, it sets nothing."""
    for line in (ROOT / ".env.example").read_text().splitlines():
        assert not line.strip() or line.startswith("#"), line


# --------------------------------------------------------------------------------------- active environments


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX", "PATH"])
def test_an_active_environment_is_respected(project: Project, tmp_path: Path, variable: str) -> None:
    active = tmp_path / "active"
    python = fake_python(active / "bin/python", 12)
    (active / "has-clbench").touch()
    value = f"{active}/bin:{project.env['PATH']}" if variable == "PATH" else str(active)
    result = project.run(**{variable: value})
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(python)
    assert not project.starts("uv")
    assert not project.venv.exists()


def test_an_active_environment_without_clbench_is_left_alone(project: Project, tmp_path: Path) -> None:
    active = tmp_path / "active"
    fake_python(active / "bin/python", 12)
    fake_python(project.bin / "python3.12", 12)
    result = project.run(VIRTUAL_ENV=str(active))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(project.venv / "bin/python")
    assert f"not installed in the active environment {active}" in result.stderr
    assert {path.name for path in active.iterdir()} == {"bin"}


@pytest.fixture(scope="module")
def real_env(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real, empty virtual environment."""
    path = tmp_path_factory.mktemp("real") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(path)], check=True)
    return path


@pytest.mark.parametrize(
    ("installed", "where", "respected"),
    [
        (("clbench", "torch", "lerobot"), "package", True),
        (("clbench", "torch", "lerobot"), "this checkout", True),
        (("clbench", "torch", "lerobot"), "another checkout", False),
        (("clbench", "torch"), "package", False),
        (("torch", "lerobot"), "nowhere", False),
    ],
)
def test_what_counts_as_installed(
    project: Project, real_env: Path, installed: tuple[str, ...], where: str, respected: bool
) -> None:
    """The probe, on a real interpreter, started in a checkout whose clbench and egg-info lie at hand."""
    site = next(real_env.glob("lib/python3.*/site-packages"))
    shutil.rmtree(site)
    site.mkdir()
    metadata = "Metadata-Version: 2.1\nName: {}\nVersion: 1.0\n"
    for name in installed:
        info = site / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(metadata.format(name))
    other = project.root.parent / "other"
    for folder in (project.root, other, *([site] if where == "package" else [])):
        (folder / "clbench").mkdir(parents=True)
        (folder / "clbench/__init__.py").touch()
    (project.root / "clbench.egg-info").mkdir()
    (project.root / "clbench.egg-info/PKG-INFO").write_text(metadata.format("clbench"))
    if where.endswith("checkout"):
        (site / "editable.pth").write_text(str(project.root if where.startswith("this") else other))

    result = project.run(f'source "$1"; _clb_python_has_clbench "{real_env}/bin/python"', PYTHONPATH=str(project.root))
    assert (result.returncode == 0) is respected, result.stderr
    assert result.stdout.strip() == (f"{real_env}/bin/python" if respected else "")
