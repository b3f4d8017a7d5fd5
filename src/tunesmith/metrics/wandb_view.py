"""A saved workspace in a W&B project: the table, charts and axes of `tunesmith compare` over the keys that every run logs."""

from __future__ import annotations

import os
from typing import Any

from tunesmith.config import Refusal

WANTED = "wandb-view needs wandb-workspaces — type: pip install -c constraints.txt wandb-workspaces"
SETTINGS = ("optim.lr", "method.kind", "method.base", "method.r", "train.conversations_per_step", "train.seed")
"""Axes of the parallel coordinates before the results; W&B shows any other key of a config at a click."""
TASK = ("test/loss", "test/slot_f1", "test/intent_accuracy", "test/exact_match")
COLUMNS = ("run/tokens_per_s", "run/mfu", "run/planned_peak_gib", "run/peak_gib", "run/hours", "run/energy_kj", "run/cost")


def workspace(project: str, entity: str, name: str, quality: str = "dev/loss") -> Any:
    """The workspace, not saved yet; raises Refusal where its library is missing."""
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ImportError:
        raise Refusal(WANTED) from None

    def setting(key: str) -> Any:
        return panels.Config(key)

    def result(key: str) -> Any:
        return panels.SummaryMetric(key)

    def column(metric: Any, shown: str) -> Any:
        return panels.ParallelCoordinatesPlotColumn(metric=metric, display_name=shown)

    def curve(*keys: str) -> Any:
        return panels.LinePlot(x="Step", y=list(keys), title=", ".join(keys))

    axes = [column(setting(key), key) for key in SETTINGS] + [column(result(key), key) for key in ("run/hours", "run/mfu", quality)]
    against = ("run/cost", "run/hours", "run/peak_gib")
    told = {
        "Settings and results": [
            panels.ParallelCoordinatesPlot(title="settings and results", columns=axes),
            *(panels.ScatterPlot(title=f"{quality} against {key}", x=result(key), y=result(quality)) for key in against),
            panels.ParameterImportancePlot(with_respect_to=quality),
            panels.RunComparer(diff_only="split"),
        ],
        "Quality": [curve("train/loss"), curve("dev/loss"), *(panels.BarPlot(title=key, metrics=[key]) for key in TASK)],
        "Speed and memory": [curve("speed/computed_tokens_per_s"), curve("speed/mfu", "speed/hfu"),
                             curve("memory/peak_gib", "plan/peak_gib"), curve("card/power_w")],
    }  # fmt: skip
    pinned = [f"summary:{key}" for key in (quality, *COLUMNS)]
    return workspaces.Workspace(
        entity=entity, project=project, name=name,
        sections=[workspaces.Section(name=title, panels=made, is_open=True) for title, made in told.items()],
        runset_settings=workspaces.RunsetSettings(pinned_columns=["run:displayName", *pinned]),
    )  # fmt: skip


def save(project: str, entity: str, name: str, quality: str = "dev/loss") -> str:
    """Save the workspace as a new view and return its address; raises Refusal where W&B is not to be reached, or does not let us in."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb

        entity = entity or wandb.Api().default_entity or ""
        if not entity:
            raise Refusal("--entity: the account names no team or user of its own — type --entity NAME")
        view = workspace(project, entity, name, quality).save()
    except Refusal:
        raise
    except Exception as error:  # W&B's errors have no common base
        told = " ".join(str(error).split())[:200]
        raise Refusal(
            f"wandb-view {project}: {type(error).__name__}: {told} — is WANDB_API_KEY set, and WANDB_BASE_URL if the server is your own?"
        ) from None
    return str(view.url)
