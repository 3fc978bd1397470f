"""Folders of diffusers are read without diffusers, or refused where their network differs."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from foreign_files import assert_same_weights, change_json, random_model, released_weights, saved
from safetensors.torch import load_file, save_file

from launch.builders.foreign import is_foreign, read_foreign
from model.diffusers_weights import to_diffusers
from model.family import Facts


@pytest.fixture
def diffusers_folder(tmp_path: Path) -> Path:
    to_diffusers(random_model(), tmp_path / "pipeline")
    return tmp_path / "pipeline"


def test_a_file_of_a_diffusers_folder_stands_for_the_folder(tmp_path: Path, diffusers_folder: Path) -> None:
    path = diffusers_folder / "transformer/diffusion_pytorch_model.safetensors"
    for where in (diffusers_folder, path.parent, path):
        assert is_foreign(str(where))
        assert_same_weights(read_foreign(str(where), "ema", Facts()).model, random_model())
    path.rename(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"has diffusers' names, which need a config.json; give the folder"):
        read_foreign(str(tmp_path / "a.safetensors"), "ema", Facts())


def test_older_and_sharded_folders_of_diffusers_are_read(diffusers_folder: Path) -> None:
    inner = diffusers_folder / "transformer"
    whole = inner / "diffusion_pytorch_model.safetensors"
    weights = load_file(whole)
    whole.unlink()
    saved(inner / "diffusion_pytorch_model.bin", weights)
    change_json(inner / "config.json", _class_name="Transformer2DModel", num_vector_embeds=None, dropout=0.1)
    assert_same_weights(read_foreign(str(diffusers_folder), "ema", Facts()).model, random_model())
    (inner / "diffusion_pytorch_model.bin").unlink()
    names = sorted(weights)
    places = {}
    for number, half in enumerate((names[::2], names[1::2]), start=1):
        file_name = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in half}, inner / file_name)
        places |= dict.fromkeys(half, file_name)
    index = inner / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(ValueError, match=r"index.json is damaged: it has no weight_map"):
        read_foreign(str(diffusers_folder), "ema", Facts())
    change_json(index, weight_map=places)
    assert_same_weights(read_foreign(str(diffusers_folder), "ema", Facts()).model, random_model())
    change_json(index, weight_map={**places, names[0]: "../../../etc/passwd"})
    with pytest.raises(ValueError, match="which is not a plain file name; it is not read"):
        read_foreign(str(diffusers_folder), "ema", Facts())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"activation_fn": "gelu"}, "has activation_fn 'gelu', but a DiT has 'gelu-approximate'"),
        ({"norm_elementwise_affine": True}, "has norm_elementwise_affine True, but a DiT has False"),
        ({"attention_bias": False}, "has attention_bias False, but a DiT has True"),
        (
            {"_class_name": "UNet2DModel"},
            "is of a UNet2DModel, but only a DiTTransformer2DModel or a UNet2DConditionModel can",
        ),
        ({"num_layers": 10**6}, "The config has 1000000 layers, but there are weights of 2"),
        ({"num_layers": 10**60}, "num_layers is 1"),
        ({"sample_size": 10**6}, "sample_size is 1000000"),
        ({"sample_size": "8"}, "sample_size is '8'"),
        ({"patch_size": 3}, "patch_size 3 does not divide sample_size 8"),
        ({"out_channels": 5}, "5 output channels for 4 input channels are neither noise alone"),
        ({"num_attention_heads": 3}, "is (48, 256), not (36, 256)"),
        ({"in_channels": 8}, "pos_embed.proj.weight is (48, 4, 2, 2), not (48, 8, 2, 2)"),
    ],
    ids=str,
)
def test_a_config_of_diffusers_that_means_another_network_is_refused(
    diffusers_folder: Path, change: dict[str, Any], words: str
) -> None:
    change_json(diffusers_folder / "transformer/config.json", **change)
    with pytest.raises(ValueError, match="transformer") as caught:
        read_foreign(str(diffusers_folder), "ema", Facts())
    assert words in str(caught.value)


def test_another_epsilon_is_said(diffusers_folder: Path) -> None:
    change_json(diffusers_folder / "transformer/config.json", norm_eps=None)  # diffusers' default, as in the published
    (note,) = read_foreign(str(diffusers_folder), "ema", Facts()).notes
    assert "its config has norm_eps 1e-05, but 1e-06 is used, as in the released code" in note


def test_embeddings_of_single_blocks_that_were_trained_apart_are_refused(diffusers_folder: Path) -> None:
    """Refuse blocks whose embeddings differ: diffusers trains one for each block, but a DiT has a single one."""
    path = diffusers_folder / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    name = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    save_file({**weights, name: weights[name] + 1e-4}, path)
    with pytest.raises(ValueError, match=rf"{name} differs from transformer_blocks.0\..*this program's DiT has one"):
        read_foreign(str(diffusers_folder), "ema", Facts())


def test_settings_that_the_folder_contradicts_are_refused(diffusers_folder: Path) -> None:
    for name, found in (("num_heads", 4), ("num_classes", 10)):
        with pytest.raises(ValueError, match=rf"foreign.{name} is 6, but the config of .* says {found}; leave it out"):
            read_foreign(str(diffusers_folder), "ema", Facts(**{name: 6}))
    with pytest.raises(ValueError, match="with one table of weights, not 'model'; leave weights out"):
        read_foreign(str(diffusers_folder), "model", Facts())
    with pytest.raises(ValueError, match=r"frequency_shift is 5, but it must be 0"):
        read_foreign(str(diffusers_folder), "ema", Facts(frequency_shift=5))


def test_frequencies_may_be_chosen_for_either_format(tmp_path: Path, diffusers_folder: Path) -> None:
    path = saved(tmp_path / "a.pt", released_weights())
    for (where, usual), shift in itertools.product(((path, 0), (diffusers_folder, 1)), (None, 0, 1)):
        model = read_foreign(str(where), "ema", Facts(num_heads=4, frequency_shift=shift)).model
        assert model.config.frequency_shift == (usual if shift is None else shift)
