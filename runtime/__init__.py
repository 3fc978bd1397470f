"""Place tensors on devices and let processes agree. Only this room imports accelerate and torch_xla."""
