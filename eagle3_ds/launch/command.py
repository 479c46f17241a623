"""From a launch's options to hosts, ranks, the launcher's command and its environment. Starts nothing."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eagle3_ds.config import Recipe, read_text

SUPERVISOR_MODULE = "eagle3_ds.launch.supervisor"
SUPERVISOR_FILE = Path(__file__).parent / "supervisor.py"
TRAIN_MODULE, CAPTURE_MODULE = "eagle3_ds.train.main", "eagle3_ds.train.capture"
LAUNCHERS = ("pdsh", "openmpi", "mpich", "impi", "mvapich", "slurm", "torchrun")
MPI_LAUNCHERS = ("openmpi", "mpich", "impi", "mvapich")
# What a rank on another host needs to behave as on this one. Secrets (tokens) stay out: pdsh shows its
# command line.
EXPORTED = (
    "ASCEND", "CUDA_DEVICE", "CUDA_HOME", "CUDNN", "DS_ACCELERATOR", "FI_", "GLOO_", "HCCL_", "HF_DATASETS",
    "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "LD_LIBRARY_PATH", "MASTER_", "NCCL_", "NVIDIA_", "OMP_",
    "PATH", "PYTORCH_", "TORCH_", "TRANSFORMERS_", "TRITON_", "UCX_",
)  # fmt: skip
# Goes on the command lines of ssh and pdsh, which take a leading dash for an option and brackets for a list
# of hosts.
HOST_LINE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._:-]*)\s+slots=([0-9]{1,9})")
MOST_SLOTS = 1024
NO_HOSTFILE = os.devnull
"""Not a regular file, so DeepSpeed takes this machine and does not look at /job/hostfile."""


@dataclass(frozen=True)
class LaunchOptions:
    """What the user said about where to run. None: not said."""

    hostfile: str | None = None
    num_ranks: int | None = None
    num_nodes: int | None = None
    include: str | None = None
    exclude: str | None = None
    master_addr: str | None = None
    master_port: int | None = None
    launcher: str | None = None


@dataclass(frozen=True)
class LaunchPlan:
    """What will be started.

    Attributes:
        hosts: host -> device slots, in rank order.
        command: the launcher, as an argument list.
        logs: folder of what the ranks say.
        environment: variables set for the launcher on top of the current ones.
        exported: variables handed to every host through DS_ENV_FILE; None on a single machine, which inherits
            them.
    """

    hosts: Mapping[str, tuple[int, ...]]
    command: tuple[str, ...]
    logs: Path
    environment: Mapping[str, str]
    exported: Mapping[str, str] | None

    @property
    def world_size(self) -> int:
        return sum(len(slots) for slots in self.hosts.values())


def resolve_hosts(
    options: LaunchOptions, accelerator: str, devices: int, wanted: int
) -> dict[str, tuple[int, ...]]:
    """Hosts and slots, as DeepSpeed will see them.

    Args:
        devices: accelerators of this machine; 0 when it has none, or when that does not matter (a dry run).
        wanted: ranks to start on this machine when nothing else says so.

    Raises:
        ValueError: contradicting options, a hostfile that is not one, hosts or slots that do not exist.
    """
    _check_options(options)
    if options.hostfile is None:
        if (options.num_nodes or 1) > 1:
            raise ValueError(
                f"--num_nodes is {options.num_nodes}, but without --hostfile there is only this machine."
            )
        count = options.num_ranks or ((devices or wanted) if options.include or options.exclude else wanted)
        if count > MOST_SLOTS:
            raise ValueError(
                f"{count} ranks are asked for on this machine, but one has {MOST_SLOTS} at most. Give "
                "--hostfile."
            )
        if accelerator != "cpu" and 0 < devices < count:
            raise ValueError(
                f"{count} ranks are asked for, but this machine has {devices} {accelerator} device(s). Lower "
                "--num_gpus, change the recipe's parallel section, or give more machines with --hostfile."
            )
        return _filter({"localhost": tuple(range(count))}, options)
    hosts = _filter(read_hostfile(options.hostfile), options)
    if options.num_nodes is not None:
        if options.num_nodes > len(hosts):
            raise ValueError(
                f"--num_nodes is {options.num_nodes}, but {options.hostfile} names {len(hosts)} host(s)."
            )
        hosts = dict(list(hosts.items())[: options.num_nodes])
    if options.num_ranks is not None:
        for host, slots in hosts.items():
            if options.num_ranks > len(slots):
                raise ValueError(
                    f"--num_gpus is {options.num_ranks}, but {host} has {len(slots)} slots. Lower it."
                )
        hosts = {host: slots[: options.num_ranks] for host, slots in hosts.items()}
    return hosts


def _check_options(options: LaunchOptions) -> None:
    for name, value in (("--num_gpus/--num_ranks", options.num_ranks), ("--num_nodes", options.num_nodes)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, but it must be at least 1.")
    if options.include and options.exclude:
        raise ValueError("--include and --exclude cannot be combined. Keep one of them.")
    limited = [name for name in ("num_nodes", "num_ranks") if getattr(options, name) is not None]
    filtered = [name for name in ("include", "exclude") if getattr(options, name)]
    if limited and filtered:
        raise ValueError(f"--{filtered[0]} cannot be combined with --{limited[0]}. Keep one of them.")
    if options.launcher in MPI_LAUNCHERS and (limited or filtered):
        raise ValueError(
            f"--launcher {options.launcher} starts every slot of the hostfile, so "
            f"--{(limited + filtered)[0]} cannot be honoured. Write a hostfile with the hosts and slots to "
            "use."
        )
    if options.launcher == "torchrun" and options.hostfile:
        raise ValueError("--launcher torchrun starts ranks on this machine only. Use pdsh with --hostfile.")


def read_hostfile(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Read `host slots=N` lines. Raises ValueError that names the line."""
    if not Path(path).is_file():
        raise ValueError(f"--hostfile: {path} is not a file. Write one line per host: `worker-0 slots=8`.")
    hosts: dict[str, tuple[int, ...]] = {}
    for number, line in enumerate(read_text(Path(path)).split("\n"), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = HOST_LINE.fullmatch(text)
        if match is None:
            raise ValueError(
                f"{path}, line {number}: {text!r} is not of the form `host slots=N`, the host a name or an "
                "address."
            )
        host, slots = match[1], int(match[2])
        if not 1 <= slots <= MOST_SLOTS:
            raise ValueError(
                f"{path}, line {number}: {host} has slots={slots}, but a host has 1 to {MOST_SLOTS}."
            )
        if host in hosts:
            raise ValueError(
                f"{path}, line {number}: host {host} is given twice. Keep one line with all its slots."
            )
        hosts[host] = tuple(range(slots))
    if not hosts:
        raise ValueError(f"{path} names no host. Write one line per host: `worker-0 slots=8`.")
    return hosts


def _filter(hosts: dict[str, tuple[int, ...]], options: LaunchOptions) -> dict[str, tuple[int, ...]]:
    """Apply --include or --exclude: `host[:slot,slot][@host...]`."""
    text = options.include or options.exclude
    if not text:
        return hosts
    flag = "--include" if options.include else "--exclude"
    named: dict[str, tuple[int, ...]] = {}
    for part in text.split("@"):
        match = re.fullmatch(r"([^:,@\s]+)(?::([0-9]+(?:,[0-9]+)*))?", part)
        if match is None:
            raise ValueError(f"{flag}: {part!r} is not of the form host or host:0,2. Separate hosts by @.")
        host, slots = match.group(1), match.group(2)
        if host not in hosts:
            raise ValueError(f"{flag}: there is no host {host}. Known: {', '.join(hosts)}.")
        chosen = tuple(int(slot) for slot in slots.split(",")) if slots else hosts[host]
        unknown = sorted(set(chosen) - set(hosts[host]))
        if unknown:
            raise ValueError(
                f"{flag}: {host} has no slot {unknown[0]}; it has {len(hosts[host])}, counted from 0."
            )
        named[host] = chosen
    keep = bool(options.include)
    left = {
        host: tuple(slot for slot in slots if (slot in named.get(host, ())) == keep)
        for host, slots in hosts.items()
    }
    left = {host: slots for host, slots in left.items() if slots}
    if not left:
        raise ValueError(f"{flag} {text} leaves no slot to run on.")
    return left


def free_port() -> int:
    """A TCP port that nobody listens on now, so that runs on one machine do not meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def plan_launch(
    options: LaunchOptions,
    hosts: Mapping[str, tuple[int, ...]],
    accelerator: str,
    recipe: Recipe,
    resume: str | None,
    environ: Mapping[str, str],
    module: str = TRAIN_MODULE,
) -> LaunchPlan:
    """The launcher's command line and environment for these hosts.

    `resume` names the checkpoint to go on from; `module` is what each rank runs.
    """
    output_dir = Path(recipe.output_dir).resolve()
    several_hosts = options.hostfile is not None
    port = options.master_port or (29500 if several_hosts else free_port())
    ranks_per_host = max(len(slots) for slots in hosts.values())
    cores = len(os.sched_getaffinity(0))
    environment = {"OMP_NUM_THREADS": environ.get("OMP_NUM_THREADS", str(max(1, cores // ranks_per_host)))}
    if accelerator == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    logs = output_dir / "logs"
    script = [SUPERVISOR_MODULE, f"--log_folder={logs}", f"--limit={recipe.faults.watchdog_seconds}"]
    script += [
        module,
        f"--recipe={output_dir / 'recipe.resolved.yaml'}",
        *([f"--resume={resume}"] if resume else []),
    ]
    exported = None
    if several_hosts:
        rendezvous = {"MASTER_ADDR": options.master_addr or next(iter(hosts)), "MASTER_PORT": str(port)}
        if options.launcher == "slurm":
            # srun hands the whole environment over; on its command line, DeepSpeed would break values at
            # their commas.
            exported = rendezvous
        else:
            exported = _exported(
                {**environ, **environment, **(rendezvous if options.launcher in MPI_LAUNCHERS else {})}
            )
        environment["DS_ENV_FILE"] = str(output_dir / "deepspeed.env")
    return LaunchPlan(dict(hosts), _command(options, hosts, port, script), logs, environment, exported)


def _command(
    options: LaunchOptions, hosts: Mapping[str, tuple[int, ...]], port: int, script: Sequence[str]
) -> tuple[str, ...]:
    ranks = len(next(iter(hosts.values())))
    if options.launcher == "torchrun":
        head = ["-m", "torch.distributed.run", "--nnodes=1", f"--nproc_per_node={ranks}"]
        return (sys.executable, *head, "--master_addr=127.0.0.1", f"--master_port={port}", "-m", *script)
    command = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        f"--hostfile={options.hostfile or NO_HOSTFILE}",
    ]
    if options.include or options.exclude:
        command.append(f"--include={options.include}" if options.include else f"--exclude={options.exclude}")
    else:
        if options.num_nodes is not None:
            command.append(f"--num_nodes={options.num_nodes}")
        if options.num_ranks is not None or options.hostfile is None:
            command.append(f"--num_gpus={ranks}")
    if options.master_addr or options.launcher == "slurm":
        command.append(f"--master_addr={options.master_addr or next(iter(hosts))}")
    command.append(f"--master_port={port}")
    if options.launcher:
        command.append(f"--launcher={options.launcher}")
    command += ["--log_level=warning", "--no_local_rank"]
    if options.launcher == "slurm":
        # No ssh where srun starts the ranks. And this backend runs a file, whatever --module says (DeepSpeed
        # 0.19.8).
        return (*command, "--no_ssh_check", str(SUPERVISOR_FILE), *script[1:])
    return (*command, "--module", *script)


def _exported(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that go to every host. Raises ValueError for one that the file's format cannot carry."""
    chosen = {
        name: value for name, value in sorted(environ.items()) if name.startswith(EXPORTED) and value.strip()
    }
    for name, value in chosen.items():
        if re.search(r"[\n\r\"`$\\]", value):
            raise ValueError(
                f"The environment variable {name} is {value!r}; DeepSpeed's environment file cannot carry "
                "line breaks, quotes, $, ` or \\. Change it, or unset it and set it on each host."
            )
    return chosen


def write_environment_file(plan: LaunchPlan) -> None:
    """Write the file that DS_ENV_FILE names: only NAME=value lines, for a blank one crashes its reader."""
    if plan.exported is not None:
        path = Path(plan.environment["DS_ENV_FILE"])
        path.write_text("".join(f"{name}={value}\n" for name, value in plan.exported.items()))
