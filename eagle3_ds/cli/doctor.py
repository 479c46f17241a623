"""`eagle3-ds doctor`: what this machine has, and which attention kernels run here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from eagle3_ds.cli.words import terminal, write

if TYPE_CHECKING:
    from rich.table import Table

    from eagle3_ds.launch.host_table import HostRow

HOST_COLUMNS = ("host", "ready", "ssh", "versions", "devices", "output folder", "clock", "all-\nreduce")


@click.command()
@click.option(
    "--head-dim",
    type=int,
    default=128,
    metavar="D",
    help="size of one attention head, e.g. --head-dim 64 (else 128)",
)
@click.option(
    "--hostfile", metavar="F", help="look at every host of it too, e.g. --hostfile recipes/2nodes.hostfile"
)
@click.option(
    "--output_dir",
    type=click.Path(path_type=Path),
    metavar="D",
    help="with --hostfile: where the run will write, e.g. --output_dir /shared/run (else this folder)",
)
def doctor(head_dim: int, hostfile: str | None, output_dir: Path | None) -> int:
    """versions, devices, and which attention kernels run here, each checked on a small case

    The exit status is 1 when a kernel that says it runs here fails or computes something else, or a host
    cannot be used.
    """
    if output_dir is not None and hostfile is None:
        raise click.UsageError(
            "--output_dir is what the hosts share. Name them by --hostfile, or leave it out"
        )
    import torch
    from rich.table import Table

    from eagle3_ds.device.found import detect_accelerator
    from eagle3_ds.run.machine import DTYPES, check_kernels, devices, versions

    console, device = terminal(), torch.device(detect_accelerator())
    checked = check_kernels(device, head_dim)
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    title = f"attention kernels on {device} with heads of {head_dim}: largest error against the reference"
    tables = (
        (Table("package", "version", title="versions"), versions()),
        (Table("device", "name", "memory", title="devices"), devices(device)),
        (
            Table("kernel", *names, "why not", title=title),
            [(kernel.name, *kernel.results, kernel.why_not) for kernel in checked],
        ),
    )
    for table, rows in tables:
        for row in rows:
            table.add_row(*row)
        console.print(table)
    failures = [failure for kernel in checked for failure in kernel.failures]
    if hostfile is not None:
        from eagle3_ds.launch.host_table import host_table

        hosts = host_table(hostfile, output_dir or Path())
        console.print(_table_of_hosts(hosts))
        failures += [problem for host in hosts for problem in host.problems]
    for failure in failures:
        write(console, f"broken: {failure}")
    return 1 if failures else 0


def _table_of_hosts(rows: list[HostRow]) -> Table:
    from rich.table import Table

    table = Table(title="hosts, seen from this machine")
    for column in HOST_COLUMNS:
        # In a narrow terminal a cell takes several lines, and nothing of it is left out.
        table.add_column(column, overflow="fold", no_wrap=column in ("host", "ready", "ssh"))
    for row in rows:
        told = (row.ssh, row.versions, row.devices, row.folder, row.clock, row.meets)
        table.add_row(row.host, "no" if row.problems else "yes", *told)
    return table
