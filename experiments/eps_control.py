"""What epsilon-DPO's adaptive beta does: how often, how far, to which pairs, and whether it pays (claim 12)

    https://arxiv.org/abs/2502.13177    Fig. 3: a larger eps adapts more often and moves further in KL
                                        Fig. 4a: beta_plus falls on pairs of low confidence
                                        Fig. 4b: a better best reward than DPO's, for all its fixed beta (the paper
                                        claims a better reward at the same KL too, against TR-DPO)

    python experiments/eps_control.py        (two CPU cores, about ten minutes)

eps_dpo.py and hdpo.py --alpha 1 (DPO) on the toy, one epoch of 128 steps of 16 pairs, three seeds. The reward is pass@1
on unseen problems, KL is KL(pi, ref) over the whole vocabulary at the held-out responses' positions, summed over a
response. The share of adapted pairs is logged in training. Why it does not grow with eps is shown on the held-out pairs
and the policies that eps 0.01 ends with, in two arithmetics:

    exact    eps_dpo.perturbed_logps, in float32
    bf16     as a trainer does whose model returns bf16 logits: perturbed logits, log_softmax and sums in bf16, as in
             eps_dpo.py --bf16-decisions

For small eps, R_minus - R and R - R_plus are both eps times the same derivative, so they nearly always have one sign:
in exact arithmetic almost every pair is adapted, whatever eps is. In bf16 a sum of log-probs has two to three digits,
most perturbations round to a tie, and a larger eps breaks more ties.

The derivative is the pair's margin (a - a0) - (b - b0), less KL(pi, ref) along the chosen response, plus that along the
rejected one. So a small margin means beta_plus nearly by definition; the experiment says how nearly.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import report
import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(report.ROOT))

import common  # noqa: E402
import eps_dpo  # noqa: E402

EPSILONS = (0.005, 0.01, 0.02)
KINDS = ("minus", "plus")
BETAS = (0.3, 1.0, 3.0)  # fixed for DPO, the first one for eps-DPO

OFTEN = (
    "mean over seeds: the share of pairs adapted in training, beta 1 at the start, rises from eps 0.005 to 0.01 to 0.02"
)
FURTHER = "mean over seeds, beta 1 at the start: KL at the end rises from eps 0.005 to 0.01 to 0.02"
CONFUSED = (
    "held-out pairs under DPO's policy (beta 1), in every seed: there are pairs of both kinds, and those that would "
    "get beta_plus have a lower mean implicit reward margin than those that would get beta_minus"
)
BEST = "mean over seeds: the best pass@1 of the three betas is higher for eps-DPO (eps 0.01) than for DPO"
PAYS = (
    "mean over seeds, for every beta whose KL lies within DPO's range: pass@1 of eps-DPO (eps 0.01) above DPO's at the "
    "same KL, the latter interpolated in log KL between its betas"
)


@dataclass
class Args:
    seeds: int = 3
    """Runs of each kind"""
    problems: int = 100
    """Problems for the reward"""
    n: int = 8
    """Samples of each"""
    runs: str = "runs/eps_control"
    """Where the runs go"""
    results: str = str(report.RESULTS)
    """Where the table and the figure go"""
    fast: bool = False
    """Two steps and few pairs, to see that it runs; its verdicts mean nothing"""


def train(epsilon: float, beta: float, seed: int, held_out: Path, args: Args) -> Path:
    """One run, of DPO where epsilon is 0; returns its directory."""
    folder = Path(args.runs, f"eps-{epsilon:g}-beta-{beta:g}-{seed}").resolve()
    script = ("eps_dpo.py", "--epsilon", epsilon) if epsilon else ("hdpo.py", "--alpha", 1)
    report.launch(
        *script, "--beta", beta, "--model", report.TOY / "model", "--dataset", report.TOY / "train.jsonl",
        "--eval-dataset", held_out, "--lr", 1e-4, "--batch-size", 16, "--eval-every", 32,
        "--steps", 2 if args.fast else 0, "--seed", seed, "--output-dir", folder, "--overwrite",
    )  # fmt: skip
    return folder


def bf16_logratios(logits, targets, batch):
    """log pi(y_w|x) - log pi(y_l|x), with log_softmax, token log-probs and their sums in bf16."""
    logps = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    sums = [logps[batch.response == i].sum() for i in range(2)]
    return sums[0] - sums[1]


def load(folder: Path):
    """The run's policy, and the reference."""
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (folder / "model", report.TOY / "model")]
    for model in models:
        model.set_attn_implementation(common.ATTENTION)
    return models


@torch.no_grad()
def divergence(folder: Path, dataset) -> float:
    """Mean KL(pi, ref) of a held-out response."""
    models, total = load(folder), 0.0
    for first in range(0, len(dataset), 16):
        batch = common.collate([dataset[i] for i in range(first, min(first + 16, len(dataset)))])
        f, f0 = (common.response_logits(model, batch) for model in models)  # (targets, vocab)
        total += float(eps_dpo.perturbed_logps(f, f0, batch.targets, 0.01)[3].sum())
    return total / (2 * len(dataset))


@torch.no_grad()
def examine(folder: Path, dataset) -> dict:
    """What the run's policy makes of each held-out pair.

    "margins": (a - b) - (a0 - b0); ("exact" or "bf16", epsilon): -1, 0 or 1, as it would get beta_minus, beta or
    beta_plus.
    """
    policy, reference = load(folder)
    found = {"margins": []} | {(kind, epsilon): [] for kind in ("exact", "bf16") for epsilon in EPSILONS}
    for row in dataset:
        batch = common.collate([row])
        f, f0 = (common.response_logits(model, batch) for model in (policy, reference))  # (targets, vocab)
        a, b = common.sum_responses(common.token_logps(f, batch.targets), batch)
        h, h0 = f.bfloat16(), f0.bfloat16()
        r = bf16_logratios(h, batch.targets, batch)
        for epsilon in EPSILONS:
            minus, plus, ref_logps, _ = eps_dpo.perturbed_logps(f, f0, batch.targets, epsilon)
            (minus_w, minus_l), (plus_w, plus_l) = (common.sum_responses(v, batch) for v in (minus, plus))
            beta = eps_dpo.adaptive_beta(torch.zeros(1), minus_w - minus_l, plus_w - plus_l, 1.0, epsilon)
            found["exact", epsilon].append(float(torch.sign(beta - 1)))
            r_minus = bf16_logratios((1 + epsilon) * h - epsilon * h0, batch.targets, batch)
            r_plus = bf16_logratios((1 - epsilon) * h + epsilon * h0, batch.targets, batch)
            found["bf16", epsilon].append(float(r_minus < r < r_plus) - float(r_minus > r > r_plus))
        a0, b0 = common.sum_responses(ref_logps, batch)
        found["margins"].append(float((a - b) - (a0 - b0)))
    return found


def at_kl(kl: float, frontier: list[tuple[float, float]]) -> float | None:
    """The reward at `kl` on the lines through (log KL, reward) points, as the figure draws them; None outside."""
    frontier = sorted(frontier)
    for (left, low), (right, high) in zip(frontier, frontier[1:]):
        if left <= kl <= right:
            return low + (high - low) * math.log(kl / left) / math.log(right / left)
    return None


def draw(runs: dict, found: dict, kl: dict, points: dict, seeds: int):
    figure, ((often, path), (confused, pays)) = report.axes(2, 2, width=9, height=3)
    for kind, style in (("exact", "o-"), ("bf16", "x--")):
        shares = [fmean(abs(v) for s in range(seeds) for v in found[0.01, 1.0, s][kind, e]) for e in EPSILONS]
        often.plot(EPSILONS, shares, style, color=report.COLOURS["eps-DPO"], label=kind)
    often.set(xlabel="$\\epsilon$", ylabel="share of adapted pairs", ylim=(-0.05, 1.05))
    shades = report.shades((0, *EPSILONS))
    for epsilon in EPSILONS:
        for seed in range(seeds):
            steps, values = zip(*report.metrics(runs[epsilon, 1.0, seed], "eval/kl"))
            path.plot(steps, values, color=shades[epsilon], label=None if seed else f"$\\epsilon={epsilon:g}$")
    path.set(xlabel="optimizer step", ylabel="$KL(\\pi, \\pi_{ref})$")
    for sign, label, color in ((-1, "$\\beta^-$", "#17becf"), (1, "$\\beta^+$", "#e377c2")):
        pairs = [one for s in range(seeds) for one in zip(found[0, 1.0, s]["margins"], found[0, 1.0, s]["exact", 0.01])]
        confused.hist([m for m, s in pairs if s == sign], bins=30, alpha=0.6, density=True, color=color, label=label)
    confused.set(xlabel="implicit reward margin $/\\beta$ of DPO's policy", ylabel="density")
    for method, epsilon in (("DPO", 0), ("eps-DPO", 0.01)):
        for seed in range(seeds):
            values = [(kl[epsilon, b, seed], points[epsilon, b, seed]) for b in BETAS]
            pays.plot(*zip(*values), "o", color=report.COLOURS[method], alpha=0.4, markersize=4)
        means = mean_points(kl, points, epsilon, seeds)
        pays.plot(*zip(*means), color=report.COLOURS[method], label=method)
    pays.set(xscale="log", xlabel="$KL(\\pi, \\pi_{ref})$", ylabel="pass@1")
    for axis in (often, path, confused, pays):
        axis.legend()
    return figure


def mean_points(kl: dict, points: dict, epsilon: float, seeds: int) -> list[tuple[float, float]]:
    """(KL, pass@1) of each beta, means over seeds."""
    every = range(seeds)
    return [(fmean(kl[epsilon, b, s] for s in every), fmean(points[epsilon, b, s] for s in every)) for b in BETAS]


def main(args: Args) -> None:
    keys = [(epsilon, beta, seed) for beta in BETAS for epsilon in (0, 0.01) for seed in range(args.seeds)]
    keys += [(epsilon, 1.0, seed) for epsilon in (0.005, 0.02) for seed in range(args.seeds)]

    held_out = report.TOY / "test.jsonl"
    if args.fast:
        few, held_out = held_out.read_text().splitlines()[:8], Path(args.runs, "few.jsonl").resolve()
        held_out.parent.mkdir(parents=True, exist_ok=True)
        held_out.write_text("\n".join(few))

    def reward(folder: Path) -> float:
        one = report.passk(folder / "model", folder / "eval", report.TOY / "problems.jsonl", args.problems, args.n)
        return one["pass@k"]["1"]["mean"]

    def run(key):
        folder = train(*key, held_out, args)
        return folder, reward(folder)

    outcomes = dict(zip(keys, report.side_by_side([lambda key=key: run(key) for key in keys])))
    runs, points = ({key: outcome[i] for key, outcome in outcomes.items()} for i in range(2))
    tokenizer = AutoTokenizer.from_pretrained(report.TOY / "model")
    dataset = common.load_preferences(str(held_out), tokenizer, "test", 512, 256)
    kl = {key: divergence(runs[key], dataset) for key in keys}
    found = {key: examine(runs[key], dataset) for key in keys if key[:2] in ((0, 1.0), (0.01, 1.0))}

    seeds = range(args.seeds)
    shares = {
        (kind, e): [fmean(map(abs, found[0.01, 1.0, s][kind, e])) for s in seeds]
        for kind in ("exact", "bf16")
        for e in EPSILONS
    }
    kls = {e: [kl[e, 1.0, s] for s in seeds] for e in EPSILONS}
    margins = {
        sign: [
            [m for m, own in zip(found[0, 1.0, s]["margins"], found[0, 1.0, s]["exact", 0.01]) if own == sign]
            for s in seeds
        ]
        for sign in (-1, 1)
    }
    both = all(margins[-1]) and all(margins[1])
    means = {sign: [fmean(one) for one in margins[sign] if one] for sign in (-1, 1)}
    logged = {
        e: [
            fmean(m + p for (_, m), (_, p) in zip(*(report.metrics(runs[e, 1.0, s], f"share/beta_{k}") for k in KINDS)))
            for s in seeds
        ]
        for e in EPSILONS
    }
    ends = {e: [report.metrics(runs[e, 1.0, s], "beta")[-1][1] for s in seeds] for e in EPSILONS}
    frontier = mean_points(kl, points, 0, args.seeds)
    compared = []
    for beta, (own_kl, own) in zip(BETAS, mean_points(kl, points, 0.01, args.seeds)):
        compared.append((beta, own_kl, own, at_kl(own_kl, frontier)))
    ours, dpos = ([reward for _, reward in mean_points(kl, points, e, args.seeds)] for e in (0.01, 0))
    inside = [one for one in compared if one[3] is not None]

    def rising(values: dict) -> bool:
        means = [fmean(values[e]) for e in EPSILONS]
        return means[0] < means[1] < means[2]

    text = (
        "Share of adapted held-out pairs, policies of eps 0.01 and beta 1; mean over seeds (range).\n\n"
        + report.table(
            ["arithmetic", *(f"eps {e:g}" for e in EPSILONS)],
            [[kind, *(report.spread(shares[kind, e]) for e in EPSILONS)] for kind in ("exact", "bf16")],
        )
    )
    rewards = {e: report.spread([points[e, 1.0, s] for s in seeds]) for e in (0, *EPSILONS)}
    text += "\nAt the end of training, beta 1 at the start.\n\n" + report.table(
        ["eps", "KL(pi, ref)", "beta", "pass@1", "adapted in training"],
        [
            ["0 (DPO)", report.spread([kl[0, 1.0, s] for s in seeds]), "1", rewards[0], ""],
            *(
                [f"{e:g}", report.spread(kls[e]), report.spread(ends[e]), rewards[e], report.spread(logged[e])]
                for e in EPSILONS
            ),
        ],
    )
    text += "\nReward and KL for each beta (eps-DPO: at the start, eps 0.01).\n\n" + report.table(
        ["beta", "DPO: KL", "DPO: pass@1", "eps-DPO: KL", "eps-DPO: pass@1", "DPO at eps-DPO's KL"],
        [
            [
                f"{beta:g}",
                report.spread([kl[0, beta, s] for s in seeds]),
                report.spread([points[0, beta, s] for s in seeds]),
                report.spread([kl[0.01, beta, s] for s in seeds]),
                report.spread([points[0.01, beta, s] for s in seeds]),
                "outside" if dpo is None else f"{dpo:.3f}",
            ]
            for beta, _, _, dpo in compared
        ],
    )
    paper = "eps-DPO Fig. 3"
    verdicts = [
        report.Verdict(
            12, paper, "A larger eps adapts more often.", OFTEN, rising(logged),
            ", ".join(report.spread(logged[e]) for e in EPSILONS) + " of the pairs in training; at its end on held-out "
            "pairs, log-probs in float32 " + ", ".join(f"{fmean(shares['exact', e]):.3f}" for e in EPSILONS)
            + ", in bf16 " + ", ".join(f"{fmean(shares['bf16', e]):.3f}" for e in EPSILONS)
            + rising({e: shares["bf16", e] for e in EPSILONS})
            * ", where ties break as eps grows: the paper's figure is consistent with bf16 arithmetic",
        ),
        report.Verdict(
            12, paper, "A larger eps moves further in KL.", FURTHER, rising(kls),
            "KL " + ", ".join(report.spread(kls[e]) for e in EPSILONS),
        ),
        report.Verdict(
            12, "eps-DPO Fig. 4a", "beta_plus falls on confused pairs.", CONFUSED,
            both and all(plus < minus for plus, minus in zip(means[1], means[-1])),
            "; ".join(
                f"beta_{kind} {sum(map(len, margins[sign]))} pairs"
                + (f", mean margin {report.spread(means[sign], 2)}" if means[sign] else "")
                for sign, kind in ((1, "plus"), (-1, "minus"))
            ),
        ),
        report.Verdict(
            12, "eps-DPO Fig. 4b", "A better best reward than a fixed beta.", BEST, max(ours) > max(dpos),
            f"pass@1 for beta {', '.join(f'{b:g}' for b in BETAS)}: eps-DPO {', '.join(f'{r:.3f}' for r in ours)}; "
            f"DPO {', '.join(f'{r:.3f}' for r in dpos)}",
        ),
        report.Verdict(
            12, "eps-DPO Fig. 4b", "A better reward for the same KL than a fixed beta.", PAYS,
            bool(inside) and all(own > dpo for _, _, own, dpo in inside),
            "; ".join(f"beta {beta:g} (KL {kl:.3f}): {own:.3f} against {dpo:.3f}" for beta, kl, own, dpo in inside)
            or "no KL in DPO's range",
        ),
    ]  # fmt: skip
    report.save(args, "eps_control", verdicts, text, draw(runs, found, kl, points, args.seeds))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
