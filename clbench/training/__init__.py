"""Training: trainer.py (a run), visits.py (visits → phases), loop.py (steps), pretrain.py (the base), backend.py."""
