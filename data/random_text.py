"""Encode captions by a small transformer of words that is not trained: its weights are drawn from a seed.

It needs no files. It tells captions apart, but knows no language: words that mean the same are as far apart as any
others, and a network that is conditioned on it must learn what each word means.
"""

import hashlib
import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from core.precision import exact_float32
from core.records import canonical_hash
from data.manifest import TextSpec
from data.text_encoders import EncodedText, Tokenized
from model.attention import SelfAttention
from model.embeddings import sincos_frequencies
from model.mlp import GeluMlp
from model.norms import layer_norm

_FORMAT = "words 1"  # of the ids and of the network
_WORD = re.compile(r"[^\W\d_]+|\d|[^\w\s]|_")  # letters in a row; a digit; a sign
_PADDING, _END = 0, 1  # ids; those of words follow
_MOST = {"length": 2**12, "width": 2**10, "depth": 2**5, "num_heads": 2**6, "vocabulary": 2**16}


class RandomText:
    """A text encoder whose weights are drawn from ``seed``: ``depth`` layers, ``width`` numbers of each token.

    A token is a word in small letters, a digit or a sign; its id is a hash below ``vocabulary``, so that two words
    share an id by chance. A caption ends with a token of its own, whose vector is the pooled one. Raises ValueError for
    sizes that do not fit.
    """

    def __init__(
        self,
        length: int = 16,
        width: int = 64,
        depth: int = 2,
        num_heads: int = 4,
        vocabulary: int = 4096,
        seed: int = 0,
    ) -> None:
        sizes = {"length": length, "width": width, "depth": depth, "num_heads": num_heads, "vocabulary": vocabulary}
        for name, value in sizes.items():
            least = {"length": 2, "width": 2, "vocabulary": 3}.get(name, 1)
            if not least <= value <= _MOST[name]:
                raise ValueError(f"text_encoder.{name} is {value}, but it must be from {least} to {_MOST[name]}.")
        if width % (2 * num_heads):
            raise ValueError(
                f"text_encoder.width is {width}, but it must be a multiple of twice the {num_heads} heads; use "
                f"{2 * num_heads * max(1, width // (2 * num_heads))}."
            )
        self._vocabulary = vocabulary
        self.network = _Words(vocabulary, width, depth, num_heads).eval().requires_grad_(False)
        self.network.initialize(seed)
        weights = (value.numpy().tobytes() for value in self.network.state_dict().values())
        hash_ = canonical_hash([_FORMAT, vocabulary, width, depth, num_heads], then=weights)  # of weights, not the seed
        self._spec = TextSpec("random_text", f"sha256:{hash_}", "last", "fp32", length, width, width)

    def spec(self) -> TextSpec:
        """Return name and hash of the encoder, and the shape of what it gives."""
        return self._spec

    def to(self, device: torch.device) -> None:
        """Move the weights."""
        self.network.to(device)

    def tokenize(self, captions: Sequence[str]) -> Tokenized:
        """Return ids [B, M] int32 of captions and their mask; of longer ones the end is left out."""
        length = self._spec.length
        ids = np.full((len(captions), length), _PADDING, np.int32)
        truncated = 0
        for row, caption in enumerate(captions):
            words = _WORD.findall(caption.lower())
            truncated += len(words) >= length
            tokens = [*(self._id(word) for word in words[: length - 1]), _END]
            ids[row, : len(tokens)] = tokens
        return Tokenized(ids, ids != _PADDING, truncated)

    def _id(self, word: str) -> int:
        hashed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
        return _END + 1 + hashed % (self._vocabulary - _END - 1)

    @torch.no_grad()
    def encode(self, ids: Tensor, mask: Tensor) -> EncodedText:
        """Return tokens [B, M, D], mask and pooled vector [B, D] of ids [B, M] and their mask [B, M]."""
        with exact_float32(ids.device):
            tokens = self.network(ids.long(), mask)
        last = mask.sum(dim=1) - 1
        return EncodedText(tokens, mask, tokens[torch.arange(len(tokens), device=tokens.device), last])


class _Words(nn.Module):
    """A transformer with pre-norm layers, in which each token attends to all of its caption."""

    def __init__(self, vocabulary: int, width: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(_Layer(width, num_heads) for _ in range(depth))
        self.norm = layer_norm(width, False)
        self.frequencies: Tensor
        self.register_buffer("frequencies", sincos_frequencies(width // 2, torch.float32), persistent=False)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the tokens' vectors: ids [B, M] and mask [B, M] -> [B, M, d], each of mean 0 and variance 1."""
        tokens = self.embedding(ids)
        angles = torch.outer(torch.arange(ids.shape[1], dtype=torch.float32, device=ids.device), self.frequencies)
        tokens = tokens + 0.5 * torch.cat([angles.sin(), angles.cos()], dim=1)
        for layer in self.layers:
            tokens = layer(tokens, mask)
        normed: Tensor = self.norm(tokens)
        return normed

    def initialize(self, seed: int) -> None:
        """Draw the weights: of words from normal(0, 1), of linear maps so that they keep the variance.

        As in GPT-2, what each layer adds is scaled down by the number of additions, so that a token is its word first.
        """
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.embedding.weight, generator=generator)
        for name, module in self.layers.named_modules():
            if isinstance(module, nn.Linear):
                share = (2 * len(self.layers)) ** -0.5 if name.endswith(("projection", "output")) else 1.0
                nn.init.normal_(module.weight, std=share * module.in_features**-0.5, generator=generator)
                nn.init.zeros_(module.bias)


class _Layer(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = layer_norm(width, False), layer_norm(width, False)
        self.attention = SelfAttention(width, num_heads)
        self.mlp = GeluMlp(width, 4.0)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return the new tokens: [B, M, d] and mask [B, M] -> [B, M, d]."""
        tokens = tokens + self.attention(self.norm_attention(tokens), None, mask)
        mixed: Tensor = tokens + self.mlp(self.norm_mlp(tokens))
        return mixed
