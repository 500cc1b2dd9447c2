"""PackNet: masks on a hand-made case over three tasks, weights frozen for ever, and the task's view."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from clbench.algorithms.build import build_algorithm
from clbench.algorithms.packnet import PackNet, keep_largest, matrices
from clbench.checkpoints.policy_io import load_policy
from clbench.checkpoints.run_folder import checkpoint_folder
from clbench.checkpoints.state import load_state
from clbench.evaluation.evaluate import evaluate
from clbench.io import read_json, read_jsonl
from clbench.report import build_report
from clbench.testing.toy import toy_config
from clbench.training.trainer import train


def test_keeps_the_largest_free_weights() -> None:
    w = torch.tensor([[3.0, -5.0, 1.0], [2.0, -2.0, 9.0]])
    free = torch.tensor([[True, True, True], [True, True, False]])
    assert keep_largest(w, free, 0.4).tolist() == [[True, True, False], [False, False, False]]
    assert keep_largest(w, free, 0.6).tolist() == [[True, True, False], [True, False, False]]  # a tie: the earlier one
    assert not keep_largest(w, free, 0.0).any() and torch.equal(keep_largest(w, free, 1.0), free)


def test_matrices_are_the_weights_of_linear_attention_and_convolution_layers() -> None:
    """Attention keeps its projections as parameters of its own: one, or three where keys and values differ in width."""
    policy = nn.ModuleDict(
        {
            "same": nn.MultiheadAttention(4, 2, add_bias_kv=True),
            "other": nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
            "conv": nn.Conv2d(3, 4, 2),
            "up1": nn.ConvTranspose1d(3, 4, 2),
            "up2": nn.ConvTranspose2d(3, 4, 2),
            "norm": nn.LayerNorm(4),
            "words": nn.Embedding(7, 4),
            "frozen": nn.Linear(4, 4).requires_grad_(False),
        }
    )
    assert {n: tuple(p.shape) for n, p in matrices(policy).items()} == {
        "same.in_proj_weight": (12, 4),  # not bias_k and bias_v
        "same.out_proj.weight": (4, 4),
        "other.q_proj_weight": (4, 4),
        "other.k_proj_weight": (4, 3),
        "other.v_proj_weight": (4, 5),
        "other.out_proj.weight": (4, 4),
        "conv.weight": (4, 3, 2, 2),
        "up1.weight": (3, 4, 2),  # torch stores a transposed convolution's input channels first
        "up2.weight": (3, 4, 2, 2),
    }


def test_three_tasks_by_hand() -> None:
    """Eight weights, half of the free ones kept by each task; numbers worked out on paper."""
    policy = nn.Sequential(nn.Linear(8, 1))
    packnet = PackNet(PackNet.Config(prune_ratio=0.5))
    visits = [SimpleNamespace(k=k, task=f"t{k}") for k in range(3)]
    ctx: Any = SimpleNamespace(policy=policy, k=0, stream=SimpleNamespace(visits=visits), log=lambda *a, **k: None)
    packnet.bind(ctx)
    trained = [
        [8.0, -7.0, 6.0, 5.0, -4.0, 3.0, 2.0, 1.0],  # keeps 8 -7 6 5
        [0.0, 0.0, 0.0, 0.0, 0.5, -9.0, 7.0, 1.0],  # of the free: keeps -9 7
        [0.0, 0.0, 0.0, 0.0, 0.2, 0.0, 0.0, -0.3],  # keeps -0.3
    ]
    owners = [
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 2, 2, 0],
        [1, 1, 1, 1, 0, 2, 2, 3],
    ]
    after = [
        [8.0, -7.0, 6.0, 5.0, 0.0, 0.0, 0.0, 0.0],
        [8.0, -7.0, 6.0, 5.0, 0.0, -9.0, 7.0, 0.0],
        [8.0, -7.0, 6.0, 5.0, 0.0, -9.0, 7.0, -0.3],
    ]
    weight = policy[0].weight
    for k in range(3):
        ctx.k, ctx.visit = k, visits[k]
        packnet._hold_owned(ctx)
        with torch.no_grad():
            free = packnet.owner["0.weight"] == 0
            weight.copy_(torch.where(free, torch.tensor([trained[k]]), weight))
        packnet._prune(ctx)
        packnet._release(ctx)
        packnet.on_task_end(ctx)
        assert packnet.owner["0.weight"].tolist() == [owners[k]]
        assert weight.tolist() == [pytest.approx(after[k])]


class Gradients:
    """The gradients of a module without ranks, as `after_backward` gets them."""

    def __init__(self, module: nn.Module) -> None:
        self.parameters = dict(module.named_parameters())

    def names(self) -> list[str]:
        return list(self.parameters)

    def get(self, name: str) -> torch.Tensor | None:
        return self.parameters[name].grad

    def set(self, name: str, value: torch.Tensor) -> None:
        self.parameters[name].grad = value


def test_frozen_weights_count_in_no_gradient() -> None:
    """Neither in the norm that is clipped nor in moments: both are of gradients that are zero there."""
    policy = nn.Sequential(nn.Linear(4, 1))
    packnet = PackNet(PackNet.Config(prune_ratio=0.5))
    visits = [SimpleNamespace(k=k, task=f"t{k}") for k in range(2)]
    ctx: Any = SimpleNamespace(
        policy=policy, k=0, visit=visits[0], stream=SimpleNamespace(visits=visits), log=lambda *a, **k: None
    )
    packnet.bind(ctx)
    packnet._hold_owned(ctx)
    with torch.no_grad():
        policy[0].weight.copy_(torch.tensor([[4.0, -3.0, 2.0, 1.0]]))
    packnet._prune(ctx)
    policy(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).sum().backward()
    packnet.after_backward(policy, Gradients(policy))
    assert policy[0].weight.grad.tolist() == [[1.0, 2.0, 0.0, 0.0]]  # retrained: what this task keeps
    packnet._release(ctx)
    packnet.on_task_end(ctx)
    ctx.k, ctx.visit = 1, visits[1]
    packnet._hold_owned(ctx)
    policy.zero_grad()
    policy(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).sum().backward()
    packnet.after_backward(policy, Gradients(policy))
    assert policy[0].weight.grad.tolist() == [[0.0, 0.0, 3.0, 4.0]]


def test_equal_capacity_gives_every_task_the_same_share(toy_data: Path, tmp_path: Path) -> None:
    config = toy_config(toy_data, {"name": "packnet", "capacity": "equal"}, f"output_dir={tmp_path}")
    folder = train(config, "r")
    owner = load_state(checkpoint_folder(folder, 2), "algorithm")["owner"]
    for name, o in owner.items():
        shares = [(o == k + 1).float().mean() for k in range(3)]
        assert max(abs(s - 1 / 3) for s in shares) < 1 / o.numel() + 1e-6, name
        assert not (o == 0).any()
    log = [r for r in read_jsonl(folder / "log.jsonl") if r["event"] == "packnet_capacity"]
    assert [round(r["free"], 1) for r in log] == [0.7, 0.3, 0.0]


@pytest.fixture(scope="module", params=["adamw", "sgd"])
def hard_case(request: pytest.FixtureRequest, toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all that moves weights without gradients: strong weight decay, momentum, a composed penalty."""
    out = tmp_path_factory.mktemp("packnet")
    config = toy_config(
        toy_data, {"name": ["er", "packnet"], "prune_ratio": 0.5, "buffer_size_per_task": 10}, f"output_dir={out}",
        f"train.optimizer.name={request.param}", "train.optimizer.weight_decay=0.3", "train.optimizer.momentum=0.9",
        "train.optimizer.lr=1e-2", "train.steps=8", "train.gradient_accumulation=2",
    )  # fmt: skip
    return train(config, "r")


def state(folder: Path, k: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    checkpoint = checkpoint_folder(folder, k)
    return (
        load_policy(checkpoint / "policy").policy.state_dict(),
        load_state(checkpoint, "algorithm")["packnet"]["owner"],
    )


def test_owned_weights_never_change_again(hard_case: Path) -> None:
    for k in range(2):
        old, owner = state(hard_case, k)
        for later in range(k + 1, 3):
            new, new_owner = state(hard_case, later)
            for name, value in old.items():
                if name in owner:
                    owned = owner[name] > 0
                    assert torch.equal(new[name][owned], value[owned]), name
                    assert torch.equal(new_owner[name][owned], owner[name][owned])
                else:
                    assert torch.equal(new[name], value), f"{name} (bias, norm or embedding) moved after task 1"


def test_released_weights_are_zero_and_train_again(hard_case: Path) -> None:
    for k in range(3):
        weights, owner = state(hard_case, k)
        assert all((weights[n][o == 0] == 0).all() for n, o in owner.items())
        assert all((weights[n][o == k + 1] != 0).any() for n, o in owner.items() if (o == k + 1).any())


def test_the_task_view_is_the_network_of_that_task(hard_case: Path, toy_data: Path) -> None:
    """With the task's identity, the last checkpoint acts with exactly the weights that the task ended with."""
    checkpoint = checkpoint_folder(hard_case, 2)
    policy = load_policy(checkpoint / "policy").policy
    algorithm = PackNet(PackNet.Config(eval_with_task_id=True))
    algorithm.load_state_dict(load_state(checkpoint, "algorithm")["packnet"])
    assert [algorithm.view_key(j) for j in range(3)] == ["0", "1", "2"]
    before = {n: v.clone() for n, v in policy.state_dict().items()}
    for j in range(3):
        with algorithm.eval_view(policy, j):
            for name, value in state(hard_case, j)[0].items():
                assert torch.equal(policy.state_dict()[name], value), (j, name)
        assert all(torch.equal(before[n], v) for n, v in policy.state_dict().items())


def test_a_revisited_task_uses_its_newest_weights() -> None:
    algorithm = PackNet(PackNet.Config(eval_with_task_id=True))
    algorithm.tasks = ["a", "b", "a"]
    assert [algorithm.view_key(j) for j in range(5)] == ["2", "1", "2", "2", "2"]
    assert PackNet(PackNet.Config()).view_key(0) == ""


def test_both_views_and_the_bases_tasks_are_evaluated_and_shown(toy_data: Path, tmp_path: Path) -> None:
    config = toy_config(
        toy_data, {"name": "packnet", "eval_with_task_id": False}, f"output_dir={tmp_path}", "train.steps=2",
        "eval.cells=last", "eval.views=[task_id]", "eval.heldout_episodes=1", "dataset.task_order=[0,1]",
        "dataset.pretrain.make.max_steps=20",
    )  # fmt: skip
    folder = train(config, "r")
    evaluate(folder, config, progress=False)
    assert (folder / "eval/views/task_id/matrix.json").is_file()
    heldout = read_json(folder / "eval/heldout/matrix.json")
    assert heldout["tasks"] == ["reach-v3", "door-open-v3"]
    assert len(heldout["success"]) == 1 and len(heldout["base"]) == 2
    rows = (build_report([folder]).parent / "table.md").read_text().splitlines()
    assert [r.split("|")[1].strip() for r in rows[2:4]] == ["packnet (no task id)", "packnet (task id)"]
    assert "pretraining tasks" in rows[0] and "→" in rows[2]


def test_each_view_acts_under_its_own_settings(toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers get the view's settings; tasks outside the stream are never seen through a stream task's mask."""
    config = toy_config(
        toy_data, {"name": "packnet", "eval_with_task_id": True}, f"output_dir={tmp_path}", "train.steps=2",
        "eval.cells=last", "eval.views=[no_task_id]", "eval.heldout_episodes=1",
    )  # fmt: skip
    folder = train(config, "r")
    seen: list[tuple[bool, list[str]]] = []
    algorithm = build_algorithm(config)
    algorithm.load_state_dict(load_state(checkpoint_folder(folder, 2), "algorithm"))

    def record(jobs: Any, settings: Any, *rest: Any) -> None:
        ids = sorted({e["task_id"] for job in jobs for e in job.episodes})
        seen.append((settings.config.algorithm["eval_with_task_id"], [algorithm.view_key(i) for i in ids]))

    monkeypatch.setattr("clbench.evaluation.evaluate._play", record)
    evaluate(folder, config, progress=False)
    assert seen == [(True, ["0", "1", "2"]), (False, ["0", "1", "2"]), (True, ["2", "2"])]


def test_heldout_tasks_need_a_base_of_our_own(toy_data: Path) -> None:
    with pytest.raises(ValueError, match="the base's own pretraining tasks"):
        toy_config(toy_data, {"name": "er"}, "eval.heldout_episodes=1", "policy.path=somewhere")


def test_an_unknown_view_is_refused_before_training(toy_data: Path) -> None:
    with pytest.raises(ValueError, match=r"not a view of packnet: it has task_id, no_task_id"):
        build_algorithm(toy_config(toy_data, {"name": "packnet"}, "eval.views=[task]"))
    with pytest.raises(ValueError, match=r"not a view of er: it has none"):
        build_algorithm(toy_config(toy_data, {"name": "er"}, "eval.views=[task_id]"))


@pytest.mark.parametrize(
    ("keys", "override", "words"),
    [
        ({"prune_ratio": 1.0}, "seed=0", "prune_ratio must be between 0 and 1"),
        ({"capacity": "half"}, "seed=0", "must be ratio or equal"),
        ({"retrain_steps": 0}, "seed=0", "retrain_steps must be at least 1"),
        ({}, "train.optimizer_across_tasks=carried", "must be fresh"),
    ],
)
def test_impossible_settings_are_refused(keys: dict[str, Any], override: str, words: str, toy_data: Path) -> None:
    with pytest.raises(ValueError, match=words):
        build_algorithm(toy_config(toy_data, {"name": "packnet", **keys}, override))
