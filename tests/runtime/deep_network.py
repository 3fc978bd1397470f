"""A network that is not a DiT: convolutions, a skip connection, units two levels deep whose arguments are trees."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.embeddings import Embedded, LabelEmbedding, TimestepEmbedding
from model.network import Network


@dataclass(frozen=True)
class DeepConfig:
    width: int = 64
    num_classes: int = 10


class Stage(NamedTuple):
    image: Tensor  # [B, d, h, w]
    skip: Tensor | None  # [B, d, h, w]


class Level(nn.Module):
    """A convolution, shifted and scaled by the condition; on the way up, it also takes the skip connection."""

    def __init__(self, width: int, joins: bool) -> None:
        super().__init__()
        self.join = nn.Conv2d(2 * width, width, 1) if joins else None
        self.convolution = nn.Conv2d(width, width, 3, padding=1)
        self.modulation = nn.Linear(width, 2 * width)

    def forward(self, stage: Stage, embedded: Embedded) -> Stage:
        image = stage.image
        if self.join is not None:
            assert stage.skip is not None
            image = self.join(torch.cat([image, stage.skip], dim=1))
        shift, scale = self.modulation(nn.functional.silu(embedded.vector))[..., None, None].chunk(2, dim=1)
        return Stage(image + self.convolution(nn.functional.silu(image * (1 + scale) + shift)), None)


class DeepNetwork(Network):
    """Two levels down, two up at the same size, the mean over a quarter of the image between them."""

    config_class = DeepConfig
    latent_shape = (4, 8, 8)
    out_channels = 8

    def __init__(self, config: DeepConfig) -> None:
        super().__init__(config)
        width = config.width
        self.timestep_embedding = TimestepEmbedding(width)
        self.label_embedding = LabelEmbedding(config.num_classes, width)
        self.first = nn.Linear(4, width)
        ways = {way: nn.ModuleList([Level(width, way == "up") for _ in range(2)]) for way in ("down", "up")}
        self.ways = nn.ModuleDict(ways)
        self.last = nn.Conv2d(width, self.out_channels, 1)
        self.initialize(0)

    def initialize(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if not parameter.is_meta:
                nn.init.normal_(parameter, std=0.05, generator=generator)

    def units(self) -> Sequence[nn.Module]:
        return [*self.ways["down"], *self.ways["up"]]  # type: ignore[misc]  # iterable: a ModuleList

    def example_inputs(self, batch: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        device = self.first.weight.device
        t = torch.zeros(batch, dtype=torch.int64, device=device)
        return torch.zeros(batch, *self.latent_shape, device=device), t, self.label_embedding.example(batch, device)

    def facts(self) -> dict[str, int | str]:
        return {"family": "deep", "size": f"{self.config.width} channels", "levels": 2}

    def forward(self, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        embedded = self.label_embedding.embed(self.timestep_embedding(t), condition)
        stage, skips = Stage(self.first(x_t.movedim(1, -1)).movedim(-1, 1), None), []
        for level in self.ways["down"]:  # type: ignore[union-attr]
            stage = level(stage, embedded)
            skips.append(stage.image)
        batch, width, height, _ = stage.image.shape
        coarse = stage.image.view(batch, width, height // 2, 2, height // 2, 2).mean(dim=(3, 5), keepdim=True)
        image = coarse.expand(-1, -1, -1, 2, -1, 2).reshape(stage.image.shape)
        for level in self.ways["up"]:  # type: ignore[union-attr]
            image = level(Stage(image, skips.pop()), embedded).image
        output: Tensor = self.last(image)
        return output
