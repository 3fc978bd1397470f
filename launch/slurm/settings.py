"""The settings of ``hydra/launcher=slurm``, without PyTorch or Hydra."""

from dataclasses import dataclass, field, fields

TARGET = "hydra_plugins.ditscale.SlurmArray"  # Hydra accepts only launchers whose name begins with that package
_AT_LEAST = {"nodes": 1, "max_parallel": 1, "time_min": 1, "grace_sec": 1, "shares": 1, "cpus_per_task": 1, "mem_gb": 1}
_AT_LEAST |= {"gpus_per_node": 0, "processes_per_node": 1, "max_crashes": 0, "poll_sec": 0}


@dataclass
class SlurmSettings:
    """The config section ``hydra.launcher``. What is null is left to SLURM and its administrator.

    Raises ValueError, with the number and the least one, for a number that is too small.
    """

    _target_: str = TARGET
    max_parallel: int | None = None  # number of runs at a time
    n_jobs: int = 1  # of hydra/launcher=processes, set by experiments; not used here
    nodes: int = 1  # of a run
    gpus_per_node: int = 0
    processes_per_node: int | None = None  # null: one per GPU, or one
    cpus_per_task: int | None = None  # cores of a process
    mem_gb: int | None = None  # of a node
    time_min: int | None = None  # limit of one start of a run; it is requeued and continues
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    container: str | None = None  # image in which pyxis starts each process
    container_mounts: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)  # more options of sbatch, such as --constraint=h100
    setup: list[str] = field(default_factory=list)  # lines of shell before a run, such as "module load cuda"
    grace_sec: int = 60  # a run is asked to stop this long before its time limit
    max_crashes: int = 3  # times that a run is requeued after its process died without a word
    shares: int | None = None  # of `encode`: tasks that share the shards of one encoding
    wait: bool = True  # follow the runs to their end; false: submit and return
    poll_sec: float = 5.0  # between looks at the queue

    def __post_init__(self) -> None:
        for each in fields(self):
            value, least = getattr(self, each.name), _AT_LEAST.get(each.name)
            if least is not None and value is not None and value < least:
                raise ValueError(
                    f"hydra.launcher.{each.name} is {value}, but it must be at least {least}; set it higher."
                )
        for name in ("partition", "account", "qos", "container"):
            text = getattr(self, name)
            if text is not None and (not text.isprintable() or not text):
                raise ValueError(
                    f"hydra.launcher.{name} is {text!r}, but it is one line of text; leave it out or correct it."
                )

    @property
    def processes(self) -> int:
        """Return the number of processes of a run on a node."""
        return self.processes_per_node or max(1, self.gpus_per_node)
