"""From settings, checkpoints and files of other programs to the objects of a job."""
