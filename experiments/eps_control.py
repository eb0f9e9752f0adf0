"""What epsilon-DPO's adaptive beta does: how often, how far, to which pairs, and whether it pays (claim 12)

    https://arxiv.org/abs/2502.13177    Fig. 3: a larger eps adapts more often and moves further in KL
                                        Fig. 4a: beta_plus falls on pairs of low confidence
                                        Fig. 4b: a better best reward than DPO's, for all its fixed beta (the paper
                                        claims a better reward at the same KL too, against TR-DPO)

    python experiments/eps_control.py        (two CPU cores, 12 minutes)

eps_dpo.py and hdpo.py --alpha 1 (DPO) on the toy, one epoch of 128 steps of 16 pairs, three seeds. Labels of real pairs
are not all right, which is what an adaptive beta is for: a quarter of the training pairs have theirs exchanged. The
reward is pass@1 on 400 unseen problems, KL is KL(pi, ref) over the whole vocabulary at the held-out responses'
positions, summed over a response. How often a pair is adapted is counted on the held-out pairs, with the policies that
eps 0.01 ends with, in two arithmetics:

    exact    eps_dpo.perturbed_logps, in float32, as in training here
    bf16     as a trainer does whose model returns bf16 logits, the authors' among them: perturbed logits, log_softmax
             and sums in bf16, as in eps_dpo.py --bf16-decisions

For small eps, R_minus - R and R - R_plus are both eps times the same derivative, so they nearly always have one sign:
in exact arithmetic almost every pair is adapted, whatever eps is. In bf16 a sum of log-probs has two to three digits,
most perturbations round to a tie, and a larger eps breaks more ties.

The derivative is the pair's margin (a - a0) - (b - b0), less KL(pi, ref) along the chosen response, plus that along the
rejected one. So a small margin means beta_plus nearly by definition; the experiment says how nearly.
"""

import json
import math
import random
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev

import report
import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(report.ROOT))

import common  # noqa: E402
import eps_dpo  # noqa: E402

EPSILONS = (0.005, 0.01, 0.02)
KINDS = ("minus", "plus")
# Fixed for DPO, the first one for eps-DPO. In pilots DPO was worse at 3 than at 1, and without 0.1 the best was at the
# edge, and eps-DPO's KL at 0.3 beyond DPO's.
BETAS = (0.1, 0.3, 1.0)
FLIPPED = 0.25  # of the training pairs
HELD_OUT = 128  # pairs

RISES = (
    "held-out pairs, policies of eps 0.01 and beta 1 at the start: the mean share of adapted pairs rises by at least "
    "0.01 from eps 0.005 to 0.01 and from there to 0.02; undecided within two standard errors over seeds"
)
FURTHER = (
    "beta 1 at the start: mean KL at the end rises from eps 0.005 to 0.01 and from there to 0.02; undecided within two "
    "standard errors over seeds"
)
CONFUSED = (
    "held-out pairs under DPO's policy (beta 1), in every seed: there are pairs of both kinds, and those that would "
    "get beta_plus have a lower mean implicit reward margin than those that would get beta_minus"
)
ERROR = "undecided within two standard errors, which are paired over problems and seeds"
BEST = f"the best pass@1 of the betas, mean over seeds, is higher for eps-DPO (eps 0.01) than for DPO; {ERROR}"
PAYS = (
    "for each beta of eps-DPO (eps 0.01) whose KL lies between those of two of DPO's: pass@1 above that of both, as a "
    f"line between two points of a bent frontier is below it; undecided where it is above one of them; {ERROR}"
)


@dataclass
class Args:
    seeds: int = 3
    """Runs of each kind"""
    problems: int = 400
    """Problems for the reward"""
    n: int = 16
    """Samples of each, from each seed's policy"""
    runs: str = "runs/eps_control"
    """Where the runs go"""
    results: str = str(report.RESULTS)
    """Where the table and the figure go"""
    fast: bool = False
    """Two steps and few pairs, to see that it runs; its verdicts mean nothing"""


def confuse(target: Path) -> Path:
    """Write the toy's training pairs with the labels of some exchanged."""
    rows = [json.loads(line) for line in (report.TOY / "train.jsonl").read_text().splitlines()]
    for i in random.Random(0).sample(range(len(rows)), round(FLIPPED * len(rows))):
        rows[i]["chosen"], rows[i]["rejected"] = rows[i]["rejected"], rows[i]["chosen"]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return target


def train(epsilon: float, beta: float, seed: int, pairs: Path, args: Args) -> Path:
    """One run, of DPO where epsilon is 0; returns its directory."""
    folder = Path(args.runs, f"eps-{epsilon:g}-beta-{beta:g}-{seed}").resolve()
    script = ("eps_dpo.py", "--epsilon", epsilon) if epsilon else ("hdpo.py", "--alpha", 1)
    report.launch(
        *script, "--beta", beta, "--model", report.TOY / "model", "--dataset", pairs, "--lr", 1e-4,
        "--batch-size", 16, "--steps", 2 if args.fast else 0, "--seed", seed, "--output-dir", folder, "--overwrite",
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


def around(kl: float, frontier: list[tuple]) -> list:
    """The rewards of the two of these (KL, reward) between which `kl` lies; empty outside."""
    frontier = sorted(frontier, key=lambda point: point[0])
    return next(([low, high] for (left, low), (right, high) in pairwise(frontier) if left <= kl <= right), [])


def above_both(differences: list[torch.Tensor]) -> bool | None:
    """Whether a reward less each of two others, (seeds, problems) each, is above 0; None where the two disagree."""
    decisions = {report.decide(float(one.mean()), paired_error(one)) for one in differences}
    return decisions.pop() if len(decisions) == 1 else None


def seed_error(values: list[float]) -> float:
    """Standard error of a mean over seeds."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def paired_error(differences: torch.Tensor) -> float:
    """Standard error of the mean of (seeds, problems): what other problems would change, and what other seeds would."""
    problems = differences.mean(0)
    return math.hypot(float(problems.std()) / len(problems) ** 0.5, seed_error(differences.mean(1).tolist()))


def rises(values: dict[float, list[float]], at_least: float = 0.0) -> bool | None:
    """Whether the smaller of the two steps between the EPSILONS, each (seeds,), is above at_least."""
    steps = [[b - a for a, b in zip(values[one], values[other])] for one, other in pairwise(EPSILONS)]
    least = min(steps, key=fmean)
    return report.decide(fmean(least), seed_error(least), at_least)


def draw(runs: dict, found: dict, kl: dict, rewards: dict, seeds: int):
    figure, ((often, path), (confused, pays)) = report.axes(2, 2, width=9, height=3)
    for kind, style in (("exact", "o-"), ("bf16", "x--")):
        shares = [fmean(abs(v) for s in range(seeds) for v in found[0.01, 1.0, s][kind, e]) for e in EPSILONS]
        often.plot(EPSILONS, shares, style, color=report.COLOURS["eps-DPO"], label=kind)
    often.set(xlabel="$\\epsilon$", ylabel="share of adapted pairs", ylim=(-0.05, 1.05))
    shades = report.shades((0, *EPSILONS))
    for epsilon in EPSILONS:
        for seed in range(seeds):
            values = [value for _, value in report.metrics(runs[epsilon, 1.0, seed], "kl")]
            means = [fmean(values[i : i + 8]) for i in range(0, len(values), 8)]
            path.plot(
                range(8, 8 * len(means) + 1, 8),
                means,
                color=shades[epsilon],
                label=None if seed else f"$\\epsilon={epsilon:g}$",
            )
    path.set(xlabel="optimizer step", ylabel="$KL(\\pi, \\pi_{ref})$, training pairs")
    for sign, label, color in ((-1, "$\\beta^-$", "#17becf"), (1, "$\\beta^+$", "#e377c2")):
        pairs = [one for s in range(seeds) for one in zip(found[0, 1.0, s]["margins"], found[0, 1.0, s]["exact", 0.01])]
        confused.hist([m for m, s in pairs if s == sign], bins=30, alpha=0.6, density=True, color=color, label=label)
    confused.set(xlabel="implicit reward margin $/\\beta$ of DPO's policy", ylabel="density")
    for method, epsilon in (("DPO", 0), ("eps-DPO", 0.01)):
        for seed in range(seeds):
            values = [(kl[epsilon, b, seed], float(rewards[epsilon, b][seed].mean())) for b in BETAS]
            pays.plot(*zip(*values), "o", color=report.COLOURS[method], alpha=0.4, markersize=4)
        means = [(fmean(kl[epsilon, b, s] for s in range(seeds)), float(rewards[epsilon, b].mean())) for b in BETAS]
        pays.plot(*zip(*means), color=report.COLOURS[method], label=method)
    pays.set(xscale="log", xlabel="$KL(\\pi, \\pi_{ref})$", ylabel="pass@1")
    for axis in (often, path, confused, pays):
        axis.legend()
    return figure


def main(args: Args) -> None:
    seeds = range(args.seeds)
    sampled = [(epsilon, beta) for beta in BETAS for epsilon in (0, 0.01)]
    keys = [(*pair, seed) for pair in sampled for seed in seeds]
    keys += [(epsilon, 1.0, seed) for epsilon in (0.005, 0.02) for seed in seeds]
    pairs = confuse(Path(args.runs, "pairs.jsonl").resolve())

    def run(key) -> tuple[Path, list[float]]:
        """The run's directory, and the share of right samples of each problem."""
        folder = train(*key, pairs, args)
        if key[:2] not in sampled:
            return folder, []
        found = report.passk(folder / "model", folder / "eval", report.TOY / "problems.jsonl", args.problems, args.n)
        return folder, [problem["c"] / problem["n"] for problem in found["problems"]]

    outcomes = dict(zip(keys, report.side_by_side([lambda key=key: run(key) for key in keys])))
    runs = {key: folder for key, (folder, _) in outcomes.items()}
    rewards = {pair: torch.tensor([outcomes[*pair, s][1] for s in seeds]) for pair in sampled}  # (seeds, problems)
    tokenizer = AutoTokenizer.from_pretrained(report.TOY / "model")
    dataset = common.load_preferences(str(report.TOY / "test.jsonl"), tokenizer, "test", 512, 256)
    dataset = dataset.select(range(8 if args.fast else HELD_OUT))
    kl = {key: divergence(runs[key], dataset) for key in keys}
    found = {key: examine(runs[key], dataset) for key in keys if key[:2] in ((0, 1.0), (0.01, 1.0))}

    kls = {pair: [kl[*pair, s] for s in seeds] for pair in [*sampled, (0.005, 1.0), (0.02, 1.0)]}
    shares = {
        kind: {e: [fmean(map(abs, found[0.01, 1.0, s][kind, e])) for s in seeds] for e in EPSILONS}
        for kind in ("exact", "bf16")
    }
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
    best = {e: max((rewards[e, b] for b in BETAS), key=torch.mean) for e in (0, 0.01)}
    gain = best[0.01] - best[0]  # (seeds, problems)
    frontier = [(fmean(kls[0, b]), rewards[0, b]) for b in BETAS]
    # beta -> pass@1 less that of DPO's two neighbours in KL, (seeds, problems) each
    same_kl = {b: [rewards[0.01, b] - one for one in around(fmean(kls[0.01, b]), frontier)] for b in BETAS}
    same_kl = {b: both for b, both in same_kl.items() if both}

    text = (
        f"Share of adapted held-out pairs ({len(dataset)}), policies of eps 0.01, beta 1; mean over seeds (range).\n\n"
        + report.table(
            ["arithmetic", *(f"eps {e:g}" for e in EPSILONS)],
            [[kind, *map(report.spread, own.values())] for kind, own in shares.items()],
        )
    )
    text += "\nAt the end of training, beta 1 at the start.\n\n" + report.table(
        ["eps", "KL(pi, ref)", "beta", "adapted in training"],
        [["0 (DPO)", report.spread(kls[0, 1.0]), "1", ""]]
        + [[f"{e:g}", *map(report.spread, (kls[e, 1.0], ends[e], logged[e]))] for e in EPSILONS],
    )

    def pass1(epsilon: float, beta: float) -> str:
        return report.spread(rewards[epsilon, beta].mean(1).tolist())

    text += "\nReward and KL for each beta (eps-DPO: at the start, eps 0.01).\n\n" + report.table(
        ["beta", "DPO: KL", "DPO: pass@1", "eps-DPO: KL", "eps-DPO: pass@1"],
        [[f"{b:g}", report.spread(kls[0, b]), pass1(0, b), report.spread(kls[0.01, b]), pass1(0.01, b)] for b in BETAS],
    )

    def compared(difference: torch.Tensor) -> str:
        return f"{float(difference.mean()):+.4f} (standard error {paired_error(difference):.4f})"

    def often(kind: str) -> str:
        return "held-out pairs " + ", ".join(map(report.spread, shares[kind].values()))

    fig3, fig4b = "eps-DPO Fig. 3", "eps-DPO Fig. 4b"
    verdicts = [
        report.Verdict(
            12, fig3, "A larger eps adapts more often: in bf16, as the authors' code.", RISES,
            rises(shares["bf16"], 0.01), often("bf16"),
        ),
        report.Verdict(
            12, fig3, "A larger eps adapts more often: in exact arithmetic.", RISES,
            rises(shares["exact"], 0.01),
            often("exact") + "; in training " + ", ".join(map(report.spread, logged.values())),
        ),
        report.Verdict(
            12, fig3, "A larger eps moves further in KL.", FURTHER, rises({e: kls[e, 1.0] for e in EPSILONS}),
            "KL " + ", ".join(report.spread(kls[e, 1.0]) for e in EPSILONS),
        ),
        report.Verdict(
            12, "eps-DPO Fig. 4a", "beta_plus falls on confused pairs (nearly by definition).", CONFUSED,
            both and all(plus < minus for plus, minus in zip(means[1], means[-1])),
            "; ".join(
                f"beta_{kind} {sum(map(len, margins[sign]))} pairs"
                + (f", mean margin {report.spread(means[sign], 2)}" if means[sign] else "")
                for sign, kind in ((1, "plus"), (-1, "minus"))
            ),
        ),
        report.Verdict(
            12, fig4b, "A better best reward than a fixed beta.", BEST,
            report.decide(float(gain.mean()), paired_error(gain)),
            f"pass@1 for beta {', '.join(f'{b:g}' for b in BETAS)}: eps-DPO "
            + ", ".join(f"{float(rewards[0.01, b].mean()):.3f}" for b in BETAS)
            + "; DPO " + ", ".join(f"{float(rewards[0, b].mean()):.3f}" for b in BETAS)
            + f"; best against best {compared(gain)}",
        ),
        report.Verdict(
            12, fig4b, "A better reward for the same KL than a fixed beta.", PAYS,
            report.all_hold(*map(above_both, same_kl.values())) if same_kl else None,
            "; ".join(f"beta {b:g}: {' and '.join(map(compared, both))}" for b, both in same_kl.items())
            or "no KL in DPO's range",
        ),
    ]  # fmt: skip
    report.save(args, "eps_control", verdicts, text, draw(runs, found, kl, rewards, args.seeds))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
