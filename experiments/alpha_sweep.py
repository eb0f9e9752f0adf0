"""H-DPO's alpha decides how diverse the samples are, and how many of them are right (claims 8 and 9)

    https://arxiv.org/abs/2411.07595    Table 2: entropy, Distinct and inverted Self-BLEU rise with alpha in 0.8 ... 1.2
                                        Fig. 3: alpha below 1 gives a better pass@k, k from 5 to 200, on GSM8K

    python experiments/alpha_sweep.py        (two CPU cores, about ten minutes)

hdpo.py on the toy, one epoch of 128 steps of 16 pairs, for five alphas and three seeds; then eval_passk.py draws 32
samples at temperature 1 for each of 100 problems.

beta is 1 here, not the paper's 0.01: alpha acts through the optimum ref^(1/alpha) exp(r / (alpha beta)) (Eq. 11), and
a policy comes near it only where the loss saturates, at margins alpha (a - b) of a few 1/beta. A toy response of 38
tokens has a log-prob of -3 to -7, so beta 0.01 would ask for margins that it cannot have. beta 0.1 is measured too.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import report
import tyro

ALPHAS = (0.8, 0.9, 1.0, 1.1, 1.2)
OUTER = (0.8, 1.2)
MEASURES = {"entropy": "entropy", "distinct_1": "Distinct-1", "distinct_2": "Distinct-2", "self_bleu": "Self-BLEU"}

CLAIM_8 = (
    "means over seeds: entropy, Distinct-1 and -2 rise and Self-BLEU falls from each alpha to the next, at beta 1; "
    "and so do the ends, 0.8 and 1.2, in every seed"
)
CLAIM_9 = (
    "mean over seeds: alpha 0.8 or alpha 0.9 has a higher pass@k than alpha 1 for every k drawn (1 to 32), at beta 1"
)


@dataclass
class Args:
    seeds: int = 3
    """Runs of each alpha"""
    problems: int = 100
    """Problems to sample"""
    n: int = 32
    """Samples of each problem"""
    runs: str = "runs/alpha_sweep"
    """Where the runs go"""
    results: str = str(report.RESULTS)
    """Where the table and the figure go"""
    fast: bool = False
    """Two alphas and two steps, to see that it runs; its verdicts mean nothing"""


def train_and_sample(alpha: float, beta: float, seed: int, args: Args) -> dict:
    """eval_passk.py's results at temperature 1 of one hdpo.py run."""
    folder = Path(args.runs, f"beta-{beta:g}-alpha-{alpha:g}-{seed}").resolve()
    report.launch(
        "hdpo.py", "--model", report.TOY / "model", "--dataset", report.TOY / "train.jsonl", "--alpha", alpha,
        "--beta", beta, "--lr", 1e-4, "--batch-size", 16, "--steps", 2 if args.fast else 0, "--seed", seed,
        "--output-dir", folder, "--overwrite",
    )  # fmt: skip
    return report.passk(folder / "model", folder / "eval", report.TOY / "problems.jsonl", args.problems, args.n)


def draw(found: dict, alphas, seeds: int):
    """Each measure of diversity against alpha, and pass@k against k."""
    figure, axes = report.axes(2, 3, width=11, height=2.9)
    for axis, (name, label) in zip(axes.flat, MEASURES.items()):
        for seed in range(seeds):
            values = [found[alpha, 1.0, seed]["diversity"][name] for alpha in alphas]
            axis.plot(alphas, values, "o", color=report.COLOURS["H-DPO"], alpha=0.5, markersize=4)
        means = [fmean(found[alpha, 1.0, seed]["diversity"][name] for seed in range(seeds)) for alpha in alphas]
        axis.plot(alphas, means, color=report.COLOURS["H-DPO"])
        axis.set(xlabel="$\\alpha$", ylabel=label)
    shades = report.shades(alphas)
    curve, ratio = axes[1, 1], axes[1, 2]
    base = mean_passk(found, 1.0, seeds)
    for alpha in alphas:
        values = mean_passk(found, alpha, seeds)
        curve.plot(list(values), list(values.values()), "o-", color=shades[alpha], markersize=3, label=f"{alpha:g}")
        ratio.plot(list(values), [values[k] - base[k] for k in values], "o-", color=shades[alpha], markersize=3)
    curve.set(xscale="log", xlabel="$k$", ylabel="pass@$k$")
    ratio.set(xscale="log", xlabel="$k$", ylabel="pass@$k$ less that of $\\alpha=1$")
    curve.legend(title="$\\alpha$")
    return figure


def mean_passk(found: dict, alpha: float, seeds: int, beta: float = 1.0) -> dict[int, float]:
    """k -> mean over seeds of pass@k."""
    every = [found[alpha, beta, seed]["pass@k"] for seed in range(seeds)]
    return {int(k): fmean(one[k]["mean"] for one in every) for k in every[0]}


def main(args: Args) -> None:
    alphas = (0.8, 1.0) if args.fast else ALPHAS
    keys = [(alpha, 1.0, seed) for alpha in alphas for seed in range(args.seeds)]
    if not args.fast:
        keys += [(alpha, 0.1, seed) for alpha in OUTER for seed in range(args.seeds)]
    found = dict(zip(keys, report.side_by_side([lambda key=key: train_and_sample(*key, args) for key in keys])))

    def values(alpha, name, beta=1.0):
        return [found[alpha, beta, seed]["diversity"][name] for seed in range(args.seeds)]

    def rises(name):
        sign = -1 if name == "self_bleu" else 1
        means = [sign * fmean(values(alpha, name)) for alpha in alphas]
        ends = zip(values(alphas[0], name), values(alphas[-1], name))
        return all(a < b for a, b in zip(means, means[1:])) and all(sign * a < sign * b for a, b in ends)

    rows, betas = [], (1.0,) if args.fast else (1.0, 0.1)
    for beta in betas:
        for alpha in alphas if beta == 1.0 else OUTER:
            passk = mean_passk(found, alpha, args.seeds, beta)
            cells = [report.spread(values(alpha, name, beta)) for name in MEASURES]
            rows.append([f"{beta:g}", f"{alpha:g}", *cells, *(f"{100 * passk[k]:.1f}" for k in passk)])
    ks = list(mean_passk(found, 1.0, args.seeds))
    header = ["beta", "alpha", *MEASURES.values(), *(f"pass@{k}" for k in ks)]
    text = (
        f"{args.n} samples of each of {args.problems} problems at temperature 1, the first 25 for diversity; mean over "
        f"{args.seeds} seeds (range); entropy in nats a token.\n\n" + report.table(header, rows)
    )
    base = mean_passk(found, 1.0, args.seeds)
    below = [alpha for alpha in alphas if alpha < 1]
    better = {alpha: [k for k in ks if mean_passk(found, alpha, args.seeds)[k] > base[k]] for alpha in below}
    gains = [
        f"alpha {alpha:g} is better at k = {', '.join(map(str, better[alpha])) or 'none'} (pass@1 "
        + report.spread([100 * found[alpha, 1.0, seed]["pass@k"]["1"]["mean"] for seed in range(args.seeds)], 1)
        + ")"
        for alpha in below
    ]
    verdicts = [
        report.Verdict(
            8, "H-DPO Table 2", "Entropy, Distinct and inverted Self-BLEU rise with alpha in 0.8 ... 1.2.", CLAIM_8,
            all(rises(name) for name in MEASURES),
            "; ".join(
                f"{label} {', '.join(f'{fmean(values(alpha, name)):.4f}' for alpha in alphas)}"
                + ("" if rises(name) else " (not monotone)")
                for name, label in MEASURES.items()
            )
            + f" for alpha {', '.join(f'{alpha:g}' for alpha in alphas)}",
        ),
        report.Verdict(
            9, "H-DPO Fig. 3", "alpha < 1 gives a better pass@k at the training temperature where one answer is right.",
            CLAIM_9,
            any(better[alpha] == ks for alpha in below),
            "; ".join(gains)
            + "; alpha 1 has pass@1 "
            + report.spread([100 * found[1.0, 1.0, seed]["pass@k"]["1"]["mean"] for seed in range(args.seeds)], 1),
        ),
    ]  # fmt: skip
    report.save(args, "alpha_sweep", verdicts, text, draw(found, alphas, args.seeds))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
