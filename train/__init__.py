"""The one loop, its step, its state, EMA, checkpoints, hooks, loggers."""
