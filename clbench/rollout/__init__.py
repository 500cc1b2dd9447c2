"""Acting: a policy in many simulators at once. Knows nothing of training or matrices."""
