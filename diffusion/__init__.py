"""Objectives, samplers and guidance, for any denoiser."""
