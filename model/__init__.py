"""Networks, their cost, and autoencoders: pure functions of tensors. This room imports core only."""
