"""The Diffusion Transformer (Peebles & Xie, arXiv 2212.09748, section 3.2)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from model.attention import initialize_linears
from model.blocks import AdaLNZeroBlock, Block
from model.embeddings import TimestepEmbedding, position_embedding_2d

BlockFactory = Callable[[int, int], Block]  # (width, num_heads) -> block


# Far above what anyone trains: a config may come out of a file, and a model is built before its weights are compared.
_MOST = {
    "latent_size": 2**12,
    "channels": 2**12,
    "width": 2**16,
    "depth": 2**12,
    "num_heads": 2**12,
    "num_classes": 2**24,
}
_MOST_POSITIONS = 2**30  # numbers in the table of positions


@dataclass(frozen=True)
class DiTConfig:
    """Everything that fixes a DiT's shape. Raises ValueError where the numbers do not fit together."""

    latent_size: int  # side of the square latent
    channels: int  # c, channels of the latent
    patch_size: int  # p, side of a patch
    width: int  # d, channels of a token
    depth: int  # N, number of blocks
    num_heads: int
    num_classes: int  # without the null class, which has index num_classes; 0: unconditional
    block: BlockFactory = AdaLNZeroBlock
    outputs_per_channel: int = 2  # of the network, for each channel of the latent: the objective's
    frequency_shift: int = 0  # of the timestep's frequencies: 0 as released, 1 as in diffusers

    def __post_init__(self) -> None:
        for name in ("latent_size", "channels", "patch_size", "width", "depth", "num_heads", "num_classes"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(
                    f"model.{name} is {getattr(self, name)!r}, but it must be one whole number: latents are square."
                )
            if getattr(self, name) < (least := 0 if name == "num_classes" else 1):
                raise ValueError(
                    f"model.{name} is {getattr(self, name)}, but it must be at least {least}; set it higher."
                )
        for name, most in _MOST.items():
            if getattr(self, name) > most:
                raise ValueError(f"model.{name} is {getattr(self, name)}, but at most {most} are built; set it lower.")
        if self.latent_size % self.patch_size:
            raise ValueError(
                f"model.patch_size {self.patch_size} does not divide the latent size {self.latent_size}; "
                f"choose one of {_divisors(self.latent_size)}."
            )
        if self.width % self.num_heads:
            raise ValueError(
                f"model.num_heads {self.num_heads} does not divide model.width {self.width}; "
                f"choose one of {_divisors(self.width)}."
            )
        if self.frequency_shift not in (0, 1):
            raise ValueError(
                f"model.frequency_shift is {self.frequency_shift}, but there are two: 0 as in the released code, 1 as "
                "in diffusers."
            )

        if self.num_tokens * self.width > _MOST_POSITIONS:
            raise ValueError(
                f"{self.num_tokens} tokens of model.width {self.width} need {self.num_tokens * self.width} numbers for "
                f"their positions, but at most {_MOST_POSITIONS} are made; set a larger model.patch_size."
            )

    @property
    def num_tokens(self) -> int:
        """T = (latent_size / p)^2, the length of the sequence."""
        return (self.latent_size // self.patch_size) ** 2

    @property
    def out_channels(self) -> int:
        """Return the number of channels of the network's output."""
        return self.channels * self.outputs_per_channel


class DiT(nn.Module):
    """Denoiser over latents. It knows no schedule, no guidance and drops no labels.

    Args are those of `DiTConfig`, which raises ValueError for shapes that do not fit. A new model is
    initialized from the seed 0; call `initialize` for another.
    """

    position_embedding: Tensor

    def __init__(
        self,
        latent_size: int,
        channels: int,
        patch_size: int,
        width: int,
        depth: int,
        num_heads: int,
        num_classes: int,
        block: BlockFactory = AdaLNZeroBlock,
        outputs_per_channel: int = 2,
        frequency_shift: int = 0,
    ) -> None:
        super().__init__()
        self.config = config = DiTConfig(
            latent_size,
            channels,
            patch_size,
            width,
            depth,
            num_heads,
            num_classes,
            block,
            outputs_per_channel,
            frequency_shift,
        )
        self.patch_embedding = nn.Linear(channels * patch_size**2, width)
        self.timestep_embedding = TimestepEmbedding(width, frequency_shift)
        self.label_embedding = nn.Embedding(num_classes + 1, width) if num_classes else None
        positions = position_embedding_2d(width, latent_size // patch_size)
        self.register_buffer("position_embedding", positions, persistent=False)
        self.blocks = nn.ModuleList([block(width, num_heads) for _ in range(depth)])
        self.final_layer = self.block_list[0].final_layer(width, config.out_channels * patch_size**2)
        self.initialize(0)

    @property
    def has_null_class(self) -> bool:
        """Return whether the label table has a row for "no label", as every model has that is made here."""
        return self.label_embedding is None or self.label_embedding.num_embeddings > self.config.num_classes

    def remove_null_class(self) -> None:
        """Take the null class's row away: weights of other programs, trained without label dropout, have none."""
        assert self.label_embedding is not None
        rows = self.label_embedding.weight[: self.config.num_classes].detach()
        self.label_embedding = nn.Embedding.from_pretrained(rows.clone(), freeze=False)

    def position_drift(self) -> float:
        """Return the largest difference between the position embedding and the fixed one that is made here."""
        fixed = position_embedding_2d(self.config.width, self.config.latent_size // self.config.patch_size)
        return float((self.position_embedding.cpu() - fixed).abs().max())

    @property
    def block_list(self) -> list[Block]:
        """The blocks, from the first to the last."""
        return cast(list[Block], list(self.blocks))

    def initialize(self, seed: int) -> None:
        """Draw the weights anew from one generator seeded with ``seed`` (released code's scheme).

        Xavier-uniform linears (the patch embedding included) and zero biases; label table and timestep
        MLP normal(0, 0.02); then what blocks and final layer set to zero.
        """
        generator = torch.Generator().manual_seed(seed)
        if self.patch_embedding.weight.is_meta:  # shapes only: nothing to draw
            return
        initialize_linears(self, generator)
        tables = [self.timestep_embedding.input.weight, self.timestep_embedding.output.weight]
        if self.label_embedding is not None:
            tables.insert(0, self.label_embedding.weight)
        for table in tables:
            nn.init.normal_(table, std=0.02, generator=generator)
        for block in self.block_list:
            block.initialize()
        self.final_layer.initialize()

    def forward(self, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """Predict what the objective asks for: [B, outputs_per_channel c, h, w].

        x_t is [B, c, h, w] float, t [B] int64 or float, the condition {"label": [B] int64 in [0, num_classes]} or, of
        an unconditional network, {}.
        Raises ValueError for latents of another shape than the config's.
        """
        self._require_shape(x_t)
        tokens = self.patch_embedding(self._patchify(x_t)) + self.position_embedding
        embedded = self._embedded(t, condition)
        tokens = self.block_list[0].enter(tokens, embedded)
        for block in self.blocks:
            tokens = block(tokens, embedded)
        tokens = self.block_list[-1].leave(tokens, embedded)
        return self._unpatchify(self.final_layer(tokens, embedded))

    def _embedded(self, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """Return what blocks are conditioned on, [B, M, d]: the timestep's embedding, then the label's."""
        parts = [self.timestep_embedding(t)]
        if self.label_embedding is not None:
            parts.append(self.label_embedding(condition["label"]))
        return torch.stack(parts, dim=1)

    def example_inputs(self, batch: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return zeros of the shapes that the network takes, for ``batch`` images, on its device."""
        device, config = self.patch_embedding.weight.device, self.config
        x_t = torch.zeros(batch, config.channels, config.latent_size, config.latent_size, device=device)
        t = torch.zeros(batch, dtype=torch.int64, device=device)
        return x_t, t, {"label": t.clone()} if config.num_classes else {}

    def _require_shape(self, latent: Tensor) -> None:
        expected = (self.config.channels, self.config.latent_size, self.config.latent_size)
        if latent.shape[1:] != expected:
            raise ValueError(
                f"The latent has shape {tuple(latent.shape[1:])}, but this model was built for {expected}; "
                "build one of that size (latents are square)."
            )

    def _patchify(self, latent: Tensor) -> Tensor:
        """[B, c, h, w] -> [B, T, c p p], the layout of a convolution's weight."""
        batch, channels, height, width = latent.shape
        p = self.config.patch_size
        patches = latent.view(batch, channels, height // p, p, width // p, p)
        return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, self.config.num_tokens, channels * p * p)

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """[B, T, p p c'] -> [B, c', h, w]. The released code's layout: channels fastest."""
        grid, p = self.config.latent_size // self.config.patch_size, self.config.patch_size
        values = patches.view(-1, grid, grid, p, p, self.config.out_channels)
        side = self.config.latent_size
        return values.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.config.out_channels, side, side)


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]
