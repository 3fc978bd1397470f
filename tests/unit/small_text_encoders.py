"""Write folders like those of CLIP and T5 on the hub, of small random networks with a vocabulary written by hand."""

import json
from pathlib import Path

import torch

WORDS = ("a", "drawing", "of", "three", "digit", "seven", "the", "number")
LENGTH = 12  # of the small CLIP; the published ones have 77


def write_small_clip(folder: Path, **changes: object) -> Path:
    """Write a CLIP text encoder with 16 channels, whose tokenizer knows letters, some words and both ends."""
    from transformers import CLIPTextConfig, CLIPTextModel

    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    merges: list[str] = []
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters)]
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:  # joined from the left
            if (merge := f"{parts[0]} {parts[1]}") not in merges:
                merges.append(merge)
            parts[:2] = [parts[0] + parts[1]]
            if parts[0] not in vocabulary:
                vocabulary.append(parts[0])
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: number for number, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(ids))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    torch.manual_seed(0)
    config = CLIPTextConfig(
        **{
            "vocab_size": len(vocabulary),
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "max_position_embeddings": LENGTH,
            "bos_token_id": ids["<|startoftext|>"],
            "eos_token_id": ids["<|endoftext|>"],
            **changes,
        }
    )
    CLIPTextModel(config).save_pretrained(folder)
    return folder


def write_whole_clip(folder: Path, sides: int = 28) -> Path:
    """Write a CLIP with both encoders, whose images of ``sides`` pixels have 4 patches, and their preparation.

    Its weights are larger than at the start of training, so that images and captions have cosines of both signs.
    """
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig

    text = CLIPTextConfig.from_pretrained(write_small_clip(folder))
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": sides, "patch_size": sides // 2}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision, projection_dim=8))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight *= 8
    model.save_pretrained(folder)
    means = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "resample": 3}
    sizes = {"size": {"shortest_edge": sides}, "crop_size": {"height": sides, "width": sides}}
    (folder / "preprocessor_config.json").write_text(json.dumps({**sizes, **means}))
    return folder


def write_small_t5(folder: Path, **changes: object) -> Path:
    """Write a T5 with 16 channels, encoder and decoder, whose tokenizer knows letters and some words."""
    from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(f"\u2581{word}", -3.0) for word in WORDS]
    pieces += [(chr(code), -5.0) for code in range(ord("a"), ord("z") + 1)]
    T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(
        **{
            "vocab_size": len(pieces) + 10,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 2,
            "num_heads": 2,
            "feed_forward_proj": "gated-gelu",
            **changes,
        }
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder
