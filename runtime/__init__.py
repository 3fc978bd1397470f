"""Where tensors live and how replicas agree. The only room that imports accelerate."""
