"""Read an autoencoder from a folder in diffusers' format, or from the hub, behind the interface `Autoencoder`."""

import hashlib
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from core.precision import exact_float32
from core.samples import Latents

Numbers = float | list[float]
_OPTIONS = {  # diffusers' class -> the model/autoencoder that reads it
    "AutoencoderKL": "sd_vae_ema",
    "VQModel": "vq_f4",
    "AutoencoderDC": "dc_f32c32",
    "AutoencoderTiny": "taesd",
}


class FolderAutoencoder:
    """An autoencoder of diffusers from a local folder or a hub name; subclasses are for one class of diffusers each.

    The diffusion process sees (z - shift) x scale, each one number or one per channel; None: the value in the folder's
    config.json, or none where it has none. ``precision`` is the network's; moments and images are float32.
    ``downscale`` and ``channels`` state the latents for jobs that do not read the weights. Weights are read from
    safetensors only. Raises ValueError where they cannot be loaded, or do not fit the settings.
    """

    usual_latents: ClassVar[tuple[int, int] | None] = None
    diffusers_class: ClassVar[str]
    blocks_setting: ClassVar[str] = "block_out_channels"  # its list has one more entry than the network halves sides
    default_scale: ClassVar[float | None] = None  # where config.json states none; None: there is no usual one

    def __init__(
        self,
        name: str,
        pretrained: str | None,
        scale: Numbers | None = None,
        shift: Numbers | None = None,
        precision: Literal["fp32", "bf16"] = "fp32",
        hub_revision: str | None = None,
        subfolder: str | None = None,
        downscale: int | None = None,
        channels: int | None = None,
    ) -> None:
        if pretrained is None:
            raise ValueError(
                f"The autoencoder {name} is not published in diffusers' format; give "
                f"data.autoencoder.pretrained=FOLDER, a folder of diffusers' {self.diffusers_class}."
            )
        place = pretrained if subfolder is None else f"{pretrained}/{subfolder}"
        self._network, stated = _load(type(self), pretrained, hub_revision, subfolder)
        self._network.requires_grad_(False)
        config = self._network.config
        self.name, self.precision, self.revision = name, precision, _weights_hash(self._network)
        self.channels, self.image_channels = self._latent_channels(config), int(config["in_channels"])
        self.downscale: int = 2 ** (len(config[self.blocks_setting]) - 1)
        _require(place, "downscale", downscale, self.downscale)
        _require(place, "channels", channels, self.channels)
        if self.image_channels not in (1, 3):
            raise ValueError(f"The autoencoder {place!r} takes images of {self.image_channels} channels, not 1 or 3.")
        self.own_scale, self.own_shift = _stated(stated, self.default_scale, self.channels, place)
        self.scale: Numbers = _first(scale, self.own_scale, 1.0)
        self.shift: Numbers = _first(shift, self.own_shift, 0.0)
        self._scale = _per_channel("scale", self.scale, self.channels)
        self._shift = _per_channel("shift", self.shift, self.channels)
        if (self._scale == 0).any():
            raise ValueError("data.autoencoder.scale is 0, by which latents cannot be divided; give another.")
        self._before_cast()
        if precision == "bf16":  # not diffusers' own `to`, which warns about layers that this network does not have
            torch.nn.Module.to(self._network, torch.bfloat16)

    def to(self, device: torch.device | str) -> Self:
        """Move the weights, and return the autoencoder."""
        self._network.to(device)
        return self

    def moments(self, images: Tensor) -> Tensor:
        """Encode images [B, C, H, W] float32 in [-1, 1] to [B, 2c, h, w] float32: mean, then log-variance."""
        raise NotImplementedError

    def compiled_draw(self) -> Latents | None:
        """Return the compiled function by which `draw` draws from float16 on the CPU, or None where PyTorch does."""
        return None

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Decode latents x_0 [B, c, h, w] to images [B, C, H, W] float32, nominally in [-1, 1]."""
        unscaled = latent.float() / self._scale.to(latent.device) + self._shift.to(latent.device)
        with self._exact(latent.device):
            image: Tensor = self._decoded(unscaled)
        return image.float()

    def for_pipeline(self) -> Any:
        """Return diffusers' own network, with the scale by which its pipelines divide latents before decoding."""
        assert not isinstance(self.scale, list), "a pipeline has one scale"
        assert self.shift == 0.0, "a pipeline has no shift"
        self._network.register_to_config(scaling_factor=self.scale)
        return self._network

    def _latent_channels(self, config: Mapping[str, Any]) -> int:
        return int(config["latent_channels"])

    def _before_cast(self) -> None:
        """Keep what must stay in float32, while the network still is."""

    def _decoded(self, unscaled: Tensor) -> Tensor:
        """Decode unscaled latents [B, c, h, w] float32 to images in the network's precision."""
        image: Tensor = self._network.decode(unscaled.to(self._network.dtype)).sample
        return image

    def _exact(self, device: torch.device) -> AbstractContextManager[None]:
        """Return the context in which float32 is true float32, whatever the caller allows its own network."""
        return exact_float32(device) if self.precision == "fp32" else nullcontext()


def _load(
    kind: type[FolderAutoencoder], pretrained: str, hub_revision: str | None, subfolder: str | None
) -> tuple[Any, dict[str, Any]]:
    """Return diffusers' network and the settings that its config.json states. Raises ValueError."""
    import diffusers  # seconds, which jobs that only read a class's attributes do not spend

    network_class = getattr(diffusers, kind.diffusers_class)
    where = {"revision": hub_revision, "subfolder": subfolder}
    try:
        stated = network_class.load_config(pretrained, **where)
        _require_class(stated.get("_class_name"), kind, pretrained)
        network, loading = network_class.from_pretrained(
            pretrained, **where, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
        if missing := loading["missing_keys"]:  # diffusers draws them at random
            raise ValueError(f"{len(missing)} tensors are missing, such as {missing[0]}")
    except _OtherClassError:
        raise
    except Exception as error:  # damaged folders make diffusers raise errors of many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"The autoencoder {pretrained!r} cannot be loaded ({reason}); set data.autoencoder.pretrained to a folder "
            "with config.json and diffusion_pytorch_model.safetensors, or to a hub name while online."
        ) from error
    return network, stated


class _OtherClassError(ValueError):
    """A folder has an autoencoder of another class than the setting reads."""


def _require_class(found: Any, kind: type[FolderAutoencoder], pretrained: str) -> None:
    """Raise ValueError where a folder states another class than ``kind`` reads. Old folders may state none."""
    if found in (None, kind.diffusers_class):
        return
    known = _OPTIONS.get(found) if isinstance(found, str) else None
    way_out = f"choose model/autoencoder={known}" if known else f"the classes that are read are {', '.join(_OPTIONS)}"
    raise _OtherClassError(
        f"The autoencoder {pretrained!r} is a {found}, but data.autoencoder._target_ reads a {kind.diffusers_class}; "
        f"{way_out}."
    )


def _require(place: str, setting: str, said: int | None, found: int) -> None:
    if said not in (None, found):
        raise ValueError(
            f"The autoencoder {place!r} has {setting} {found}, but data.autoencoder.{setting} is {said}; set "
            f"data.autoencoder.{setting}={found}."
        )


def _stated(
    config: Mapping[str, Any], default_scale: float | None, channels: int, place: str
) -> tuple[Numbers | None, Numbers | None]:
    """Return scale and shift as a config.json states them; None where it does not.

    ``latents_mean`` and ``latents_std``, per channel, are used in place of the shift, and divide the scale.
    """
    factor, shift = config.get("scaling_factor"), config.get("shift_factor")
    mean, std = config.get("latents_mean"), config.get("latents_std")
    try:
        scale = default_scale if factor is None else _finite(factor)
        if mean is None or std is None:
            return scale, None if shift is None else _finite(shift)
        per_channel = [(1.0 if scale is None else scale) / _finite(value) for value in std]
        means = [_finite(value) for value in mean]
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"The config.json of the autoencoder {place!r} has a scaling_factor, shift_factor, latents_mean or "
            f"latents_std that is not made of finite numbers ({error}); correct it."
        ) from error
    if {len(per_channel), len(means)} != {channels}:
        raise ValueError(
            f"The config.json of the autoencoder {place!r} has {len(means)} numbers in latents_mean and "
            f"{len(per_channel)} in latents_std, but {channels} channels; give one per channel."
        )
    return per_channel, means


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value} is not finite")
    return number


def _first(*values: Numbers | None) -> Numbers:
    return next(value for value in values if value is not None)


def _weights_hash(network: torch.nn.Module) -> str:
    """Return a SHA-256 over names, shapes and float32 values, which no file format or location changes."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.detach().float().contiguous().cpu().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def _per_channel(name: str, value: Numbers, channels: int) -> Tensor:
    """Return the values as [1, 1 or c, 1, 1]. Raises ValueError for another number of values."""
    values = value if isinstance(value, list) else [value]
    if len(values) not in (1, channels):
        raise ValueError(
            f"data.autoencoder.{name} has {len(values)} values, but the autoencoder has {channels} channels; give one, "
            "or one per channel."
        )
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)
