"""Do the losses end where the papers' closed forms say? Tables of a few outcomes, trained to convergence.

    python experiments/tabular.py        (one CPU core, about 10 seconds)

A policy is a softmax over the logits of a few outcomes. It is trained with hdpo.hdpo_loss and dpl.dpl_loss, in float64,
on the exact expectation over a population of raters, so that nothing is sampled and nothing is left to fit but the
loss. H-DPO (https://arxiv.org/abs/2411.07595) and DPL (https://arxiv.org/abs/2511.08594) say where it has to end:

    raters prefer i to j with probability s(r_i - r_j):  pi(y) ~ ref(y)^(1/alpha) exp(r(y) / (alpha beta))     (Eq. 11)
    a share p of the raters prefers y to the other:      DPO: pi(y) ~ ref(y) p^(1/beta)                     (Prop. 3.1)
                                                         DPL: pi(y) ~ ref(y)^(beta/alpha) p^(1/alpha)       (Prop. 3.2)
    every rater ranks all outcomes (Plackett-Luce):      pi(y) ~ ref(y)^(beta/alpha) p_best(y)^(1/alpha)    (Prop. A.1)
    alpha = 1, flat reference:                           pi(y) = p, or p_best(y)                            (Cor. 3.1)

s is the logistic function, p_best(y) the share of the raters whose favourite is y. alpha of Eq. 11 is H-DPO's, which is
alpha/beta in the lines below it.
"""

import itertools
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import report
import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import dpl  # noqa: E402
import hdpo  # noqa: E402

Verdict = partial(report.Verdict, where="exact")

# Thresholds
PROBABILITY = 1e-6  # largest |pi(y) - closed form|, over all outcomes and settings
MAJORITY = "99.9999%"  # what Prop. 3.1's example makes of 80%, and
MINORITY = 0.01  # relative error of the others' 0.0001%, which a difference of probabilities would not see

HDPO_ALPHAS = (0.5, 0.8, 1.0, 1.2, 2.0)
BETAS = (0.1, 1.0)  # the papers' 0.1, and no temperature at all
RATIOS = (1.0, 1.2, 2.0, 4.0, 10.0)  # DPL's alpha/beta; 10 is alpha = 1 where beta is 0.1
PRIORS = (0.5, 0.1)  # reference's probability of y, where there are two outcomes
SEEDS = (0, 1, 2)


@dataclass
class Args:
    results: str = str(report.RESULTS)
    """Where the tables and the figure go"""
    fast: bool = False
    """Fewer settings, for tests"""


def train(loss, population: Tensor, log_ref: Tensor) -> Tensor:
    """Log-probs (outcomes,) of the policy that minimises sum_ij population_ij loss(i preferred to j).

    population  (outcomes, outcomes), share of the raters who prefer i to j
    """
    i, j = torch.cartesian_prod(torch.arange(len(log_ref)), torch.arange(len(log_ref))).T  # (outcomes^2,) both
    logits = log_ref.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=2000, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def expected_loss():
        optimizer.zero_grad()
        log_pi = logits.log_softmax(0)
        total = (population[i, j] * loss(log_pi[i], log_pi[j], log_ref[i], log_ref[j])).sum()
        total.backward()
        return total

    optimizer.step(expected_loss)
    return logits.detach().log_softmax(0)


def train_hdpo(population: Tensor, log_ref: Tensor, alpha: float, beta: float) -> Tensor:
    return train(lambda *logps: hdpo.hdpo_loss(*logps, alpha, beta), population, log_ref)


def train_dpl(population: Tensor, log_ref: Tensor, alpha: float, beta: float) -> Tensor:
    return train(lambda *logps: dpl.dpl_loss(*logps, alpha, beta), population, log_ref)


def bradley_terry(reward: Tensor) -> Tensor:
    """(outcomes, outcomes): share of the raters who prefer i to j; an outcome is not compared with itself."""
    return torch.sigmoid(reward[:, None] - reward).fill_diagonal_(0)


def two_outcomes(share: float) -> Tensor:
    return torch.tensor([[0, share], [1 - share, 0]], dtype=torch.float64)


def plackett_luce(reward: Tensor) -> tuple[Tensor, Tensor]:
    """Raters draw a ranking from best to worst, each next outcome with probability ~ exp(reward) of those left.

    Returns the shares who rank i above j, (outcomes, outcomes), and p_best (outcomes,), counted over all rankings.
    """
    above, best = torch.zeros(len(reward), len(reward)).double(), torch.zeros(len(reward)).double()
    for ranking in itertools.permutations(range(len(reward))):
        share = torch.stack([reward[list(ranking[k:])].softmax(0)[0] for k in range(len(ranking))]).prod()
        best[ranking[0]] += share
        for i, j in itertools.combinations(ranking, 2):
            above[i, j] += share
    return above, best


def optimum(log_ref: Tensor, preference: Tensor, alpha: float, beta: float) -> Tensor:
    """Log-probs (outcomes,) of ref^(beta/alpha) preference^(1/alpha), normalised; `preference` as a logarithm."""
    return (beta / alpha * log_ref + preference / alpha).log_softmax(0)


def random_logits(outcomes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two draws of standard normals: rewards, and the reference's logits."""
    return torch.randn(2, outcomes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).unbind()


def error(got: Tensor, expected: Tensor) -> float:
    """Largest difference in probability between two policies given as log-probs."""
    return (got.exp() - expected.exp()).abs().max().item()


def eq_11(seeds, outcomes: int) -> list[float]:
    errors = []
    for seed, alpha, beta in itertools.product(seeds, HDPO_ALPHAS, BETAS):
        reward, logits = random_logits(outcomes, seed)
        log_ref = logits.log_softmax(0)
        # Eq. 11's exponents are 1/alpha and 1/(alpha beta): optimum's with alpha * beta and beta.
        expected = optimum(log_ref, reward, alpha * beta, beta)
        errors.append(error(train_hdpo(bradley_terry(reward), log_ref, alpha, beta), expected))
    return errors


def prop_3_1() -> list[Tensor]:
    """80% of the raters prefer y, beta 0.1, flat reference; by DPO as both scripts have it: two policies (2,)."""
    log_ref = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    return [train_hdpo(two_outcomes(0.8), log_ref, 1.0, 0.1), train_dpl(two_outcomes(0.8), log_ref, 0.1, 0.1)]


def prop_3_2(shares) -> list[float]:
    errors = []
    for share, prior, ratio, beta in itertools.product(shares, PRIORS, RATIOS, BETAS):
        log_ref, log_p = (torch.tensor([x, 1 - x], dtype=torch.float64).log() for x in (prior, share))
        got = train_dpl(two_outcomes(share), log_ref, ratio * beta, beta)
        errors.append(error(got, optimum(log_ref, log_p, ratio * beta, beta)))
    return errors


def prop_a_1(seeds, outcomes: int) -> list[float]:
    errors = []
    for seed in seeds:
        reward, logits = random_logits(outcomes, seed)
        above, best = plackett_luce(reward)
        log_ref = logits.log_softmax(0)
        for ratio, beta in itertools.product(RATIOS, BETAS):
            got = train_dpl(above, log_ref, ratio * beta, beta)
            errors.append(error(got, optimum(log_ref, best.log(), ratio * beta, beta)))
    return errors


def cor_3_1(shares, seeds, outcomes: int) -> list[float]:
    """alpha = 1 and a flat reference: the policy minus the population's preferences themselves."""
    errors = []
    for beta in BETAS:
        flat = torch.zeros(2, dtype=torch.float64).log_softmax(0)
        for share in shares:
            log_p = torch.tensor([share, 1 - share], dtype=torch.float64).log()
            errors.append(error(train_dpl(two_outcomes(share), flat, 1.0, beta), log_p))
        flat = torch.zeros(outcomes, dtype=torch.float64).log_softmax(0)
        for seed in seeds:
            above, best = plackett_luce(random_logits(outcomes, seed)[0])
            errors.append(error(train_dpl(above, flat, 1.0, beta), best.log()))
    return errors


def draw(shares, outcomes: int, beta: float = 0.1):
    """Two outcomes, several outcomes, and Eq. 11: trained policies as markers, closed forms as lines."""
    figure, ((left, middle, right),) = report.axes(columns=3, width=11, height=4.2)

    colours = report.shades(RATIOS[1:])
    fine = torch.linspace(0.001, 0.999, 500, dtype=torch.float64)
    flat = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    left.plot([0, 1], [0, 1], color="black", linestyle=":", label="proportional")
    for ratio in RATIOS:
        alpha = ratio * beta
        colour = report.COLOURS["DPO"] if ratio == 1 else colours[ratio]
        label = "DPO" if ratio == 1 else "DPL, alpha 1" if alpha == 1 else f"DPL, alpha/beta {ratio:g}"
        closed = torch.sigmoid((fine.log() - (1 - fine).log()) / alpha)
        trained = [train_dpl(two_outcomes(share), flat, alpha, beta)[0].exp().item() for share in shares]
        left.plot(fine, closed, color=colour)
        left.plot(shares, trained, "o", color=colour, markersize=4, label=label)
    left.set(xlabel="share p of the raters who prefer y", ylabel="pi(y)", title=f"Prop. 3.2, flat ref, beta {beta}")

    above, best = plackett_luce(random_logits(outcomes, seed=0)[0])
    order = best.argsort(descending=True)
    flat = torch.zeros(outcomes, dtype=torch.float64).log_softmax(0)
    bars = {
        "raters' favourites": (best, "black"),
        "DPL, alpha 1": (train_dpl(above, flat, 1.0, beta).exp(), colours[RATIOS[-1]]),
        "DPL, alpha/beta 4": (train_dpl(above, flat, 4 * beta, beta).exp(), colours[4.0]),
        "DPO": (train_dpl(above, flat, beta, beta).exp(), report.COLOURS["DPO"]),
    }
    for k, (label, (values, colour)) in enumerate(bars.items()):
        middle.bar(torch.arange(outcomes) + (k - 1.5) * 0.2, values[order], 0.2, color=colour, label=label)
    middle.set(xlabel="outcome", ylabel="probability", title=f"Prop. A.1, flat ref, beta {beta}")
    middle.set_xticks(range(outcomes))

    reward, logits = random_logits(outcomes, seed=0)
    log_ref = logits.log_softmax(0)
    order = (log_ref + reward).argsort(descending=True)
    right.plot(log_ref.exp()[order], color=report.COLOURS["reference"], linestyle="--", label="reference")
    colours = report.shades(HDPO_ALPHAS)
    for alpha in HDPO_ALPHAS:
        colour = report.COLOURS["DPO"] if alpha == 1 else colours[alpha]
        right.plot(optimum(log_ref, reward, alpha, 1.0).exp()[order], color=colour)
        trained = train_hdpo(bradley_terry(reward), log_ref, alpha, 1.0).exp()[order]
        label = "alpha 1: DPO" if alpha == 1 else f"alpha {alpha:g}"
        right.plot(trained, "o", color=colour, markersize=4, label=label)
    right.set(xlabel="outcome", ylabel="probability", title="H-DPO Eq. 11, beta 1")
    right.set_xticks(range(outcomes))
    for panel in (left, middle, right):
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    return figure


def main(args: Args) -> None:
    seeds, outcomes = (SEEDS[:1], 4) if args.fast else (SEEDS, 5)
    shares = (0.2, 0.8) if args.fast else tuple(k / 20 for k in range(1, 20))

    errors = {
        "H-DPO Eq. 11": eq_11(seeds, outcomes),
        "DPL Prop. 3.2": prop_3_2(shares),
        "DPL Prop. A.1": prop_a_1(seeds, outcomes),
        "DPL Cor. 3.1": cor_3_1(shares, seeds, outcomes),
    }
    expected = torch.tensor([1.0, 4**-10], dtype=torch.float64).log().log_softmax(0)  # 0.8^10 to 0.2^10
    policies = prop_3_1()
    errors["DPL Prop. 3.1"] = [error(policy, expected) for policy in policies]
    majorities = [f"{policy[0].exp():.4%}" for policy in policies]
    minority = max(((policy[1] - expected[1]).exp() - 1).abs().item() for policy in policies)

    within = {name: max(values) < PROBABILITY for name, values in errors.items()}
    threshold = f"largest |difference in probability| to the closed form < {PROBABILITY:g}"

    def numbers(name: str) -> str:
        return f"largest difference {max(errors[name]):.1e} over {len(errors[name])} trained policies"

    verdicts = [
        Verdict(3, "H-DPO Eq. 11", "H-DPO's optimum is pi ~ ref^(1/alpha) exp(r / (alpha beta))", threshold,
                within["H-DPO Eq. 11"], numbers("H-DPO Eq. 11")),
        Verdict(3, "DPL Prop. 3.1", "DPO with beta 0.1 turns a majority of 80% into 99.9999%",
                f"shows as {MAJORITY}; the minority's probability to {MINORITY:.0%} of itself; {threshold}",
                within["DPL Prop. 3.1"] and set(majorities) == {MAJORITY} and minority < MINORITY,
                f"{' and '.join(majorities)} (hdpo.py with alpha 1, dpl.py with alpha = beta); minority off by "
                f"{minority:.1e} of itself; {numbers('DPL Prop. 3.1')}"),
        Verdict(3, "DPL Prop. 3.2", "two outcomes: DPL's optimum is pi ~ ref^(beta/alpha) p^(1/alpha)", threshold,
                within["DPL Prop. 3.2"], numbers("DPL Prop. 3.2")),
        Verdict(3, "DPL Prop. A.1", "several outcomes: DPL's optimum is pi ~ ref^(beta/alpha) p_best^(1/alpha)",
                threshold, within["DPL Prop. A.1"], numbers("DPL Prop. A.1")),
        Verdict(4, "DPL Cor. 3.1", "with alpha = 1 the policy's probabilities equal the population's preferences",
                f"flat reference, largest |pi(y) - share of the raters| < {PROBABILITY:g}",
                within["DPL Cor. 3.1"], numbers("DPL Cor. 3.1")),
    ]  # fmt: skip

    settings = {
        "H-DPO Eq. 11": f"{outcomes} outcomes, random rewards and reference, alpha {HDPO_ALPHAS}, beta {BETAS}, "
        f"{len(seeds)} seeds",
        "DPL Prop. 3.1": "80% of the raters, beta 0.1, flat reference, both scripts",
        "DPL Prop. 3.2": f"{len(shares)} shares from {shares[0]} to {shares[-1]}, ref(y) {PRIORS}, alpha/beta "
        f"{RATIOS}, beta {BETAS}",
        "DPL Prop. A.1": f"{outcomes} outcomes, random rewards and reference, alpha/beta {RATIOS}, beta {BETAS}, "
        f"{len(seeds)} seeds",
        "DPL Cor. 3.1": f"alpha 1, beta {BETAS}, flat reference; two outcomes with the shares above, {outcomes} with "
        f"{len(seeds)} seeds",
    }
    rows = [(name, text, len(errors[name]), f"{max(errors[name]):.1e}") for name, text in settings.items()]
    header = ("closed form", "settings", "trained policies", "largest difference in probability")
    text = report.table(header, rows) + "\nIn the figure, dots are trained policies and lines are closed forms.\n"
    report.save(args, "tabular", verdicts, text, draw(shares, outcomes))


if __name__ == "__main__":
    main(tyro.cli(Args))
