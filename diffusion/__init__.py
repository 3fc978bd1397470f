"""The diffusion process: schedules, losses, draws, samplers, guidance. Takes any denoiser."""
