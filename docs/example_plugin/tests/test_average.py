"""The example's algorithm: the tests that every algorithm passes, and its mathematics."""

import torch

from clbench.testing import PLAIN_SGD, AlgorithmTests, Case, PlainRun, make_toy_root, toy_config
from clbench.training.trainer import train


class TestAverage(AlgorithmTests):
    cases = (Case("example_average", {"share": 0.5}),)


def test_a_task_moves_the_weights_by_its_share(tmp_path):
    data = make_toy_root(tmp_path / "data")
    config = toy_config(data, {"name": "example_average", "share": 0.25}, f"output_dir={tmp_path}", *PLAIN_SGD)
    run = PlainRun(train(config, "run"))
    policy, before = run.policy_before(1), run.weights_after(0)
    for batch, noise in run.steps(1):
        gradients = torch.autograd.grad(run.losses(policy, batch, noise).mean(), list(policy.parameters()))
        with torch.no_grad():
            for p, gradient in zip(policy.parameters(), gradients, strict=True):
                p -= 0.01 * gradient
    for name, after in policy.named_parameters():
        want = 0.75 * before[name] + 0.25 * after.detach()
        torch.testing.assert_close(run.weights_after(1)[name], want, rtol=1e-5, atol=1e-7)
