"""Scripted experts, which make demonstrations: one module per family of simulators."""
