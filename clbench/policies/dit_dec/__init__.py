"""DiT-Dec: the observation encoding conditions AdaLN blocks through one projection."""
