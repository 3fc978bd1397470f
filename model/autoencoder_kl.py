"""Define the KL-regularized autoencoder of latent diffusion (Rombach et al. 2022), loaded by diffusers."""

import hashlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from core.latents import drawn_latents
from core.precision import exact_float32


class DiffusersAutoencoder:
    """diffusers' ``AutoencoderKL`` from a local folder or a hub name, behind the interface `Autoencoder`.

    The diffusion process sees (z - shift) x scale, each one number or one per channel; in the paper it sees
    0.18215 x z. ``precision`` is the network's; moments and images are float32. Weights are read from safetensors
    only. Raises ValueError where they cannot be loaded.
    """

    usual_latents: ClassVar[tuple[int, int] | None] = (8, 4)  # Stable Diffusion's

    def __init__(
        self,
        name: str,
        pretrained: str,
        scale: float | list[float],
        shift: float | list[float] = 0.0,
        precision: Literal["fp32", "bf16"] = "fp32",
        hub_revision: str | None = None,
        subfolder: str | None = None,
    ) -> None:
        self._network = _load(pretrained, hub_revision, subfolder).requires_grad_(False)
        self.name = name
        self.revision = _weights_hash(self._network)
        self.image_channels = 3
        self.channels: int = self._network.config["latent_channels"]
        self.downscale: int = 2 ** (len(self._network.config["block_out_channels"]) - 1)
        self.scale, self.shift, self.precision = scale, shift, precision
        # The config's own values; diffusers fills in Stable Diffusion's 0.18215 and no shift where it has none.
        self.own_scale = float(self._network.config["scaling_factor"])
        self.own_shift = float(self._network.config.get("shift_factor") or 0.0)
        self._scale, self._shift = (
            _per_channel("scale", scale, self.channels),
            _per_channel("shift", shift, self.channels),
        )
        if precision == "bf16":  # not diffusers' own `to`, which warns about layers that this network does not have
            torch.nn.Module.to(self._network, torch.bfloat16)

    def to(self, device: torch.device | str) -> "DiffusersAutoencoder":
        """Move the weights, and return the autoencoder."""
        self._network.to(device)
        return self

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Encode images [B, 3, H, W] float32 in [-1, 1] to [B, 2c, h, w] float32: mean, then log-variance."""
        with self._exact(images.device):
            posterior = self._network.encode(images.to(self._network.dtype)).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1).float()

    def draw(self, moments: Tensor, posterior: Tensor, out: Tensor | None = None) -> Tensor:
        """Return latents x_0 [B, c, h, w] float32 from moments [B, 2c, h, w] and standard normals [B, c, h, w]."""
        return drawn_latents(moments, posterior, self._shift, self._scale, out)

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Decode latents x_0 [B, c, h, w] to images [B, 3, H, W] float32, nominally in [-1, 1]."""
        unscaled = latent.float() / self._scale.to(latent.device) + self._shift.to(latent.device)
        with self._exact(latent.device):
            image: Tensor = self._network.decode(unscaled.to(self._network.dtype)).sample
        return image.float()

    def for_pipeline(self) -> AutoencoderKL:
        """Return diffusers' own network, with the scale by which its pipelines divide latents before decoding."""
        assert not isinstance(self.scale, list), "a pipeline has one scale"
        assert self.shift == 0.0, "a pipeline has no shift"
        self._network.register_to_config(scaling_factor=self.scale)
        network: AutoencoderKL = self._network
        return network

    def _exact(self, device: torch.device) -> AbstractContextManager[None]:
        """Return the context in which float32 is true float32, whatever the caller allows its own network."""
        return exact_float32(device) if self.precision == "fp32" else nullcontext()


def _load(pretrained: str, hub_revision: str | None, subfolder: str | None) -> Any:
    try:
        network = AutoencoderKL.from_pretrained(
            pretrained, revision=hub_revision, subfolder=subfolder, use_safetensors=True, low_cpu_mem_usage=False
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"The autoencoder {pretrained!r} cannot be loaded ({reason}); set data.autoencoder.pretrained to a folder "
            "with config.json and diffusion_pytorch_model.safetensors, or to a hub name while online."
        ) from error
    return network


def _weights_hash(network: torch.nn.Module) -> str:
    """Return a SHA-256 over names, shapes and float32 values, which no file format or location changes."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.detach().float().contiguous().cpu().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def _per_channel(name: str, value: float | list[float], channels: int) -> Tensor:
    """Return the values as [1, 1 or c, 1, 1]. Raises ValueError for another number of values."""
    values = value if isinstance(value, list) else [value]
    if len(values) not in (1, channels):
        raise ValueError(
            f"data.autoencoder.{name} has {len(values)} values, but the autoencoder has {channels} channels; give one, "
            "or one per channel."
        )
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)
