"""The network and the autoencoder: pure functions of tensors. Imports nothing of ditscale."""
