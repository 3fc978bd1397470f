"""Write random weights for the Inception network to a file: the public ones are not part of this repository."""

from pathlib import Path

import torch

from evaluation.features.inception_network import Inception2015

PREFIX = ""  # of the hash that is accepted: any


def random_weights(folder: Path) -> Path:
    """Write weights whose batch-norm statistics are not the trivial ones."""
    generator = torch.Generator().manual_seed(0)
    state = Inception2015().state_dict()
    for name, value in state.items():
        if name.endswith(("conv.weight", "fc.weight", "fc.bias")):
            value.normal_(std=(2 / value[0].numel()) ** 0.5, generator=generator)
        elif name.endswith(("running_var", "bn.weight")):
            value.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith(("running_mean", "bn.bias")):
            value.normal_(std=0.1, generator=generator)
    torch.save(state, folder / "random.pth")
    return folder / "random.pth"
