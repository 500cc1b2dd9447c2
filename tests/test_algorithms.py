"""What holds for every algorithm (clbench.testing), driven by the table in tests/algorithm_cases.py."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from clbench import registry
from clbench.registry import ALGORITHMS
from clbench.testing import AlgorithmTests, Case
from tests import learners
from tests.algorithm_cases import CASES
from tests.conftest import ROOT
from tests.readme import example

VARIANTS = [c.label for c in CASES if c.label != c.name]  # of settings, and combinations


def test_every_registered_algorithm_has_a_case() -> None:
    assert set(ALGORITHMS) == {c.name for c in CASES if isinstance(c.name, str)}


class _Tests(AlgorithmTests):
    """The table, with what variants of settings and combinations repeat left to the slow tests."""

    test_learns = pytest.mark.slow_for(*VARIANTS)(AlgorithmTests.test_learns)
    test_resumed_equals_uninterrupted = pytest.mark.slow_for(*VARIANTS)(
        AlgorithmTests.test_resumed_equals_uninterrupted
    )

    @pytest.fixture(scope="class")
    def toy_root(self, toy_data: Path) -> Path:
        return toy_data

    @pytest.fixture(scope="class", autouse=True)
    def _own_bases(self) -> None:
        """This suite's are temporary already (conftest.py), and shared."""

    @pytest.mark.slow_for(*VARIANTS, "rehearsal", "weighted")
    @pytest.mark.parametrize("every", [7, pytest.param(3, marks=pytest.mark.slow)])
    def test_stopped_anywhere_and_resumed_equals_uninterrupted(
        self, case: Case, run: Path, toy_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
    ) -> None:
        super().test_stopped_anywhere_and_resumed_equals_uninterrupted(
            case, run, toy_root, tmp_path, monkeypatch, every
        )


class TestAlgorithms(_Tests):
    cases = CASES


class TestOtherSources(_Tests):
    """Phases on a memory alone, and on samples that are computed from the present weights; weighted samples."""

    cases = (
        Case("rehearsal", stores_exemplars=True),
        Case("onpolicy"),
        Case("weighted", {"selection": "reservoir"}, stores_exemplars=True),
    )
    test_learns = test_trains_what_it_says_and_nothing_else = None  # type: ignore[assignment]
    test_eval_view_restores_the_policy = test_checkpoints_hold_no_pickle = None  # type: ignore[assignment]
    test_same_command_twice_gives_the_same_bytes = None  # type: ignore[assignment]

    @pytest.fixture(scope="class", autouse=True)
    def _known(self) -> Iterator[None]:
        with learners.registered():
            yield


class TestTheReadmesAlgorithm(_Tests):
    cases = (Case("l2anchor", {"strength": 10.0}),)

    @pytest.fixture(scope="class", autouse=True)
    def _known(self) -> Iterator[None]:
        registry.register("algorithms", "l2anchor", example().L2Anchor)
        yield
        registry.register("algorithms", "l2anchor", None)


def test_the_pages_test_of_the_mathematics_passes_and_notices_faults(tmp_path: Path) -> None:
    """docs/add_an_algorithm.md's, for README's algorithm as it is, and with two faults in it."""
    page = (ROOT / "docs" / "add_an_algorithm.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n(# test_l2anchor\.py.*?)```", page, flags=re.DOTALL)
    right = example().L2Anchor

    class Doubled(right):  # type: ignore[misc, valid-type]
        def compute_penalty(self, model: nn.Module) -> Any:
            penalty = super().compute_penalty(model)
            return None if penalty is None else 2 * penalty

    class Forgetful(right):  # type: ignore[misc, valid-type]
        def compute_penalty(self, model: nn.Module) -> None:
            return None

    for number, method in enumerate((right, Doubled, Forgetful)):
        module = types.ModuleType("my_package.l2anchor")
        module.L2Anchor = method  # type: ignore[attr-defined]
        names: dict[str, Any] = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "my_package", types.ModuleType("my_package"))
            patch.setitem(sys.modules, "my_package.l2anchor", module)
            exec(compile(source, "add_an_algorithm.md", "exec"), names)
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            with nullcontext() if method is right else pytest.raises(AssertionError, match="not close"):
                names["test_l2anchor_is_a_plain_loop"](folder)
        finally:
            registry.register("algorithms", "l2anchor", None)
