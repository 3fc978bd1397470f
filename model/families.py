"""List the families of weights that other programs have: files are read, started from and written by this list.

A new family needs a class derived from `Family`, its entry here, its name in `launch.command.settings.Program`, and a
test that its program's outputs are computed. Its classes of networks are known to model/ alone.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from model.adm_family import GuidedDiffusion
from model.dit_families import LightningDiT, ReleasedDiT, SiT
from model.family import Facts, Family
from model.ldm_family import LatentDiffusion
from model.network import Network
from model.sd_family import StableDiffusion

RELEASED_DIT, STABLE_DIFFUSION = ReleasedDiT(), StableDiffusion()
FOLDERS: tuple[Family, ...] = (RELEASED_DIT, STABLE_DIFFUSION)  # those with folders of diffusers
FAMILIES: tuple[Family, ...] = (
    RELEASED_DIT,
    SiT(),
    LightningDiT(),
    GuidedDiffusion(),
    LatentDiffusion(),
    STABLE_DIFFUSION,
)  # the first that recognizes a table has it


def written_for(program: str) -> Family | None:
    """Return the family that `export to=...` writes for a program, or None for one with a form of its own."""
    return next((family for family in FAMILIES if family.program == program), None)


def require_written(program: str, network: Network, where: str) -> None:
    """Raise ValueError where a network would be written for the program of another family, naming both."""
    target = written_for(program)
    targets = FOLDERS if target is None else (target,)
    if not any(family.fits(network) for family in targets):
        fitting = [f"to={family.program}" for family in FAMILIES if family.fits(network)]
        written = " or ".join(family.name for family in targets)
        raise ValueError(
            f"to={program} writes weights of the family {written}, but {where} has a network of the family "
            f"{network.facts()['family']}; {'give ' + ' or '.join(fitting) if fitting else 'keep it in our format'}."
        )


def written_as_folder(network: Network) -> Family:
    """Return the family that `export to=diffusers` writes for a network, for which `require_written` is called."""
    return next((family for family in FOLDERS if family.fits(network)), RELEASED_DIT)


def family_of(state: Mapping[str, Tensor], asked: str | None, hint: Family | None) -> tuple[Family, bool]:
    """Return the family of a table of weights, and whether it is certain, since DiT's and SiT's have the same names.

    ``asked`` is the name that the user gives; ``hint`` is `stated` by the file. Raises ValueError, naming both, where
    the table is of another family than is asked for.
    """
    fitting = [family for family in FAMILIES if family.recognises(state)]
    assert fitting, "a table of weights is found by the anchor of a family"
    if asked is not None:
        wanted = _named(asked)
        if wanted not in fitting:
            raise ValueError(
                f"these are weights of the family {fitting[0].name}, but foreign.family is {asked}; leave it out, or "
                "give other weights."
            )
        return wanted, True
    if hint in fitting:
        return hint, True
    return fitting[0], len(fitting) == 1


def require_fit(family: Family, network: Network) -> None:
    """Raise ValueError where a run would start with weights of another family than its network's, naming both."""
    if not family.fits(network):
        raise ValueError(
            f"init_from has weights of the family {family.name}, but this run's network is of the family "
            f"{network.facts()['family']}; choose a model of the weights' family."
        )


def require_settings(family: Family, facts: Facts) -> None:
    """Raise ValueError for a given setting of ``foreign`` that the files of the family state themselves."""
    for name in ("num_heads", "head_dim", "latent_size", "num_classes", "frequency_shift", "new_attention_order"):
        if getattr(facts, name) is not None and name not in family.settings:
            having = ", ".join(other.name for other in FAMILIES if name in other.settings)
            raise ValueError(
                f"foreign.{name} is {getattr(facts, name)}, but these are weights of the family {family.name}, and "
                f"only {having} have this setting; leave it out."
            )


def stated(arguments: Mapping[str, Any], file_name: str) -> Family | None:
    """Return the family that a trainer's arguments state, or the name of a released file, or None.

    `ditscale export` writes such arguments. Names are such as DiT-XL/2 and SiT-XL-2-256x256.pt.
    """
    model = arguments.get("model")
    by_name = {family.name: family for family in FAMILIES}
    if isinstance(model, str) and (family := by_name.get(model.split("-")[0])) is not None:
        return family
    if "path_type" in arguments:  # only SiT's trainer has it
        return by_name["SiT"]
    return by_name.get(file_name.split("-")[0]) if "-" in file_name else None


def _named(name: str) -> Family:
    for family in FAMILIES:
        if family.name == name:
            return family
    raise ValueError(
        f"foreign.family is {name!r}, but the families of weights are {', '.join(one.name for one in FAMILIES)}; "
        "choose one of them, or leave it out."
    )
