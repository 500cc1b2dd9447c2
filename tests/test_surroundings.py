"""Containers: a home, caches or a temporary folder that cannot be written, and a locale without our characters."""

from __future__ import annotations

import io
import os
import sys
import tempfile
from pathlib import Path

import pytest
from huggingface_hub.errors import HFValidationError
from lerobot.datasets import LeRobotDatasetMetadata

from clbench import surroundings
from clbench.checkpoints.policy_io import policy_config
from clbench.data.frames import StreamFrames
from clbench.errors import UserError
from clbench.streams.stream import build_stream
from clbench.surroundings import settle
from clbench.terminal import show
from clbench.testing.toy import toy_config

CACHES = ("HF_HOME", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "MPLCONFIGDIR", "XDG_CACHE_HOME", "TORCH_HOME",
          "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "TRITON_CACHE_DIR", "XDG_CONFIG_HOME", "XDG_DATA_HOME")  # fmt: skip


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's home, with nothing set."""
    for name in (*CACHES, "TMPDIR"):
        monkeypatch.setenv(name, "x")  # to be put back
        monkeypatch.delenv(name)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("CLBENCH_CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def deny(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    """Root may write everywhere: these count as not writable."""
    allowed = surroundings._writable
    monkeypatch.setattr(
        surroundings, "_writable", lambda f: not any(f.is_relative_to(d) for d in folders) and allowed(f)
    )


def test_nothing_changes_where_all_can_be_written(home: Path) -> None:
    before = dict(os.environ)
    settle()
    assert dict(os.environ) == before and not (home.parent / "cache").exists() and not list(home.iterdir())


@pytest.mark.parametrize("missing", ["/proc/nohome", "~"])
def test_a_home_that_is_missing_is_given(home: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setenv("HOME", missing)
    settle()
    assert os.environ["HOME"] == str(home.parent / "cache" / "libraries" / "home")
    assert Path(os.environ["HOME"]).is_dir() and "HF_HOME" not in os.environ


def test_caches_in_a_home_that_is_read_only_go_elsewhere(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deny(monkeypatch, home)
    settle()
    given = [os.environ.get(n) for n in ("HF_HOME", "MPLCONFIGDIR", "XDG_CACHE_HOME", "TRITON_CACHE_DIR")]
    assert all(g and Path(g).is_dir() and home.parent / "cache" in Path(g).parents for g in given), given
    assert os.environ["HOME"] == str(home)


def test_models_in_a_read_only_image_are_still_read(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = home / ".cache" / "huggingface"
    models.mkdir(parents=True)
    deny(monkeypatch, home)
    settle()
    assert os.environ["HF_HOME"] == str(models)
    assert home not in Path(os.environ["HF_DATASETS_CACHE"]).parents


def test_where_the_cache_cannot_be_written_either_a_folder_of_ones_own_is_taken(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    deny(monkeypatch, home, tmp_path / "cache")
    settle()
    assert tmp_path / "tmp" in Path(os.environ["HF_HOME"]).parents


def test_a_folder_that_another_user_may_have_made_is_not_taken(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not for what is in a folder within it either."""
    shared = tmp_path / "tmp" / f"clbench-{os.getuid()}"
    shared.mkdir(parents=True)
    shared.chmod(0o777)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    deny(monkeypatch, tmp_path / "cache")
    made = surroundings._made("huggingface/modules")
    assert made.is_dir() and made.parts[-2:] == ("huggingface", "modules") and not made.is_relative_to(shared)
    assert made.parent.parent.stat().st_mode & 0o777 == 0o700 and list(shared.iterdir()) == []


def test_a_temporary_folder_that_is_missing_is_replaced(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/nowhere/at/all")
    settle()
    assert Path(os.environ["TMPDIR"]).is_dir()

    def none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    settle()
    assert os.environ["TMPDIR"] == tempfile.tempdir == str(home.parent / "cache" / "libraries" / "tmp")


def test_a_locale_without_our_characters(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="latin-1"))
    settle()
    show("a → b")
    assert out.getvalue() == b"a ? b\n"


def test_a_set_on_this_machine_is_never_asked_of_a_hub(toy_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise FileNotFoundError("/home/nobody/.cache/huggingface")  # as where a cache cannot be made

    config = toy_config(toy_data, {"name": "seqfft"})
    monkeypatch.setattr(LeRobotDatasetMetadata, "_load_metadata", missing)
    with pytest.raises(UserError, match=r"cannot open the data set in .*stream: /home/nobody/\.cache") as e:
        StreamFrames([v.tasks for v in build_stream(config.dataset).visits], policy_config(config.policy, "cpu"))
    assert isinstance(e.value.__cause__, HFValidationError)  # refused before anything is sent
