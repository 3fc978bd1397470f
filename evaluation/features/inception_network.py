"""Define the Inception network of 2015-12-05, on which FID, sFID and the Inception Score are defined.

It is the network that TensorFlow published as ``classify_image_graph_def.pb`` (Szegedy et al. 2015, "Rethinking the
Inception Architecture", with differences in pooling), not torchvision's. Parameters are named as in the public
checkpoint ``pt_inception-2015-12-05-6726825d.pth``, so that it loads without changes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

INPUT_SIZE = 299  # pixels, side of the square input
NUM_FEATURES = 2048
NUM_SPATIAL_CHANNELS = 7  # channels used of the 17x17 map, as in ADM's suite
NUM_SPATIAL = NUM_SPATIAL_CHANNELS * 17 * 17  # 2023
NUM_LOGITS = 1008  # outputs of the graph, of which 1000 are classes of ImageNet


class InceptionOutput(NamedTuple):
    """The three tensors that ADM's suite reads from the graph."""

    pool: Tensor  # [B, 2048] float32, ``pool_3:0``
    spatial: Tensor  # [B, 2023] float32, the first 7 channels of ``mixed_6/conv:0`` after ReLU, flattened as [h, w, c]
    logits: Tensor  # [B, 1008] float32, without bias


class Conv(nn.Module):
    """A convolution, batch normalization and ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: tuple[int, int], stride: int = 1, padding: tuple[int, int] = (0, 0)
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, h, w] to [B, outputs, h', w']."""
        return F.relu_(self.bn(self.conv(x)))


class ConvSpec(NamedTuple):
    """A convolution inside a branch: padded to the same size at stride 1, not padded at stride 2."""

    name: str
    outputs: int
    kernel: tuple[int, int]
    stride: int = 1


class Pool(NamedTuple):
    """A 3x3 pooling at the start of a branch. Averages do not count the padding, as in TensorFlow."""

    kind: str  # average or maximum
    stride: int

    def __call__(self, x: Tensor) -> Tensor:
        """Map [B, c, h, w] to [B, c, h / stride, w / stride]."""
        if self.kind == "average":
            pooled = F.avg_pool2d(_as_pooled(x), 3, self.stride, padding=1, count_include_pad=False)
        else:
            pooled = F.max_pool2d(_as_pooled(x), 3, self.stride, padding=1 if self.stride == 1 else 0)
        return pooled.contiguous()


def _as_pooled(x: Tensor) -> Tensor:
    """Return the input in the memory format that a CPU pools fastest, to the same bits; convolutions would differ."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


HALVE = Pool("maximum", 2)

# A stage of a branch; a list is a fork: convolutions of the same input whose outputs are concatenated.
Stage = ConvSpec | Pool | list[ConvSpec]
Branch = list[Stage]


class Mixed(nn.Module):
    """Branches of the same input, concatenated. Convolutions are attributes with their names in the checkpoint."""

    def __init__(self, inputs: int, branches: list[Branch]) -> None:
        super().__init__()
        self._branches = branches
        self.outputs = sum(self._add(inputs, branch) for branch in branches)

    def _add(self, channels: int, branch: Branch) -> int:
        """Create the convolutions of a branch; return its number of output channels."""
        for stage in branch:
            if isinstance(stage, Pool):
                continue
            specs = [stage] if isinstance(stage, ConvSpec) else stage
            for spec in specs:
                rows, columns = spec.kernel
                padding = (rows // 2, columns // 2) if spec.stride == 1 else (0, 0)
                self.add_module(spec.name, Conv(channels, spec.outputs, spec.kernel, spec.stride, padding))
            channels = sum(spec.outputs for spec in specs)
        return channels

    def branches(self, x: Tensor) -> list[Tensor]:
        """Return the output of each branch, [B, c_i, h, w]."""
        return [self._run(branch, x) for branch in self._branches]

    def _run(self, branch: Branch, x: Tensor) -> Tensor:
        for stage in branch:
            if isinstance(stage, Pool):
                x = stage(x)
            elif isinstance(stage, ConvSpec):
                x = self.get_submodule(stage.name)(x)
            else:
                x = torch.cat([self.get_submodule(spec.name)(x) for spec in stage], dim=1)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, h, w] to [B, outputs, h', w']."""
        return torch.cat(self.branches(x), dim=1)


ONE, THREE, FIVE, ROW, COLUMN = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1)


def _grid_35(inputs: int, pooled: int) -> Mixed:
    """Return Mixed_5b, 5c or 5d, on the 35x35 grid."""
    return Mixed(
        inputs,
        [
            [ConvSpec("branch1x1", 64, ONE)],
            [ConvSpec("branch5x5_1", 48, ONE), ConvSpec("branch5x5_2", 64, FIVE)],
            [
                ConvSpec("branch3x3dbl_1", 64, ONE),
                ConvSpec("branch3x3dbl_2", 96, THREE),
                ConvSpec("branch3x3dbl_3", 96, THREE),
            ],
            [Pool("average", 1), ConvSpec("branch_pool", pooled, ONE)],
        ],
    )


def _to_grid_17(inputs: int) -> Mixed:
    """Return Mixed_6a, from 35x35 to 17x17."""
    return Mixed(
        inputs,
        [
            [ConvSpec("branch3x3", 384, THREE, 2)],
            [
                ConvSpec("branch3x3dbl_1", 64, ONE),
                ConvSpec("branch3x3dbl_2", 96, THREE),
                ConvSpec("branch3x3dbl_3", 96, THREE, 2),
            ],
            [Pool("maximum", 2)],
        ],
    )


def _grid_17(inputs: int, width: int) -> Mixed:
    """Return one of Mixed_6b .. 6e, on the 17x17 grid; 7x7 convolutions are factored into a row and a column."""
    return Mixed(
        inputs,
        [
            [ConvSpec("branch1x1", 192, ONE)],
            [
                ConvSpec("branch7x7_1", width, ONE),
                ConvSpec("branch7x7_2", width, ROW),
                ConvSpec("branch7x7_3", 192, COLUMN),
            ],
            [
                ConvSpec("branch7x7dbl_1", width, ONE),
                ConvSpec("branch7x7dbl_2", width, COLUMN),
                ConvSpec("branch7x7dbl_3", width, ROW),
                ConvSpec("branch7x7dbl_4", width, COLUMN),
                ConvSpec("branch7x7dbl_5", 192, ROW),
            ],
            [Pool("average", 1), ConvSpec("branch_pool", 192, ONE)],
        ],
    )


def _to_grid_8(inputs: int) -> Mixed:
    """Return Mixed_7a, from 17x17 to 8x8."""
    return Mixed(
        inputs,
        [
            [ConvSpec("branch3x3_1", 192, ONE), ConvSpec("branch3x3_2", 320, THREE, 2)],
            [
                ConvSpec("branch7x7x3_1", 192, ONE),
                ConvSpec("branch7x7x3_2", 192, ROW),
                ConvSpec("branch7x7x3_3", 192, COLUMN),
                ConvSpec("branch7x7x3_4", 192, THREE, 2),
            ],
            [Pool("maximum", 2)],
        ],
    )


def _grid_8(inputs: int, pool: Pool) -> Mixed:
    """Return Mixed_7b or 7c, on the 8x8 grid, with forks; the graph has average pooling in 7b and maximum in 7c."""
    row, column = (1, 3), (3, 1)
    return Mixed(
        inputs,
        [
            [ConvSpec("branch1x1", 320, ONE)],
            [
                ConvSpec("branch3x3_1", 384, ONE),
                [ConvSpec("branch3x3_2a", 384, row), ConvSpec("branch3x3_2b", 384, column)],
            ],
            [
                ConvSpec("branch3x3dbl_1", 448, ONE),
                ConvSpec("branch3x3dbl_2", 384, THREE),
                [ConvSpec("branch3x3dbl_3a", 384, row), ConvSpec("branch3x3dbl_3b", 384, column)],
            ],
            [pool, ConvSpec("branch_pool", 192, ONE)],
        ],
    )


class Inception2015(nn.Module):
    """Maps uint8 images of any size to the three outputs that the metrics are defined on."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, THREE, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, THREE)
        self.Conv2d_2b_3x3 = Conv(32, 64, THREE, padding=(1, 1))
        self.Conv2d_3b_1x1 = Conv(64, 80, ONE)
        self.Conv2d_4a_3x3 = Conv(80, 192, THREE)
        self.Mixed_5b = _grid_35(192, pooled=32)
        self.Mixed_5c = _grid_35(256, pooled=64)
        self.Mixed_5d = _grid_35(288, pooled=64)
        self.Mixed_6a = _to_grid_17(288)
        self.Mixed_6b = _grid_17(768, width=128)
        self.Mixed_6c = _grid_17(768, width=160)
        self.Mixed_6d = _grid_17(768, width=160)
        self.Mixed_6e = _grid_17(768, width=192)
        self.Mixed_7a = _to_grid_8(768)
        self.Mixed_7b = _grid_8(1280, Pool("average", 1))
        self.Mixed_7c = _grid_8(2048, Pool("maximum", 1))
        self.fc = nn.Linear(NUM_FEATURES, NUM_LOGITS)

    def forward(self, images: Tensor) -> InceptionOutput:
        """Return the outputs for images [B, 3, H, W] uint8."""
        x = (resize_like_tensorflow(images.float(), INPUT_SIZE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # [B, 64, 147, 147]
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(HALVE(x)))  # [B, 192, 71, 71]
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(HALVE(x))))  # [B, 288, 35, 35]
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # [B, 768, 17, 17]
        branches = self.Mixed_6d.branches(x)
        spatial = branches[0][:, :NUM_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_6e(torch.cat(branches, dim=1))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # [B, 2048, 8, 8]
        pool = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return InceptionOutput(pool, spatial, pool @ self.fc.weight.T)


def resize_like_tensorflow(images: Tensor, size: int) -> Tensor:
    """Resize [B, C, H, W] float to [B, C, size, size] like ResizeBilinear of TensorFlow 1.

    Output pixel i is at i * H / size, without half-pixel centers, and without antialiasing when images shrink.
    """
    rows, next_rows, row_fraction = _bilinear_taps(images.shape[2], size, images.device)
    columns, next_columns, column_fraction = _bilinear_taps(images.shape[3], size, images.device)
    upper, lower = images[:, :, rows], images[:, :, next_rows]

    def along_row(lines: Tensor) -> Tensor:
        left = lines[..., columns]
        return left + (lines[..., next_columns] - left) * column_fraction

    top = along_row(upper)
    return top + (along_row(lower) - top) * row_fraction[:, None]


def _bilinear_taps(length: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return, for each of ``size`` outputs, the pixel before it, the pixel after it, and its fraction between them."""
    scale = torch.tensor(length / size, dtype=torch.float32, device=device)
    place = torch.arange(size, dtype=torch.float32, device=device) * scale
    before = place.long()
    return before, (before + 1).clamp(max=length - 1), place - before.float()
