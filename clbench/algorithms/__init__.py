"""Continual-learning algorithms: the protocol in protocol.py, one file per algorithm."""
