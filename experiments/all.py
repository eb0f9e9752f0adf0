"""Run every experiment and join their verdicts to experiments/results/README.md.

    python experiments/all.py                          (two CPU cores, under an hour)
    python experiments/all.py --only tabular           (one of them again; the others' results stay)

Each also runs by itself: python experiments/NAME.py.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import report
import tyro

ON_ONE_CORE = ("did_energy", "gaussians", "tabular")  # these run side by side
ON_ALL_CORES = (
    "displacement", "alpha_sweep", "hard_problems", "calibration", "eps_control", "did_entropy", "reference_cost",
)  # fmt: skip
EXPERIMENTS = (*ON_ONE_CORE, *ON_ALL_CORES)


@dataclass
class Args:
    only: tuple[str, ...] = ()
    """Names of the experiments to run; empty: all"""
    results: str = str(report.RESULTS)
    """Where the results are and go"""
    fast: bool = False
    """The fast version of each, to see that they run; the verdicts mean nothing"""


def run(name: str, args: Args) -> None:
    """Run one; an experiment that fails stops everything, with its output above."""
    started = time.perf_counter()
    command = [sys.executable, str(Path(__file__).parent / f"{name}.py"), "--results", args.results]
    subprocess.run(
        command + ["--fast"] * args.fast,
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | (report.ONE_THREAD if name in ON_ONE_CORE else {}),
    )
    print(f"{name:<16}{time.perf_counter() - started:7.0f} s", flush=True)


def join(results: Path) -> str:
    """The page of all verdicts that lie in `results`."""
    found = {name: json.loads(path.read_text()) for name in EXPERIMENTS if (path := results / f"{name}.json").exists()}
    lines = [(verdict["claim"], name, verdict) for name, one in found.items() for verdict in one["verdicts"]]
    lines.sort(key=lambda line: line[:2])  # stable: the verdicts of one file on one claim stay in its order
    machines = sorted({one["machine"] for one in found.values()})
    held = sum(verdict["holds"] for _, _, verdict in lines)
    page = (
        "# What the papers claim, and what a toy shows\n\n"
        + "From fast versions, whose verdicts mean nothing.\n\n" * any(one["fast"] for one in found.values())
        + "Every line was printed by a file of [experiments/](..), which says what it does and has the threshold, "
        "written before the run that is shown; learning rates and beta come from pilot runs with one seed. What does "
        "not hold at this scale is left standing as such: it says something about the toy at least as often as about "
        "the paper. Ranges are over seeds.\n\n"
        f"{held} of {len(lines)} lines hold. `python experiments/all.py`, on {'; '.join(machines)}.\n\n"
        + report.table(
            ["claim", "paper", "what it says", "here", "numbers", "file"],
            [
                [number, v["paper"], v["statement"], "holds" if v["holds"] else "**does not hold**", v["numbers"]]
                + [f"[{name}](#{name})"]
                for number, name, v in lines
            ],
        )
    )
    for name, one in found.items():
        claims = sorted({v["claim"] for v in one["verdicts"]})
        page += (
            f"\n## {name}\n\nClaims {', '.join(map(str, claims))}; [table and thresholds]({name}.md), "
            f"[source](../{name}.py), commit {one['commit']}, {one['seconds']} s.\n\n![{name}]({name}.png)\n"
        )
    return page


def main(args: Args) -> None:
    unknown = set(args.only) - set(EXPERIMENTS)
    if unknown:
        sys.exit(f"--only: no experiment is called {', '.join(sorted(unknown))}; there are {', '.join(EXPERIMENTS)}")
    names = args.only or EXPERIMENTS
    started = time.perf_counter()
    report.side_by_side([lambda name=name: run(name, args) for name in names if name in ON_ONE_CORE])
    for name in names:
        if name in ON_ALL_CORES:
            run(name, args)
    page = report.folder(args) / "README.md"
    page.write_text(join(page.parent))
    print(f"{'all':<16}{time.perf_counter() - started:7.0f} s; {page}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
