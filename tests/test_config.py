"""Configuration: layers, recipes, smoke, redaction. Bad input on the command line is in test_cli.py."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clbench.config.compose import CONFIG_ROOT, _recipe, available, compose, compose_files, override, to_dict, to_yaml
from clbench.config.schema import WandbConfig
from clbench.registry import algorithm_names


def test_later_layers_win() -> None:
    config, files = compose(
        model="dit_encdec_tiny",
        algorithms=["clare"],
        dataset="metaworld_quick",
        overrides=["--train.steps=7", "seed=3"],
    )
    assert config.policy["type"] == "dit_encdec" and config.train.steps == 7 and config.seed == 3
    assert "configs/recipes/clare_metaworld.yaml" in files  # named, because it applies
    assert config.algorithm["adapter_hidden"] == 64  # the recipe's
    assert config.algorithm["expand_threshold"] == 2.5  # the algorithm's


def test_composition_of_algorithms_keeps_both_sets_of_keys() -> None:
    config, _ = compose(model="dit_dec_tiny", algorithms=["er", "clare"], dataset="metaworld_quick")
    assert config.algorithm["name"] == ["er", "clare"]
    assert config.algorithm["replay_batch_ratio"] == 0.3 and config.algorithm["expand_threshold"] == 2.5


def test_written_configuration_composes_to_itself(tmp_path: Path) -> None:
    config, _ = compose(model="dit_dec_tiny", algorithms=["er"], dataset="metaworld_cw10", smoke=True)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    again, _ = compose_files([str(tmp_path / "config.yaml")])
    assert to_dict(again) == to_dict(config)


def every_file() -> Iterator[dict[str, Any]]:
    """Arguments of `compose`: every model, stream and algorithm at least once, and every recipe."""
    same = {"model": "dit_dec_tiny", "algorithms": ["seqfft"], "dataset": "metaworld_quick"}
    yield from ({**same, "model": model} for model in available("models"))
    yield from ({**same, "dataset": dataset} for dataset in available("datasets"))
    for dataset in ("metaworld_quick", "metaworld_val", "libero_object_state"):
        yield from ({**same, "dataset": dataset, "algorithms": [algo]} for algo in algorithm_names())


def test_smoke_is_small_for_everything() -> None:
    for names in every_file():
        if names["model"] == "checkpoint":
            names["overrides"] = ["policy.path=somewhere"]
        config, _ = compose(**names, smoke=True)
        assert config.train.steps <= 20 and config.pretrain.steps <= 50 and config.eval.episodes == 1
        steps = [v for k, v in config.algorithm.items() if k.endswith("_steps") and v is not None]
        assert all(v <= 20 for v in steps)


def test_every_shipped_file_composes() -> None:
    used = set()
    for names in every_file():
        if names["model"] == "checkpoint":
            names["overrides"] = ["policy.path=somewhere"]
        used.update(compose(**names)[1])
    shipped = {f"configs/{p.relative_to(CONFIG_ROOT)}" for k in ("models", "datasets", "algorithms", "recipes")
               for p in (CONFIG_ROOT / k).glob("*.yaml")}  # fmt: skip
    assert shipped - used == set()
    for recipe in (CONFIG_ROOT / "recipes").glob("*.yaml"):
        algo, _, name = recipe.stem.partition("_")
        streams = [d for d in available("datasets") if recipe in _recipe([algo], d)]
        assert algo in available("algorithms") and streams, recipe
        assert name in (*streams, "metaworld", "libero_state")


def test_values_that_look_like_secrets_are_redacted() -> None:
    config, _ = compose(model="dit_dec_tiny", algorithms=["seqfft"], dataset="metaworld_quick")
    config.policy["hub_token"] = "abc"
    config.algorithm["api_key"] = "xyz"
    text = to_yaml(config)
    assert "abc" not in text and "xyz" not in text and text.count("<redacted>") == 2


def test_overrides_of_a_composed_configuration() -> None:
    config, _ = compose(model="dit_dec_tiny", algorithms=["seqfft"], dataset="metaworld_quick")
    assert override(config, ["eval.episodes=3"]).eval.episodes == 3
    with pytest.raises(ValueError, match="Did you mean 'episodes'"):
        override(config, ["eval.episode=3"])


def test_experiments_name_things_that_exist() -> None:
    from clbench.sweep import load_experiment

    for path in (CONFIG_ROOT / "experiments").glob("*.yaml"):
        experiment, runs = load_experiment(path.stem)
        assert len(runs) == len(experiment.algorithms) * len(experiment.seeds)
        assert len({r.run_id for r in runs}) == len(runs)


def test_help_is_quick_because_it_imports_no_torch() -> None:
    code = (
        "import sys, contextlib, io\n"
        "from clbench.cli import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): main(['--help'])\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): main(['list'])\n"
        "print([m for m in ('torch', 'lerobot', 'matplotlib', 'mujoco') if m in sys.modules])\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_wandb_is_a_switch_or_settings() -> None:
    def wandb(*overrides: str) -> Any:
        config, _ = compose(
            model="dit_dec_tiny", algorithms=["seqfft"], dataset="metaworld_quick", overrides=overrides
        )
        return override(config, []).log.wandb

    assert not wandb().enabled and wandb("log.wandb=true") == WandbConfig(enabled=True)
    assert wandb("log.wandb={entity: me, tags: [a]}") == WandbConfig(enabled=True, entity="me", tags=["a"])
    assert wandb("log.wandb.group=g", "log.wandb.enabled=false") == WandbConfig(enabled=False, group="g")
    with pytest.raises(ValueError, match="Did you mean 'entity'"):
        wandb("log.wandb.entitty=me")
