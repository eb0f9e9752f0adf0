"""Entropy of the Differential Information Distribution by counting all sequences, and App. K's estimate (claim 13)

    https://arxiv.org/abs/2505.23761    Claim 4.1, Table 2: reinforcing the policy (DPO-PG) goes with a DID of lower
                                        entropy than DPO's; appendix K estimates it, K.1 checks the estimate

    python experiments/did_exact.py        (one CPU core, about two minutes)

The DID q ~ pi/ref has a partition function that no language model of use can sum up. This one has 8 letters and texts
of 4 letters, 4,096 in all. A Llama of two layers learns a random Markov chain; then DPO and DPO-PG train it on
near-duplicate pairs as markov.py has them (one letter differs), with the scripts' loss and projection and the same
RMSprop, until DPO's loss on other pairs has come down to given values. The entropies are compared where that loss is
equal, for H(q) begins at its maximum, log 4096, where pi = ref, and comes down with training whatever the method.

App. K trains pi' from ref on y_w ~ pi, y_l ~ ref with the reward log pi', whose optimum is pi' = q, and takes H(pi'),
here without the noise of samples from pi'. K.1 regresses log pi' on log(pi/ref) over samples from pi' and wants a slope
above zero; at the optimum it is 1.
"""

import copy
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import report
import torch
import tyro
from markov import language, near_duplicates, walk
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

import dpo_pg  # noqa: E402
import hdpo  # noqa: E402

LETTERS, LENGTH = 8, 4
PAIRS = 1024, 256  # to train on, and others for the loss
BETA = 0.1
LOSSES = (0.67, 0.65, 0.63)  # of DPO on the other pairs; a pilot run of DPO-PG came little further than the last
LR = 3e-4
LR_APP_K = 1e-3
WARM_UP = 20  # steps; RMSprop's first ones would be ten times too long
MOST_STEPS = 3000
ESTIMATED = (64, 256, 512)  # steps of App. K, of 64 pairs each
METHODS = ("DPO", "DPO-PG")

AT = f"at each of the held-out DPO losses {', '.join(map(str, LOSSES))}, by more than two standard errors over seeds: "
CLAIM_13 = (
    AT + "DPO-PG's DID has a lower entropy than DPO's; undecided where its policy has not, so does not reinforce more"
)
TOGETHER = AT + "one policy has the lower entropy, and its DID has the lower one, too"


@dataclass
class Args:
    seeds: int = 4
    """Languages, each with its model, its pairs and a run of each method"""
    results: str = str(report.RESULTS)
    """Where the table and the figure go"""
    fast: bool = False
    """The first loss and few steps of App. K, to see that it runs; its verdict means nothing"""


def make_model() -> LlamaForCausalLM:
    """Untrained, in float64."""
    config = LlamaConfig(
        vocab_size=LETTERS, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=LENGTH, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


def all_texts() -> Tensor:
    """(texts, 1 + LENGTH) letters; the first one is 0 and given."""
    texts = torch.cartesian_prod(*[torch.arange(LETTERS)] * LENGTH)
    return torch.nn.functional.pad(texts, (1, 0))


def log_probs(model, texts: Tensor) -> Tensor:
    """log pi (texts,) of texts (texts, 1 + LENGTH)."""
    logps = model(input_ids=texts[:, :-1], use_cache=False).logits.log_softmax(-1)
    return logps.gather(2, texts[:, 1:, None]).sum((1, 2))


@torch.no_grad()
def enumerate_texts(model) -> Tensor:
    """log pi of all texts, in the order of all_texts."""
    return log_probs(model, all_texts())


def entropy(logps: Tensor) -> float:
    """In nats, of all texts' log-probs."""
    return -(logps.exp() * logps).sum().item()


def did(log_pi: Tensor, log_ref: Tensor) -> Tensor:
    """log q of all texts: pi/ref, normalised."""
    return (log_pi - log_ref).log_softmax(0)


def draw_texts(chain: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return walk(chain, torch.zeros(count, dtype=torch.long), 1 + LENGTH, generator)


def draw_pairs(chain: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Near-duplicate pairs (2, pairs, 1 + LENGTH): chosen and rejected."""
    places = torch.randint(1, LENGTH, (count, 1), generator=generator)
    return torch.stack(near_duplicates(chain, draw_texts(chain, count, generator), places, generator))


def supervise(chain: Tensor, generator: torch.Generator) -> LlamaForCausalLM:
    """A model that has learned the chain from its texts."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(400):
        (-log_probs(model, draw_texts(chain, 64, generator)).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def rmsprop(parameters, lr: float):
    """The optimizer of the paper and its warm-up."""
    optimizer = torch.optim.RMSprop(parameters, lr=lr)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP))


def dpo_loss(logps: Tensor, ref: Tensor) -> Tensor:
    """DPO's loss of pairs from log-probs (2, pairs), chosen and rejected."""
    return hdpo.hdpo_loss(*logps, *ref, alpha=1, beta=BETA).mean()


def train(method: str, reference, pairs: Tensor, others: Tensor, generator: torch.Generator, losses) -> list[Tensor]:
    """log pi of all texts where DPO's loss on the other pairs first is as low as each of `losses`."""
    model = copy.deepcopy(reference)
    parameters = list(model.parameters())
    optimizer, schedule = rmsprop(parameters, LR)

    def both(one, pairs):  # (2, pairs)
        return log_probs(one, pairs.flatten(0, 1)).view(2, -1)

    with torch.no_grad():
        ref, ref_others = both(reference, pairs), both(reference, others)
    found = []
    for _ in range(MOST_STEPS):
        with torch.no_grad():
            loss = dpo_loss(both(model, others), ref_others)
        while loss <= losses[len(found)]:
            found.append(enumerate_texts(model))
            if len(found) == len(losses):
                return found
        batch = torch.randint(pairs.shape[1], (16,), generator=generator)
        logps = both(model, pairs[:, batch])
        if method == "DPO":
            gradients = torch.autograd.grad(dpo_loss(logps, ref[:, batch]), parameters)
        else:
            chosen = torch.autograd.grad(-logps[0].mean(), parameters, retain_graph=True)
            gradients = dpo_pg.project(chosen, torch.autograd.grad(-logps[1].mean(), parameters))
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient
        optimizer.step()
        schedule.step()
    raise SystemExit(f"{method}: DPO's loss is {loss:.4f} after {MOST_STEPS} steps and not {losses[len(found)]}")


def estimate(
    reference, log_pi: Tensor, log_ref: Tensor, generator: torch.Generator, steps
) -> list[tuple[float, float]]:
    """App. K's entropy and K.1's slope after each of `steps` optimizer steps."""
    model, texts = copy.deepcopy(reference), all_texts()
    optimizer, schedule = rmsprop(model.parameters(), LR_APP_K)
    found = []
    for step in range(max(steps)):
        drawn = [torch.multinomial(logps.exp(), 64, True, generator=generator) for logps in (log_pi, log_ref)]
        logps = log_probs(model, texts[torch.cat(drawn)]).view(2, -1)
        hdpo.hdpo_loss(*logps, *torch.zeros_like(logps), alpha=1, beta=1).mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step + 1 in steps:
            logps = enumerate_texts(model)
            found.append((entropy(logps), slope(log_pi - log_ref, logps)))
    return found


def slope(ratio: Tensor, logps: Tensor) -> float:
    """Of the regression of logps on ratio, over texts that have the probabilities exp(logps)."""
    weight = logps.exp()
    x, y = (values - (weight * values).sum() for values in (ratio, logps))
    return ((weight * x * y).sum() / (weight * x * x).sum()).item()


def run(seed: int, losses, steps) -> dict:
    """Of one language: ref's entropy, each method's pi's and q's at every loss, App. K's numbers at the last one."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    chain = language(1, LETTERS, generator)
    reference = supervise(chain, generator)
    log_ref = enumerate_texts(reference)
    pairs, others = (draw_pairs(chain, count, generator) for count in PAIRS)
    found = {"H(ref)": entropy(log_ref)}
    for method in METHODS:
        policies = train(method, reference, pairs, others, generator, losses)
        found[method] = [(entropy(log_pi), entropy(did(log_pi, log_ref))) for log_pi in policies]
        found[method, "App. K"] = estimate(reference, policies[-1], log_ref, generator, steps)
    return found


def draw(runs: list[dict], losses, steps):
    """H(pi) and H(q) at every loss, and how far App. K's estimate is from the last H(q)."""
    figure, ((pi, q, off),) = report.axes(1, 3, width=12, height=3.2)
    for found in runs:
        for method in METHODS:
            style = {"color": report.COLOURS[method], "alpha": 0.8, "label": None if found is not runs[0] else method}
            for axis, values in zip((pi, q), zip(*found[method])):
                axis.plot(losses, values, "o-", **style)
            estimates = [estimated for estimated, _ in found[method, "App. K"]]
            off.plot(steps, [estimated - found[method][-1][1] for estimated in estimates], "o-", **style)
    for axis, name in ((pi, "$H(\\pi)$"), (q, "$H(q)$, exact")):
        axis.invert_xaxis()
        axis.set(title=name, xlabel="held-out DPO loss", ylabel="nats", xticks=losses)
    off.axhline(0, color="black", linewidth=0.8)
    off.set(title="App. K's estimate less $H(q)$", xlabel="optimizer steps of App. K", xscale="log")
    off.set_xticks(steps, steps)
    off.minorticks_off()
    for axis in (pi, q, off):
        axis.legend()
    return figure


def main(args: Args) -> None:
    torch.set_num_threads(1)
    losses, steps = (LOSSES[:1], (2, 4)) if args.fast else (LOSSES, ESTIMATED)
    runs = [run(seed, losses, steps) for seed in range(args.seeds)]

    def entropies(method, place, of=1):
        """Of the policies (0) or the DIDs (1), seed by seed."""
        return [found[method][place][of] for found in runs]

    rows = [
        [method, f"{loss:g}", *(report.spread([found[method][i][j] for found in runs], 2) for j in (0, 1))]
        for i, loss in enumerate(losses)
        for method in METHODS
    ]
    estimates = []
    for method in METHODS:
        for i, count in enumerate(steps):
            values, slopes = zip(*(found[method, "App. K"][i] for found in runs))
            off = [value - exact for value, exact in zip(values, entropies(method, -1))]
            cells = [report.spread(entropies(method, -1), 2), *(report.spread(v, 2) for v in (values, off, slopes))]
            estimates.append([method, count, *cells])
    text = (
        f"Nats of a text; mean over {args.seeds} seeds (range). H(ref) is "
        f"{report.spread([found['H(ref)'] for found in runs], 2)}, the maximum {math.log(LETTERS**LENGTH):.2f}.\n\n"
        + report.table(["method", "held-out DPO loss", "H(pi)", "H(q), exact"], rows)
        + f"\nApp. K's estimate for the policies at a loss of {losses[-1]:g}, and K.1's slope:\n\n"
        + report.table(["method", "steps", "H(q), exact", "estimate", "off by", "slope"], estimates)
    )
    # At each loss, what DPO's entropy is above DPO-PG's, seed by seed
    pi, did = (
        [[a - b for a, b in zip(entropies("DPO", i, of), entropies("DPO-PG", i, of))] for i in range(len(losses))]
        for of in (0, 1)
    )
    reinforces = all(report.above_zero(less) for less in pi)
    signs = [1 if sum(less) > 0 else -1 for less in pi]
    together = [report.above_zero([s * v for v in own]) for s, *both in zip(signs, pi, did) for own in both]
    numbers = [
        f"loss {loss:g}: "
        + ", ".join(
            f"{method} {report.spread(entropies(method, i), 2)} (policy {fmean(entropies(method, i, 0)):.2f})"
            for method in METHODS
        )
        for i, loss in enumerate(losses)
    ]
    verdicts = [
        report.Verdict(
            13, "DID Claim 4.1, Table 2", "Reinforcing (DPO-PG) goes with a lower DID entropy than DPO.", CLAIM_13,
            report.all_hold(*map(report.above_zero, did)) if reinforces else None,
            "; ".join(numbers) + " nats", "exact",
        ),
        report.Verdict(
            13, "DID Claim 4.1", "A policy of lower entropy has a DID of lower entropy.", TOGETHER,
            report.all_hold(*together), "see the line before", "exact",
        ),
    ]  # fmt: skip
    report.save(args, "did_exact", verdicts, text, draw(runs, losses, steps))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
