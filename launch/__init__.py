"""The command line, Hydra, and the wiring of rooms into jobs. The only room that imports hydra."""

import os

# accelerate takes XLA wherever torch_xla can be imported and decides so when it is first imported, which
# diffusers does too: it must not know of torch_xla, whatever is imported first. runtime/xla.py needs no such leave.
os.environ["USE_TORCH_XLA"] = "0"

STARTED_BY = os.getppid()  # asked before seconds of imports, in which it may die
