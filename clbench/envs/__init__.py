"""Simulators behind one small protocol; nothing here imports a simulator until one is requested."""
