"""Run every experiment and join their verdicts to experiments/results/README.md.

    python experiments/all.py                          (two CPU cores, 55 minutes)
    python experiments/all.py --only tabular           (one of them again; the others' results stay)

Each also runs by itself: python experiments/NAME.py. So do did_entropy.py and real_model.py, which are for your models.
"""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import report
import tyro

ON_ONE_CORE = ("did_energy", "did_exact", "gaussians", "pareto", "closed_form", "tabular")  # these run side by side
ON_ALL_CORES = (
    "displacement", "markov", "alpha_sweep", "hard_problems", "calibration", "eps_control", "reference_cost",
    "methods",
)  # fmt: skip
EXPERIMENTS = (*ON_ONE_CORE, *ON_ALL_CORES)
APART = ("did_entropy", "real_model")

# What the results page opens with: the claims in a few words, in the order of their numbers.
CLAIMS = (
    ("H-DPO", "on two Gaussians a smaller alpha seeks one mode"),
    ("H-DPO", "on three and four, the one of highest density"),
    ("H-DPO, DPL", "closed forms of the optima"),
    ("DPL", "alpha 1: probabilities equal preferences"),
    ("DPO-PG (DID)", "the log-ratio reward alone reaches the target"),
    ("DGPO", "DPO lowers the chosen log-prob, DGPO raises it"),
    ("DPO-PG", "chosen up, rejected not up, DPO's loss down"),
    ("H-DPO", "diversity rises with alpha"),
    ("H-DPO", "alpha below 1: better pass@k"),
    ("DPL", "a higher alpha/beta wins at many samples; better diversity for its quality"),
    ("DPL", "a higher alpha/beta is calibrated better"),
    ("eps-DPO", "a larger eps adapts more and moves further; better reward"),
    ("DPO-PG (DID)", "reinforcing has a DID of lower entropy"),
    ("DGPO", "no reference: less time and memory"),
    ("DGPO", "unrelated rejected responses alleviate displacement"),
)


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


def overview(lines: list[tuple[int, str, dict]]) -> str:
    """A row for each claim: how it fared in closed form, on the toy and on the real model."""
    rows = []
    for number, (paper, words) in enumerate(CLAIMS, 1):
        cells = []
        for where in ("exact", "toy", "real model"):
            here = [(name, v["holds"]) for claim, name, v in lines if claim == number and v["where"] == where]
            counts = Counter(report.said(holds) for _, holds in here)
            text = ", ".join(f"{count} x {said}" if len(here) > 1 else said for said, count in counts.items())
            files = ", ".join(f"[{name}](#{name})" for name in dict.fromkeys(name for name, _ in here))
            cells.append(f"{text} ({files})" if here else "")
        rows.append([number, paper, words, *cells])
    return report.table(["claim", "paper", "in a few words", "exact", "toy", "real model"], rows)


def join(results: Path) -> str:
    """The page of all verdicts that lie in `results`."""
    names = (*EXPERIMENTS, *APART)
    found = {name: json.loads(path.read_text()) for name in names if (path := results / f"{name}.json").exists()}
    lines = [(verdict["claim"], name, verdict) for name, one in found.items() for verdict in one["verdicts"]]
    lines.sort(key=lambda line: line[:2])  # stable: the verdicts of one file on one claim stay in its order
    machines = sorted({one["machine"] for one in found.values()})
    counts = Counter(report.said(verdict["holds"]) for _, _, verdict in lines)
    page = (
        "# What the papers claim, and what we found\n\n"
        + "From fast versions, whose verdicts mean nothing.\n\n" * any(one["fast"] for one in found.values())
        + f'{len(lines)} tests: {", ".join(f"{said} {count}" for said, count in counts.most_common())}. "Exact" is a '
        "closed form, or every outcome enumerated; the toy is a language model of 0.8M parameters that works sums, or "
        "in markov one of a small Markov language; undecided is what is within two standard errors of its threshold. "
        "By chance alone 9 of 100 tests with three seeds would end as holds, 7 with four, 2 with many problems or "
        "pairs. Some lines follow from the equations and test our code, not a paper: the optima of claim 3, in closed "
        "form the rule of claim 9 (alpha's optimum is DPO's at a temperature over whole responses) and that DPL is "
        "never worse on reward + beta log ref (claim 10, Gibbs).\n\n"
        + overview(lines)
        + "\n## Every test with its numbers\n\n"
        "Every line was printed by a file of [experiments/](..), which says what it does and has the threshold, "
        "written before the run that is shown, but where a second look at the runs led to a stricter one (claim 9's "
        "rule of Sec. 5.4, claim 12 at the same KL, claim 13) or to another line (claim 8 at beta 0.1, claim 15 after "
        "as many steps); learning rates and beta come from pilot runs with one seed. What does "
        "not hold at this scale is left standing as such: it says something about the toy at least as often as about "
        f"the paper. Ranges are over seeds. `python experiments/all.py`, on {'; '.join(machines)}.\n\n"
        + report.table(
            ["claim", "paper", "what it says", "on", "here", "numbers", "file"],
            [
                [number, v["paper"], v["statement"], v["where"], f"**{report.said(v['holds'])}**", v["numbers"]]
                + [f"[{name}](#{name})"]
                for number, name, v in lines
            ],
        )
    )
    for name, one in found.items():
        claims = sorted({v["claim"] for v in one["verdicts"]})
        used = f" ({one['processor_seconds']} s of one core)" if "processor_seconds" in one else ""
        judged = f"Claims {', '.join(map(str, claims))}" if claims else "No claim is judged"
        page += (
            f"\n## {name}\n\n{judged}; [table and thresholds]({name}.md), "
            f"[source](../{name}.py), commit {one['commit']}, {one['seconds']} s{used}.\n\n![{name}]({name}.png)\n"
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
