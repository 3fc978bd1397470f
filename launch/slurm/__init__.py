"""Run sweeps and encodings as job arrays of SLURM: ``-m hydra/launcher=slurm``."""
