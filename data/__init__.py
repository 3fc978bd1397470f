"""Images to latents to shards to batches. Knows no model but the autoencoder, no device, no step."""
