"""The command line, Hydra, and the wiring of rooms into jobs. No other room imports Hydra."""

import os

# On its first import, which diffusers may trigger, accelerate chooses XLA wherever torch_xla can be imported. This
# variable prevents that, whatever is imported first. runtime/xla.py does not depend on accelerate's choice.
os.environ["USE_TORCH_XLA"] = "0"

STARTED_BY = os.getppid()  # read now: the parent may die during the imports, which take seconds
