"""Make the reference that generated images are compared with from real images."""
