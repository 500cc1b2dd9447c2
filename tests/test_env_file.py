"""The two readers of .env, clbench/env_file.py and scripts/bootstrap.sh, and the command that starts with it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from unittest import mock

import pytest

from clbench import env_file
from clbench.cli import main
from clbench.env_file import load_env_file
from clbench.errors import UserError

ROOT = Path(__file__).resolve().parents[1]

NASTY = (
    b'# a comment\nPLAIN=one two  # why\n  export \t QUOTED="a # b" and more\nSINGLE=\'$HOME "x"\'\r\n'
    b"HOMELY=~/data\nQUOTED_HOME='~/data'\nTILDE=~other/x\nJUST_TILDE=~\nEMPTY=\nEMPTY=second\nTWICE=1\nTWICE=2\n"
    b"HASH=#none\nHASH_INSIDE=a#b #c #d\nSPACES=   \nLEADING=  x \nOPEN=\"never closed # x\nOPEN_SINGLE='never\n"
    b'MIXED="it\'s"\nNOTHING=""\nCODE=$(touch witness)`touch witness`\nBACK=a\\nb\\\nNEXT=$PLAIN ${PLAIN}\n'
    b"BAD-NAME=1\n1ST=1\n=1\nNO EQUALS\nKEY =1\nX[0]=1\nPLUS+=1\nEQUALS=a=b=c\nline=1\nkey=2\nvalue=3\nfile=4\n"
    b"UMLAUT=gr\xc3\xbcn\nLATIN=gr\xfcn # x\nWIDE=a\xe3\x80\x80#b\xe3\x80\x80\nNAME\xc3\x84=1\nNUL=a\0b\nCR=a\rb\r\r\n"
    b"TABS=\ta\t# b\nFORM=a\x0c# b\n\x0bVERTICAL=1\nexport=5\nexportA=1\nexport  B=2\nexport\nSET=file\n"
    b"SET_EMPTY=file\nLC_ALL=C.UTF-8\nHOME=/elsewhere\nAFTER=~/x\n\xef\xbb\xbfBOM=1\nLAST=no newline"
)


def by_bash(file: Path, env: dict[str, str]) -> dict[bytes, bytes]:
    """What scripts/bootstrap.sh exports, bash's own variables aside."""
    script = 'set -euo pipefail; source "$1"; _clb_load_env "$2"; exec env -0'
    command = ["bash", "-c", script, "caller", str(ROOT / "scripts" / "bootstrap.sh"), str(file)]
    out = subprocess.run(command, env=env, cwd=file.parent, capture_output=True, check=True)
    assert out.stderr == b""
    pairs = [item.partition(b"=") for item in out.stdout.split(b"\0") if item]
    return {k: v for k, _, v in pairs if k not in (b"_", b"PWD", b"OLDPWD", b"SHLVL", b"CLBENCH_ROOT")}


@pytest.mark.parametrize("locale", [{}, {"LC_ALL": "C"}, {"LC_ALL": "C.UTF-8"}], ids=str)
@pytest.mark.parametrize("home", ["/home/someone", "/home/slash/", ""])
def test_both_readers_set_the_same(tmp_path: Path, locale: dict[str, str], home: str) -> None:
    file = tmp_path / "nasty.env"
    file.write_bytes(NASTY)
    before = {"PATH": os.environ["PATH"], "HOME": home, "SET": "before", "SET_EMPTY": "", **locale}
    there = by_bash(file, before)
    with mock.patch.dict(os.environ, before | {"CLBENCH_ENV_FILE": str(file)}, clear=True):
        load_env_file()
        here = {k: v for k, v in os.environb.items() if k != b"CLBENCH_ENV_FILE"}
    assert here == there
    assert here[b"PLAIN"] == b"one two" and here[b"QUOTED"] == b"a # b" and here[b"TWICE"] == b"1"
    assert here[b"EMPTY"] == b"second" and here[b"SET"] == b"before" and here[b"SET_EMPTY"] == b""
    assert here[b"LATIN"] == b"gr\xfcn" and here[b"line"] == b"1" and here[b"LAST"] == b"no newline"
    assert here[b"HOMELY"] == home.encode() + b"/data" and here[b"AFTER"] == home.encode() + b"/x"
    assert list(tmp_path.iterdir()) == [file], "nothing was executed"


def test_the_command_starts_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.env"
    file.write_text(f"CLBENCH_DATA_ROOT={tmp_path}/from the file\n")
    monkeypatch.setenv("CLBENCH_ENV_FILE", str(file))
    assert main(["data", "check", "metaworld_quick"]) == 2
    assert "from the file" not in capsys.readouterr().err, "what is set already wins"
    monkeypatch.delenv("CLBENCH_DATA_ROOT")
    assert main(["data", "check", "metaworld_quick"]) == 2
    assert f"there is no data set in {tmp_path}/from the file/" in capsys.readouterr().err
    assert os.environ["CLBENCH_DATA_ROOT"] == f"{tmp_path}/from the file", "child processes inherit it"


def test_a_file_that_is_named_must_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for absent in (tmp_path / "absent", tmp_path):
        monkeypatch.setenv("CLBENCH_ENV_FILE", str(absent))
        with pytest.raises(UserError, match="not a readable file"):
            load_env_file()
        assert main(["list"]) == 2
        assert f"clbench: CLBENCH_ENV_FILE={absent} is not a readable file" in capsys.readouterr().err


def test_without_a_name_it_is_the_checkouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env_file, "PROJECT_ROOT", tmp_path)
    assert env_file.env_file() is None, "empty: none"
    monkeypatch.delenv("CLBENCH_ENV_FILE")
    (tmp_path / ".env").write_text("A=1\n")
    assert env_file.env_file() is None, "an installed package is in no checkout"
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "bootstrap.sh").touch()
    assert env_file.env_file() == tmp_path / ".env"
    (tmp_path / ".env").unlink()
    assert env_file.env_file() is None
