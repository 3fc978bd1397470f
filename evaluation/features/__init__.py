"""Map images to feature vectors."""
