"""Scripted experts, which demonstrations are made with: one module per family of simulators."""
