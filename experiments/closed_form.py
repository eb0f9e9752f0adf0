"""alpha below 1 and alpha/beta above 1, where all of it can be computed (claims 9 and 10)

    https://arxiv.org/abs/2411.07595    H-DPO  Fig. 3: alpha < 1 gives a better pass@k       Sec. 5.4: where it does
                                               App. A.2: a smaller beta is no substitute
    https://arxiv.org/abs/2511.08594    DPL    Sec. 3.1, Fig. 3: alpha/beta > 1 wins at many samples on hard problems

    python experiments/closed_form.py        (one CPU core, about 30 seconds)

The two papers want opposite things of one parameter: H-DPO's alpha is DPL's alpha/beta. Here are two small worlds, each
with the mechanism that its paper describes:

Chains. A response is five steps of four results each, and it is right where all five are (one answer, reached by
precise reasoning). The reference slips at each step, more on some problems; the reward is 1 for a right response, plus
noise of standard deviation 1 on every response, right or wrong. The policies are H-DPO's optimum at beta 1 (Eq. 11)

    pi(y) ~ ref(y)^(1/alpha) exp(r(y) / (alpha beta))

over all 1,024 responses of a problem, which tabular.py shows to be where hdpo.hdpo_loss ends. DPO (alpha 1) is also
sampled at token temperature T: each step's conditional probabilities to the power 1/T, normalised. Two references, one
that DPO brings to about a quarter with one sample and one to about a twentieth, as in Tables 1 and 3.

Strategies. Problems look alike, so a policy chooses among eight strategies without seeing which a problem needs. Each
needs one of them, in the shares in which the raters prefer it (p_best), which then succeeds with a chance from 1% to
100%, log-uniform. The policies minimise dpl.dpl_loss on those raters (tabular.py) at the paper's beta 0.1; rewards and
reference are random for each population. Hard is what the reference needs more than 64 samples for (4.2).
"""

import itertools
import sys
from dataclasses import dataclass
from functools import partial

import report
import tabular
import torch
import tyro
from torch import Tensor

STEPS, RESULTS = 5, 4
BASES = {
    "a stronger base": 2.2,
    "a weaker base": 0.6,
}  # mean logit of the right result; a pilot with DPO alone chose them
ALPHAS = (0.8, 0.9, 1.0, 1.1, 1.2)  # and token temperatures of DPO
KS = (1, 5, 10, 50, 100, 200)  # Fig. 3, and one sample
FEW, MANY = (5, 10), (50, 100, 200)

STRATEGIES, BETA = 8, 0.1
RATIOS = (1.0, 1.1, 1.2, 2.0)  # DPO, the two of DPL's Table 1, and one far beyond
PAPER = (1.1, 1.2)
NS = (1, 4, 16, 64, 128)

# Thresholds. An effect counts where it is larger than two standard errors. alpha_sweep.py has the first two in common.
BETTER = (
    "alpha 0.8 or alpha 0.9 has a higher pass@k than alpha 1 at every k of {}, by more than two standard errors of the "
    "paired differences"
)
RULE = (
    "at every k from 1 to 200 where DPO at temperature 0.9 differs from temperature 1 and alpha 0.9 from alpha 1, both "
    "by more than two standard errors, both differences have one sign; the same for 1.1"
)
BETA_TUNING = (
    "pass@k of alpha 0.9 above that of alpha 1 with beta times 0.9, at k = 5 and 10, by more than two standard errors"
)
CROSSES = "alpha/beta 1.1 and 1.2 above DPO at N = 128 on hard problems, both by more than two standard errors"
STARTS_BELOW = "alpha/beta 1.1 and 1.2 below DPO at N = 1, on hard problems, both by more than two standard errors"
EASY = "alpha/beta 1.1 and 1.2 below DPO at N = 1, on all other problems, both by more than two standard errors"


@dataclass
class Args:
    problems: int = 1000
    """Chains of each base"""
    populations: int = 40
    """Populations of raters, each with 200 problems"""
    results: str = str(report.RESULTS)
    """Where the table and the figure go"""
    fast: bool = False
    """Few problems and populations, for tests"""


def chains(problems: int, base: float) -> tuple[Tensor, Tensor]:
    """log ref and rewards of all responses, (problems, results, ..., results) both; right is result 0 at every step."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(problems, STEPS, RESULTS, generator=random, dtype=torch.float64)
    logits[:, :, 0] += base + torch.randn(problems, 1, generator=random, dtype=torch.float64)
    log_ref = torch.zeros(problems, *[1] * STEPS, dtype=torch.float64)
    for step, logps in enumerate(logits.log_softmax(-1).unbind(1)):
        log_ref = log_ref + logps.view(problems, *[RESULTS if i == step else 1 for i in range(STEPS)])
    reward = torch.randn(log_ref.shape, generator=random, dtype=torch.float64)
    reward.view(problems, -1)[:, 0] += 1
    return log_ref, reward


def optimum(log_ref: Tensor, reward: Tensor, alpha: float, beta: float = 1.0) -> Tensor:
    """Eq. 11's log-probs of all responses of each problem, as log_ref has them."""
    logits = (log_ref + reward / beta) / alpha
    return logits.flatten(1).log_softmax(1).view_as(logits)


def token_temperature(log_pi: Tensor, temperature: float) -> Tensor:
    """Log-probs of responses sampled step by step, each step's conditional to the power 1/temperature."""
    found = torch.zeros_like(log_pi)
    for step in range(1, log_pi.dim()):
        later = tuple(range(step + 1, log_pi.dim()))
        prefix = log_pi.logsumexp(later, keepdim=True) if later else log_pi
        found = found + (prefix / temperature).log_softmax(step)  # what comes before the step cancels
    return found


def pass_at(chance: Tensor, ks) -> Tensor:
    """(problems,) chances of one sample -> (problems, ks) chances that one of k is right."""
    return 1 - (1 - chance[:, None]) ** torch.tensor(ks)


def effect(differences: Tensor) -> tuple[list[float], list[float]]:
    """Means of (problems, ks) or (seeds, problems, ks) over all but the last, and standard errors, in points.

    Problems and seeds are both drawn, so both add to the error: the spread over problems of their means over seeds, and
    over seeds of their means over problems. Where a policy is paired with DPO, so are they.
    """
    differences = differences if differences.dim() == 3 else differences[None]
    means = [means for means in (differences.mean(0), differences.mean(1)) if len(means) > 1]
    error = sum(one.var(0) / len(one) for one in means).sqrt()
    return (100 * differences.mean((0, 1))).tolist(), (100 * error).tolist()


def decisions(differences: Tensor, sign: int = 1) -> list[bool | None]:
    """For each k: whether the mean difference is above 0, or below it where sign is -1."""
    return [report.decide(sign * mean, error) for mean, error in zip(*effect(differences))]


def lowest(found: list[bool | None]) -> bool | None:
    """All of them: False where one is, else undecided where one is."""
    return min(found, key=(False, None, True).index)


def highest(found: list[bool | None]) -> bool | None:
    """One of them: True where one is, else undecided where one is."""
    return max(found, key=(False, None, True).index)


def chain_policies(problems: int, base: float) -> dict[tuple, Tensor]:
    """("alpha", alpha), ("T", temperature) and ("beta", 0.9) -> pass@k (problems, KS)."""
    log_ref, reward = chains(problems, base)
    dpo = optimum(log_ref, reward, 1.0)
    policies = {("alpha", alpha): optimum(log_ref, reward, alpha) for alpha in ALPHAS}
    policies |= {("T", heat): token_temperature(dpo, heat) for heat in ALPHAS}
    policies["beta", 0.9] = optimum(log_ref, reward, 1.0, 0.9)
    return {name: pass_at(log_pi.flatten(1)[:, 0].exp(), KS) for name, log_pi in policies.items()}


def strategies(population: int, problems: int = 200) -> tuple[dict[float, Tensor], Tensor]:
    """alpha/beta -> best-of-N accuracy (problems, NS), and which problems are hard (problems,)."""
    reward, logits = tabular.random_logits(STRATEGIES, population)
    log_ref, log_best = logits.log_softmax(0), reward.log_softmax(0)
    random = torch.Generator().manual_seed(population)
    needed = torch.multinomial(log_best.exp(), problems, replacement=True, generator=random)
    skill = 100 ** -torch.rand(problems, generator=random, dtype=torch.float64)
    raters = tabular.bradley_terry(reward)  # the pairs of a Plackett-Luce population
    trained = {ratio: tabular.train_dpl(raters, log_ref, ratio * BETA, BETA) for ratio in RATIOS}
    accuracy = {ratio: pass_at(log_pi.exp()[needed] * skill, NS) for ratio, log_pi in trained.items()}
    return accuracy, log_ref.exp()[needed] * skill < 1 / 64


def turn(differences: Tensor) -> str:
    """Up to which k a mean difference is above 0, in words."""
    means, _ = effect(differences)
    ahead = list(itertools.takewhile(lambda k: means[KS.index(k)] > 0, KS))
    return f"ahead up to k = {ahead[-1]}" if ahead else "never ahead"


def listed(values) -> str:
    """ "5, 10 and 20"."""
    return " and ".join(", ".join(map(str, values)).rsplit(", ", 1))


def gains(differences: Tensor, at, of) -> str:
    """ "+1.2 (0.3) at 5, ..." in points, with standard errors."""
    cells = zip(of, *effect(differences))
    return ", ".join(f"{mean:+.2f} ({error:.2f}) at {k}" for k, mean, error in cells if k in at)


def judge(found: dict[tuple, Tensor], on: str, where: str = "exact") -> list[report.Verdict]:
    """Claim 9's verdicts for few samples, for many, and on Sec. 5.4's rule.

    found  ("alpha", alpha) and ("T", token temperature of DPO) -> pass@k (problems, KS) or (seeds, problems, KS)
    """
    verdict = partial(report.Verdict, 9, where=where)
    gain = {name: values - found["alpha", 1.0] for name, values in found.items()}
    below = [(kind, value) for kind, value in found if kind == "alpha" and value < 1]
    verdicts = []
    for ks in (FEW, MANY):
        every = [lowest([decisions(gain[name])[KS.index(k)] for k in ks]) for name in below]
        numbers = [f"alpha {name[1]:g}: {gains(gain[name], ks, KS)}, {turn(gain[name])}" for name in below]
        statement = f"alpha < 1 gives a better pass@k at temperature 1, k = {listed(ks)}; {on}"
        verdicts.append(
            verdict("H-DPO Fig. 3", statement, BETTER.format(listed(ks)), highest(every), "; ".join(numbers))
        )
    sides = {step: [] for step in (0.9, 1.1) if ("alpha", step) in gain}  # whether T and alpha have one sign
    for step, same in sides.items():
        both = zip(decisions(gain["T", step]), decisions(gain["alpha", step]))
        same += [colder == smaller for colder, smaller in both if None not in (colder, smaller)]
    numbers = [f"one sign in {sum(same)} of {len(same)} cells at {step:g}" for step, same in sides.items()]
    numbers += [f"DPO at T 0.9 over T 1: {gains(gain['T', 0.9], KS, KS)}"]
    numbers += [f"alpha 0.9 over alpha 1: {gains(gain['alpha', 0.9], KS, KS)}"]
    statement = f"alpha < 1 helps where a lower temperature of DPO helps; {on}"
    holds = report.all_hold(*(all(same) if same else None for same in sides.values()))
    return [*verdicts, verdict("H-DPO Sec. 5.4", statement, RULE, holds, "; ".join(numbers))]


def judge_beta(found: dict[tuple, Tensor], on: str) -> report.Verdict:
    """App. A.2's comparison of a smaller beta with a smaller alpha."""
    ahead = found["alpha", 0.9] - found["beta", 0.9]
    few = [decision for k, decision in zip(KS, decisions(ahead)) if k in FEW]
    return report.Verdict(
        9, "H-DPO App. A.2", f"a smaller beta is no substitute for a smaller alpha; {on}", BETA_TUNING, lowest(few),
        f"alpha 0.9 over beta times 0.9: {gains(ahead, KS, KS)}", "exact",
    )  # fmt: skip


def judge_strategies(hard: dict[float, Tensor], other: dict[float, Tensor]) -> list[report.Verdict]:
    """Claim 10, from means over each population's problems, (populations, NS)."""

    def verdict(statement: str, threshold: str, accuracy: dict[float, Tensor], at: int, sign: int) -> report.Verdict:
        ahead = {ratio: accuracy[ratio] - accuracy[1.0] for ratio in RATIOS[1:]}
        found = [decisions(ahead[ratio], sign)[NS.index(at)] for ratio in PAPER]
        numbers = [f"alpha/beta {ratio:g}: {gains(ahead[ratio], (at,), NS)}" for ratio in ahead]
        return report.Verdict(
            10, "DPL Sec. 3.1, Fig. 3", statement, threshold, lowest(found), "; ".join(numbers), "exact"
        )

    return [
        verdict("on hard problems a higher alpha/beta is above DPO at many samples", CROSSES, hard, 128, 1),
        verdict("on hard problems it starts below DPO at one sample", STARTS_BELOW, hard, 1, -1),
        verdict("on other problems DPO is ahead at one sample", EASY, other, 1, -1),
    ]


def draw(chain: dict[str, dict], hard: dict[float, Tensor]):
    """Differences to DPO in points: of alpha and of T on both bases, and of alpha/beta on hard problems."""
    figure, ((*left, right),) = report.axes(columns=3, width=11, height=4.4)
    others = [alpha for alpha in ALPHAS if alpha != 1]
    shades = report.shades(others)
    for axis, (base, found) in zip(left, chain.items()):
        for alpha in others:
            for name, line in (("alpha", "-"), ("T", ":")):
                means, _ = effect(found[name, alpha] - found["alpha", 1.0])
                label = f"$\\alpha$ {alpha:g}" if name == "alpha" else f"DPO, T {alpha:g}"
                axis.plot(KS, means, line, marker="o", markersize=3, color=shades[alpha], label=label)
        axis.set(xscale="log", xlabel="$k$", ylabel="pass@$k$ less that of DPO, points", title=f"chains, {base}")
        axis.axhline(0, color="black", linewidth=0.8)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    colours = report.shades(RATIOS[1:])
    for ratio in RATIOS[1:]:
        means, errors = effect(hard[ratio] - hard[1.0])
        right.errorbar(NS, means, errors, marker="o", markersize=3, color=colours[ratio], label=f"{ratio:g}")
    right.axhline(0, color="black", linewidth=0.8)
    right.set(xscale="log", xlabel="$N$", ylabel="best-of-$N$ less that of DPO, points", title="strategies, hard")
    right.legend(title="$\\alpha/\\beta$")
    return figure


def main(args: Args) -> None:
    problems, populations = (20, 2) if args.fast else (args.problems, args.populations)
    chain = {name: chain_policies(problems, base) for name, base in BASES.items()}
    drawn = [strategies(population) for population in range(populations)]
    hard, other = (
        {ratio: torch.stack([found[ratio][is_hard == which].mean(0) for found, is_hard in drawn]) for ratio in RATIOS}
        for which in (True, False)
    )
    verdicts = [verdict for on, found in chain.items() for verdict in (*judge(found, on), judge_beta(found, on))]
    verdicts += judge_strategies(hard, other)

    def percent(values: Tensor) -> list[str]:
        return [f"{100 * value:.1f}" for value in values.mean(0)]

    names = {"alpha": "alpha {:g}", "T": "DPO at T {:g}", "beta": "DPO with beta times {:g}"}
    rows = [
        (base, names[kind].format(value), *percent(found[kind, value]))
        for base, found in chain.items()
        for kind, value in found
        if (kind, value) != ("T", 1.0)
    ]
    text = (
        f"Chains: pass@k in percent, {problems} problems each.\n\n"
        + report.table(("base", "policy", *(f"k = {k}" for k in KS)), rows)
        + f"\nStrategies: best-of-N accuracy in percent, mean over {populations} populations, "
        f"{sum(is_hard.sum().item() for _, is_hard in drawn)} of {200 * populations} problems hard.\n\n"
    )
    rows = [
        (which, f"{ratio:g}", *percent(accuracy[ratio]))
        for which, accuracy in (("hard", hard), ("other", other))
        for ratio in RATIOS
    ]
    text += report.table(("problems", "alpha/beta", *(f"N = {n}" for n in NS)), rows)
    report.save(args, "closed_form", verdicts, text, draw(chain, hard))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
