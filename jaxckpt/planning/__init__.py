"""The fastest setting of a training step's stacks that fits into a budget of memory."""
