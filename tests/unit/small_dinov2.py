"""Write a folder like DINOv2's page on the hub, of a small network."""

from pathlib import Path

import torch


def write_small_dinov2(folder: Path) -> Path:
    """Write a DINOv2 with random weights and 32 features."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=70, patch_size=14, layerscale_value=0.5
    )
    Dinov2Model(config).save_pretrained(folder)
    return folder
