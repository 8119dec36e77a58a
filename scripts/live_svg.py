"""Draw docs/results/live.svg, what a terminal showed at a step of the last stage of a finished run, from its logs.

make quickstart
python scripts/live_svg.py runs/quickstart 60 docs/results/live.svg
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console

from aligndistil.progress import RunView
from aligndistil.recipe import load_recipe
from aligndistil.run_folder import MetricsLog, RunFolder


def draw(run: Path, step: int, out: Path) -> None:
    """Its stages one after the other, the last one up to this step."""
    recipe, folder = load_recipe(run / "recipe.yaml"), RunFolder(run)
    inputs = {name: stage.inputs for name, stage in recipe.stages.items()}
    headlines = {name: stage.objective.headline for name, stage in recipe.stages.items()}
    now = 0.0
    nowhere, console = Console(file=io.StringIO()), Console(file=io.StringIO(), width=80, record=True)
    view = RunView(recipe.name, inputs, headlines, console=nowhere, clock=lambda: now)
    for name in recipe.stages:
        lines = MetricsLog(folder.stage(name).path / "metrics.jsonl").read()
        steps = [line for line in lines if line["split"] == "train"]
        with view.training(name, steps[-1]["step"]) as training:
            for line in steps:
                now += line["perf/step_seconds"]
                training.update(line["step"], line)
                if name == [*recipe.stages][-1] and line["step"] == step:
                    console.print(view)
    # rich's own format fetches a font from the network
    template = re.sub(r"@font-face {{.*?}}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL).replace("Fira Code, ", "")
    svg = console.export_svg(title=f"aligndistil train {recipe.name}", code_format=template, unique_id="live")
    out.write_text("".join(line.rstrip() + "\n" for line in svg.splitlines()))


if __name__ == "__main__":
    draw(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
