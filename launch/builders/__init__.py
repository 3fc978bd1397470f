"""Build the objects of a job from settings, checkpoints and files of other programs."""
