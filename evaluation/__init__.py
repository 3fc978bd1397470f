"""Generate images, take features, compute statistics and metrics, report how they scale."""
