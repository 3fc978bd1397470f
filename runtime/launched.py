"""Check the environment variables of launchers before any library reads them."""

import os
from collections.abc import Mapping

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torchrun sets all of them
_COUNTS = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": 1}  # the smallest value of each
_ALONE = {"RANK": "0", "WORLD_SIZE": "1"}  # values that are valid for a process without a launcher
_MODES = {  # accelerate's modes, which ditscale does not support -> what to use instead
    "ACCELERATE_USE_DEEPSPEED": "runtime.mode=fsdp shards the state",
    "ACCELERATE_USE_MEGATRON_LM": "runtime.mode=fsdp shards the state",
    "ACCELERATE_USE_FSDP": "runtime.mode=fsdp shards the state",
}
_NO = ("", "0", "false", "no", "off")


def require_sound_environment(environment: Mapping[str, str] = os.environ) -> None:
    """Raise ValueError where variables are left over from another launch or request unsupported accelerate modes."""
    for name, instead in _MODES.items():
        if environment.get(name, "").lower() not in _NO:
            raise ValueError(
                f"{name} is {environment[name]}, but ditscale does not use that mode of accelerate; unset it "
                f"({instead})."
            )
    if environment.get("ACCELERATE_DYNAMO_BACKEND", "").lower() not in _NO:
        raise ValueError(
            f"ACCELERATE_DYNAMO_BACKEND is {environment['ACCELERATE_DYNAMO_BACKEND']}, but ditscale does not compile "
            "through accelerate; unset it (runtime.compile=true compiles)."
        )
    found = {name: environment[name] for name in LAUNCHED if name in environment}
    for name, least in _COUNTS.items():
        if name in found and not (found[name].isdecimal() and int(found[name]) >= least):
            raise ValueError(f"{name} is {found[name]!r}, but it must be a whole number of at least {least}; unset it.")
    told = [name for name in found if name not in ("MASTER_ADDR", "MASTER_PORT") and _ALONE.get(name) != found[name]]
    missing = [name for name in LAUNCHED if name not in found]
    if told and missing:
        raise ValueError(
            f"{told[0]} is {found[told[0]]}, as if set by a launcher, but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set; unset {' and '.join(told)}, or start with torchrun."
        )
    if told and int(found["RANK"]) >= int(found["WORLD_SIZE"]):
        raise ValueError(
            f"RANK is {found['RANK']}, but it must be below WORLD_SIZE, which is {found['WORLD_SIZE']}; unset both, or "
            "start with torchrun."
        )
