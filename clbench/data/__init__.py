"""Task data: making demonstrations, describing them, and reading them for training."""
