"""Features of generated images and a reference to numbers."""
