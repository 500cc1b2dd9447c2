"""Several data sets in one section: the short forms are written out as `sets`, in whatever file they stand.

data: [./left, ./right]                         # or repo_id: [OWNER/A, OWNER/B]
exclude_episodes: [[3, 17], []]                 # a list for each

mixtures: {lab: [{data: ./left, weight: 2}, {data: ./right}]}
data: lab
"""

from __future__ import annotations

from typing import Any

from clbench.config.reading import clip
from clbench.errors import UserError

PARTS = ("data", "repo_id", "revision")  # revision: one for all, or in `sets`


def with_sets(layer: dict[str, Any]) -> dict[str, Any]:
    """A configuration's mappings with `sets` in place of lists and of mixtures' names, for the stream and its base.

    Raises:
        UserError: lists of different lengths, several ways to name sets at once, or an empty mixture.
    """
    dataset = layer.get("dataset")
    if not isinstance(dataset, dict):
        return layer
    dataset = dict(dataset)
    mixtures = dataset.pop("mixtures", None) or {}
    pretrain = dataset.get("pretrain")
    if isinstance(pretrain, dict):
        dataset["pretrain"] = _written_out(pretrain, mixtures, "dataset.pretrain")
    return {**layer, "dataset": _written_out(dataset, mixtures, "dataset")}


def _written_out(section: dict[str, Any], mixtures: dict[str, Any], key: str) -> dict[str, Any]:
    data, excluded = section.get("data"), section.get("exclude_episodes")
    sets: list[Any] = []
    if isinstance(data, str) and data in mixtures and not section.get("repo_id"):
        sets = [dict(s) for s in mixtures[data]]
        if not sets:
            raise UserError(f"dataset.mixtures: '{clip(data)}' has no sets.")
    lists = {part: section[part] for part in PARTS if isinstance(section.get(part), list)}
    if lists:
        lengths = {part: len(values) for part, values in lists.items()}
        if len(set(lengths.values())) > 1 or not all(lengths.values()):
            said = ", ".join(f"{key}.{part} has {n}" for part, n in lengths.items())
            raise UserError(f"lists of data sets must have one entry for each of the sets: {said}.")
        count = next(iter(lengths.values()))
        sets = [{part: values[i] for part, values in lists.items()} for i in range(count)]
        for part in PARTS:  # one value is for all
            if part not in lists and section.get(part):
                sets = [{**s, part: section[part]} for s in sets]
    if sets and section.get("sets"):
        raise UserError(f"{key}.sets and a list or mixture in {key}.data both name data sets: keep one of them.")
    per_set = bool(excluded) and all(isinstance(e, list) for e in excluded or ())
    if excluded and not per_set and any(isinstance(e, list) for e in excluded):
        raise UserError(f"{key}.exclude_episodes must be a list of episodes, or a list of lists, one for each set.")
    chosen = sets or [dict(s) for s in section.get("sets") or []]
    if excluded and not per_set and len(chosen) == 1:
        excluded, per_set = [excluded], True
    if excluded and (per_set or chosen):
        count = max(1, len(chosen))
        if not per_set or len(excluded) != count:
            what = f"has {len(excluded)} lists" if per_set else "is one list"
            raise UserError(
                f"{key}.exclude_episodes {what}, but there {'are' if count > 1 else 'is'} {count} data "
                f"set{'s' if count > 1 else ''}: give a list for each, as in [[3, 17], []]."
            )
        if not chosen:
            return {**section, "exclude_episodes": excluded[0]}
        chosen = [{**s, "exclude_episodes": [*s.get("exclude_episodes", []), *e]}
                  for s, e in zip(chosen, excluded, strict=True)]  # fmt: skip
        section = {**section, "exclude_episodes": []}
    if not sets:
        return {**section, "sets": chosen} if chosen else section
    if len(chosen) == 1 and not chosen[0].keys() - {*PARTS, "exclude_episodes"}:  # a list of one
        return {**section, **chosen[0]}
    return {**section, "data": "", "repo_id": None, "revision": None, "sets": chosen}
