"""Define final layers, which decode tokens to patches."""

from torch import Tensor, nn

from model.embeddings import Embedded
from model.norms import NormFactory, layer_norm


def modulate(normalized: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift normalized tokens per sample: [B, T, d], [B, d], [B, d] -> [B, T, d]."""
    return normalized * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def scaled(normalized: Tensor, scale: Tensor) -> Tensor:
    """Scale normalized tokens per sample: [B, T, d], [B, d] -> [B, T, d]."""
    return normalized * (1 + scale.unsqueeze(1))


class FinalLayer(nn.Module):
    """Decodes each token to its patch by a norm and a linear map (paper, section 3.2)."""

    affine_norm = True

    def __init__(self, width: int, patch_values: int, norm: NormFactory = layer_norm) -> None:
        super().__init__()
        self.norm = norm(width, self.affine_norm)
        self.decoder = nn.Linear(width, patch_values)

    def initialize(self) -> None:
        """Zero the decoder: an untrained network's output is exactly zero."""
        nn.init.zeros_(self.decoder.weight)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, tokens: Tensor, embedded: Embedded) -> Tensor:
        """Decode tokens to patches: [B, T, d] -> [B, T, patch_values]."""
        return self.decoder(self.norm(tokens))


class AdaptiveFinalLayer(FinalLayer):
    """A final layer with an adaptive norm, for the adaptive blocks."""

    affine_norm = False

    def __init__(self, width: int, patch_values: int, norm: NormFactory = layer_norm) -> None:
        super().__init__(width, patch_values, norm)
        self.modulation = nn.Linear(width, 2 * width)

    def initialize(self) -> None:
        """Zero the modulation and the decoder."""
        super().initialize()
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, tokens: Tensor, embedded: Embedded) -> Tensor:
        """Decode tokens to patches: [B, T, d] -> [B, T, patch_values]."""
        shift, scale = self.modulation(nn.functional.silu(embedded.vector)).chunk(2, dim=1)
        return self.decoder(modulate(self.norm(tokens), shift, scale))
