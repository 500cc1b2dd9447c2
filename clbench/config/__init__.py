"""Configuration: checked dataclasses (schema.py) and YAML composition (compose.py). Imports no torch."""
