"""Training: trainer.py (a run), visits.py (visits → phases), loop.py (steps), backend.py (the only file that knows Accelerate), pretrain.py."""
