"""Generate images, compute features, statistics and metrics, and report how they scale."""
