"""The table in docs/policies.md: LeRobot's policies that can be built here, trained and played by each method."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from clbench.checkpoints.policy_io import load_policy
from clbench.checkpoints.run_folder import checkpoint_folder
from clbench.checkpoints.trusted import trusting
from clbench.config.policy_types import LEROBOT, missing, wants_trust
from clbench.config.schema import Config
from clbench.data.make import make_dataset
from clbench.envs.rendering import libraries
from clbench.errors import UserError
from clbench.evaluation.evaluate import evaluate, run_config
from clbench.io import read_json
from clbench.testing.toy import toy_config
from clbench.training.trainer import train
from tests import tiny_policies

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "policies.md").read_text()
TASKS, BEFORE = ["window-close-v3", "faucet-open-v3"], ["door-close-v3"]
METHODS = {
    "full": {"name": "seqfft"},
    "LoRA": {"name": "seqlora", "merge": False},
    "CLARE": {"name": "clare", "adapter_hidden": 4, "discriminator_hidden": 4, "discriminator_latent": 2,
              "detect_steps": 1, "discriminator_steps": 2},
}  # fmt: skip
RAN = "trained, played"


def table() -> dict[str, list[str]]:
    """The rows of the page's table: type → what was run with each method."""
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", PAGE, flags=re.MULTILINE)
    return {kind: [cell.strip() for cell in rest.split("|")] for kind, rest in rows if kind in LEROBOT}


def test_the_table_has_every_type_and_says_what_is_tried_here() -> None:
    rows = table()
    assert set(rows) == set(LEROBOT)
    for kind, cells in rows.items():
        assert len(cells) == len(METHODS), kind
        assert (cells == [RAN] * 3) == (kind in tiny_policies.BUILT), kind
        if LEROBOT[kind].rewards:
            assert cells == ["learns from rewards"] * 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One demonstration per task, with a camera at 32 pixels."""
    if not libraries():
        pytest.skip("nothing can draw here: neither EGL nor OSMesa is installed")
    root = tmp_path_factory.mktemp("table")
    for name, tasks in (("stream", TASKS), ("pretrain", BEFORE)):
        make_dataset(
            root / name, name=name, env_type="metaworld_pixels", tasks=tasks, demos_per_task=1, seed=0,
            ceiling_episodes=0, workers=1, progress=False, render={"size": 32},
        )  # fmt: skip
    return root


def config(kind: str, method: str, data: Path, out: Path, *overrides: str) -> Config:
    found = toy_config(
        data, dict(METHODS[method]), "dataset.env.type=metaworld_pixels", "render.size=32", f"output_dir={out}",
        f"dataset.tasks=[{','.join(TASKS)}]", f"dataset.pretrain.tasks=[{','.join(BEFORE)}]", "pretrain.steps=3",
        "train.steps=2", "lora.rank=2", "eval.cells=last", *overrides,
    )  # fmt: skip
    found.policy = tiny_policies.section(kind, data)
    if (kind, method) == ("smolvla", "CLARE"):  # the default layers but the last of four, whose output is not read
        found.algorithm["target_modules"] = r".*vlm.*text_model\.layers\.[0-2]\.mlp"
    return found


def test_layers_that_nothing_reads_are_refused(data: Path, tmp_path: Path) -> None:
    last = config("smolvla", "CLARE", data, tmp_path)
    last.algorithm["target_modules"] = r".*vlm.*text_model\.layers\.3\.mlp"
    words = r"phase adapters: what trains .* no influence on the loss"
    with trusting(["smolvla"]), pytest.raises(UserError, match=words):
        train(last, "r")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", tiny_policies.BUILT)
def test_it_trains_and_plays(kind: str, method: str, data: Path, tmp_path: Path) -> None:
    if missing(kind):
        pytest.skip(f"{kind} needs {', '.join(missing(kind))}")
    with trusting([kind] if wants_trust(kind) else []):
        folder = train(config(kind, method, data, tmp_path), "r")
    base = read_json(folder / "manifest.json")["base"]["path"]
    with trusting([str(folder), base]):
        first, last = (load_policy(checkpoint_folder(folder, k) / "policy").policy.state_dict() for k in (0, 1))
        assert any(n not in first or not torch.equal(first[n], v) for n, v in last.items())
        run = run_config(folder)
        evaluate(folder, run, progress=False)
    assert read_json(folder / "eval" / "matrix.json")["episodes"][1] == [1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["LoRA", "CLARE"])
def test_adapters_need_codes_that_are_learned(method: str, data: Path, tmp_path: Path) -> None:
    random = config("vqbet", method, data, tmp_path, "dataset.pretrain=null")
    with pytest.raises(UserError, match=r"'vqbet' yet: VQ-BeT changes its codes .* let them be learned in pretraining"):
        train(random, "r")
