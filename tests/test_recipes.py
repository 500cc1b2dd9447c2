"""Recipes: they follow the policy, survive composition, and what they set is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clbench.config import folders
from clbench.config.compose import compose
from clbench.config.reading import flatten
from clbench.errors import UserError
from tests.test_folders import away, install, write  # noqa: F401 (a fixture)

SHIPPED = "configs/recipes/dit_dec_tiny.yaml"


def composed(algo: str, *overrides: str, model: str = "dit_dec_tiny", dataset: str = "metaworld_quick") -> Any:
    return compose(model=model, algorithms=algo.split(","), dataset=dataset, overrides=overrides)


def said(lines: list[str]) -> list[str]:
    return [line for line in lines if "recipes/" in line or "untuned" in line]


@pytest.mark.parametrize(
    ("algo", "dataset", "expected"),
    [
        ("seqfft", "metaworld_quick", {"train.optimizer.lr": 3e-4}),
        ("clare", "metaworld_cw10", {"algorithm.adapter_lr": 6e-3, "algorithm.adapter_hidden": 64}),
        ("clare", "metaworld_val", {"algorithm.adapter_lr": 3e-3, "algorithm.adapter_hidden": 64}),
        ("clare", "libero_goal_state", {"algorithm.adapter_lr": 6e-3, "train.optimizer.lr": 1e-3}),
        ("clare", "libero_goal", {"algorithm.adapter_lr": None, "algorithm.adapter_hidden": 1024}),
        ("seqfft", "metaworld_val", {"train.optimizer.lr": 1e-3}),
        ("er,clare", "metaworld_quick", {"algorithm.adapter_hidden": 64, "train.optimizer.lr": 1e-3}),
        ("er,ewc", "metaworld_quick", {"algorithm.ewc_lambda": 1e3, "train.optimizer.lr": 3e-4}),
        ("ewc,er", "metaworld_quick", {"algorithm.ewc_lambda": 1e3, "train.optimizer.lr": 1e-3}),
    ],
)
@pytest.mark.parametrize("model", ["dit_dec_tiny", "dit_encdec_tiny"])
def test_shipped_settings(algo: str, dataset: str, expected: dict[str, Any], model: str) -> None:
    config, lines = composed(algo, dataset=dataset, model=model)
    values = {"train.optimizer.lr": config.train.optimizer.lr, **flatten({"algorithm": config.algorithm})}
    assert {key: values[key] for key in expected} == expected
    assert len(said(lines)) == len(algo.split(","))  # every algorithm is named, tuned or not


def test_what_is_not_tuned_is_said() -> None:
    untuned = "untuned defaults for {} ({} has no recipe for it here)"
    assert said(composed("singletask")[1]) == [untuned.format("singletask", "dit_dec_tiny")]
    assert said(composed("er", dataset="libero_goal")[1]) == [untuned.format("er", "dit_dec_tiny")]
    assert said(composed("er,singletask")[1]) == [
        f"{SHIPPED} er (train.optimizer.lr=0.001)", untuned.format("singletask", "dit_dec_tiny")
    ]  # fmt: skip
    other = composed("er", "policy.type=dit_encdec")
    assert said(other[1]) == ["untuned defaults for er (the policy is not a preset)"]


def test_a_checkpoint_has_the_recipe_of_the_preset_that_it_was_made_with(tmp_path: Path) -> None:
    preset, _ = composed("er")
    described = {**preset.policy, "ffn_mult": 2, "device": "cpu"}
    (tmp_path / "config.json").write_text(json.dumps(described))
    for model in ("checkpoint", "dit_dec_tiny"):
        config, lines = composed("er,ewc", f"policy.path={tmp_path}", model=model)
        assert config.train.optimizer.lr == 3e-4 and said(lines)[0] == f"{SHIPPED} er (train.optimizer.lr=0.001)"
    (tmp_path / "config.json").write_text(json.dumps({**described, "d_model": 1024}))
    for text in (None, "{", "[]"):
        config, lines = composed("ewc", f"policy.path={tmp_path}", model="checkpoint")
        assert config.algorithm["ewc_lambda"] == 1e4
        assert said(lines) == ["untuned defaults for ewc (the policy is not a preset)"]
        if text is not None:
            (tmp_path / "config.json").write_text(text)


def test_sections_of_all_folders_are_joined_and_the_users_counts(away: Path) -> None:  # noqa: F811
    plugin = install(away / "site", "plug")
    write(plugin, "recipes/dit_dec_tiny.yaml", "er: {algorithm: {mode: append}}\nmine: {algorithm: {strength: 3}}\n")
    write(away / "configs", "recipes/dit_dec_tiny.yaml", "ewc: {train: {steps: 7}}\n")
    folders.forget()
    config, lines = composed("er,ewc,clare")
    assert config.train.optimizer.lr == 1e-3 and config.train.steps == 7 and config.algorithm["ewc_lambda"] == 1e4
    assert said(lines)[:2] == ["plug 1.0: recipes/dit_dec_tiny.yaml er (algorithm.mode=append)",
                               "./configs/recipes/dit_dec_tiny.yaml ewc (train.steps=7)"]  # fmt: skip
    assert composed("er", dataset="libero_goal")[0].algorithm["mode"] == "append"  # tuned_for is for its own file
    config, lines = compose(model="dit_encdec_tiny", algorithms=["mine"], dataset="metaworld_val", registered=["mine"])
    assert config.algorithm == {"strength": 3, "name": "mine"}
    assert said(lines)[0].endswith("mine (algorithm.strength=3)")
    write(install(away / "site", "also"), "recipes/dit_dec_tiny.yaml", "mine: {}\n")
    folders.forget()
    with pytest.raises(UserError, match=r"the section mine of recipes/dit_dec_tiny\.yaml is provided by also 1\.0 and"):
        composed("seqfft")
    write(away / "configs", "recipes/dit_dec_tiny.yaml", "mine: {}\n")
    composed("seqfft")


def test_a_preset_of_ones_own_has_a_recipe_of_its_own(away: Path) -> None:  # noqa: F811
    write(away / "configs", "models/wide.yaml", "policy: {type: dit_dec, d_model: 512}\n")
    assert said(composed("er", model="wide")[1]) == ["untuned defaults for er (wide has no recipe for it here)"]
    write(away / "configs", "recipes/wide.yaml", "er+ewc: {train: {steps: 5}}\nlike: dit_dec_tiny\n")
    assert composed("er", model="wide")[0].train.optimizer.lr == 1e-3
    config, lines = composed("er,ewc", model="wide")
    assert config.train.steps == 5 and config.algorithm["ewc_lambda"] == 1e4
    assert said(lines) == ["./configs/recipes/wide.yaml er+ewc (train.steps=5)"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("er: {trian: {steps: 3}}", r"unknown key 'er\.trian'.*Did you mean 'train'"),
        ("er: {train: {optimizer: {rate: 3}}}", r"unknown key 'er\.train\.optimizer\.rate'"),
        ("er: {streams: {metaworld: {dataset: {name: x}}}}", r"unknown key 'er\.streams\.metaworld\.dataset'"),
        ("er: {streams: {metaworld: 3}}", r"'er\.streams\.metaworld' must hold keys and values but is 3"),
        ("er: 3", "'er' must hold keys and values but is 3"),
        ("er: {train: {steps: many}}", "must be a whole number"),
        ("er: {algorithm: {name: ewc}}", "er: a recipe cannot name an algorithm"),
        ("tuned_for: metaworld", "tuned_for must be a list"),
        ("like: dit_decc_tiny", r"like: dit_decc_tiny: no such recipe.*Did you mean 'dit_dec_tiny'"),
        ("like: wide", "like: wide leads back to this file"),
        ("- er", "it must hold a mapping"),
        ("er: !!python/object:os.system {}", "a tag"),
        ("er: &a {}\newc: *a", "an alias"),
        ("er: {algorithm: {note: '${oc.env:HOME}'}}", "refers to another value"),
    ],
)
def test_mistakes_in_a_recipe_are_said(text: str, message: str, away: Path) -> None:  # noqa: F811
    write(away / "configs", "models/wide.yaml", "policy: {type: dit_dec}\n")
    write(away / "configs", "recipes/wide.yaml", text)
    with pytest.raises(UserError, match=message):
        composed("er", model="wide")


def test_the_form_that_recipes_had_is_refused(away: Path) -> None:  # noqa: F811
    path = write(away / "configs", "recipes/er_metaworld.yaml", "train: {steps: 3}\n")
    with pytest.raises(UserError, match=r"^\./configs/recipes/er_metaworld\.yaml is a recipe of the old form.*into "
                       r"recipes/dit_dec_tiny\.yaml, indented below 'er:' .*, and remove the file\.$"):  # fmt: skip
        composed("er")
    composed("ewc")  # it is not for this
    path.unlink()
    write(away / "configs", "recipes/er+ewc_metaworld_quick.yaml", "")
    with pytest.raises(UserError, match="old form"):
        composed("er,ewc")
