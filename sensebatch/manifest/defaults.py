"""Overlays a manifest's defaults with a job. Knows which fields exclude one another."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sensebatch.config import SCHEDULE_SETTINGS
from sensebatch.manifest.fields import FOREIGN_FIELDS, SIZE_FIELDS
from sensebatch.tasks import Task

_OVERRIDDEN = {
    **dict.fromkeys(SIZE_FIELDS, SIZE_FIELDS),
    "seeds": frozenset({"seed", "n"}),
    "n": frozenset({"seeds"}),
    "seed": frozenset({"seeds"}),
    "quality": frozenset(SCHEDULE_SETTINGS),
    "timesteps": frozenset({"num_steps", "timestep_shift"}),
    "num_steps": frozenset({"timesteps"}),
    "timestep_shift": frozenset({"timesteps"}),
}
"""The fields that a field, once given, removes from the layers below it, besides itself."""


def defaults_for(task: Task, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the defaults of a task: its own section over the common fields that the task has."""
    sections = {str(known) for known in Task}
    common = {
        name: value
        for name, value in defaults.items()
        if name not in sections and name not in FOREIGN_FIELDS[task]
    }
    return overlaid(common, defaults.get(task) or {}, ())


def overlaid(
    below: Mapping[str, Any], above: Mapping[str, Any], matrix: Collection[str]
) -> dict[str, Any]:
    """Returns the fields of two layers; the upper one wins, and metadata is merged.

    Args:
        below: The defaults.
        above: The job.
        matrix: The names that the job's matrix sets.
    """
    if not below:
        return dict(above)
    taken = set(above) | set(matrix)
    for name in (*above, *matrix):
        taken |= _OVERRIDDEN.get(name, frozenset())
    if "seed" in matrix:
        taken.add("n")
    fields = {**{n: value for n, value in below.items() if n not in taken}, **above}
    lower, upper = below.get("metadata"), above.get("metadata")
    if isinstance(lower, Mapping) and isinstance(upper, Mapping):
        fields["metadata"] = {**lower, **upper}
    return fields
