"""Compute numbers from the features of generated images and a reference."""
