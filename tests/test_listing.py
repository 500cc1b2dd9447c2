"""`clbench list`, and the models that a name can mean."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from clbench import listing, registry
from clbench.cli import main
from clbench.config import folders, policy_types
from clbench.config.compose import compose
from clbench.errors import UserError
from tests.test_folders import away, install, write  # noqa: F401 (a fixture)


def test_every_axis_is_listed_within_100_columns_and_nothing_heavy_is_imported() -> None:
    code = (
        "import sys\nfrom clbench.cli import main\nmain(['list'])\n"
        "print('heavy:', [m for m in ('torch', 'lerobot', 'transformers', 'mujoco') if m in sys.modules])\n"
    )
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[-1] == "heavy: []"
    assert max(map(len, lines)) <= listing.WIDTH
    heads = {line.split()[0].rstrip(":") for line in lines[:-1] if line and not line.startswith(" ")}
    assert heads == {*listing.FILES, *registry.AXES}


@pytest.mark.parametrize("axis", listing.axes())
def test_every_shipped_name_says_what_it_is(axis: str) -> None:
    for item in listing.items(axis):
        assert item.text or item.origin.startswith("lerobot"), f"{axis} {item.name}"


def test_every_shipped_file_begins_with_what_it_is() -> None:
    assert [p for p in folders.SHIPPED.rglob("*.yaml") if len(listing.comment(p)) < 15] == []


def test_an_axis_alone_and_what_plugins_and_users_bring(
    away: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    plugin = install(away / "site", "plug")
    write(plugin, "models/theirs.yaml", "# A wide one.\n# For GPUs; more. And more.\npolicy: {type: groot}\n")
    write(away / "configs", "models/mine.yaml", "policy: {typ: [}\n")
    info = away / "site" / "plug-1.0.dist-info" / "entry_points.txt"
    info.write_text(info.read_text() + "[clbench.algorithms]\nmethod = plug.method:Method\n")
    (away / "site/plug/method.py").write_text('class Method:\n    """Does it."""\n\n    needs = ("no-such-dist",)\n')
    folders.forget()
    assert main(["list", "models"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "theirs plug 1.0 A wide one. [needs camera images, --trust groot, " in out
    assert "mine ./configs [not valid" in out and "algorithms" not in out
    assert main(["list", "algorithms"]) == 0
    assert "method plug 1.0 Does it. [needs no-such-dist (missing)]" in " ".join(capsys.readouterr().out.split())
    assert "plug" not in sys.modules
    assert main(["list", "algoritms"]) == 2
    assert "there is no axis 'algoritms'. Did you mean 'algorithms'?" in capsys.readouterr().err


def test_a_model_is_a_preset_or_a_type() -> None:
    config, lines = compose(model="act", algorithms=["er"], dataset="libero_goal")
    assert config.policy == {"type": "act"} and config.model == "act"
    assert lines[1] == "policy type act with its own defaults"
    assert lines[-1] == "untuned defaults for er (act has no recipe for it here)"
    with pytest.raises(UserError, match=r"unknown model 'dit_dec_tiney'\. Did you mean 'dit_dec_tiny'\? Preset"):
        compose(model="dit_dec_tiney", algorithms=["er"], dataset="libero_goal")
    with pytest.raises(UserError, match=r"'xyz'\. Presets: .*defaults: act, .*--trust TYPE .*pi0.*policy\.path=FOLDER"):
        compose(model="xyz", algorithms=["er"], dataset="libero_goal")


def test_a_policy_that_wants_cameras_is_refused_on_states(tmp_path: Path) -> None:
    states = compose(model="act", algorithms=["er"], dataset="metaworld_quick")[0]
    with pytest.raises(UserError, match=r"'act' needs camera images, but the stream 'metaworld_quick' \(metaworld"):
        policy_types.check_fits(states)
    policy_types.check_fits(compose(model="act", algorithms=["er"], dataset="libero_goal")[0])
    (tmp_path / "config.json").write_text(json.dumps({"type": "vqbet"}))
    states.policy = {"path": str(tmp_path)}
    with pytest.raises(UserError, match="'vqbet' needs camera images"):
        policy_types.check_fits(states)
    states.policy = {"path": str(tmp_path / "none")}
    policy_types.check_fits(states)  # said where it is opened


def test_what_a_type_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_types, "missing", lambda kind: ("timm",))
    with pytest.raises(UserError, match=r"'groot' needs timm, which is not installed: pip install 'lerobot\[groot\]'"):
        policy_types.check_fits(compose(model="groot", algorithms=["er"], dataset="libero_goal")[0])
