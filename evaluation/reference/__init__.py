"""Real images to what generated ones are compared with."""
