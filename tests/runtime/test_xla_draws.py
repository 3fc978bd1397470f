"""Words and normals of philox32_v1 have the same bits under XLA, which contracts multiply-adds, as on the host."""

from pathlib import Path

from warm_python import WITH_XLA, run_warm_python

SCRIPT = """
import torch, torch_xla
from core.tensor_philox32 import normals_of_words, stream_words

positions = torch.tensor([0, 3, 2**32 - 1, 2**40, 2**62 + 5])
for seed in (0, 2**31, 2**40 + 7, 2**63 - 1):
    for device in ("cpu", torch_xla.device()):
        words = stream_words(positions.to(device), 4099, 7, seed)
        normals = normals_of_words(words)
        found = words.cpu(), normals.cpu().view(torch.int32)
        if device == "cpu":
            expected = found
    assert all(map(torch.equal, found, expected)), seed
"""


def test_draws_have_the_bits_of_the_host(tmp_path: Path) -> None:
    run_warm_python(WITH_XLA, "-c", SCRIPT, cwd=tmp_path, env={"PJRT_DEVICE": "CPU"})
