"""H-DPO's alpha decides how diverse the samples are, and how many of them are right (claims 8 and 9)

    https://arxiv.org/abs/2411.07595    Table 2: entropy, Distinct and inverted Self-BLEU rise with alpha in 0.8 ... 1.2
                                        Fig. 3: alpha below 1 gives a better pass@k, k from 5 to 200, on GSM8K
                                        Sec. 5.4: it does where a lower sampling temperature of DPO does

    python experiments/alpha_sweep.py        (two CPU cores, about ten minutes)

hdpo.py on the toy, one epoch of 128 steps of 16 pairs, for five alphas and three seeds; then eval_passk.py draws 32
samples at temperature 1 for each of 100 problems, which are graded by their final answers.

With five samples the toy is nearly solved. So pass@k is measured a second time, on 400 new problems of four operations
(hard_problems.py), up to k = 200 and at several temperatures. There nothing is sampled: p is the exact probability of a
right working out, and pass@k is 1 - (1 - p)^k. That grader is stricter: a right answer after a wrong line is wrong.

beta is 1 here, not the paper's 0.01: alpha acts through the optimum ref^(1/alpha) exp(r / (alpha beta)) (Eq. 11), and
a policy comes near it only where the loss saturates, at margins alpha (a - b) of a few 1/beta. A toy response of 38
tokens has a log-prob of -3 to -7, so beta 0.01 would ask for margins that it cannot have. beta 0.1 is measured too.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import closed_form
import hard_problems
import report
import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(report.ROOT))

from grading.metrics import pass_at_k  # noqa: E402

ALPHAS = (0.8, 0.9, 1.0, 1.1, 1.2)
OUTER = (0.8, 1.2)
TEMPERATURES = (0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.4)
MEASURES = {"entropy": "entropy", "distinct_1": "Distinct-1", "distinct_2": "Distinct-2", "self_bleu": "Self-BLEU"}

CLAIM_8 = (
    "means over seeds: entropy, Distinct-1 and -2 rise and Self-BLEU falls from each alpha to the next, at beta 1; "
    "and so do the ends, 0.8 and 1.2, in every seed"
)
AT_A_SMALLER_BETA = "from alpha 0.8 to 1.2, at beta 0.1, by more than two standard errors over seeds: the same"


@dataclass
class Args:
    seeds: int = 3
    """Runs of each alpha"""
    problems: int = 100
    """Problems of the toy to sample"""
    n: int = 32
    """Samples of each problem"""
    harder: int = 400
    """New problems of four operations"""
    runs: str = "runs/alpha_sweep"
    """Where the runs go"""
    results: str = str(report.RESULTS)
    """Where the table and the figure go"""
    fast: bool = False
    """Two alphas and two steps, to see that it runs; its verdicts mean nothing"""


def train_and_sample(alpha: float, beta: float, seed: int, args: Args) -> dict:
    """eval_passk.py's results at temperature 1 of one hdpo.py run."""
    folder = model_of(alpha, beta, seed, args).parent
    report.launch(
        "hdpo.py", "--model", report.TOY / "model", "--dataset", report.TOY / "train.jsonl", "--alpha", alpha,
        "--beta", beta, "--lr", 1e-4, "--batch-size", 16, "--steps", 2 if args.fast else 0, "--seed", seed,
        "--output-dir", folder, "--overwrite",
    )  # fmt: skip
    return report.passk(folder / "model", folder / "eval", report.TOY / "problems.jsonl", args.problems, args.n)


def model_of(alpha: float, beta: float, seed: int, args: Args) -> Path:
    """Where train_and_sample leaves its model."""
    return Path(args.runs, f"beta-{beta:g}-alpha-{alpha:g}-{seed}").resolve() / "model"


def exact_passk(alphas, args: Args) -> dict[tuple[float, float], Tensor]:
    """(alpha, temperature) -> pass@k of a right working out of the harder problems, (seeds, problems, KS)."""
    problems, seeds = hard_problems.new_problems(args.harder), range(args.seeds)
    found = {}
    for alpha in alphas:
        models = [model_of(alpha, 1.0, seed, args) for seed in seeds]
        each = torch.stack([hard_problems.chances(model, problems, TEMPERATURES) for model in models])
        for column, heat in enumerate(TEMPERATURES):
            passk = [closed_form.pass_at(chance[:, column], closed_form.KS) for chance in each]
            found[alpha, heat] = torch.stack(passk)
    return found


def judge_samples(found: dict, alphas, args: Args) -> report.Verdict:
    """Claim 9 on the toy: pass@k of the final answers, k from 5 to args.n."""
    ks = [k for k in (5, 10, 20) if k < args.n] + [args.n]

    def passk(alpha: float) -> Tensor:
        """(seeds, problems, ks)"""
        runs = [found[alpha, 1.0, seed]["problems"] for seed in range(args.seeds)]
        return torch.tensor([[[pass_at_k(one["n"], one["c"], k) for k in ks] for one in run] for run in runs]).double()

    ahead = {alpha: passk(alpha) - passk(1.0) for alpha in alphas if alpha < 1}
    holds = closed_form.highest([closed_form.lowest(closed_form.decisions(values)) for values in ahead.values()])
    numbers = [f"alpha {alpha:g}: {closed_form.gains(values, ks, ks)}" for alpha, values in ahead.items()]
    numbers.append(f"alpha 1 has {100 * passk(1.0)[..., -1].mean():.1f}% at {ks[-1]}")
    return report.Verdict(
        9, "H-DPO Fig. 3", "alpha < 1 gives a better pass@k at temperature 1; two to four operations, sampled",
        closed_form.BETTER.format(closed_form.listed(ks)), holds, "; ".join(numbers),
    )  # fmt: skip


def draw(found: dict, exact: dict, alphas, seeds: int):
    """Each measure of diversity against alpha; pass@k against k on the toy, and on harder problems, as Fig. 3 too."""
    figure, axes = report.axes(2, 4, width=13, height=2.9)
    for axis, (name, label) in zip(axes[0], MEASURES.items()):
        for seed in range(seeds):
            values = [found[alpha, 1.0, seed]["diversity"][name] for alpha in alphas]
            axis.plot(alphas, values, "o", color=report.COLOURS["H-DPO"], alpha=0.5, markersize=4)
        means = [fmean(found[alpha, 1.0, seed]["diversity"][name] for seed in range(seeds)) for alpha in alphas]
        axis.plot(alphas, means, color=report.COLOURS["H-DPO"])
        axis.set(xlabel="$\\alpha$", ylabel=label)
    shades = report.shades(alphas)
    toy, harder, few, many = axes[1]
    base = mean_passk(found, 1.0, seeds)
    for alpha in alphas:
        values = mean_passk(found, alpha, seeds)
        gain = [100 * (values[k] - base[k]) for k in values]
        toy.plot(list(values), gain, "o-", color=shades[alpha], markersize=3, label=f"{alpha:g}")
        for heat, line in ((1.0, "-"), (alpha, ":")):  # alpha at temperature 1, DPO at the temperature alpha
            gain, _ = closed_form.effect(exact[alpha if heat == 1 else 1.0, heat] - exact[1.0, 1.0])
            harder.plot(closed_form.KS, gain, line, marker="o", color=shades[alpha], markersize=3)
        for axis, k in ((few, 10), (many, 200)):
            at = closed_form.KS.index(k)
            means = [100 * exact[alpha, heat][..., at].mean() for heat in TEMPERATURES]
            axis.plot(TEMPERATURES, means, "o-", color=shades[alpha], markersize=3)
            axis.set(xlabel="temperature", ylabel=f"pass@{k}, percent", title="harder problems")
    toy.set(xscale="log", xlabel="$k$", ylabel="pass@$k$ less $\\alpha=1$'s, points", title="the toy")
    harder.set(xscale="log", xlabel="$k$", ylabel="the same", title="harder; dotted: $\\alpha=1$ at T = $\\alpha$")
    toy.legend(title="$\\alpha$", ncols=2)
    return figure


def mean_passk(found: dict, alpha: float, seeds: int, beta: float = 1.0) -> dict[int, float]:
    """k -> mean over seeds of pass@k."""
    every = [found[alpha, beta, seed]["pass@k"] for seed in range(seeds)]
    return {int(k): fmean(one[k]["mean"] for one in every) for k in every[0]}


def main(args: Args) -> None:
    alphas = (0.9, 1.0) if args.fast else ALPHAS
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
    exact = exact_passk(alphas, args)
    cells = [(alpha, 1.0) for alpha in alphas] + [(1.0, heat) for heat in TEMPERATURES if heat != 1]
    rows = [[f"{a:g}", f"{t:g}", *(f"{100 * k:.1f}" for k in exact[a, t].mean((0, 1)))] for a, t in cells]
    text += (
        f"\n{args.harder} new problems of four operations, beta 1: exact chance in percent of a right working out "
        "among k samples.\n\n" + report.table(["alpha", "temperature", *(f"k = {k}" for k in closed_form.KS)], rows)
    )
    named = {("alpha", alpha): exact[alpha, 1.0] for alpha in alphas}
    named |= {("T", heat): exact[1.0, heat] for heat in TEMPERATURES}
    smaller = {}  # measure -> what alpha 1.2 has more than 0.8 at the smallest beta, seed by seed
    for name in MEASURES:
        less, more = (values(alpha, name, betas[-1]) for alpha in (alphas[0], alphas[-1]))
        smaller[name] = [(a - b if name == "self_bleu" else b - a) for a, b in zip(less, more)]
    statement = "Entropy, Distinct and inverted Self-BLEU rise with alpha in 0.8 ... 1.2, beta {:g}."
    verdicts = [
        report.Verdict(
            8, "H-DPO Table 2", statement.format(1), CLAIM_8,
            all(rises(name) for name in MEASURES),
            "; ".join(
                f"{label} {', '.join(f'{fmean(values(alpha, name)):.4f}' for alpha in alphas)}"
                + ("" if rises(name) else " (not monotone)")
                for name, label in MEASURES.items()
            )
            + f" for alpha {', '.join(f'{alpha:g}' for alpha in alphas)}",
        ),
        report.Verdict(
            8, "H-DPO Table 2", statement.format(betas[-1]), AT_A_SMALLER_BETA,
            report.all_hold(*map(report.above_zero, smaller.values())),
            "from alpha 0.8 to 1.2: "
            + ", ".join(
                f"{'inverted ' * (name == 'self_bleu')}{label} {fmean(smaller[name]):+.4f} "
                f"({report.error(smaller[name]):.4f})"
                for name, label in MEASURES.items()
            ),
        ),
        judge_samples(found, alphas, args),
        *closed_form.judge(named, "four operations", "toy"),
    ]  # fmt: skip
    report.save(args, "alpha_sweep", verdicts, text, draw(found, exact, alphas, args.seeds))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
