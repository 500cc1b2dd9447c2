"""The rule for the seeds of an evaluation's episodes; its name is recorded with the results, to check them by."""

from __future__ import annotations

from dataclasses import dataclass

from clbench.envs.base import SEEDS_PER_SPLIT, SPLITS
from clbench.errors import UserError
from clbench.seeding import derive_seed

CONSECUTIVE = "consecutive"  # the same for all tasks; also for results from before a rule was recorded
BY_TASK = "by_task"
RULES = (CONSECUTIVE, BY_TASK)
RULE = BY_TASK  # for new evaluations; a folder that has episodes continues with their rule


@dataclass(frozen=True)
class EpisodeSeeds:
    """The seeds of one task's episodes in one eval folder: the split's first + (seed + offset + i) modulo a million.

    The offset is a hash of the task's name under the rule "by_task", so that no two tasks start their episodes from the
    same random numbers; under "consecutive" it is 0. Either way, seeds are consecutive: 50 episodes play each of 50
    published initial states once. They are the same for every checkpoint and every method, so that these are paired.

    Attributes:
        rule: the rule's name ("episode_seeds" in settings.json and in a matrix's "run").
        split: test or validation.
        seed: eval.seed.
        task: the task's name; None = not set yet.
    """

    rule: str
    split: str
    seed: int
    task: str | None = None

    def for_task(self, task: str) -> EpisodeSeeds:
        return EpisodeSeeds(self.rule, self.split, self.seed, task)

    def of(self, episode: int) -> int:
        """The seed of an episode; UserError for a rule that this version does not know."""
        if self.rule not in RULES:
            raise UserError(
                f"the episodes' seeds follow the rule '{self.rule}', which this version of clbench does not know: use "
                "the version that played them, or a newer one."
            )
        if self.rule == CONSECUTIVE:
            return SPLITS[self.split] + self.seed + episode
        assert self.task is not None
        offset = derive_seed("episode seeds", self.task) % SEEDS_PER_SPLIT
        return SPLITS[self.split] + (self.seed + offset + episode) % SEEDS_PER_SPLIT
