"""Reading from the environment which rank a launcher has started this process as."""

from __future__ import annotations

from collections.abc import Mapping

# The names that MPI and Slurm give to torch's RANK, WORLD_SIZE and LOCAL_RANK.
_ANNOUNCED = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    # The size of an srun step, not of the job: a batch script has SLURM_PROCID 0 too, but is no rank.
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)


def announcement(environ: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE and LOCAL_RANK from the variables of MPI or Slurm; empty when there are none, or when
    RANK is set already.
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
