"""What all experiments share: verdicts, the scripts as a user launches them, colours, and the files that they leave.

An experiment NAME.py is readable on its own and leaves, in experiments/results/ (or --results):

    NAME.md      its verdicts and its table
    NAME.json    the same as data, with the commit and the time; all.py joins these files to results/README.md
    NAME.png     its figure
"""

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

STARTED = time.perf_counter()
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results"
TOY = ROOT / "toy"
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

# One colour for one algorithm in every figure, and a scale for alpha, alpha/beta or epsilon where they are swept.
COLOURS = {
    "reference": "#7f7f7f",
    "DPO": "#1f77b4",
    "H-DPO": "#ff7f0e",
    "DPL": "#2ca02c",
    "eps-DPO": "#9467bd",
    "DGPO": "#d62728",
    "DPO-PG": "#8c564b",
}


@dataclass
class Verdict:
    """One line of results/README.md."""

    claim: int
    """Its number in results/README.md"""
    paper: str
    """As "H-DPO Fig. 1"."""
    statement: str
    """What the paper says, in a sentence"""
    threshold: str
    """What has to be measured here for "holds"; written in the file before its numbers were seen"""
    holds: bool | None
    """None: undecided, the error is larger than the effect"""
    numbers: str
    """What was measured, with the spread over seeds"""
    where: str = "toy"
    """What it was measured on: "exact" (closed form, or all outcomes enumerated), "toy" or "real model"."""


def decide(effect: float, error: float, at_least: float = 0.0) -> bool | None:
    """Whether an effect is above a threshold: None where it is nearer to it than two standard errors."""
    return None if abs(effect - at_least) < 2 * error else effect > at_least


def error(values: Sequence[float]) -> float:
    """Standard error of the mean; of one value it is not known."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.inf


def above_zero(values: Sequence[float]) -> bool | None:
    """Whether the mean is above zero by more than two standard errors; None where it is within them."""
    return decide(statistics.fmean(values), error(values))


def all_hold(*holds: bool | None) -> bool | None:
    """One that does not hold is enough for False, and else one that is undecided for None."""
    return False if False in holds else None if None in holds else True


def said(holds: bool | None) -> str:
    """A verdict in words."""
    return {True: "holds", False: "does not hold", None: "undecided"}[holds]


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and, of several values, their range: "0.123 (0.120 to 0.127)"."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(header: Sequence, rows: Sequence[Sequence]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def launch(script: str, *arguments, threads: int = 1) -> str:
    """Run a script of this repository as a user does; what it printed. Fails with the end of that if the script did.

    threads  of torch; one each for jobs that run side by side
    """
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | ONE_THREAD | {"OMP_NUM_THREADS": str(threads)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout


def side_by_side(jobs: Sequence, jobs_at_once: int = 0) -> list:
    """Call functions without arguments, a thread for every core (or jobs_at_once); their results in order.

    For functions that wait for processes, as launch does.
    """
    with ThreadPoolExecutor(jobs_at_once or os.cpu_count() or 1) as pool:
        return list(pool.map(lambda job: job(), jobs))


def metrics(folder: str | Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of one metric of a run, from its metrics.jsonl; "eval/..." too."""
    rows = map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row[name]) for row in rows if name in row]


def passk(model: str | Path, folder: str | Path, task: str | Path, problems: int, n: int, *arguments) -> dict:
    """Sample a model with eval_passk.py at temperature 1; its results at that temperature.

    problems  at most this many of the task's
    n         samples of each
    """
    launch(
        "eval_passk.py", "--model", model, "--output-dir", folder, "--task", task, "--problems", problems, "--n", n,
        "--temperatures", 1, "--max-new-tokens", 80, "--overwrite", *arguments,
    )  # fmt: skip
    return json.loads(Path(folder, "results.json").read_text())["temperatures"]["1"]


def commit() -> str:
    """The commit that the files are of, and whether they differ from it."""

    def git(*arguments) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    changed = git(
        "status", "--porcelain", "--untracked-files=no", "--", ".", ":!experiments/results", ":!benchmarks/results"
    )
    return (git("rev-parse", "--short", "HEAD") or "no git") + (" with changes" if changed else "")


def axes(rows: int = 1, columns: int = 1, width: float = 9, height: float = 3.4):
    """(figure, axes as an array of rows x columns) at a README's width, drawn without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "legend.fontsize": 8})
    return plt.subplots(rows, columns, figsize=(width, height * rows), squeeze=False, layout="constrained")


def shades(values: Sequence[float]) -> dict[float, tuple]:
    """A colour for every value of a swept parameter, from dark (smallest) to light."""
    import matplotlib

    scale = matplotlib.colormaps["viridis"]
    ordered = sorted(values)
    return {value: scale(0.9 * i / max(1, len(ordered) - 1)) for i, value in enumerate(ordered)}


def machine() -> str:
    """Cores, memory, processor and the versions that matter."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return (
        f"{os.cpu_count()} cores ({names[0] if names else platform.machine()}), {memory:.0f} GiB, "
        f"Python {platform.python_version()}, torch {version('torch')}"
    )


def folder(args) -> Path:
    """args.results, but for a fast version never the directory of the results that are kept."""
    results = Path(args.results)
    results = ROOT / "runs/fast" if args.fast and results.resolve() == RESULTS else results
    results.mkdir(parents=True, exist_ok=True)
    return results


def save(args, name: str, verdicts: Sequence[Verdict], text: str, figure) -> None:
    """Write NAME.md, NAME.json and NAME.png to folder(args), and print the first.

    args  .results is a directory; .fast marks what comes from a fast version
    text  the tables, in markdown
    """
    figure.savefig(folder(args) / f"{name}.png", dpi=110)
    lines = [
        f"**Claim {v.claim}** ({v.paper}; {v.where}): {v.statement}\n\n- **{said(v.holds)}**: "
        f"{v.numbers}\n- threshold: {v.threshold}\n"
        for v in verdicts
    ]
    note = "From the fast version, whose verdicts mean nothing.\n\n" if args.fast else ""
    page = f"# {name}\n\n{note}" + "\n".join(lines) + f"\n{text.strip()}\n\n![{name}]({name}.png)\n"
    (folder(args) / f"{name}.md").write_text(page)
    data = {
        "commit": commit(),
        "machine": machine(),
        "seconds": round(time.perf_counter() - STARTED),
        "processor_seconds": round(sum(os.times()[:4])),  # of the processes that it launched, too
        "fast": args.fast,
        "verdicts": list(map(asdict, verdicts)),
    }
    (folder(args) / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
    print(page)
