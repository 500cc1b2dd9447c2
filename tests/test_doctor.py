"""`clbench doctor`: says what is missing and how to get it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from clbench import doctor
from clbench.cli import main


def test_names_every_stream_and_how_to_make_its_data(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CLBENCH_DATA_ROOT", str(tmp_path))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "clbench data make metaworld_cw10" in out and "torch 2" in out
    assert "nothing essential is missing" in out


def test_says_what_the_env_file_sets_but_no_values(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "no .env" in next(doctor.settings()).what
    file = tmp_path / "mine.env"
    file.write_text("HF_TOKEN=hf_secret\nCLBENCH_MODEL_ROOT=/here\nEMPTY=\n")
    monkeypatch.setenv("CLBENCH_ENV_FILE", str(file))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("CLBENCH_MODEL_ROOT", "/there")
    used, lost = doctor.settings()
    assert used.what == f"{file} sets HF_TOKEN"
    assert "CLBENCH_MODEL_ROOT" in lost.what and "the environment's are used" in lost.remedy


def test_what_is_essential_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name in ("lerobot", "deepspeed"):
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(doctor, "version", version)
    assert doctor.doctor() == 1
    lines = capsys.readouterr().out.splitlines()
    assert any("MISSING lerobot" in line and "scripts/test.sh" in line for line in lines)
    assert any("deepspeed is not installed" in line and "extra 'deepspeed'" in line for line in lines)


def test_a_folder_that_cannot_be_written_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    found = [f for f in doctor.folders() if f.state == "missing"]
    assert len(found) == 3 and all("set CLBENCH_" in f.remedy for f in found)
