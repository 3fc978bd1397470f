"""The command line and Hydra: words become settings, sweeps start runs, and errors become sentences."""
