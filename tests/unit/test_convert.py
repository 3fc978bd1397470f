"""Weights convert between the released code, this program and diffusers without a change."""

from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from foreign_files import assert_same_weights, random_model, released_weights
from safetensors.torch import load_file, save_file
from test_model import forward_inputs, golden_model, inputs, tiny

from diffusion.process import GaussianDiffusion
from diffusion.schedules import LinearSchedule
from diffusion.variances import LearnedRangeVariance
from launch.builders.diffusers_folder import read_diffusers_folder
from launch.builders.training import load_starting_weights
from model.attention import QKNormSelfAttention
from model.blocks import AdaLNBlock, AdaLNZeroBlock
from model.diffusers_weights import to_diffusers
from model.dit import DiT
from model.released import from_reference, to_reference
from model.starting import add_null_class, replace_label_table

GAUSSIAN = GaussianDiffusion(LinearSchedule(), LearnedRangeVariance())


def in_diffusers(theirs: DiTTransformer2DModel) -> torch.Tensor:
    x_t, t, condition = inputs()
    output: torch.Tensor = theirs(x_t, t, condition["label"]).sample
    return output


def from_diffusers(folder: Path, frequency_shift: int = 1) -> DiT:
    return read_diffusers_folder(folder, frequency_shift)[0]


def test_released_weights_come_in_and_go_out_bit_for_bit() -> None:
    weights = released_weights()
    model = from_reference(weights, num_heads=4)
    golden = golden_model()[1]
    output = model(*forward_inputs(golden))
    assert (output - golden["forward/out"]).abs().max() / golden["forward/out"].abs().max() < 1e-5
    back = to_reference(model)
    assert back.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(back[name], value), name


def test_wrong_weights_are_refused_with_their_first_three_keys() -> None:
    weights = released_weights()
    weights["blocks.0.attn.qkv.weight"] = torch.zeros(3, 3)
    del weights["blocks.1.mlp.fc1.bias"]
    weights["extra"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"fc1.bias is missing; extra is unknown; .*qkv.weight is \(3, 3\), not"):
        from_reference(weights, num_heads=4)
    with pytest.raises(ValueError, match="pos_embed is missing"):
        from_reference({"x_embedder.proj.weight": torch.zeros(4, 4, 2, 2)})
    with pytest.raises(ValueError, match="The weights of a model of width 48 do not contain its number of heads"):
        from_reference(released_weights())


@pytest.mark.parametrize("frequency_shift", [0, 1])
def test_diffusers_gives_back_the_same_weights(tmp_path: Path, frequency_shift: int) -> None:
    model = random_model(frequency_shift)
    to_diffusers(model, tmp_path)
    assert_same_weights(model, from_diffusers(tmp_path, frequency_shift))


def test_diffusers_computes_the_same_where_the_frequencies_are_its_own(tmp_path: Path) -> None:
    model = random_model(frequency_shift=1)
    to_diffusers(model, tmp_path)
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path / "transformer").eval()
    with torch.no_grad():
        ours, output = model(*inputs()), in_diffusers(theirs)
        again = from_diffusers(tmp_path)(*inputs())
    assert (output - ours).abs().max() / ours.abs().max() < 1e-5
    assert torch.equal(again, ours)


def test_nothing_but_the_frequencies_separates_diffusers_from_the_released_code(tmp_path: Path) -> None:
    model = from_reference(released_weights(), num_heads=4)
    to_diffusers(model, tmp_path)
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path / "transformer").eval()
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    with torch.no_grad():
        ours, output = model(*inputs()), in_diffusers(theirs)
    assert (output - ours).abs().max() / ours.abs().max() < 1e-5


def test_another_number_of_classes_renews_the_label_table_alone() -> None:
    model = random_model()
    renewed = replace_label_table(model, 3)
    assert renewed.config.num_classes == 3
    for name, value in renewed.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]) == (not name.startswith("label_embedding")), name


def drifted(by: float) -> dict[str, torch.Tensor]:
    """Return the golden weights with a position embedding that a trainer averaged or trained."""
    weights = released_weights()
    noise = torch.randn(weights["pos_embed"].shape, generator=torch.Generator().manual_seed(0)).clamp(-2, 2) / 2
    return {**weights, "pos_embed": weights["pos_embed"] + by * noise}


@pytest.mark.parametrize("by", [1.6e-4, 1.0])
def test_a_position_embedding_of_the_file_is_computed_with_and_comes_back_bit_for_bit(by: float) -> None:
    weights = drifted(by)
    model = from_reference(weights, num_heads=4)
    for name, value in to_reference(model).items():
        assert torch.equal(value, weights[name]), name
    assert model.position_drift() == pytest.approx(by, rel=0.1)
    with torch.no_grad():
        ours = model(*inputs())
        model.position_embedding.copy_(released_weights()["pos_embed"][0])
        assert (model(*inputs()) - ours).abs().max() > 1e-2 * by


def test_the_golden_output_needs_the_position_embedding_that_it_was_computed_with() -> None:
    """Subtract the drift from the patches' biases: the outputs show that the embedding is added exactly once."""
    golden = golden_model()[1]
    weights = released_weights()
    shift = torch.randn(48, generator=torch.Generator().manual_seed(1)) * 1e-3
    weights["pos_embed"] = weights["pos_embed"] + shift
    weights["x_embedder.proj.bias"] = weights["x_embedder.proj.bias"] - shift
    output = from_reference(weights, num_heads=4)(
        golden["forward/x"], golden["forward/t"], {"label": golden["forward/y"]}
    )
    assert (output - golden["forward/out"]).abs().max() / golden["forward/out"].abs().max() < 1e-5


@pytest.mark.parametrize("rows", [10, 1])
def test_a_label_table_without_a_null_row_comes_in_and_goes_out_bit_for_bit(rows: int) -> None:
    weights = released_weights()
    weights["y_embedder.embedding_table.weight"] = weights["y_embedder.embedding_table.weight"][:rows]
    model = from_reference(weights, num_heads=4, num_classes=rows)
    assert (model.config.num_classes, model.has_null_class) == (rows, False)
    assert model.label_embedding.num_embeddings == rows
    for name, value in to_reference(model).items():
        assert torch.equal(value, weights[name]), name
    completed = add_null_class(model)
    assert completed.has_null_class
    assert torch.equal(completed.label_embedding.weight[:rows], model.label_embedding.weight)


def test_weights_claim_no_more_than_is_there() -> None:
    """Allocate nothing by a file's number of blocks or width before all tensors were seen."""
    weights = released_weights()
    with pytest.raises(ValueError, match=r"there are 3 blocks, but no block 2"):
        from_reference({**weights, "blocks.9999.mlp.fc1.bias": torch.zeros(1)}, num_heads=4)
    huge = torch.zeros(1).expand(4_000_000, 4, 2, 2)
    with pytest.raises(ValueError, match="These are not a DiT's weights"):
        from_reference({**weights, "x_embedder.proj.weight": huge}, num_heads=4)


def test_models_that_exist_here_only_are_not_exported(tmp_path: Path) -> None:
    qk_norm = tiny(block=lambda width, heads: AdaLNZeroBlock(width, heads, attention=QKNormSelfAttention))
    for model, words in ((tiny(block=AdaLNBlock), "AdaLNBlock"), (qk_norm, "QKNormSelfAttention")):
        with pytest.raises(ValueError, match=f"but the model has .*{words}"):
            to_reference(model)
        with pytest.raises(ValueError, match=f"but the model has .*{words}"):
            to_diffusers(model, tmp_path)
    without = from_reference(released_weights(), num_heads=4, num_classes=11)
    with pytest.raises(ValueError, match="no null class, but diffusers' DiT has one after its 11 classes"):
        to_diffusers(without, tmp_path)
    with pytest.raises(ValueError, match="position embedding of these weights was trained: it differs by up to 1"):
        to_diffusers(from_reference(drifted(1.0), num_heads=4), tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not the folder of a diffusers DiT or U-Net: it has no config.json"):
        from_diffusers(tmp_path)
    to_diffusers(random_model(), tmp_path)
    (tmp_path / "transformer/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no network of diffusers in safetensors: it has nothing else"):
        from_diffusers(tmp_path)


def test_starting_weights_for_other_classes_say_that_the_label_table_is_new(tmp_path: Path) -> None:
    torch.save(released_weights(), tmp_path / "a.pt")
    model = tiny(num_classes=3)
    fresh_labels = model.label_embedding.weight.clone()
    (note,) = load_starting_weights(model, str(tmp_path / "a.pt"), GAUSSIAN)
    assert "has 10 classes and this run 3: the label table starts anew" in note
    assert torch.equal(model.label_embedding.weight, fresh_labels)
    expected = from_reference(released_weights(), num_heads=4).blocks[0].attention.qkv.weight
    assert torch.equal(model.blocks[0].attention.qkv.weight, expected)
    with pytest.raises(ValueError, match=r"has depth 2, but model.depth is 1; set it to 2"):
        load_starting_weights(tiny(depth=1), str(tmp_path / "a.pt"), GAUSSIAN)
    with pytest.raises(ValueError, match=r"has other blocks than model.block"):
        load_starting_weights(tiny(block=AdaLNBlock), str(tmp_path / "a.pt"), GAUSSIAN)


def test_a_diffusers_folder_with_wrong_weights_is_refused_with_their_names(tmp_path: Path) -> None:
    to_diffusers(random_model(), tmp_path)
    path = tmp_path / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({name: value for name, value in weights.items() if name != "proj_out_2.bias"}, path)
    with pytest.raises(ValueError, match=r"proj_out_2.bias is missing \(1 in all\)"):
        from_diffusers(tmp_path)
    save_file({**weights, "extra": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="extra is unknown"):
        from_diffusers(tmp_path)
    save_file({**weights, "proj_out_2.bias": torch.zeros(7)}, path)
    with pytest.raises(ValueError, match=r"proj_out_2.bias"):
        from_diffusers(tmp_path)
    path.write_bytes(b"rubbish, and not a little of it")
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model.safetensors is not a safetensors file"):
        from_diffusers(tmp_path)


@pytest.mark.parametrize(("width", "num_heads"), [(384, 6), (768, 12), (1024, 16), (1152, 16)])
def test_the_papers_sizes_need_no_number_of_heads(width: int, num_heads: int) -> None:
    model = tiny(width=width, depth=1, num_heads=num_heads)
    found = from_reference(to_reference(model))
    assert found.config == model.config
    assert_same_weights(model, found)


@pytest.mark.parametrize(
    ("width", "num_heads", "patch_size"), [(384, 6, 8), (768, 12, 4), (1024, 16, 2), (1152, 16, 2)]
)
def test_every_size_is_the_same_network_in_all_three_programs(
    width: int, num_heads: int, patch_size: int, tmp_path: Path
) -> None:
    """Use the paper's widths, heads and patches, and one block, since all blocks convert alike."""
    model = tiny(width=width, depth=1, num_heads=num_heads, patch_size=patch_size, frequency_shift=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # adaLN-Zero starts with zeros, which would prove nothing
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    to_diffusers(model, tmp_path)
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path / "transformer").eval()
    with torch.no_grad():
        ours, output = model(*inputs()), in_diffusers(theirs)
    assert (output - ours).abs().max() / ours.abs().max() < 1e-5
    assert_same_weights(from_diffusers(tmp_path), model)
    assert_same_weights(from_reference(to_reference(from_diffusers(tmp_path))), model)
