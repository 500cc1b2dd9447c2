"""Training gives the weights that it gave when clbench.numerics.NUMERICS was last raised.

After a change that is meant: raise NUMERICS, and write tests/numerics.json anew with `python -m tests.test_numerics`.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from clbench.checkpoints import run_folder
from clbench.checkpoints.policy_io import load_policy
from clbench.checkpoints.run_folder import checkpoint_folder
from clbench.io import read_json, write_json
from clbench.numerics import NUMERICS
from clbench.testing import PLAIN_SGD, make_toy_root, toy_config
from clbench.training.trainer import train

RECORDED = Path(__file__).with_name("numerics.json")
RUNS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "er": ({"name": "er", "buffer_size_per_task": 10}, ()),
    "ewc-encdec": ({"name": "ewc", "ewc_lambda": 10.0, "fisher_batches": 2}, ("policy.type=dit_encdec",)),
}


def trained(label: str, data: Path, out: Path) -> dict[str, list[float]]:
    """Of every parameter of a run's last checkpoint its norm and three of its numbers, those of keys' biases apart."""
    section, own = RUNS[label]
    config = toy_config(data, section, f"output_dir={out}", "pretrain.steps=5", *PLAIN_SGD, *own)
    folder = checkpoint_folder(train(config, label), 2)
    found = {}
    for name, p in load_policy(folder / "policy").policy.named_parameters():
        flat = p.detach().double().flatten()
        if name.endswith("kv.bias"):
            flat = flat[len(flat) // 2 :]  # a bias of keys has no effect (softmax), so Adam moves it by rounding alone
        picked = flat[torch.linspace(0, len(flat) - 1, 3).long()]
        found[name] = [float(f"{v:.7g}") for v in (flat.norm(), *picked)]
    return found


@pytest.mark.parametrize("label", RUNS)
def test_weights_are_as_recorded(label: str, toy_data: Path, tmp_path: Path) -> None:
    recorded = read_json(RECORDED)
    assert recorded["numerics"] == NUMERICS, "write tests/numerics.json anew: see this file's docstring"
    found = trained(label, toy_data, tmp_path)
    assert found.keys() == recorded[label].keys()
    for name, values in found.items():
        assert values == pytest.approx(recorded[label][name], rel=1e-5, abs=1e-5), (
            f"{name}: the same command trains other weights. If that is meant, raise NUMERICS and record anew."
        )


def test_the_manifest_says_which_version(
    toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a run that another version goes on with."""
    config = toy_config(toy_data, {"name": "seqfft"}, f"output_dir={tmp_path}", "pretrain.steps=5")
    folder = train(config, "r")
    assert read_json(folder / "manifest.json")["numerics"] == NUMERICS
    shutil.rmtree(checkpoint_folder(folder, 2))
    monkeypatch.setattr(run_folder, "numerics", lambda kind: NUMERICS + 1)
    train(config, "r", resume=True)
    assert read_json(folder / "manifest.json")["numerics"] == f"{NUMERICS}, then {NUMERICS + 1}"
    assert "begun by a version with different numerics" in capsys.readouterr().err


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        root = make_toy_root(Path(folder) / "data")
        write_json(RECORDED, {"numerics": NUMERICS, **{r: trained(r, root, Path(folder) / r) for r in RUNS}})
    sys.exit(0)
