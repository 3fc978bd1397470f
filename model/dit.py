"""Define the Diffusion Transformer (Peebles & Xie, arXiv 2212.09748, section 3.2)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self, cast, get_args

import torch
from torch import Tensor, nn

from model.attention import initialize_linears
from model.blocks import AdaLNZeroBlock, Block
from model.embeddings import (
    ConditionEmbedding,
    LabelEmbedding,
    TimestepEmbedding,
    grid_positions,
    position_embedding_2d,
)
from model.network import Network
from model.parts import family_name, parts_of

BlockFactory = Callable[[int, int], Block]  # (width, num_heads) -> block
EmbeddingFactory = Callable[..., ConditionEmbedding]  # (num_classes=, width=) -> embedding
PositionTable = Literal[
    "fixed", "learned", "none"
]  # added to the tokens: the paper's sines and cosines, a weight, none
Residual = Literal["fp32", "bf16"]  # of the tokens between blocks under autocast, to which each block adds


# Limits far above any real model: a config may come from a file, and a model is built before its weights are checked.
_MOST = {
    "latent_size": 2**12,
    "channels": 2**12,
    "width": 2**16,
    "depth": 2**12,
    "num_heads": 2**12,
    "num_classes": 2**24,
}
_MOST_POSITIONS = 2**30  # numbers in the position embedding
ROUNDING = 1e-6  # most that two ways of computing the fixed position embedding differ
FIXED_WITHIN = 2.0**-8  # most that averaging, or bfloat16, changes a fixed position embedding


@dataclass(frozen=True)
class DiTConfig:
    """All settings that determine a DiT's shape. Raises ValueError where the numbers do not fit together."""

    latent_size: int  # side of the square latent
    channels: int  # c, channels of the latent
    patch_size: int  # p, side of a patch
    width: int  # d, channels of a token
    depth: int  # number of blocks
    num_heads: int
    num_classes: int  # without the null class, which has index num_classes; 0: unconditional
    block: BlockFactory = AdaLNZeroBlock
    outputs_per_channel: int = 2  # of the network, for each channel of the latent; the objective determines it
    frequency_shift: int = 0  # of the timestep's frequencies: 0 as released, 1 as in diffusers
    embedding: EmbeddingFactory | None = None  # for a condition other than labels
    position_table: PositionTable = "fixed"
    residual: Residual = "fp32"

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
                f"model.frequency_shift is {self.frequency_shift}, but it must be 0, as in the released code, or 1, as "
                "in diffusers."
            )
        for name, values in (("position_table", PositionTable), ("residual", Residual)):
            if (value := getattr(self, name)) not in get_args(values):
                raise ValueError(f"model.{name} is {value!r}, but it must be one of {', '.join(get_args(values))}.")
        if self.num_tokens * self.width > _MOST_POSITIONS:
            raise ValueError(
                f"{self.num_tokens} tokens of model.width {self.width} need {self.num_tokens * self.width} numbers for "
                f"their positions, but at most {_MOST_POSITIONS} are allowed; set a larger model.patch_size."
            )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Return (c, h, w) of a latent."""
        return self.channels, self.latent_size, self.latent_size

    @property
    def num_tokens(self) -> int:
        """Return T = (latent_size / p)^2, the number of the image's tokens."""
        return (self.latent_size // self.patch_size) ** 2

    @property
    def out_channels(self) -> int:
        """Return the number of channels of the network's output."""
        return self.channels * self.outputs_per_channel

    def condition_embedding(self) -> ConditionEmbedding:
        """Return a new embedding of the condition: the configured one, else one of labels, else an empty one."""
        if self.embedding is not None:
            return self.embedding(num_classes=self.num_classes, width=self.width)
        return LabelEmbedding(self.num_classes, self.width) if self.num_classes else ConditionEmbedding()


class DiT(Network):
    """A transformer over patches of the latent. It is initialized from seed 0; call `initialize` for another seed."""

    config_class = DiTConfig
    config: DiTConfig
    # No weight depends on the latent's size, but for a learned position table.
    same_settings = ("channels", "patch_size", "width", "depth", "num_heads", "frequency_shift", "position_table")
    position_embedding: Tensor | None  # [T, d], if there is a table
    positions: Tensor | None  # [T, 2], if blocks use them

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        width, grid = config.width, config.latent_size // config.patch_size
        self.latent_shape, self.out_channels = config.latent_shape, config.out_channels
        self.patch_embedding = nn.Linear(config.channels * config.patch_size**2, width)
        self.timestep_embedding = TimestepEmbedding(width, config.frequency_shift)
        embedding = config.condition_embedding()
        self._embedding_name = embedding.name
        self.label_table = f"{embedding.name}.weight" if isinstance(embedding, LabelEmbedding) else None
        self.add_module(embedding.name, embedding)
        self._add_position_table()
        self.blocks = nn.ModuleList([config.block(width, config.num_heads) for _ in range(config.depth)])
        first = self.block_list[0]
        if embedding.for_tokens and not first.reads_tokens:
            raise ValueError(
                f"model.embedding gives tokens of the condition, but {first.name} blocks read its vector alone; set "
                "model/embedding=pooled_text, or a model/block with cross-attention."
            )
        self.shared_modulation = first.shared_modulation(width)
        self._block_name, self._assembly = first.name, first.assembly()
        self._parts = parts_of(first)
        positions = grid_positions(grid) if first.sees_positions else None
        self.register_buffer("positions", positions, persistent=False)
        self.final_layer = first.final_layer(width, config.out_channels * config.patch_size**2)
        self.initialize(0)

    def _add_position_table(self) -> None:
        """Add the table of positions: a buffer that no checkpoint contains, or a parameter [T, d]."""
        config, fixed = self.config, None
        if config.position_table == "learned":
            self.position_embedding = nn.Parameter(torch.empty(config.num_tokens, config.width))
            return
        if config.position_table == "fixed":
            fixed = position_embedding_2d(config.width, config.latent_size // config.patch_size)
        self.register_buffer("position_embedding", fixed, persistent=False)

    @property
    def embedding(self) -> ConditionEmbedding:
        """Return the module that embeds the condition. The module itself decides its name in the network."""
        return cast(ConditionEmbedding, self.get_submodule(self._embedding_name))

    @property
    def has_null_class(self) -> bool:
        """Return whether the condition can be dropped: the label table has a row for it, or there is no table."""
        labels = self.embedding
        return not isinstance(labels, LabelEmbedding) or labels.has_null_class

    def notes_on_weights(self) -> Sequence[str]:
        """Return a clause where the position embedding is not the fixed one."""
        if (drift := self.position_drift()) <= ROUNDING:
            return ()
        return (f"its position embedding differs from the fixed one by up to {drift:.2g}; its own is used.",)

    def require_start(self, found: Self, where: str) -> Sequence[str]:
        """Return notes on replacing the position embedding by the fixed one.

        Raises ValueError where it was trained, or is for another grid, and for weights of other blocks.
        """
        self._require_blocks(found, where)
        sizes = found.config.latent_size, self.config.latent_size
        if sizes[0] != sizes[1] and self.config.position_table == "learned":
            raise ValueError(
                f"init_from {where} has a learned position table for latents of side {sizes[0]}, but model.latent_size "
                f"is {sizes[1]}; start from weights of that size."
            )
        if (drift := found.position_drift()) > FIXED_WITHIN:
            raise ValueError(
                f"init_from {where} has a trained position embedding, which differs by up to {drift:.3g} from the "
                "fixed one of a run; start from weights with a fixed one."
            )
        if sizes[0] != sizes[1]:
            return (
                f"{where} has latents of side {sizes[0]} and this run of {sizes[1]}: all weights are taken over, and "
                "the positions are those of this run's grid.",
            )
        if drift > ROUNDING:
            return (f"{where}: this run replaces its position embedding by the fixed one (difference {drift:.2g}).",)
        return ()

    def _require_blocks(self, found: Self, where: str) -> None:
        """Raise ValueError where other blocks would compute another function of weights that may have equal shapes."""
        theirs, ours = ((family_name(dit._parts, "fixed"), dit._block_name) for dit in (found, self))
        if theirs != ours:
            raise ValueError(
                f"init_from {where} has other blocks than model.block: its weights are of the family {theirs[0]} with "
                f"{theirs[1]} blocks, but this run's network is of {ours[0]} with {ours[1]} blocks; choose the parts "
                "of the weights."
            )

    def position_drift(self) -> float:
        """Return the largest difference between a fixed position embedding and the sine-cosine one; 0 for others."""
        if self.position_embedding is None or self.config.position_table != "fixed":
            return 0.0
        fixed = position_embedding_2d(self.config.width, self.config.latent_size // self.config.patch_size)
        return float((self.position_embedding.cpu() - fixed).abs().max())

    @property
    def block_list(self) -> list[Block]:
        """Return the blocks, from the first to the last."""
        return cast(list[Block], list(self.blocks))

    def units(self) -> Sequence[nn.Module]:
        """Return the blocks."""
        return self.block_list

    def facts(self) -> dict[str, int | str]:
        """Return the family, patch size, width, depth and the name of the blocks."""
        config = self.config
        return {
            "family": family_name(self._parts, config.position_table),
            "patch_size": config.patch_size,
            "width": config.width,
            "depth": config.depth,
            "block": self._block_name,
        }

    def tables(self) -> Sequence[Tensor]:
        """Return the position embedding, unless it is a parameter."""
        fixed = self.position_embedding if self.config.position_table == "fixed" else None
        return () if fixed is None else (fixed,)

    def notes(self) -> Sequence[str]:
        """Return a sentence if a token has fewer channels than its patch has values."""
        p, width, values = self.config.patch_size, self.config.width, self.patch_embedding.in_features
        if width >= values:
            return ()
        return (
            f"model.width is {width}, but a patch has {values} values ({p}x{p} of {self.config.channels} channels), "
            "which a token cannot hold; set a larger model.width or a smaller model.patch_size.",
        )

    def initialize(self, seed: int) -> None:
        """Draw new weights from one generator seeded with ``seed``, by the released code's scheme.

        Linear maps, the patch embedding included, are Xavier-uniform with zero biases; the label table and the
        timestep MLP are normal(0, 0.02), as is a learned position table; blocks and final layer then set some of their
        weights to zero.
        """
        generator = torch.Generator().manual_seed(seed)
        if self.patch_embedding.weight.is_meta:  # shapes only: nothing to draw
            return
        initialize_linears(self, generator)
        self.embedding.initialize(generator)
        for table in (self.timestep_embedding.input.weight, self.timestep_embedding.output.weight):
            nn.init.normal_(table, std=0.02, generator=generator)
        if isinstance(self.position_embedding, nn.Parameter):
            nn.init.normal_(self.position_embedding, std=0.02, generator=generator)
        if self.shared_modulation is not None:
            self.shared_modulation.initialize()
        for block in self.block_list:
            block.initialize()
        self.final_layer.initialize()

    def forward(self, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """Return the prediction that the objective asks for: [B, outputs_per_channel c, h, w].

        x_t is [B, c, h, w] float, t is [B] int64 or float, and the condition is {"label": [B] int64 in
        [0, num_classes]}, or {} for an unconditional network. Raises ValueError for latents of another shape than the
        config's.
        """
        return self.with_tokens(x_t, t, condition, self.config.depth)[0]

    def token_shape(self, unit: int) -> tuple[int, int]:
        """Return (T, d). Raises ValueError for a block that there is not."""
        if not 1 <= unit <= self.config.depth:
            raise ValueError(
                f"alignment.block is {unit}, but the network has {self.config.depth} blocks; choose one from 1 to "
                f"{self.config.depth}."
            )
        return self.config.num_tokens, self.config.width

    def with_tokens(self, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor], unit: int) -> tuple[Tensor, Tensor]:
        """Return the prediction, and the image's tokens [B, T, d] after block ``unit``. Raises as `forward` does."""
        self._require_shape(x_t)
        tokens = self.patch_embedding(self._patchify(x_t))
        table = self.position_embedding
        tokens = tokens.float() if table is None else tokens + table  # float32, under autocast too
        if self.config.residual == "bf16" and torch.is_autocast_enabled(tokens.device.type):
            tokens = tokens.bfloat16()
        embedded = self.embedding.embed(self.timestep_embedding(t), condition)
        if self.shared_modulation is not None:
            embedded = embedded._replace(modulation=self.shared_modulation(embedded.vector))
        sequence = self._assembly.enter(tokens, embedded)
        positions = None if self.positions is None else self._assembly.places(self.positions, embedded)
        for number, block in enumerate(self.blocks, start=1):
            sequence = block(sequence, embedded, positions)
            if number == unit:
                tokens = self._assembly.leave(sequence, embedded)
        last = tokens if unit == len(self.blocks) else self._assembly.leave(sequence, embedded)
        return self._unpatchify(self.final_layer(last, embedded)), tokens

    def example_inputs(self, batch: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return zeros of the shapes that the network takes, for ``batch`` images, on its device."""
        device = self.patch_embedding.weight.device
        x_t = torch.zeros(batch, *self.latent_shape, device=device)
        t = torch.zeros(batch, dtype=torch.int64, device=device)
        return x_t, t, self.embedding.example(batch, device)

    def _require_shape(self, latent: Tensor) -> None:
        if latent.shape[1:] != (expected := self.latent_shape):
            raise ValueError(
                f"The latent has shape {tuple(latent.shape[1:])}, but this model was built for {expected}; "
                "build one of that size (latents are square)."
            )

    def _patchify(self, latent: Tensor) -> Tensor:
        """Cut latents into patches in the layout of a convolution's weight: [B, c, h, w] -> [B, T, c p p]."""
        batch, channels, height, width = latent.shape
        p = self.config.patch_size
        patches = latent.view(batch, channels, height // p, p, width // p, p)
        return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, self.config.num_tokens, channels * p * p)

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """Assemble patches in the released code's layout, channels last: [B, T, p p c'] -> [B, c', h, w]."""
        grid, p = self.config.latent_size // self.config.patch_size, self.config.patch_size
        values = patches.view(-1, grid, grid, p, p, self.config.out_channels)
        side = self.config.latent_size
        return values.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.config.out_channels, side, side)


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]
