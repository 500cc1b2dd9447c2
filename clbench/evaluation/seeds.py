"""Which seed an episode of an evaluation has: a rule, whose name is recorded with the results to check them by."""

from __future__ import annotations

from dataclasses import dataclass

from clbench.envs.base import SPLITS
from clbench.errors import UserError

CONSECUTIVE = "consecutive"  # also of results from before a rule was recorded
RULE = CONSECUTIVE  # of the episodes that are played from now on


@dataclass(frozen=True)
class EpisodeSeeds:
    """The seeds of the episodes in one eval folder.

    Attributes:
        rule: the rule's name ("episode_seeds" in settings.json and in a matrix's "run").
        split: test or validation.
        seed: eval.seed.
    """

    rule: str
    split: str
    seed: int

    def of(self, episode: int) -> int:
        """The seed of an episode; UserError for a rule that this version does not have."""
        if self.rule == CONSECUTIVE:
            return SPLITS[self.split] + self.seed + episode
        raise UserError(
            f"the episodes' seeds follow the rule '{self.rule}', which this version of clbench does not know: use the "
            "version that played them, or a newer one."
        )
