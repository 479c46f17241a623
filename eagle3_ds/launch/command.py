"""Turning the options of a launch into hosts, ranks, the launcher's command and its environment. Starts
nothing.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eagle3_ds.config import Recipe, read_text
from eagle3_ds.device.kinds import VISIBLE
from eagle3_ds.launch.places import visible_devices
from eagle3_ds.launch.probe import free_port, is_here

SUPERVISOR_MODULE = "eagle3_ds.launch.supervisor"
SUPERVISOR_FILE = Path(__file__).parent / "supervisor.py"
TRAIN_MODULE, CAPTURE_MODULE = "eagle3_ds.train.main", "eagle3_ds.train.capture"
LAUNCHERS = ("pdsh", "openmpi", "mpich", "impi", "mvapich", "slurm", "torchrun")
MPI_LAUNCHERS = ("openmpi", "mpich", "impi", "mvapich")
# Prefixes of the variables that ranks on other hosts get. Secrets such as tokens are left out, because they
# would appear on pdsh's command line.
EXPORTED = (
    "ASCEND", "CUDA_DEVICE", "CUDA_HOME", "CUDNN", "DS_ACCELERATOR", "FI_", "GLOO_", "HCCL_", "HF_DATASETS",
    "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "LD_LIBRARY_PATH", "MASTER_", "NCCL_", "NVIDIA_", "OMP_",
    "PATH", "PYTORCH_", "TORCH_", "TRANSFORMERS_", "TRITON_", "UCX_",
)  # fmt: skip
# Host names go on the command lines of ssh and pdsh, which take a leading dash for an option and brackets for
# a list of hosts.
HOST_LINE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._:-]*)\s+slots=([0-9]{1,9})")
MOST_SLOTS = 1024
NO_HOSTFILE = os.devnull
"""A path that is no regular file: with it, DeepSpeed uses this machine and does not read /job/hostfile."""


@dataclass(frozen=True)
class LaunchOptions:
    """The user's options about where to run; None: not given."""

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
        hosts: {host: device slots}, in the order of ranks.
        command: the launcher's argument list.
        logs: folder of the ranks' logs.
        environment: variables for the launcher, in addition to the current ones.
        exported: variables that every host gets through DS_ENV_FILE; None on a single machine, where ranks
            inherit them.
        port: the port on which rank 0 listens; None: not known.
        by_ssh: hosts that ssh must reach.
        address: address of the first host, if the user has given one.
    """

    hosts: Mapping[str, tuple[int, ...]]
    command: tuple[str, ...]
    logs: Path
    environment: Mapping[str, str]
    exported: Mapping[str, str] | None
    port: int | None = None
    by_ssh: tuple[str, ...] = ()
    address: str | None = None

    @property
    def world_size(self) -> int:
        return sum(len(slots) for slots in self.hosts.values())


def resolve_hosts(
    options: LaunchOptions,
    accelerator: str,
    devices: int,
    wanted: int,
    environ: Mapping[str, str] | None = None,
) -> dict[str, tuple[int, ...]]:
    """The hosts and slots of a run, as DeepSpeed will see them.

    Args:
        devices: number of accelerators of this machine; 0 when it has none, or in a dry run.
        wanted: ranks to start on this machine when the options do not say how many.
        environ: the environment with CUDA_VISIBLE_DEVICES or its like; None: that of this process.

    Raises:
        ValueError: options contradict each other, the hostfile is malformed, or hosts or slots do not exist
            or are hidden by the environment.
    """
    _check_options(options)
    visible = _visible(options, accelerator, os.environ if environ is None else environ)
    if options.hostfile is None:
        return _this_machine(options, accelerator, devices, wanted, visible)
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
    _check_slots(options, accelerator, hosts, visible)
    return hosts


def _visible(options: LaunchOptions, accelerator: str, environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """The devices of this machine that CUDA_VISIBLE_DEVICES or its like names. None: all of them, or the
    launcher decides.
    """
    if options.launcher == "torchrun" and not (options.include or options.exclude):
        # Ranks of this launcher inherit the variable, and count devices within it.
        return None
    if options.launcher in ("slurm", *MPI_LAUNCHERS):
        # These launchers set the variable for each rank; this process's value does not count.
        return None
    return visible_devices(accelerator, environ)


def _this_machine(
    options: LaunchOptions, accelerator: str, devices: int, wanted: int, visible: tuple[int, ...] | None
) -> dict[str, tuple[int, ...]]:
    """The slots of a run on this machine only.

    Raises:
        ValueError: the options ask for more devices than there are.
    """
    if (options.num_nodes or 1) > 1:
        raise ValueError(
            f"--num_nodes is {options.num_nodes}, but without --hostfile there is only this machine."
        )
    if visible is not None:
        # As in CUDA, the list ends at the first device that does not exist.
        visible = visible[: devices or len(visible)]
        devices = len(visible)
    count = options.num_ranks or ((devices or wanted) if options.include or options.exclude else wanted)
    if count > MOST_SLOTS:
        raise ValueError(
            f"{count} ranks are asked for on this machine, but one has {MOST_SLOTS} at most. Give --hostfile."
        )
    if accelerator != "cpu" and 0 < devices < count:
        hidden = f" that {VISIBLE[accelerator]} leaves" if visible is not None else ""
        raise ValueError(
            f"{count} ranks are asked for, but this machine has {devices} {accelerator} device(s){hidden}. "
            "Lower --num_gpus, change the recipe's parallel section, or give more machines with --hostfile."
        )
    # DeepSpeed gives the chosen devices to the ranks in ascending order.
    pool = tuple(range(count)) if visible is None else tuple(sorted(visible[:count]))
    return _filter({"localhost": pool}, options)


def _check_slots(
    options: LaunchOptions,
    accelerator: str,
    hosts: Mapping[str, tuple[int, ...]],
    visible: tuple[int, ...] | None,
) -> None:
    """Check the slots of the hosts.

    Raises:
        ValueError: the launcher cannot use these slots, or the environment hides them on this machine.
    """
    if options.launcher == "slurm":
        uneven = len({len(slots) for slots in hosts.values()}) > 1
        if uneven or any(slots != tuple(range(len(slots))) for slots in hosts.values()):
            raise ValueError(
                "--launcher slurm places ranks by number, so each host must have the same slots, counted "
                f"from 0, but they are {dict(hosts)}. Choose whole hosts, or --num_gpus."
            )
    if visible is None:
        return
    for host, slots in hosts.items():
        hidden = sorted(set(slots) - set(visible))
        if hidden and is_here(host):
            shown = ",".join(map(str, visible))
            raise ValueError(
                f"{host} is this machine, where {VISIBLE[accelerator]} leaves the devices {shown}, but slot "
                f"{hidden[0]} is to be used. Choose them by --include {host}:{shown} (the hostfile's slots "
                f"count all devices), or unset {VISIBLE[accelerator]}."
            )


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
    if options.launcher in ("slurm", *MPI_LAUNCHERS) and options.hostfile is None:
        raise ValueError(
            f"--launcher {options.launcher} needs --hostfile with the hosts to use: without one, DeepSpeed "
            "starts all ranks on this machine by itself."
        )
    if options.master_port is not None and not 1 <= options.master_port <= 65535:
        raise ValueError(f"--master_port is {options.master_port}, but ports are 1 to 65535.")
    if options.launcher == "torchrun" and options.hostfile:
        raise ValueError("--launcher torchrun starts ranks on this machine only. Use pdsh with --hostfile.")


def read_hostfile(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Read the `host slots=N` lines of a hostfile into {host: slots}.

    Raises:
        ValueError: the file is missing, or a line is malformed. The message names the line.
    """
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
    named: dict[str, set[int]] = {}
    for part in text.split("@"):
        match = re.fullmatch(r"([^:,@\s]+)(?::([0-9]{1,9}(?:,[0-9]{1,9})*))?", part)
        if match is None:
            raise ValueError(f"{flag}: {part!r} is not of the form host or host:0,2. Separate hosts by @.")
        host, slots = match.group(1), match.group(2)
        if host not in hosts:
            raise ValueError(f"{flag}: there is no host {host}. Known: {', '.join(hosts)}.")
        chosen = {int(slot) for slot in slots.split(",")} if slots else set()
        unknown = sorted(chosen - set(hosts[host]))
        if unknown:
            raise ValueError(
                f"{flag}: {host} has no slot {unknown[0]}; it has {','.join(map(str, hosts[host]))}."
            )
        # As in DeepSpeed: several parts about one host add up, and a host without slots means all its slots
        # only if no other part names some of them.
        named.setdefault(host, set()).update(chosen)
    named = {host: chosen or set(hosts[host]) for host, chosen in named.items()}
    keep = bool(options.include)
    left = {
        host: tuple(slot for slot in slots if (slot in named.get(host, ())) == keep)
        for host, slots in hosts.items()
    }
    left = {host: slots for host, slots in left.items() if slots}
    if not left:
        raise ValueError(f"{flag} {text} leaves no slot to run on.")
    return left


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

    Args:
        resume: name of the checkpoint to continue from; None for a new run.
        module: the Python module that each rank runs.

    Raises:
        ValueError: the hosts do not fit the rendezvous address, or a variable cannot be exported.
    """
    output_dir = Path(recipe.output_dir).resolve()
    local = _starts_here(options, hosts)
    port = options.master_port or free_port()
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
    if local:
        slots = next(iter(hosts.values()))
        if options.launcher == "torchrun" and accelerator in VISIBLE and slots != tuple(range(len(slots))):
            environment[VISIBLE[accelerator]] = ",".join(map(str, slots))
        return LaunchPlan(
            dict(hosts),
            _local_command(options, slots, accelerator, port, script),
            logs,
            environment,
            None,
            port,
        )
    rendezvous = {"MASTER_ADDR": options.master_addr or next(iter(hosts)), "MASTER_PORT": str(port)}
    if options.launcher == "slurm":
        # srun passes the whole environment on. DeepSpeed would put variables on srun's command line, where
        # their values are split at commas.
        exported = rendezvous
    else:
        exported = exported_variables(
            {**environ, **environment, **(rendezvous if options.launcher in MPI_LAUNCHERS else {})}
        )
    environment["DS_ENV_FILE"] = str(output_dir / "deepspeed.env")
    by_ssh = () if options.launcher == "slurm" else tuple(hosts)
    command = _command(options, hosts, port, script)
    return LaunchPlan(dict(hosts), command, logs, environment, exported, port, by_ssh, options.master_addr)


def _starts_here(options: LaunchOptions, hosts: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether all ranks run on this machine and a local launcher starts them.

    Raises:
        ValueError: they do, but the rendezvous address is another machine's.
    """
    if options.hostfile is None:
        return True
    host = next(iter(hosts))
    if len(hosts) > 1 or options.launcher in ("slurm", *MPI_LAUNCHERS) or not is_here(host):
        return False
    if options.master_addr is not None and not is_here(options.master_addr):
        raise ValueError(
            f"--master_addr is {options.master_addr}, but all ranks run on {host}, which is this machine "
            "and has no such address. Leave it out."
        )
    return True


def _local_command(
    options: LaunchOptions, slots: tuple[int, ...], accelerator: str, port: int, script: Sequence[str]
) -> tuple[str, ...]:
    if options.launcher == "torchrun":
        head = ["-m", "torch.distributed.run", "--nnodes=1", f"--nproc_per_node={len(slots)}"]
        return (sys.executable, *head, "--master_addr=127.0.0.1", f"--master_port={port}", "-m", *script)
    # --num_gpus takes the first devices, whatever CUDA_VISIBLE_DEVICES says. On a CPU a slot is only a
    # number, and with --include DeepSpeed would look for NUMA nodes of these numbers.
    if accelerator == "cpu" or slots == tuple(range(len(slots))):
        which = f"--num_gpus={len(slots)}"
    else:
        which = f"--include=localhost:{','.join(map(str, slots))}"
    head = [sys.executable, "-m", "deepspeed.launcher.runner", f"--hostfile={NO_HOSTFILE}", which]
    # Warnings are left out because the launcher has a single one, that there is no hostfile.
    tail = [f"--master_port={port}", "--log_level=error", "--no_local_rank", "--module"]
    return (*head, *tail, *script)


def _command(
    options: LaunchOptions, hosts: Mapping[str, tuple[int, ...]], port: int, script: Sequence[str]
) -> tuple[str, ...]:
    command = [sys.executable, "-m", "deepspeed.launcher.runner", f"--hostfile={options.hostfile}"]
    if options.include or options.exclude:
        command.append(f"--include={options.include}" if options.include else f"--exclude={options.exclude}")
    else:
        if options.num_nodes is not None:
            command.append(f"--num_nodes={options.num_nodes}")
        if options.num_ranks is not None:
            command.append(f"--num_gpus={options.num_ranks}")
    if len(hosts) == 1:
        # Without it, if only one host is left, DeepSpeed starts its ranks on the machine that it runs on.
        command.append("--force_multi")
    if options.master_addr or options.launcher == "slurm":
        command.append(f"--master_addr={options.master_addr or next(iter(hosts))}")
    command.append(f"--master_port={port}")
    if options.launcher:
        command.append(f"--launcher={options.launcher}")
    command += ["--log_level=warning", "--no_local_rank"]
    if options.launcher == "slurm":
        # srun needs no ssh. DeepSpeed 0.19.8 ignores --module with this launcher, so a file is named.
        return (*command, "--no_ssh_check", str(SUPERVISOR_FILE), *script[1:])
    return (*command, "--module", *script)


def exported_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that every host gets.

    Raises:
        ValueError: the format of DS_ENV_FILE cannot hold one of them.
    """
    chosen = {
        name: value
        for name, value in sorted(environ.items())
        # CUDA_VISIBLE_DEVICES and its like hold for this machine only.
        if name.startswith(EXPORTED) and name not in VISIBLE.values() and value.strip()
    }
    for name, value in chosen.items():
        if re.search(r"[\n\r\"`$\\]", value):
            raise ValueError(
                f"The environment variable {name} is {value!r}; DeepSpeed's environment file cannot carry "
                "line breaks, quotes, $, ` or \\. Change it, or unset it and set it on each host."
            )
    return chosen


def write_environment_file(plan: LaunchPlan) -> None:
    """Write the file that DS_ENV_FILE names. It has only NAME=value lines, because DeepSpeed's reader fails
    on a blank one.
    """
    if plan.exported is not None:
        path = Path(plan.environment["DS_ENV_FILE"])
        path.write_text("".join(f"{name}={value}\n" for name, value in plan.exported.items()))
