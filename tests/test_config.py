"""Configuration: layers, recipes, smoke, redaction. Bad input on the command line is in test_cli.py."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from clbench.checkpoints.changes import changed_values
from clbench.config import recipes
from clbench.config.compose import (
    _streams,
    available,
    compose,
    compose_files,
    override,
    read_config,
    to_dict,
    to_yaml,
)
from clbench.config.folders import SHIPPED
from clbench.config.schema import LogConfig, WandbConfig
from clbench.errors import UserError
from clbench.lock import held
from clbench.redaction import redact_command, secrets_of
from clbench.registry import algorithm_names
from clbench.training.log import RunLog


def test_later_layers_win() -> None:
    config, files = compose(
        model="dit_encdec_tiny",
        algorithms=["clare"],
        dataset="metaworld_quick",
        overrides=["--train.steps=7", "seed=3"],
    )
    assert config.policy["type"] == "dit_encdec" and config.train.steps == 7 and config.seed == 3
    assert files[-1].startswith("configs/recipes/dit_dec_tiny.yaml clare (algorithm.adapter_hidden=64, ")
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
    yield {**same, "model": "dit_dec_small", "dataset": "metaworld_pixels"}
    yield from ({**same, "model": f"dit_{kind}_base", "dataset": "libero_10"} for kind in ("dec", "encdec"))
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
        used.update(line.partition(" ")[0] for line in compose(**names)[1])
    used |= {f"configs/recipes/dit_encdec_{size}.yaml" for size in ("tiny", "small")}  # like dit_dec's, which are named
    shipped = {f"configs/{p.relative_to(SHIPPED)}" for k in ("models", "datasets", "algorithms", "recipes")
               for p in (SHIPPED / k).glob("*.yaml")}  # fmt: skip
    assert shipped - used == set()
    known = {name for d in available("datasets") for name in _streams(d)}
    for recipe in (SHIPPED / "recipes").glob("*.yaml"):
        assert recipe.stem in available("models")
        for algorithm, section in recipes._sections(recipe.stem).items():
            assert algorithm in available("algorithms")
            assert {*(section.tuned_for or ()), *section.keys.get("streams", {})} <= known


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "SECRET_OF_MINE", "DB_PASSWORD", "hf_token"])
def test_secrets_are_redacted_inside_of_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in ((name, "do-not-tell"), ("LONGER_TOKEN", "do-not-tell-more"), ("MY_KEY", str(SHIPPED))):
        monkeypatch.setenv(key, value)
    config, _ = compose(model="dit_dec_tiny", algorithms=["er"], dataset="metaworld_quick", overrides=[
        "log.project=x-${oc.env:" + name + "}-y", "policy={note: [do-not-tell-more], api_key: my-own-secret}",
        "model=of-my-own-secret", "output_dir=" + str(SHIPPED / "runs"),
    ])  # fmt: skip
    assert config.log.project == "x-do-not-tell-y"  # what is used
    written = yaml.safe_load(to_yaml(config))
    assert "do-not" not in to_yaml(config) and "my-own-secret" not in to_yaml(config)
    assert written["log"]["project"] == "x-<redacted>-y" and written["policy"]["note"] == ["<redacted>"]
    assert written["output_dir"] == str(SHIPPED / "runs")  # the path of a key's file is no secret


def test_command_lines_are_written_down_without_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "do-not-tell")
    command = ["clbench", "train", "--run-id", "do-not-tell", "--", "log.project=x-do-not-tell", "train.steps=3",
               "algorithm.hub_token=ab c", "policy={api_key: short, steps: 3, b: {token: 'x y'}}",
               "seed=1"]  # fmt: skip
    expected = ["clbench", "train", "--run-id", "<redacted>", "--", "log.project=x-<redacted>", "train.steps=3",
                "algorithm.hub_token=<redacted>", "policy={api_key: <redacted>, steps: 3, b: {token: <redacted>}}",
                "seed=1"]  # fmt: skip
    assert redact_command(command, secrets_of()) == expected
    monkeypatch.setattr(sys, "orig_argv", ["python", *command])
    with held(tmp_path, "training"):
        assert json.loads((tmp_path / ".training.lock").read_text())["command"] == shlex.join(["python", *expected])
    log = RunLog(tmp_path, LogConfig(), "r")
    log.event("note", text="x-do-not-tell", listed=["do-not-tell"], step=1)
    log.close()
    assert '"text": "x-<redacted>", "listed": ["<redacted>"], "step": 1' in (tmp_path / "log.jsonl").read_text()


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

    for path in (SHIPPED / "experiments").glob("*.yaml"):
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


def composed(*overrides: str, **axes: Any) -> Any:
    names = {"model": "dit_dec_tiny", "algorithms": ["seqfft"], "dataset": "metaworld_quick"} | axes
    return compose(**names, overrides=overrides)[0]


def at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config


TEXT_KEYS = ["output_dir", "dataset.revision", "dataset.data", "log.project", "policy.path", "lora.target_modules"]
TEXTS = [
    *("0123456", "7e5", "12e4567", "2025_01_02", "on", "5:00", "a #b", "{a}", "*x", "it's", "1e3", "[qv]_proj"),
    *("0x10", '"', "1.", "no", "007", "0[1-3]"),
]


def test_a_text_stays_what_was_typed(tmp_path: Path) -> None:
    """On the command line, in a file, and in the configuration that a run writes down."""
    path = tmp_path / "c.yaml"
    for start in range(0, len(TEXTS), len(TEXT_KEYS)):
        texts = dict(zip(TEXT_KEYS, TEXTS[start:], strict=False))
        config = composed("dataset.repo_id=me/set", *(f"{k}={t}" for k, t in texts.items()))
        assert {k: at(config, k) for k in texts} == texts
        path.write_text(to_yaml(config))
        assert to_dict(read_config(path)) == to_dict(config)
    (tmp_path / "more.yaml").write_text(
        "output_dir: 0123456\ndataset: {revision: 7e5, data: 2025_01_02}\nlog: {project: on}\npolicy: {path: 007}\n"
        "lora: {target_modules: 5:00}\n"
    )
    config = compose_files([str(path), str(tmp_path / "more.yaml")])[0]
    assert [at(config, k) for k in TEXT_KEYS] == ["0123456", "7e5", "2025_01_02", "on", "007", "5:00"]
    assert composed("output_dir='null'", 'log.project="a b"').output_dir == "null"  # quotes are taken off


def test_numbers_are_decimal_or_an_error() -> None:
    config = composed("seed=010", "train.steps=0500", "dataset.task_order=[01,2]", "train.optimizer.lr=3e-4")
    assert (config.seed, config.train.steps, config.train.optimizer.lr) == (10, 500, 3e-4)
    assert config.dataset.task_order == [1, 2] and composed("train.tf32=on").train.tf32 is True
    for wrong in ("seed=5:00", "seed=1_0", "seed=0x10", "seed=1e3", "train.optimizer.lr=1_0.5", "train.tf32=2"):
        with pytest.raises(ValueError, match=rf"{wrong.partition('=')[0]} must be .*; the form is "):
            composed(wrong)


@pytest.mark.parametrize(
    ("override", "form"),
    [
        ("dataset.tasks=push-v3,window-close-v3", "'dataset.tasks=[push-v3, window-close-v3]'"),
        ("dataset.tasks=(push-v3 window-close-v3)", "'dataset.tasks=[push-v3, window-close-v3]'"),
        ("dataset.tasks=[push-v3", "'dataset.tasks=[push-v3]'"),
        ("dataset.task_order=1,0", "'dataset.task_order=[1, 0]'"),
        ("eval.views=task_id", "'eval.views=[task_id]'"),
        ("train.optimizer.betas=0.9,0.95", "'train.optimizer.betas=[0.9, 0.95]'"),
        ("train.optimizer.betas[1]=0.95", "'train.optimizer.betas=[0.9, 0.999]'"),
        ("train.optimizer.betas.1=0.95", "'train.optimizer.betas=[0.95]'"),
        ("train.optimizer.betas=[0.9, x]", "'train.optimizer.betas=[1, 2]'"),
        ("dataset.exclude_episodes=3", "'dataset.exclude_episodes=[3]'"),
        ("dataset.rename.observation.state.full=observation.state", "'dataset.rename={OLD: NEW}'"),
        ("dataset.rename={observation.state.full:observation.state}", "{observation.state.full: observation.state}"),
        ("dataset.rename=observation.state", "'dataset.rename={OLD: NEW}'"),
        ("dataset.pretrain.rename=[a]", "'dataset.pretrain.rename={OLD: NEW}'"),
        ("dataset.instructions={a:b}", "'dataset.instructions={TEXT: TASK}'"),
        ("train.steps=[1]", "train.steps=10"),
        ("train.steps={a: 1}", "train.steps=10"),
        ("train.tf32=maybe", "train.tf32=true"),
        ("dataset.name=null", "dataset.name=TEXT"),
        ("log.wandb=maybe", "log.wandb=true"),
        ("train.steps.a=5", "has no keys of its own"),
        ("train=${pretrain}", "not valid"),
    ],
)
def test_messages_show_the_form_in_no_words_of_a_library(override: str, form: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(form)) as e:
        composed(override)
    assert re.search("AnyNode|Config|Optional|Node|<unicode", str(e.value)) is None


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("dataset: {tasks: 'a, b'}", "tasks: [a, b]"),
        ("dataset: {rename: {a:b}}", "rename: {OLD: NEW}"),
        ("train: {steps: [1]}", "steps: 10"),
        ("train: {optimizer: {betas: 0.9}}", "betas: [0.9]"),
        ("log: {project: [a]}", "project: TEXT"),
    ],
)
def test_messages_about_files_show_their_form(text: str, form: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"the form is {form}")) as e:
        compose_files([str(tmp_path / "c.yaml")])
    assert re.search("AnyNode|Config|Optional|Node", str(e.value)) is None


def test_combined_algorithms_keep_their_recipes() -> None:
    config, files = compose(model="dit_dec_tiny", algorithms=["er", "ewc"], dataset="metaworld_quick")
    assert config.algorithm["ewc_lambda"] == 1e3 and config.train.optimizer.lr == 3e-4
    recipe = "configs/recipes/dit_dec_tiny.yaml"
    assert files[-2:] == [
        f"{recipe} er (train.optimizer.lr=0.001)",
        f"{recipe} ewc (train.optimizer.lr=0.0003 instead of er's 0.001, algorithm.ewc_lambda=1000.0)",
    ]
    config, files = compose(model="dit_dec_tiny", algorithms=["ewc", "er"], dataset="metaworld_cw10")
    assert config.algorithm["ewc_lambda"] == 1e3 and config.train.optimizer.lr == 1e-3
    assert composed("train.optimizer.lr=0.5", algorithms=["er", "clare"]).algorithm["adapter_hidden"] == 64


def test_names_in_experiments_stay_texts(tmp_path: Path) -> None:
    from clbench.sweep import load_experiment

    path = tmp_path / "e.yaml"
    path.write_text(
        "name: 2025_01_02\nseeds: [010]\nalgorithms: [{algo: er, label: 1e3, overrides: [log.project=007]}]\n"
    )
    experiment, runs = load_experiment(str(path))
    assert experiment.name == "2025_01_02" and runs[0].run_id == "2025_01_02_1e3_s10"
    assert runs[0].config.log.project == "007" and runs[0].config.seed == 10
    path.write_text("algorithms: [er]\noverrides: ['log.project=${oc.env:HOME}']\n")
    with pytest.raises(ValueError, match="refers to another value"):
        load_experiment(str(path))
    path.write_text("algorithms: [er]\noverrides: ['log.project=\"\\x24{oc.env:HOME}\"']\n")
    with pytest.raises(ValueError, match="refers to another value"):
        load_experiment(str(path))


def test_a_run_written_down_by_an_earlier_version_compares_equal(tmp_path: Path) -> None:
    """`wandb: false`, and none of the keys that came later."""
    config = composed("log.project=0123", "dataset.repo_id=me/set", "dataset.revision=7e5")
    values = to_dict(config)
    values["log"]["wandb"] = False
    for part in (values["dataset"], values["dataset"]["pretrain"]):
        del part["exclude_episodes"], part["instructions"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    assert changed_values(tmp_path, config) == {}
    assert read_config(tmp_path / "config.yaml") == config
    values["log"]["wandb"] = True
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    assert set(changed_values(tmp_path, config)) == {"log.wandb.enabled"}


def test_wandb_is_a_switch_or_settings() -> None:
    def wandb(*overrides: str) -> Any:
        config, _ = compose(model="dit_dec_tiny", algorithms=["seqfft"], dataset="metaworld_quick", overrides=overrides)
        return override(config, []).log.wandb

    assert not wandb().enabled and wandb("log.wandb=true") == WandbConfig(enabled=True)
    assert wandb("log.wandb={entity: me, tags: [a]}") == WandbConfig(enabled=True, entity="me", tags=["a"])
    assert wandb("log.wandb.group=g", "log.wandb.enabled=false") == WandbConfig(enabled=False, group="g")
    with pytest.raises(ValueError, match="Did you mean 'entity'"):
        wandb("log.wandb.entitty=me")


def test_an_algorithm_named_twice_is_refused_by_the_configuration() -> None:
    with pytest.raises(UserError, match=r"list of different names but is \['er', 'er'\]"):
        compose(model="dit_dec_tiny", algorithms=["er", "er"], dataset="metaworld_quick", registered=["er"])
