"""The command line, Hydra, and the wiring of rooms into jobs. The only room that imports hydra."""
