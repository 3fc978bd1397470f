"""Turn images into latents, latents into shards, and shards into batches.

This room depends on no model but the autoencoder, and on no device or training step.
"""
