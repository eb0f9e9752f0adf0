"""Likelihood displacement on the toy: what DPO, DGPO and DPO-PG do to the chosen response's log-prob (claims 6, 7)

    DGPO    https://openreview.net/forum?id=wmi6satsIu    Fig. 1, 2, Table 3: DPO lowers it, DGPO raises it
    DPO-PG  https://arxiv.org/abs/2505.23761              Fig. 8, 9: chosen up, rejected not up, and DPO's loss falls

    python experiments/displacement.py        (two CPU cores, about five minutes)

The toy's near-duplicate pairs differ in one digit, so the gradients of log pi(y_w|x) and log pi(y_l|x) nearly agree
(DGPO's Eqs. 4-7 say that then both can fall together). Every method takes the same 64 steps of 16 pairs, at three
learning rates, from three seeds; log-probs are means per token on 128 held-out pairs. The toy works sums and is nearly
sure of the chosen response; markov.py does the same with a language whose log-probs start where the papers' do.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import report
import tyro

TOY = report.TOY
RATES = (1e-5, 3e-5, 1e-4)
# Arguments beside those that all share; each method's schedule and optimizer are its paper's.
METHODS = {
    "DPO": ("hdpo.py", "--alpha", 1, "--beta", 0.1),
    "DGPO": ("dgpo.py",),
    "DPO-PG": ("dpo_pg.py", "--log-dpo-loss", "--dpo-beta", 0.1),
}

# Thresholds. DPO-PG's theorems (H.4, H.5) are of first order, so they are judged at the smallest rate.
CLAIM_6 = (
    "at one learning rate that both use: DPO lowers the chosen log-prob and DGPO raises it, each by more than two "
    "standard errors over seeds"
)
CLAIM_7 = (
    "at the smallest rate, in every seed: chosen log-prob higher, rejected not higher, DPO's loss lower than at the "
    "start"
)


@dataclass
class Args:
    seeds: int = 3
    """Runs of each kind"""
    steps: int = 64
    """Optimizer steps of a run"""
    runs: str = "runs/displacement"
    """Where the runs go"""
    results: str = str(report.RESULTS)
    """Where the table and the figure go"""
    fast: bool = False
    """One rate and few pairs, to see that it runs; its verdicts mean nothing"""


def train(method: str, rate: float, seed: int, args, model: Path, data: dict[str, Path], evaluations: int = 4) -> Path:
    """Launch one run, of "METHOD" or "METHOD, kind of pairs"; returns its directory.

    args  .steps of 16 pairs, .runs where the directory goes
    data  files of pairs, "train" and "test"
    """
    script, *more = METHODS[method.split(",")[0]]
    folder = Path(args.runs, f"{method.replace(', ', '-')}-{rate:g}-{seed}".lower()).resolve()
    report.launch(
        script, *more, "--model", model, "--dataset", data["train"], "--eval-dataset", data["test"],
        "--lr", rate, "--warmup", 0.1, "--batch-size", 16, "--epochs", 8, "--steps", args.steps, "--seed", seed,
        "--eval-every", max(1, args.steps // evaluations), "--output-dir", folder, "--overwrite",
    )  # fmt: skip
    return folder


def course(folder: Path, name: str) -> tuple[list[int], list[float]]:
    """Steps, and the change of a metric on the held-out pairs since step 0."""
    steps, values = zip(*report.metrics(folder, f"eval/{name}"))
    return list(steps), [value - values[0] for value in values]


def change(folder: Path, name: str) -> float:
    """Last minus first value of a metric on the held-out pairs."""
    return course(folder, name)[1][-1]


def claim_6(changes: Callable[[str, float], Sequence[float] | None], rates: Sequence[float], when: str):
    """Its verdict from the changes of the chosen log-prob of a method at a rate, a number a seed or None."""
    judged = {rate: (changes("DPO", rate), changes("DGPO", rate)) for rate in rates}
    judged = {rate: both for rate, both in judged.items() if None not in both}
    holds = [
        report.all_hold(report.above_zero([-value for value in dpo]), report.above_zero(dgpo))
        for dpo, dgpo in judged.values()
    ] + [None] * (len(rates) - len(judged))
    every = "; ".join(
        f"lr {rate:g}: DPO {report.spread(dpo, 4)}, DGPO {report.spread(dgpo, 4)}"
        for rate, (dpo, dgpo) in judged.items()
    )
    return report.Verdict(
        6, "DGPO Fig. 1, 2, Table 3", "On near-duplicate pairs DPO lowers the chosen log-prob and DGPO raises it.",
        f"{when}, {CLAIM_6}", True if True in holds else None if None in holds else False,
        f"{when}, at {holds.count(True)} of {len(judged)} rates that came there. {every}",
    )  # fmt: skip


def claim_7(changes: Callable[[str], Sequence[float]], rate: float):
    """Its verdict from the changes of DPO-PG's metrics at the smallest rate, a number a seed."""
    chosen, rejected, loss = map(changes, ("logps/chosen", "logps/rejected", "dpo_loss"))
    return report.Verdict(
        7, "DPO-PG Fig. 8, 9", "DPO-PG raises the chosen, never the rejected log-prob, and DPO's loss still falls.",
        CLAIM_7, min(chosen) > 0 and max(rejected) <= 0 and max(loss) < 0,
        f"lr {rate:g}: chosen {report.spread(chosen, 4)}, rejected {report.spread(rejected, 4)}, DPO's loss "
        f"{report.spread(loss, 4)}",
    )  # fmt: skip


def rows_of(folders: dict, seeds: int) -> list[list[str]]:
    """Rows of a table: method, rate, change of chosen, rejected and loss, and of chosen for a nat of the margin."""
    rows = []
    for method, rate in dict.fromkeys(key[:2] for key in folders):
        loss = "dpo_loss" if method == "DPO-PG" else "loss"
        found = [
            [change(folders[method, rate, seed], name) for seed in range(seeds)]
            for name in ("logps/chosen", "logps/rejected", loss)
        ]
        chosen, rejected = sum(found[0]), sum(found[1])
        cells = [report.spread(values, 4) for values in found]
        rows.append([method, f"{rate:g}", *cells, f"{chosen / (chosen - rejected):+.3f}"])
    return rows


def draw_courses(axes, folders: dict, rate: float, seeds: int) -> None:
    """A panel for each method, on one scale: log-probs over the steps at one learning rate."""
    for axis, method in zip(axes, dict.fromkeys(key[0] for key in folders)):
        axis.sharey(axes[0])
        for seed in range(seeds):
            for name, style in (("chosen", "-"), ("rejected", "--")):
                line = course(folders[method, rate, seed], f"logps/{name}")
                color = report.COLOURS[method.split(",")[0]]
                axis.plot(*line, style, color=color, alpha=0.8, label=None if seed else name)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(title=f"{method}\nlr {rate:g}", xlabel="optimizer step")
        axis.legend()
    axes[0].set_ylabel("change of $\\log\\pi$ per token")


def draw(folders: dict, rates, shown: float, seeds: int):
    """Above, log-probs over the steps at the rate `shown`. Below, where they end at all rates."""
    figure, axes = report.axes(2, len(METHODS), width=9, height=2.9)
    draw_courses(axes[0], folders, shown, seeds)
    for below, method in zip(axes[1], METHODS):
        below.sharey(axes[1, 0])
        for name, marker in (("chosen", "o"), ("rejected", "x")):
            points = [
                (rate, change(folders[method, rate, seed], f"logps/{name}")) for rate in rates for seed in range(seeds)
            ]
            below.plot(*zip(*points), marker, color=report.COLOURS[method], label=name)
        below.axhline(0, color="black", linewidth=0.8)
        below.set(xscale="log", xlabel="learning rate")
        below.set_yscale("symlog", linthresh=0.01)
        below.legend()
    axes[1, 0].set_ylabel("change at the end")
    return figure


def main(args: Args) -> None:
    data = {"train": TOY / "near_train.jsonl", "test": TOY / "near_test.jsonl"}
    rates = RATES[-1:] if args.fast else RATES
    keys = [(method, rate, seed) for method in METHODS for rate in rates for seed in range(args.seeds)]
    jobs = [lambda key=key: train(*key, args, TOY / "model", data) for key in keys]
    folders = dict(zip(keys, report.side_by_side(jobs)))

    def changes(method, rate, name="logps/chosen"):
        return [change(folders[method, rate, seed], name) for seed in range(args.seeds)]

    start = {name: report.metrics(folders[keys[0]], f"eval/logps/{name}")[0][1] for name in ("chosen", "rejected")}
    text = (
        f"Change of the mean log-prob per token on held-out pairs after {args.steps} steps of 16 pairs, from "
        f"{start['chosen']:.4f} (chosen) and {start['rejected']:.2f} (rejected); mean over {args.seeds} seeds (range). "
        "The loss is each method's own, for DPO-PG it is DPO's (beta 0.1). The last column is the chosen change for "
        "each nat that the margin, chosen less rejected, has gained.\n\n"
        + report.table(["method", "lr", "chosen", "rejected", "loss", "chosen / margin"], rows_of(folders, args.seeds))
    )
    verdicts = [
        claim_6(changes, rates, "after as many steps"),
        claim_7(lambda name: changes("DPO-PG", rates[0], name), rates[0]),
    ]
    worst = min(rates, key=lambda rate: sum(changes("DPO", rate)))
    report.save(args, "displacement", verdicts, text, draw(folders, rates, worst, args.seeds))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
