"""The command line and Hydra's machinery: words to settings, runs of a sweep, errors to sentences."""
