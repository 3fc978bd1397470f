"""The family of weights of Stable Diffusion's U-Net, in checkpoints of its program and in diffusers' folders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from model.family import TEXT_ENCODER, Facts, PipelineParts, Reading
from model.ldm_family import CompVisFamily
from model.ldm_weights import LABELS, has_transformers
from model.network import Network
from model.sd_diffusers import to_unet_folder
from model.sd_weights import from_sd, has_known_heads, to_sd
from model.unet_names import ANCHOR


class StableDiffusion(CompVisFamily):
    """Weights of SD's U-Net, of CompVis' Stable Diffusion."""

    name = "SD"
    program = "sd"
    anchor = ANCHOR
    objective = "diffusion=sd"
    settings = ("num_heads", "head_dim", "latent_size")
    pipeline = "StableDiffusionPipeline"
    folder_predictions = ("noise", "v")

    def recognises(self, state: Mapping[str, Tensor]) -> bool:
        """Return whether the timestep's embedding has its name, and there are transformers but no table of labels."""
        return ANCHOR in state and LABELS not in state and has_transformers(state)

    def read(self, state: Mapping[str, Tensor], facts: Facts) -> Reading:
        """Return the network; see `from_sd`. A run that starts with the weights has the latents' size and the heads.

        Raises ValueError too where neither the run, a setting nor the published width tells the heads.
        """
        why = "their width is not that of Stable Diffusion 1 and 2"
        return Reading(from_sd(state, *self.unstated(facts, has_known_heads(state), why)))

    def write(self, network: Network) -> dict[str, Tensor]:
        """Return the weights under the names of a checkpoint of Stable Diffusion."""
        return to_sd(network)

    def content(self, network: Network, stated: Mapping[str, Any]) -> dict[str, Any]:
        """Return the content of a checkpoint: its ``state_dict``, and the name of the text encoder where that is known.

        Other programs read the ``state_dict`` alone.
        """
        named = {"args": {TEXT_ENCODER: stated[TEXT_ENCODER]}} if TEXT_ENCODER in stated else {}
        return super().content(network, stated) | named

    def write_folder(self, network: Network, folder: Path, parts: PipelineParts) -> None:
        """Write a folder of ``StableDiffusionPipeline``, without the text encoder."""
        to_unet_folder(network, folder, parts.autoencoder, parts.betas, parts.prediction)

    def notes_on_folder(self, network: Network, parts: PipelineParts) -> list[str]:
        """Return a sentence on what the pipeline needs besides."""
        needed = ["text_encoder", "tokenizer"]
        needed += ["vae"] if parts.autoencoder is None else []
        needed += ["scheduler"] if parts.betas is None else []
        return [f"{self.pipeline}.from_pretrained(FOLDER, ...) needs your own {', '.join(needed)}."]
