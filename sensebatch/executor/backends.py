"""The backends that start workers in processes of their own, by name. Imports each when it is used.

One engine in the process of the run needs none of them; see `run`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sensebatch.config import WorkersConfig
from sensebatch.executor.ray_actor import Recipe
from sensebatch.executor.roster import Crew


def _on_ray(workers: WorkersConfig, recipe: Recipe, uses_gpu: bool) -> Crew:
    from sensebatch.executor.ray_workers import RayCrew

    return RayCrew(workers, recipe, uses_gpu=uses_gpu)


BACKENDS: Mapping[str, Callable[[WorkersConfig, Recipe, bool], Crew]] = {"ray": _on_ray}
"""What starts workers: given how many and where, how each begins, and if each has a GPU."""
