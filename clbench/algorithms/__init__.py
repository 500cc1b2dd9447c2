"""Continual-learning algorithms: the protocol in hooks.py, one file per algorithm."""
