"""Training: trainer.py (visits → phases → steps), backend.py (the only file that knows Accelerate), pretrain.py."""
