"""MIR: its ranking against brute force, the virtual step undone bit for bit, and what ends up in a batch."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from clbench.algorithms.build import build_algorithm
from clbench.algorithms.hooks import Context
from clbench.algorithms.mir import MIR, virtual_step
from clbench.data.frames import Batch, StreamFrames, select
from clbench.io import read_jsonl
from clbench.policies.view import PolicyView
from clbench.streams.stream import build_stream
from clbench.testing.toy import toy_config
from clbench.training.trainer import train
from tests.algorithm_cases import SMALL_MIR
from tests.test_policies import build


def context(toy_data: Path, **algorithm: Any) -> tuple[MIR, Context]:
    """MIR in its second task, with a memory of the first."""
    config = toy_config(toy_data, {"name": "mir", **SMALL_MIR, **algorithm})
    loaded = build("dit_dec", toy_data)
    stream = build_stream(config.dataset)
    frames = StreamFrames([v.tasks for v in stream.visits], loaded.policy.config)
    loss = PolicyView(loaded.policy, loaded.policy, loaded.preprocessor, nullcontext)
    ctx = Context(
        stream=stream, policy=loaded.policy, frames=frames, train=config.train, seed=0, device=torch.device("cpu"),
        view=loss, log=lambda *a, **k: None,
    )  # fmt: skip
    mir = build_algorithm(config)
    assert isinstance(mir, MIR)
    mir.bind(ctx)
    mir.on_task_end(ctx)
    ctx.k, ctx.phase = 1, "train"
    mir.on_task_start(ctx)
    return mir, ctx


def step_batch(ctx: Context, mir: MIR, step: int) -> Batch:
    """What the training loop sets before modify_batch; returns the current samples."""
    B = ctx.train.batch_size
    plan = mir.plan_batch(ctx, step)
    assert plan is not None
    refs = torch.stack([torch.full((B,), ctx.k), torch.arange(B)], 1)
    batch = ctx.frames.fetch(refs)
    ctx.step, ctx.global_batch, ctx.positions, ctx.planned_total = step, B, torch.arange(B), len(plan.refs)
    ctx.step_batch = batch
    ctx.planned = {**ctx.frames.fetch(plan.refs), "slot": torch.arange(len(plan.refs))} if len(plan.refs) else None
    return {**batch, "slot": torch.arange(B)}


def test_ranking_is_that_of_brute_force(toy_data: Path) -> None:
    mir, ctx = context(toy_data, mir_candidate_size=9, mir_top_k=4, mir_virtual_lr=0.05)
    policy, loss = ctx.policy, ctx.view
    before = {n: v.clone() for n, v in policy.state_dict().items()}
    batch = step_batch(ctx, mir, 0)
    plan = mir.plan_batch(ctx, 0)
    assert plan is not None and plan.shared and len(plan.refs) == 9
    mir.modify_batch(batch, 1)
    assert all(torch.equal(before[n], v) for n, v in policy.state_dict().items())

    other = copy.deepcopy(policy)  # the same with an optimizer and one candidate at a time
    again = PolicyView(other, other, loss.processor, nullcontext)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.05)
    draw = again.draw(ctx.train.batch_size, ctx.generator("mir-gradient", 0))
    again.per_sample(ctx.step_batch, draw).mean().backward()
    optimizer.step()
    candidates = ctx.frames.fetch(plan.refs)
    draw = again.draw(9, ctx.generator("mir-losses", 0))
    delta = []
    for i in range(9):
        row, one = torch.tensor([i]), {n: v[i : i + 1] for n, v in draw.items()}
        with torch.no_grad():
            sample = select(candidates, row)
            delta.append(float(again.per_sample(sample, one) - loss.per_sample(sample, one)))
    best = sorted(range(9), key=lambda i: -delta[i])[:4]
    assert {tuple(r) for r in mir.chosen.tolist()} == {tuple(plan.refs[i].tolist()) for i in best}


def test_virtual_step_is_undone_bit_for_bit_also_after_an_exception(toy_data: Path) -> None:
    policy = build("dit_dec", toy_data).policy.to(torch.bfloat16)
    parameters = dict(policy.named_parameters())
    before = {n: p.detach().clone() for n, p in parameters.items()}
    gradient = {n: torch.randn_like(p) for n, p in parameters.items()}

    def moved() -> bool:
        return any(not torch.equal(before[n], p) for n, p in parameters.items())

    with virtual_step(parameters, gradient, 0.1):
        assert moved()
    assert not moved()
    with pytest.raises(RuntimeError, match="inside"), virtual_step(parameters, gradient, 0.1):
        raise RuntimeError("inside")
    assert not moved()


@pytest.mark.parametrize("mode", ["replace", "append"])
def test_batches_hold_only_what_was_chosen(mode: str, toy_data: Path) -> None:
    mir, ctx = context(toy_data, mode=mode, mir_refresh_interval=3, replay_batch_ratio=0.5)
    B, m = ctx.train.batch_size, 4
    chosen = []
    for step in range(4):
        mixed = mir.modify_batch(step_batch(ctx, mir, step), 1)
        chosen.append(mir.chosen)
        stored = ctx.frames.fetch(mir.chosen)["observation.state"]
        replayed = [row for row in mixed["observation.state"] if any(torch.equal(row, s) for s in stored)]
        assert len(replayed) == m
        assert len(mixed["task"]) == (B if mode == "replace" else B + m)
        assert sorted(mixed["slot"].tolist()) == list(range(len(mixed["task"])))
    assert torch.equal(chosen[0], chosen[2]) and not torch.equal(chosen[0], chosen[3])  # a new choice at step 3


def test_the_choice_survives_a_checkpoint_between_two_refreshes(toy_data: Path) -> None:
    mir, ctx = context(toy_data, mir_refresh_interval=10)
    mir.modify_batch(step_batch(ctx, mir, 0), 1)
    again, other = context(toy_data, mir_refresh_interval=10)
    again.load_state_dict(mir.state_dict())
    one, two = (a.modify_batch(step_batch(c, a, 1), 1) for a, c in ((mir, ctx), (again, other)))
    assert torch.equal(one["observation.state"], two["observation.state"])


def test_first_choices_are_logged_and_only_from_the_second_task_on(toy_data: Path, tmp_path: Path) -> None:
    config = toy_config(toy_data, {"name": "mir", **SMALL_MIR, "mir_refresh_interval": 2}, f"output_dir={tmp_path}")
    choices = [r for r in read_jsonl(train(config, "r") / "log.jsonl") if r["event"] == "mir_choice"]
    assert [(r["k"], r["step"]) for r in choices] == [(1, 0), (1, 2), (2, 0), (2, 2)]
    assert all(r["delta_chosen"] >= r["delta_mean"] for r in choices)


def test_frozen_parameters_move_in_the_virtual_step_only_when_asked(toy_data: Path) -> None:
    for only in (True, False):
        mir, ctx = context(toy_data, mir_lora_only=only)
        name, frozen = next(iter(ctx.policy.named_parameters()))
        frozen.requires_grad_(False)
        seen = []
        original = ctx.view.mean_gradient

        def spy(batch: Any, draw: Any, parameters: Any, parts: int = 1, seen: Any = seen, f: Any = original) -> Any:
            seen.append(set(parameters))
            return f(batch, draw, parameters, parts)

        ctx.view.mean_gradient = spy  # type: ignore[method-assign]
        mir.modify_batch(step_batch(ctx, mir, 0), 1)
        assert (name in seen[0]) is not only
        assert not frozen.requires_grad


def test_fewer_candidates_than_choices_is_a_config_error(toy_data: Path) -> None:
    with pytest.raises(ValueError, match=r"mir_top_k \(9\) must not exceed algorithm.mir_candidate_size \(8\)"):
        build_algorithm(toy_config(toy_data, {"name": "mir", "mir_candidate_size": 8, "mir_top_k": 9}))


def test_warns_when_the_choice_has_to_repeat(toy_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    context(toy_data, replay_batch_ratio=0.5, mir_top_k=2)
    assert "mir_top_k=4 and mir_candidate_size=8" in capsys.readouterr().err
