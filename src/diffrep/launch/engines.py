"""Which engine makes the shards, from what the user said."""

from __future__ import annotations

from diffrep.errors import UserError
from diffrep.launch import ranks
from diffrep.launch.jobs import Engine, here
from diffrep.launch.local import side_by_side
from diffrep.launch.ray_tasks import on_ray
from diffrep.launch.slurm import on_slurm


def chosen(jobs: int | None = None, ray: str | None = None, slurm: str | None = None) -> Engine:
    """The one engine that was asked for; this process alone where none was.

    Args:
        jobs: processes on this machine, or jobs of a Slurm array.
        ray: ``auto``, ``local`` or an address. slurm: a partition, "" for the cluster's default.

    Raises:
        UserError: two engines at once, or one whose package or cluster is not here.
    """
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs {jobs}: at least 1")
    asked = {"torchrun": ranks.world() > 1, "--ray": ray is not None, "--slurm": slurm is not None}
    asked["--jobs"] = jobs is not None and slurm is None
    named = [name for name, is_asked in asked.items() if is_asked]
    if len(named) > 1:
        raise UserError(f"{named[0]} and {named[1]} at once: shards are made by one of them")
    if ranks.world() > 1:
        return ranks.by_rank
    if ray is not None:
        return on_ray(ray)
    if slurm is not None:
        return on_slurm(slurm, jobs)
    return here if jobs in (None, 1) else side_by_side(jobs or 1)
