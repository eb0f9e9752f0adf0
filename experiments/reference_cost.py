"""What it saves to need no reference model (claim 14)

    https://openreview.net/forum?id=wmi6satsIu    DGPO, Fig. 3: 13.6% less memory and 25% less time than DPO

    python experiments/reference_cost.py        (two CPU cores, about two minutes)

Optimizer steps of 8 pairs of HH-RLHF's lengths on a Llama of 34M parameters, by benchmarks/steps.py: DGPO, DPO with a
frozen reference that runs at every step, as in the paper, and DPO as hdpo.py does it, with reference log-probs stored
before the first step. Each runs in its own process; they take turns, and a ratio is taken within a turn.
"""

import sys
from dataclasses import dataclass
from statistics import median

import report
import tyro

sys.path.insert(0, str(report.ROOT / "benchmarks"))

import steps  # noqa: E402

BASES = {"dpo live": "DPO, live reference", "dpo stored": "DPO, stored log-probs (hdpo.py)"}

CLAIM_14 = (
    "against a live reference: at least half of the paper's savings, so time at most 0.875 and memory at most 0.932"
)


@dataclass
class Args:
    turns: int = 7
    """Steps of each"""
    results: str = str(report.RESULTS)
    """Where the table and the figure go"""
    fast: bool = False
    """One turn, to see that it runs; its verdict means little"""


def main(args: Args) -> None:
    found = steps.measure(("dgpo", *BASES), 1 if args.fast else args.turns)
    seconds, peak = found["dgpo"]
    times = {base: [ours / other for ours, other in zip(seconds, found[base][0])] for base in BASES}
    memory = {base: peak / found[base][1] for base in BASES}

    shown = {base: f"{median(own):.2f} ({min(own):.2f} to {max(own):.2f})" for base, own in times.items()}
    text = report.table(
        ["", "s a step (median)", "peak memory (MB)", "time of DGPO / its", "memory of DGPO / its"],
        [
            ["DGPO", f"{median(seconds):.2f}", f"{peak / 1e6:.0f}", "", ""],
            *(
                [label, f"{median(found[base][0]):.2f}", f"{found[base][1] / 1e6:.0f}"]
                + [shown[base], f"{memory[base]:.2f}"]
                for base, label in BASES.items()
            ),
        ],
    )
    verdict = report.Verdict(
        14, "DGPO Fig. 3", "No reference model: less memory (13.6%) and time (25%) than DPO.", CLAIM_14,
        median(times["dpo live"]) <= 0.875 and memory["dpo live"] <= 0.932,
        "; ".join(
            f"against {label}: time {shown[base]}, memory {memory[base]:.2f}"
            for base, label in BASES.items()
        )
        + " (median and range over steps)",
    )  # fmt: skip

    figure, axes = report.axes(1, 2, width=9, height=2.6)
    names = ["DGPO", "DPO, live", "DPO, stored"]
    colours = [report.COLOURS["DGPO"], report.COLOURS["DPO"], report.COLOURS["DPO"]]
    axes[0, 0].barh(names, [median(own) for own, _ in found.values()], color=colours)
    axes[0, 1].barh(names, [own / 1e6 for _, own in found.values()], color=colours)
    axes[0, 0].set(xlabel="seconds a step of 8 pairs (median)")
    axes[0, 1].set(xlabel="peak memory of the process (MB)")
    report.save(args, "reference_cost", [verdict], text, figure)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
