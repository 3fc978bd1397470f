"""Draw words and normals with PyTorch's operations on integers: the same bits on every device and compiler.

Words are those of Philox 4x32-10 (Salmon et al. 2011) with the seed as key and counter (number, position, position's
high half, stream), as Random123 defines them. A normal is looked up and interpolated in integers (`core.normal_table`);
its conversion to float32 is exact, so neither contraction to fused multiply-adds nor another order changes it.
"""

import torch
from torch import Tensor

from core.normal_table import DROP_BITS, FIRST_INDEX, normal_table

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # increments of the keys
ROUNDS = 10
LANES = 16  # consecutive counters, whose first words come first, then their second words, and so on
UNIT = 2.0**-21  # of a normal
_LOW = 0xFFFFFFFF


def block_words(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four words of counters, as int64 below 2^32; a counter's words are given in this way too."""
    c0, c1, c2, c3 = counter
    key_0, key_1 = seed & _LOW, seed >> 32
    for _ in range(ROUNDS):
        product_0, product_1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # modulo 2^64
        c0, c1 = _high(product_1) ^ c1 ^ key_0, product_1 & _LOW
        c2, c3 = _high(product_0) ^ c3 ^ key_1, product_0 & _LOW
        key_0, key_1 = (key_0 + WEYL[0]) & _LOW, (key_1 + WEYL[1]) & _LOW
    return c0, c1, c2, c3


def _high(product: Tensor) -> Tensor:
    """Return the high half. Its low half is zero before the shift: torch_xla divides negative numbers, rounding up."""
    return ((product & ~_LOW) >> 32) & _LOW


def stream_words(positions: Tensor, count: int, stream: int, seed: int) -> Tensor:
    """Return the first ``count`` words of the stream of each position: [B] int64 -> [B, count] int64 below 2^32."""
    num_chunks = -(-count // (4 * LANES))
    numbers = torch.arange(num_chunks * LANES, device=positions.device)
    rows = positions[:, None]
    counter = torch.broadcast_tensors(numbers[None, :], rows & _LOW, rows >> 32, torch.full_like(rows, stream))
    c0, c1, c2, c3 = counter
    by_chunk = [word.unflatten(1, (num_chunks, LANES)) for word in block_words((c0, c1, c2, c3), seed)]
    return torch.stack(by_chunk, dim=2).flatten(1)[:, :count]


def normals_of_words(words: Tensor) -> Tensor:
    """Return the standard normal, float32, of each word: its highest bit is the sign, the lowest is not used."""
    table = torch.from_numpy(normal_table().astype("int64")).to(words.device)
    bits = ((words & 0x7FFFFFFF) | 1).to(torch.int32).to(torch.float32).view(torch.int32)
    entries = table[((bits >> 16) - FIRST_INDEX).long()]
    place = (bits & 0xFFFF).long()
    drop = ((entries & (2**DROP_BITS - 1)) * place + 2**12) >> 13
    magnitude = ((entries >> DROP_BITS) << 3) - drop
    return torch.where(words >> 31 > 0, -magnitude, magnitude).to(torch.float32) * UNIT
