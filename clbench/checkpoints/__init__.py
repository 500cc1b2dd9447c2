"""What is saved and how it is read back: policies with their processors, algorithm state, whole checkpoints."""
