"""Two hosts on one machine: network namespaces joined by a cable, an sshd in each, and a hostfile for pdsh.

Everything ssh needs is made here: the hosts' keys, the user's key, and `known_hosts` with the hosts' keys in
it, so that host key checking stays on. Files are shared, as by a cluster's storage; network, addresses and
log-ins are each host's own.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from judge.cable import CLONE, MTU, Cable

TOOLS = ("ip", "sshd", "ssh", "ssh-keygen", "pdsh")
INTERFACE = "cable"
RANK = "eagle3_ds.train.main"
# Set aside for tests of networks (RFC 2544): no real host has such an address.
ADDRESSES = ("198.18.0.1", "198.18.0.2")


def why_not() -> str | None:
    """Why two hosts cannot be had on this machine; None when they can."""
    if not os.access(CLONE, os.R_OK | os.W_OK):
        return f"{CLONE} cannot be opened here, so there is no cable between two hosts"
    missing = [tool for tool in TOOLS if shutil.which(tool, path=_path()) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: iproute2 openssh-server openssh-client pdsh)"
    probe = f"probe-{os.getpid()}"
    made = _ip("netns", "add", probe, check=False)
    if made.returncode:
        return f"network namespaces cannot be made here: {made.stderr.strip()}"
    _ip("netns", "delete", probe)
    return None


@dataclass(frozen=True)
class TwoHosts:
    """What a test needs of them.

    Attributes:
        namespaces: the hosts' network namespaces, in the order of ADDRESSES.
        cable: the only way from one to the other.
        hostfile: names both hosts by address.
        environment: of a user who is logged in on the first host.
    """

    namespaces: tuple[str, str]
    cable: Cable
    hostfile: Path
    environment: Mapping[str, str]

    def start(
        self, command: Sequence[str], folder: Path, log: Path, **variables: str
    ) -> subprocess.Popen[bytes]:
        """Start a command on the first host, as a user logged in there; what it says goes to `log`."""
        line = ["ip", "netns", "exec", self.namespaces[0], *command]
        with log.open("ab") as file:
            environment = {**self.environment, **variables}
            return subprocess.Popen(line, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT)

    def ranks(self, host: int) -> list[int]:
        """The processes of a host's ranks, without their supervisors."""
        commands = {pid: _command_line(pid) for pid in self.pids(host)}
        return [pid for pid, command in commands.items() if command[2:4] == ["-m", RANK]]

    def programs(self, host: int) -> list[int]:
        """What runs on a host besides its sshd."""
        return [pid for pid in self.pids(host) if "sshd" not in _command_line(pid)[0]]

    def pids(self, host: int) -> list[int]:
        """Every process on a host."""
        return [int(pid) for pid in _ip("netns", "pids", self.namespaces[host]).stdout.split()]


@contextmanager
def two_hosts(folder: Path, slots: int) -> Iterator[TwoHosts]:
    """Two hosts of `slots` slots each; keys, configurations and the hostfile are written to `folder`."""
    namespaces = (f"host-a-{os.getpid()}", f"host-b-{os.getpid()}")
    with ExitStack() as stack:
        for namespace in namespaces:
            _ip("netns", "add", namespace)
            stack.callback(_remove, namespace)
        devices = (f"end-a-{os.getpid()}", f"end-b-{os.getpid()}")
        cable = Cable(devices)
        stack.callback(cable.close)
        for namespace, device, own, peer in zip(
            namespaces, devices, ADDRESSES, reversed(ADDRESSES), strict=True
        ):
            _ip("link", "set", device, "netns", namespace, "name", INTERFACE, "mtu", str(MTU), "up")
            _ip("-n", namespace, "address", "add", own, "peer", peer, "dev", INTERFACE)
            _ip("-n", namespace, "link", "set", INTERFACE, "up")
            _ip("-n", namespace, "link", "set", "lo", "up")
        _write_client(folder)
        for namespace, address in zip(namespaces, ADDRESSES, strict=True):
            _start_sshd(folder, namespace, address)
        hostfile = folder / "hostfile"
        hostfile.write_text("".join(f"{address} slots={slots}\n" for address in ADDRESSES))
        environment = {**os.environ, "PATH": f"{folder}:{_path()}", "GLOO_SOCKET_IFNAME": INTERFACE}
        yield TwoHosts(namespaces, cable, hostfile, environment)


def _command_line(pid: int) -> list[str]:
    """Of a process that has gone: nothing."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return [""]


def _write_client(folder: Path) -> None:
    """The user's key, an ssh configuration, and an `ssh` in front of the real one that reads it: ssh looks
    for its files in the account's home, whatever HOME says, and that is not ours to write to."""
    _make_key(folder / "user_key")
    options = {
        "IdentityFile": folder / "user_key",
        "IdentitiesOnly": "yes",
        "UserKnownHostsFile": folder / "known_hosts",
        "StrictHostKeyChecking": "yes",
        "BatchMode": "yes",
    }
    (folder / "ssh_config").write_text("".join(f"{name} {value}\n" for name, value in options.items()))
    wrapper = folder / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder / "ssh_config"} "$@"\n')
    wrapper.chmod(0o755)


def _start_sshd(folder: Path, namespace: str, address: str) -> None:
    key = folder / f"host_key_{address}"
    _make_key(key)
    with (folder / "known_hosts").open("a") as file:
        file.write(f"{address} {key.with_suffix(key.suffix + '.pub').read_text()}")
    options = {
        "ListenAddress": address,
        "HostKey": key,
        "AuthorizedKeysFile": folder / "user_key.pub",
        # The folder of a test lies under /tmp, which others may write to.
        "StrictModes": "no",
        "PasswordAuthentication": "no",
        "PermitRootLogin": "prohibit-password",
        "UsePAM": "yes",
        "PidFile": "none",
    }
    config = folder / f"sshd_config_{address}"
    config.write_text("".join(f"{name} {value}\n" for name, value in options.items()))
    Path("/run/sshd").mkdir(exist_ok=True)
    sshd = shutil.which("sshd", path=_path())
    log = folder / f"sshd_{address}.log"
    # It goes into the background once it listens, so there is nothing to wait for.
    subprocess.run(
        ["ip", "netns", "exec", namespace, str(sshd), "-f", str(config), "-E", str(log)],
        check=True,
        env=_env(),
    )


def _make_key(path: Path) -> None:
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", path.name, "-f", str(path)], check=True
    )


def _remove(namespace: str) -> None:
    """Switch a host off: its processes end with it."""
    for _ in range(50):
        pids = _ip("netns", "pids", namespace).stdout.split()
        if not pids:
            break
        for pid in pids:
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.1)
    _ip("netns", "delete", namespace)


def _ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True, env=_env())


def _env() -> dict[str, str]:
    return {**os.environ, "PATH": _path()}


def _path() -> str:
    """Administrators' tools are not on everybody's PATH."""
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
