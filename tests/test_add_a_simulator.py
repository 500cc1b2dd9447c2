"""docs/add_a_simulator.md: its example is installed as a package, makes demonstrations, and is registered by hand."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clbench import registry
from clbench.config.compose import compose
from clbench.data.experts.base import episode_expert
from clbench.data.make import run_episode
from clbench.envs.base import SimulatorFamily
from clbench.envs.making import family, instruction, make_simulator, simulator_versions
from clbench.errors import UserError
from clbench.streams.stream import checked_order

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "add_a_simulator.md").read_text()
SPEC = {"type": "point", "task": "go-left"}


def blocks(language: str) -> list[str]:
    """The page's blocks of a language, without what indents them."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, text in found]


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path with the example's module and its stream."""
    (tmp_path / "my_simulators.py").write_text(blocks("python")[0])
    (tmp_path / "points.yaml").write_text(blocks("yaml")[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("my_simulators", None)
    for axis in ("simulators", "experts"):
        registry.register(axis, "point", None)


@pytest.fixture
def installed(code: Path) -> Path:
    """The same, installed with the page's entry points."""
    groups = tomllib.loads(blocks("toml")[0])["project"]["entry-points"]
    lines = [line for group, points in groups.items() for line in (f"[{group}]", *map(" = ".join, points.items()))]
    info = code / "my_simulators-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-simulators\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return code


def test_an_installed_package_brings_simulators(installed: Path) -> None:
    entry = registry.entries("simulators")["point"]
    assert entry.origin == "my-simulators 1.0" and "my_simulators" not in sys.modules
    described = registry.describe(entry)
    assert described.text == "A point in the plane that is pushed to a goal." and described.needs == ("numpy",)
    config, _ = compose(
        model="dit_dec_tiny", algorithms=["seqfft"], dataset=str(installed / "points.yaml"), registered=["seqfft"]
    )
    assert checked_order(config.dataset) == ["go-left", "go-right"]
    assert instruction(SPEC) == "Move to the goal on the left"
    example = ROOT / "docs" / "example_plugin" / "clbench_example" / "point.py"  # test_example_plugin makes its data
    assert example.read_text() == blocks("python")[0]


def test_one_is_registered_for_this_process(code: Path) -> None:
    names: dict[str, Any] = {}
    exec(blocks("python")[0], names)
    with pytest.raises(UserError, match="unknown environment type 'point'"):
        make_simulator(SPEC)
    for block in blocks("python")[1:]:
        exec(block, names)
    assert names["observation"]["observation.state"].shape == (4,)
    assert registry.entries("simulators")["point"].origin == "this process"
    assert simulator_versions("point") == {"numpy": np.__version__}
    simulator = make_simulator(SPEC)
    expert = episode_expert(SPEC, simulator)
    states, actions, success = run_episode(simulator, expert, 0, 50, 0, 0.1, np.random.default_rng(0))
    assert success and states.shape == (len(actions), 4) and actions.shape[1] == 2
    with pytest.raises(UserError, match=r"point has no task 'go-letf'. Did you mean 'go-left'"):
        make_simulator({"type": "point", "task": "go-letf"})
    with pytest.raises(UserError, match="cannot be rendered"):
        make_simulator({**SPEC, "render": {"size": 64}})


def test_the_page_names_every_attribute_of_a_family() -> None:
    for name in SimulatorFamily.__annotations__:
        assert f"`{name}`" in PAGE and f"        {name}: " in (SimulatorFamily.__doc__ or ""), name


@pytest.mark.parametrize(
    ("registered", "message"),
    [
        (type("Short", (SimulatorFamily,), {"fps": 10, "max_steps": 5}), "Short .* does not set state_dim, action_dim"),
        (dict, "not a subclass of SimulatorFamily"),
        (len, "not a subclass of SimulatorFamily"),
    ],
)
def test_what_is_no_family_is_refused(registered: Any, message: str) -> None:
    registry.register("simulators", "wrong", registered)
    try:
        with pytest.raises(UserError, match=message):
            family("wrong")
    finally:
        registry.register("simulators", "wrong", None)


def test_what_a_family_needs_is_named_when_it_is_missing() -> None:
    class Missing(SimulatorFamily):
        fps = state_dim = action_dim = max_steps = 1
        needs = ("numpy", "no-such-distribution")
        install = "Install it."

    with pytest.raises(UserError, match=r"^'x' needs no-such-distribution, which is not installed\. Install it\.$"):
        Missing("x").versions()


def test_a_type_without_experts_says_so() -> None:
    with pytest.raises(UserError, match="environment type 'point' has no scripted experts"):
        episode_expert(SPEC, None)  # type: ignore[arg-type]
