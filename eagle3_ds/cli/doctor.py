"""`eagle3-ds doctor`: what this machine has, and which attention kernels run here."""

from __future__ import annotations

import click

from eagle3_ds.cli.words import terminal, write


@click.command()
@click.option(
    "--head-dim",
    type=int,
    default=128,
    metavar="D",
    help="size of one attention head, e.g. --head-dim 64 (else 128)",
)
@click.option(
    "--hostfile", metavar="F", help="reach every host of it too, e.g. --hostfile recipes/2nodes.hostfile"
)
def doctor(head_dim: int, hostfile: str | None) -> int:
    """versions, devices, and which attention kernels run here, each checked on a small case

    The exit status is 1 when a kernel that says it runs here fails or computes something else, or a host
    cannot be used.
    """
    import torch
    from rich.table import Table

    from eagle3_ds.device.found import detect_accelerator
    from eagle3_ds.run.machine import DTYPES, check_hosts, check_kernels, devices, versions

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
        reached, problems = check_hosts(hostfile)
        for line in reached:
            write(console, line)
        failures += problems
    for failure in failures:
        write(console, f"broken: {failure}")
    return 1 if failures else 0
