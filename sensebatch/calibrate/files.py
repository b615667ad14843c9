"""What a calibration leaves behind: a table, configuration files, a sheet, and all figures."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sensebatch.calibrate.run import Variant, Verdict
from sensebatch.declarations import plain
from sensebatch.errors import ConfigError
from sensebatch.report.sheet import Tile, contact_sheet
from sensebatch.store.files import write_atomic
from sensebatch.units import counted
from sensebatch.yaml_values import dump_yaml

SHEET, FIGURES = "sheet.png", "calibration.json"


def config_name(num_steps: int) -> str:
    """Returns the name of the configuration file for a number of steps."""
    return f"{num_steps}-steps.yaml"


def table_rows(verdict: Verdict) -> list[list[str]]:
    """Returns a row of text for each variant: name, evaluations, distance, and seconds an image."""
    return [
        [
            variant.name,
            str(variant.evaluations),
            f"{variant.psnr_db:.1f}",
            f"{variant.ssim:.4f}",
            f"{variant.image_s:.2f}",
        ]
        for variant in verdict.variants
    ]


def claim_folder(folder: Path, manifests: Sequence[Path], model: str) -> None:
    """Notes in a folder, before anything is drawn, which calibration it holds.

    Args:
        folder: Where everything goes.
        manifests: Those with the jobs.
        model: As the user named it.

    Raises:
        ConfigError: It holds the calibration of other manifests or of another model.
    """
    path, own = folder / FIGURES, _subject(manifests, model)
    if not path.exists():
        write_atomic(path, _json(own))
        return
    try:
        content = json.loads(path.read_bytes())
        held = {name: content[name] for name in own}
    except (OSError, ValueError, KeyError, TypeError):
        held = {}
    if held != own:
        words = _words(held) if held else "something else"
        raise ConfigError(
            f"{folder}: holds the calibration of {words}, found {_words(own)}; choose another "
            "--output-dir"
        )


def _subject(manifests: Sequence[Path], model: str) -> dict[str, Any]:
    """Returns what a calibration is of."""
    # A link is a place of its own.
    paths = [os.path.abspath(path) for path in manifests]  # noqa: PTH100
    return {"model": model, "manifests": paths}


def _words(subject: dict[str, Any]) -> str:
    return f"{subject['model']} with {', '.join(subject['manifests'])}"


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def write_files(
    folder: Path,
    verdicts: Sequence[Verdict],
    num_steps: Sequence[int],
    *,
    manifests: Sequence[Path],
    model: str,
    made_by: str,
) -> list[Path]:
    """Writes the files of a calibration, and returns their paths.

    Args:
        folder: Where they go.
        verdicts: One for each task.
        num_steps: The numbers of steps that configuration files are for.
        manifests: Those with the jobs.
        model: As the user named it.
        made_by: The version and the date.
    """
    paths = [folder / config_name(steps) for steps in num_steps]
    for path, steps in zip(paths, num_steps, strict=True):
        text = _config(verdicts, steps, model=model, made_by=made_by)
        write_atomic(path, text.encode())
    figures = {str(verdict.task): _figures(verdict) for verdict in verdicts}
    content = {**_subject(manifests, model), "made_by": made_by, "tasks": figures}
    write_atomic(folder / FIGURES, _json(content))
    shown = [tile for verdict in verdicts for tile in verdict.sheet]
    tiles = [Tile(image=image, caption=text) for image, text in shown]
    sheet = io.BytesIO()
    columns = max(len(verdict.sheet) for verdict in verdicts)
    contact_sheet(tiles, columns).save(sheet, "PNG")
    write_atomic(folder / SHEET, sheet.getvalue())
    return [*paths, folder / SHEET, folder / FIGURES]


def _config(verdicts: Sequence[Verdict], num_steps: int, *, model: str, made_by: str) -> str:
    """Returns a configuration file with the best steps of each task, and what they were measured
    to come to."""
    lines = [f"# Steps for {model}, by sensebatch calibrate ({made_by})."]
    tasks = {}
    for verdict in verdicts:
        best, base = verdict.best(num_steps), verdict.base
        tasks[str(verdict.task)] = _settings(best)
        lines.append(
            f"# {verdict.task}: {best.name}, {best.evaluations} evaluations an image instead of "
            f"{base.evaluations};"
        )
        lines.append(
            f"#   {best.psnr_db:.1f} dB from the converged image (as it is: {base.psnr_db:.1f}), "
            f"{best.image_s:.2f} s an image ({base.image_s:.2f}), "
            f"means of {counted(verdict.num_judged, 'image')} that the search did not see."
        )
    return "\n".join(lines) + "\n" + dump_yaml({"tasks": tasks})


def _settings(variant: Variant) -> dict[str, Any]:
    """Returns the settings that a configuration file needs: timesteps say the number of steps."""
    settings = {name: plain(value) for name, value in variant.settings.items()}
    if settings["timesteps"]:
        settings["timesteps"] = [round(t, 6) for t in settings["timesteps"]]
        return {
            name: settings[name]
            for name in ("solver", "timesteps", "guidance_stride", "layer_stride")
        }
    del settings["timesteps"]
    return settings


def _figures(verdict: Verdict) -> dict[str, Any]:
    variants = [
        {
            name: {key: plain(setting) for key, setting in value.items()}
            if name == "settings"
            else value
            for name, value in asdict(variant).items()
        }
        for variant in verdict.variants
    ]
    return {"num_judged": verdict.num_judged, "variants": variants}
