"""How a launcher tells a process which rank it is."""

from __future__ import annotations

from collections.abc import Mapping

# What torch's own launchers call RANK, WORLD_SIZE and LOCAL_RANK, by MPI and Slurm.
_ANNOUNCED = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    # Of a step, not of the job: a batch script itself has SLURM_PROCID 0 and is no rank.
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)


def announcement(environ: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE and LOCAL_RANK as MPI or Slurm announce them; empty when nobody does, or they are set
    already.
    """
    if "RANK" in environ:
        return {}
    for names in _ANNOUNCED:
        if all(name in environ for name in names) and int(environ[names[1]]) > 1:
            return {
                name: environ[announced]
                for name, announced in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), names, strict=True)
            }
    return {}
