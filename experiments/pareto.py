"""Diversity against quality: DPL's alpha/beta, or a token temperature and cuts on the DPO policy? Exactly. (claim 10)

    https://arxiv.org/abs/2511.08594    Sec. 4.1, Fig. 2, 5: the fronts    App. B.3: settings    Eq. 10: optimum

    python experiments/pareto.py        (one CPU core, about 15 seconds)

Sequences are so few that all are enumerated, so every number is an expectation and nothing is sampled or trained. The
reference draws token by token from random distributions, each sequence has a random reward r, and

    DPO       pi ~ ref exp(r / beta)
    DPL       pi ~ ref^(beta/alpha) exp(r / alpha) = DPO^(beta/alpha), of whole sequences
    others    DPO's distribution of each next token at a temperature, alone or with a cut: top-p, top-k or min-p

At the temperatures of the paper, each of the others is compared with the DPL policy of the same entropy H, by

    objective        E[r] + beta E[log ref]
    cross-entropy    -E[log ref], the lower the better
    reward           E[r]

The first is a theorem (Gibbs): DPL maximises E[r] + beta E[log ref] + alpha H, so no policy of the same H has a higher
objective, and the first verdict could only fail by a mistake here. The other two are its halves. About each alone there
is no theorem: what a policy lacks in one it may have in the other. The objective becomes the reward as beta goes to 0
and the cross-entropy as it grows, so the table has other beta beside that of the verdicts.
"""

import math
from dataclasses import dataclass
from functools import partial

import report
import torch
import tyro
from torch import Tensor
from transformers.generation import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

Verdict = partial(report.Verdict, where="exact")

VOCABULARY, LENGTH = 6, 4
BETAS = (0.1, 0.5, 2.5)
BETA = 0.5  # of the verdicts and the figure; rewards have sd 1, and beta log ref nearly as much

# Temperatures and cuts of B.3. Of its 32,000 tokens the paper keeps 180; of six, 4 are kept here (ours).
SWEEPS = {
    "temperature": ((1.1, 1.2, 1.3, 1.4, 1.5), []),
    "top-p 0.9": ((1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7), [TopPLogitsWarper(0.9)]),
    "top-k 4": ((1.1, 1.2, 1.3, 1.5, 2.0, 2.5), [TopKLogitsWarper(4)]),
    "min-p 0.1": ((1.3, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0), [MinPLogitsWarper(0.1)]),
}
COLOURS = {"temperature": report.COLOURS["DPO"], "top-p 0.9": "#17becf", "top-k 4": "#e377c2", "min-p 0.1": "#bcbd22"}
MEASURES = {"objective": 1, "cross-entropy": -1, "reward": 1}  # -1: the lower the better

# Thresholds
ROUNDING = 1e-9  # DPL's objective is the largest at every setting of every seed, up to this
# Cross-entropy, reward: mean advantage over seeds above 0 by two standard errors, at each of the token temperatures


@dataclass
class Args:
    seeds: int = 100
    """Random references with random rewards"""
    results: str = str(report.RESULTS)
    """Where the table and the figure go"""
    fast: bool = False
    """Three seeds, for tests"""


def sequences_of(conditionals: list[Tensor]) -> Tensor:
    """Log-probs of all sequences (vocabulary^length,), in lexical order, from those of each next token.

    conditionals  one tensor for each step t: (vocabulary^t, vocabulary), a row for each prefix in lexical order
    """
    total = torch.zeros(1, dtype=torch.float64)
    for step in conditionals:
        total = (total[:, None] + step).flatten()
    return total


def conditionals_of(log_pi: Tensor) -> list[Tensor]:
    """The inverse of sequences_of."""
    prefixes = [log_pi.view(VOCABULARY**t, -1).logsumexp(1) for t in range(LENGTH + 1)]
    return [prefixes[t + 1].view(-1, VOCABULARY) - prefixes[t][:, None] for t in range(LENGTH)]


def by_token(log_pi: Tensor, temperature: float, cuts: list) -> Tensor:
    """Log-probs of all sequences when each token is drawn at a temperature, then cut; as eval_passk.py draws them."""
    steps = []
    for logits in conditionals_of(log_pi):
        for warper in (TemperatureLogitsWarper(temperature), *cuts):
            logits = warper(None, logits)
        steps.append(logits.log_softmax(-1))
    return sequences_of(steps)


def entropy(log_pi: Tensor) -> Tensor:
    """Of the last dimension, in nats; a sequence may have no probability."""
    return torch.special.entr(log_pi.exp()).sum(-1)


def global_temperature(log_pi: Tensor, entropies: Tensor) -> Tensor:
    """alpha/beta (n,) for which pi^(beta/alpha) has these entropies (n,): it rises with alpha/beta, so by bisection."""
    low, high = torch.full_like(entropies, math.log(1e-3)), torch.full_like(entropies, math.log(1e3))
    for _ in range(60):
        middle = (low + high) / 2
        above = entropy((log_pi / middle.exp()[:, None]).log_softmax(-1)) > entropies
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return ((low + high) / 2).exp()


def measure(log_pi: Tensor, log_ref: Tensor, reward: Tensor, beta: float) -> Tensor:
    """(..., 3): the MEASURES of policies (..., sequences)."""
    rewards, cross = log_pi.exp() @ reward, -(log_pi.exp() @ log_ref)
    return torch.stack([rewards - beta * cross, cross, rewards], -1)


def draw_problem(seed: int) -> tuple[Tensor, Tensor]:
    """The reference's log-probs and the rewards of all sequences: logits of each next token and rewards are normal."""
    generator = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    log_ref = sequences_of([normal(VOCABULARY**t, VOCABULARY).log_softmax(-1) for t in range(LENGTH)])
    return log_ref, normal(len(log_ref))


def compare(seed: int, beta: float) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """For each sweep: entropies (settings,), MEASURES of its policies and of DPL's at these entropies (settings, 3)."""
    log_ref, reward = draw_problem(seed)
    dpo = (log_ref + reward / beta).log_softmax(0)
    found = {}
    for name, (temperatures, cuts) in SWEEPS.items():
        log_pi = torch.stack([by_token(dpo, t, cuts) for t in temperatures])
        ratios = global_temperature(dpo, entropy(log_pi))
        dpl = (dpo / ratios[:, None]).log_softmax(-1)
        found[name] = (entropy(log_pi), *(measure(policy, log_ref, reward, beta) for policy in (log_pi, dpl)))
    return found


def advantages(seeds: int, beta: float) -> dict[str, Tensor]:
    """For each sweep (seeds, settings, 3): by how much DPL is better in each of MEASURES at the same entropy."""
    found, signs = [compare(seed, beta) for seed in range(seeds)], torch.tensor(list(MEASURES.values()))
    return {name: torch.stack([(one[name][2] - one[name][1]) * signs for one in found]) for name in SWEEPS}


def judge(values: Tensor) -> bool | None:
    """Is the mean over seeds (seeds, settings) above 0 at every setting? None: at one its error is larger than it."""
    errors = values.std(0) / len(values) ** 0.5
    found = [report.decide(mean, error) for mean, error in zip(values.mean(0).tolist(), errors.tolist())]
    return False if False in found else None if None in found else True


def draw(beta: float, seed: int = 0):
    """Each measure against the entropy, upwards is better: DPL as a line, the others at the settings of the paper."""
    log_ref, reward = draw_problem(seed)
    dpo, found = (log_ref + reward / beta).log_softmax(0), compare(seed, beta)
    every = torch.cat([entropies for entropies, *_ in found.values()])
    ratios = global_temperature(dpo, torch.linspace(every.min(), every.max(), 60, dtype=torch.float64))
    dpl = (dpo / ratios[:, None]).log_softmax(-1)
    figure, (panels,) = report.axes(columns=3, width=11, height=4.2)
    for number, (panel, (name, sign)) in enumerate(zip(panels, MEASURES.items())):
        line = sign * measure(dpl, log_ref, reward, beta)[:, number]
        panel.plot(entropy(dpl), line, color=report.COLOURS["DPL"], label="DPL")
        start = sign * measure(dpo, log_ref, reward, beta)[number]
        panel.plot(entropy(dpo), start, "o", color="black", label="DPO", zorder=3)
        for sweep, (entropies, other, _) in found.items():
            panel.plot(entropies, sign * other[:, number], "o-", color=COLOURS[sweep], markersize=3.5, label=sweep)
        panel.set(xlabel="entropy of a sequence, nats", title=f"{'-' * (sign < 0)}{name}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.suptitle(f"beta {beta}, seed {seed}; upwards is better")
    return figure


def main(args: Args) -> None:
    seeds = 3 if args.fast else args.seeds
    found = {beta: advantages(seeds, beta) for beta in BETAS}
    every = torch.cat([values[..., 0].flatten() for sweeps in found.values() for values in sweeps.values()])

    def shares(beta: float, name: str) -> list[str]:  # of MEASURES; where a cut leaves one sequence, all are equal
        different = (one := found[beta][name])[(one != 0).any(-1)]
        return [f"{share:.1%}" for share in (different > 0).double().mean(0).tolist()]

    def numbers(measure: int) -> str:
        values = found[BETA]["temperature"][..., measure]
        error = (values.std(0) / seeds**0.5).max().item()
        others = ", ".join(f"{shares(BETA, name)[measure]} ({name})" for name in SWEEPS)
        means = report.spread(values.mean(0).tolist(), 4)
        return f"mean advantage {means} over the temperatures, standard error <= {error:.4f}; DPL better in {others}"

    threshold = (
        f"beta {BETA}, {seeds} seeds, at the entropy of each token temperature: DPL's mean advantage above 0 by two "
        "standard errors at every one of them"
    )
    verdicts = [
        Verdict(10, "DPL Fig. 2, 5", "at equal entropy DPL is best at its own objective, reward + beta log ref",
                f"smallest advantage over every token-level setting, beta and seed > -{ROUNDING:g}",
                every.min().item() > -ROUNDING, f"smallest advantage {every.min():.1e} of {len(every)} comparisons"),
        Verdict(10, "DPL Fig. 2, 5", "at equal entropy DPL has a lower reference cross-entropy than token temperature",
                threshold, judge(found[BETA]["temperature"][..., 1]), numbers(1)),
        Verdict(10, "DPL Fig. 2, 5", "at equal entropy DPL has a higher reward than token temperature",
                threshold, judge(found[BETA]["temperature"][..., 2]), numbers(2)),
    ]  # fmt: skip
    rows = [(beta, name, *shares(beta, name)) for beta in BETAS for name in SWEEPS]
    text = (
        f"How often DPL is better at the same entropy, of {seeds} seeds x the temperatures of the sweep, but for those "
    )
    text += "that leave a single sequence, where all are equal:\n\n"
    text += report.table(("beta", "against", *MEASURES), rows)
    report.save(args, "pareto", verdicts, text, draw(BETA))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
