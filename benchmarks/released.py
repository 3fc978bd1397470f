"""Build the network that training steps are compared with: DiT with the structure of the released program.

It is written here from the paper and from what the released program computes in which order; it trains, but is not
tested for more than its shapes. The wiring that differs from ours: patches by a convolution, frequencies at every pass,
timm's attention and MLP, a six-fold modulation that is chunked in every block.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.embeddings import position_embedding_2d


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        mixed = functional.scaled_dot_product_attention(query, key, value, dropout_p=0.0)
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, width))


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(c).chunk(6, dim=1)
        x = x + gate_1.unsqueeze(1) * self.attn(_modulated(self.norm1(x), shift_1, scale_1))
        return x + gate_2.unsqueeze(1) * self.mlp(_modulated(self.norm2(x), shift_2, scale_2))


class ReleasedDiT(nn.Module):
    """DiT with adaLN-Zero blocks for latents [B, 4, 32, 32], two outputs per channel, and 1,000 classes."""

    def __init__(self, patch_size: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        grid = 32 // patch_size
        self.patch_size, self.grid = patch_size, grid
        self.patches = nn.Conv2d(4, width, patch_size, stride=patch_size)
        self.positions = nn.Parameter(position_embedding_2d(width, grid).unsqueeze(0), requires_grad=False)
        self.time_mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.labels = nn.Embedding(1001, width)
        self.blocks = nn.ModuleList([_Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.final_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.decoder = nn.Linear(width, 8 * patch_size**2)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return the prediction [B, 8, 32, 32] for latents [B, 4, 32, 32], t [B] int64 and labels [B] int64."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        y = torch.where(torch.rand(len(y), device=y.device) < 0.1, 1000, y)
        c = self.time_mlp(self._features(t)) + self.labels(y)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_modulation(c).chunk(2, dim=1)
        x = self.decoder(_modulated(self.norm(x), shift, scale))
        size, grid = self.patch_size, self.grid
        x = x.reshape(len(x), grid, grid, size, size, 8)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), 8, grid * size, grid * size)

    def _features(self, t: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(10_000) * torch.arange(0, 128, dtype=torch.float32) / 128).to(t.device)
        angles = t[:, None].float() * frequencies[None]
        return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


class ReleasedLoss(nn.Module):
    """The released program's loss and reverse step, from float64 tables that are sent to the device for every look-up.

    ``timesteps`` are the steps kept for sampling, of 1,000; None keeps all.
    """

    def __init__(self, timesteps: Sequence[int] | None = None) -> None:
        super().__init__()
        kept = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000, dtype=np.float64))
        self.timesteps = np.arange(1000) if timesteps is None else np.asarray(timesteps)
        self.num_steps = len(self.timesteps)
        kept = kept[self.timesteps]
        betas = 1.0 - kept / np.append(1.0, kept[:-1])
        before = np.append(1.0, kept[:-1])
        variance = betas * (1.0 - before) / (1.0 - kept)
        self.tables = {
            "signal": np.sqrt(kept),
            "noise": np.sqrt(1.0 - kept),
            "of_start": betas * np.sqrt(before) / (1.0 - kept),
            "of_x_t": (1.0 - before) * np.sqrt(1.0 - betas) / (1.0 - kept),
            "least": np.log(np.append(variance[1], variance[1:])),
            "most": np.log(betas),
            "start_x_t": np.sqrt(1.0 / kept),
            "start_noise": np.sqrt(1.0 / kept - 1.0),
        }

    def _at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        values = torch.from_numpy(self.tables[name]).to(t.device)[t].float()
        return values[:, None, None, None] + torch.zeros_like(like)

    def noised(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return x_t [B, c, h, w]."""
        return self._at("signal", t, x_0) * x_0 + self._at("noise", t, x_0) * noise

    def timestep(self, t: Tensor) -> Tensor:
        """Return the step of the 1,000 that the network is told, for t [B] of the kept ones."""
        return torch.from_numpy(self.timesteps).to(t.device)[t]

    def reverse(self, predicted: Tensor, fraction: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance [B, c, h, w] of the reverse step."""
        least, most = self._at("least", t, x_t), self._at("most", t, x_t)
        log_variance = (fraction + 1) / 2 * most + (1 - (fraction + 1) / 2) * least
        start = self._at("start_x_t", t, x_t) * x_t - self._at("start_noise", t, x_t) * predicted
        return self._mean(start, x_t, t), log_variance

    def _mean(self, start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return self._at("of_start", t, x_t) * start + self._at("of_x_t", t, x_t) * x_t

    def forward(self, output: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return the losses [B]: mean squared error, and the variational bound's term with a detached mean."""
        predicted, fraction = output.float().chunk(2, dim=1)
        least = self._at("least", t, x_0)
        mean, log_variance = self.reverse(predicted.detach(), fraction, x_t, t)
        true_mean = self._mean(x_0, x_t, t)
        divergence = log_variance - least - 1.0 + torch.exp(least - log_variance)
        divergence = 0.5 * (divergence + (true_mean - mean) ** 2 * torch.exp(-log_variance))
        decoded = _discretized(x_0, mean, 0.5 * log_variance)
        bound = torch.where(t == 0, _mean(decoded), _mean(divergence)) / math.log(2.0)
        return _mean((noise - predicted) ** 2) + bound


def _mean(values: Tensor) -> Tensor:
    return values.mean(dim=(1, 2, 3))


def _discretized(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Return the negative log-likelihood of x in bins of 1 / 255 to each side, by Page's approximation of the CDF."""

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)))

    above = cdf((x - mean + 1 / 255) * torch.exp(-log_scale))
    below = cdf((x - mean - 1 / 255) * torch.exp(-log_scale))
    inside = torch.log((above - below).clamp(min=1e-12))
    first, last = torch.log(above.clamp(min=1e-12)), torch.log((1.0 - below).clamp(min=1e-12))
    return -torch.where(x < -0.999, first, torch.where(x > 0.999, last, inside))
