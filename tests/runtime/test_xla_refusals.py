"""Settings that do not fit an XLA mesh are refused before compilation; a host's rows return unchanged."""

from pathlib import Path

from warm_python import WITH_XLA, run_warm_python

SCRIPT = """
import pytest, torch
from runtime.choice import xla
from tiny_run import Case

settings = {"device": "cpu", "cpu_devices": 4}
runtime = xla("fp32", **settings, micro_batches=8)
with pytest.raises(ValueError, match="batch_size 16 is not a multiple of 4 devices x 8 micro-batches; use 32.$"):
    runtime.require_batch(16)
with pytest.raises(ValueError, match="batch_size 40 is not a multiple of 4 devices x 8 micro-batches; use 32 or 64.$"):
    runtime.require_batch(40)
with pytest.raises(ValueError, match="runtime.fsdp_devices 3 does not divide the 4 devices"):
    xla("fp32", **settings, fsdp_devices=3)
with pytest.raises(ValueError, match="runtime.cpu_devices is 8, but this process already has 4"):
    xla("fp32", "cpu", 8)
import torch_xla
model = Case("x", "xla").model()
for optimizer in (torch.optim.SGD(model.parameters()), torch.optim.AdamW(model.parameters(), amsgrad=True)):
    with pytest.raises(ValueError, match="runtime=xla steps with plain AdamW, but optimizer is (SGD|AdamW) with"):
        runtime.prepare(model, [Case("x", "xla").model()], optimizer)
    model = Case("x", "xla").model()
model.blocks[0].router = torch.nn.Linear(63, 2)
sharded = xla("fp32", **settings, mode="fsdp")
with pytest.raises(ValueError, match="blocks.0.router.weight has 2 rows to shard, which is not a multiple of 4"):
    sharded.prepare(model, [model], torch.optim.AdamW(model.parameters()))

# As one of several hosts feeds its rows; here there is one, whose rows are all.
runtime._feeds_own_rows = True
for rows in (torch.randn(8, 3, 2), torch.arange(8)):
    placed = runtime.put(rows)
    assert torch_xla._XLAC._get_xla_sharding_spec(placed) == f"{{devices=[4{',1' * (rows.dim() - 1)}]0,1,2,3}}"
    assert torch.equal(runtime.rows(placed), rows)

import torch_xla.debug.metrics as metrics
assert metrics.metric_data("CompileTime") is None
"""


def test_what_does_not_fit_is_refused_and_rows_come_back(tmp_path: Path) -> None:
    run_warm_python(WITH_XLA, "-c", SCRIPT, cwd=tmp_path)
