"""Processors of DiT-Dec (found by LeRobot's naming convention)."""

from clbench.policies.dit.processor import make_dit_pre_post_processors as make_dit_dec_pre_post_processors

__all__ = ["make_dit_dec_pre_post_processors"]
