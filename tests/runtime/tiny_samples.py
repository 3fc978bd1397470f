"""Sample from a tiny DiT under one runtime, in a subprocess of the tests.

``python tiny_samples.py OUT RUNTIME`` writes ``OUT/RUNTIME.npz``, images by sampler, and ``OUT/RUNTIME.json``:
for each sampler how many programs the first batch compiled, how many the second, and how many were executed.
"""

import json
import sys
from pathlib import Path

import numpy as np
from tiny_run import Case, Counters, diffusion, make_runtime

from core.batch import Denoiser
from data.conditions import ClassLabels
from data.manifest import LatentSpec
from diffusion.diffusers_samplers import DPMSolverPP, FlowDPMSolverPP, Heun
from diffusion.edm import EDM
from diffusion.edm_sampler import EdmHeun
from diffusion.flow import Flow
from diffusion.guidance import ClassifierFreeGuidance, Unguided
from diffusion.objective import Objective
from diffusion.ode_samplers import Euler, HeunOde
from diffusion.samplers import DDIM, DDPM, Sampler
from diffusion.sde_samplers import EulerMaruyama, StochasticHeun
from evaluation.generate import Generator
from model.autoencoder import IdentityAutoencoder
from model.network import Network
from runtime.protocol import Runtime

STEPS = 12
SAMPLERS: dict[str, Sampler] = {
    "ddpm": DDPM(STEPS),
    "ddim": DDIM(STEPS, eta=0.5),
    "dpm_solver_pp": DPMSolverPP(STEPS),
    "heun": Heun(STEPS),
    "guided": DDPM(STEPS),
    "euler": Euler(STEPS),
    "heun_ode": HeunOde(STEPS),
    "euler_maruyama": EulerMaruyama(STEPS),
    "stochastic_heun": StochasticHeun(STEPS),
    "flow_dpm_solver_pp": FlowDPMSolverPP(STEPS),
    "edm_heun": EdmHeun(STEPS, churn=4.0),
}
FLOW, EDM_OBJECTIVE = Flow(outputs_per_channel=2), EDM(sigma_data=0.5)


def first_half(network: Denoiser) -> Denoiser:
    """Return a network of one output per channel from one of two."""
    return lambda x_t, t, condition: network(x_t, t, condition)[:, : x_t.shape[1]]


def fit(sampler: Sampler, objective: Objective) -> bool:
    try:
        sampler.require(objective)
    except ValueError:
        return False
    return True


def new_generator(kind: str, model: Network, runtime: Runtime) -> Generator:
    """Return a generator of images by a sampler, for the first objective that it fits."""
    sampler, labels = SAMPLERS[kind], ClassLabels(10)
    guidance = ClassifierFreeGuidance if kind == "guided" else Unguided
    network = first_half(model) if kind == "edm_heun" else model
    denoiser = guidance(network, null=labels.null, latent_channels=4)
    objectives: list[Objective] = [diffusion(), FLOW, EDM_OBJECTIVE]
    objective = runtime.place(next(one for one in objectives if fit(sampler, one)))
    spec = LatentSpec("golden", 8, "identity", "1", 1.0, 1, 4, "float16", False, 10)
    return Generator(denoiser, objective, IdentityAutoencoder(4), sampler, spec, labels, 0, runtime)


def main() -> None:
    out, name = Path(sys.argv[1]), sys.argv[2]
    case = Case(name, name, settings={"cpu_devices": 4, "mode": "fsdp"} if name == "xla" else {})
    runtime = make_runtime(case)
    model = runtime.place(case.model().eval().requires_grad_(False))
    images, counts, labels = {}, {}, ClassLabels(10)
    for kind in SAMPLERS:
        generator = new_generator(kind, model, runtime)
        counters, read = Counters(name), []
        parts = []
        for _, part in generator.batches(labels.in_turn(14), 14, 8):  # two rounds of eight rows, two of them spare
            parts.append(part)
            read.append(counters.read().get("compilations", 0))
        images[kind] = np.concatenate(parts)
        counts[kind] = {"first": read[0], "second": read[1] - read[0]}
    np.savez(out / f"{name}.npz", **images)
    (out / f"{name}.json").write_text(json.dumps(counts))


if __name__ == "__main__":
    main()
