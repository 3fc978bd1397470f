"""The training loop, its step, its state, EMA, checkpoints, hooks and loggers."""
