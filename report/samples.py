"""Draw figure 7: the same noise and labels through all models."""

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from report.models import patch_name, patch_names, size_name
from report.study import Study
from report.style import Palette, new_figure

SampleGrid = tuple[list[str], NDArray[np.uint8]]  # names of runs, images [runs, columns, H, W, C]


def figure_7(samples: SampleGrid, study: Study) -> Figure:
    """Draw samples of all models from the same noise and labels: a row for each size, a column for each patch size."""
    names, images = samples
    records = {name: study.chosen[name] for name in names}
    patches = patch_names(records.values())
    sizes = list(Palette(records.values()).by_size)
    columns = images.shape[1]
    width = min(11.0, 1.1 + 0.42 * columns * len(patches))
    figure = new_figure(width, 0.9 + 0.9 * width / (len(patches) * columns) * len(sizes))
    grid = figure.subplots(len(sizes), len(patches), squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[], frame_on=False)
    for name, row in zip(names, images, strict=True):
        record = records[name]
        axes = grid[sizes.index(size_name(record)), patches.index(patch_name(record))]
        strip = np.concatenate([np.pad(image, ((1, 1), (1, 1), (0, 0)), constant_values=255) for image in row], axis=1)
        strip = strip[..., :3] if strip.shape[2] >= 3 else strip[..., 0]
        axes.imshow(strip, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    for axes, patch in zip(grid[0], patches, strict=True):
        axes.set_title(patch, loc="center")
    for axes, size in zip(grid[:, 0], sizes, strict=True):
        axes.set_ylabel(size, rotation=0, ha="right", va="center", fontweight="bold")
    return figure
