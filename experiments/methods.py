"""All methods side by side: how much of their gain does a colder sampler give for nothing?

    DPO, H-DPO   https://arxiv.org/abs/2411.07595            eps-DPO   https://arxiv.org/abs/2502.13177
    DPL          https://arxiv.org/abs/2511.08594            DPO-PG    https://arxiv.org/abs/2505.23761
    DGPO         https://openreview.net/forum?id=wmi6satsIu

    python experiments/methods.py        (two CPU cores, about ten minutes)

No claim of a paper is judged here. On the toy every script trains on the same pairs, and eval_passk.py samples the base
model and what each script leaves at the README's three temperatures. One seed; intervals are over problems.

Then a task with several right ways, small enough to be enumerated. An outcome is a sequence of LENGTH tokens, the
reference a table of next-token logits drawn at random; a quarter of the outcomes, drawn at random too, is right. So a
colder sampler is right no more often, and some right ways are rare. Raters see a right and a wrong outcome, each drawn
from the reference, and take the right one with probability SURE; each script's own loss is minimised in expectation
over all such pairs. What is counted is the share of the right ways that SAMPLES samples find, which has a closed form.
Adam's settings come from a pilot with one table, where they bring DPO and DPL to their closed forms.
"""

import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import report
import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import dgpo  # noqa: E402
import dpl  # noqa: E402
import dpo_pg  # noqa: E402
import eps_dpo  # noqa: E402
import hdpo  # noqa: E402
from grading.metrics import bootstrap, paired_difference  # noqa: E402

TOY = report.TOY
# As the README has them, but DPO-PG on the pairs of all others and, like them, for one epoch of steps of 16. DPL trains
# adapters, which need a larger rate, in steps of 8.
SCRIPTS = {
    "DPO": ("hdpo.py", "--alpha", 1, "--lr", 1e-5, "--batch-size", 16),
    "H-DPO": ("hdpo.py", "--lr", 1e-5, "--batch-size", 16),
    "DPL": ("dpl.py", "--lr", 1e-4, "--steps", 250, "--warmup", 25),
    "eps-DPO": ("eps_dpo.py", "--lr", 1e-5, "--batch-size", 16),
    "DGPO": ("dgpo.py", "--lr", 1e-5),
    "DPO-PG": ("dpo_pg.py", "--lr", 1e-5, "--warmup", 0, "--batch-size", 16, "--epochs", 1),
}
TEMPERATURES = ("0.2", "0.5", "1")

VOCAB, LENGTH = 5, 3
SURE = 0.9
SAMPLES = 32
BETA = 0.1  # DPL's, for all that have a reference
EPSILON = 0.01
HEAT = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0)  # temperatures
# From log-probs summed over the tokens: of chosen and rejected outcome, and of both under the reference.
LOSSES = {
    "H-DPO, alpha 0.8": lambda *logps: hdpo.hdpo_loss(*logps, 0.8, BETA),
    "DPO": lambda *logps: hdpo.hdpo_loss(*logps, 1.0, BETA),
    "H-DPO, alpha 1.2": lambda *logps: hdpo.hdpo_loss(*logps, 1.2, BETA),
    "DPL, alpha/beta 2": lambda *logps: dpl.dpl_loss(*logps, 2 * BETA, BETA),
    "DGPO": lambda a, b, a0, b0: dgpo.dgpo_loss(a / LENGTH, b / LENGTH, 2.5),
}
WAYS = (*LOSSES, "eps-DPO", "DPO-PG")  # the last two are more than a loss: see train


@dataclass
class Args:
    problems: int = 100
    """Problems to sample"""
    n: int = 64
    """Samples of each problem"""
    trees: int = 20
    """Tables with several right ways"""
    runs: str = "runs/methods"
    """Where the runs go"""
    results: str = str(report.RESULTS)
    """Where the table and the figure go"""
    fast: bool = False
    """Two scripts and two steps, to see that it runs"""


def train_and_sample(method: str, args: Args) -> tuple[dict[str, float], dict]:
    """Change of the log-probs per token on the held-out pairs, and eval_passk.py's results by temperature."""
    folder = Path(args.runs, method.lower()).resolve()
    changes, model = {}, TOY / "model"
    if method != "base":
        script, *more = SCRIPTS[method]
        report.launch(
            script, *more, "--model", model, "--dataset", TOY / "train.jsonl", "--eval-dataset", TOY / "test.jsonl",
            "--output-dir", folder, "--overwrite", *(["--steps", 2] if args.fast else []),
        )  # fmt: skip
        for name in ("chosen", "rejected"):
            values = report.metrics(folder, f"eval/logps/{name}")
            changes[name] = values[-1][1] - values[0][1]
        model = folder / "model"
    report.launch(
        "eval_passk.py", "--model", model, "--task", TOY / "problems.jsonl", "--problems", args.problems,
        "--n", args.n, "--temperatures", *TEMPERATURES, "--max-new-tokens", 80, "--output-dir", folder / "eval",
        "--overwrite",
    )  # fmt: skip
    return changes, json.loads((folder / "eval/results.json").read_text())["temperatures"]


def percent(cell: dict, sign: str = "") -> str:
    """A mean and its interval in percent, or in points with their sign."""
    mean, low, high = (f"{100 * cell[key]:{sign}.1f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def on_the_toy(found: dict, args: Args) -> str:
    """The table of all methods, and what it shows."""
    base, k = found["base"][1], str(args.n)
    trained = [method for method in found if method != "base"]
    gains = {(m, t): paired_difference(base[t], found[m][1][t], 1) for m in trained for t in TEMPERATURES}
    rows = []
    for method, (changes, passes) in found.items():
        cells = [f"{changes[name]:+.4f}" if changes else "" for name in ("chosen", "rejected")]
        for t in TEMPERATURES:
            cell = f"{100 * passes[t]['pass@k']['1']['mean']:.1f}"
            cells.append(f"{cell} ({percent(gains[method, t], '+')})" if changes else cell)
        rows.append([method, *cells, f"{100 * passes['1']['pass@k'][k]['mean']:.0f}"])
    header = ["method", "chosen", "rejected", *(f"pass@1, T = {t}" for t in TEMPERATURES), f"pass@{k}, T = 1"]

    def gain(t: str) -> str:
        """Smallest and largest over the methods, and how many are certain."""
        here = [gains[method, t] for method in trained]
        means = [100 * cell["mean"] for cell in here]
        up, down = sum(cell["low"] > 0 for cell in here), sum(cell["high"] < 0 for cell in here)
        return f"{min(means):+.1f} to {max(means):+.1f} points at T = {t} ({up} intervals above 0, {down} below)"

    def mean(method: str, t: str) -> float:
        return found[method][1][t]["pass@k"]["1"]["mean"]

    best, cold = max(trained, key=lambda m: mean(m, "1")), max(TEMPERATURES, key=lambda t: mean("base", t))
    free = paired_difference(found[best][1]["1"], base[cold], 1)
    does = "more than" if free["low"] > 0 else "less than" if free["high"] < 0 else "as much as"
    top, at = max(itertools.product(trained, TEMPERATURES), key=lambda pair: mean(*pair))
    return (
        f"{args.n} samples of each of {args.problems} problems, one seed; pass@k in percent, in brackets the paired "
        "difference to the base at that temperature in points, with its 95% interval over problems. Chosen and "
        f"rejected: change of the log-prob per token on held-out pairs.\n\n{report.table(header, rows)}\n"
        f"Training adds to pass@1 {'; '.join(map(gain, TEMPERATURES))}. A colder sampler alone does {does} the best "
        f"training: the base at T = {cold} against {best} at T = 1, {percent(free, '+')}. The best of all, {top} at "
        f"T = {at}, against that base: {percent(paired_difference(base[cold], found[top][1][at], 1), '+')}.\n"
    )


def positions() -> tuple[Tensor, Tensor]:
    """The row of the logits' table and the token at every position of every outcome, (outcomes, LENGTH) both."""
    outcomes = torch.cartesian_prod(*[torch.arange(VOCAB)] * LENGTH)
    rows, first, code = [], 0, torch.zeros(len(outcomes), dtype=torch.long)
    for depth in range(LENGTH):  # one row a prefix; those of equal length lie together
        rows.append(first + code)
        first, code = first + VOCAB**depth, code * VOCAB + outcomes[:, depth]
    return torch.stack(rows, 1), outcomes


ROWS, TOKENS = positions()


def log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-prob (outcomes,) of every outcome, sampled token by token at a temperature, from logits (prefixes, VOCAB)."""
    return (logits / temperature).log_softmax(-1)[ROWS, TOKENS].sum(1)


def draw_table(seed: int) -> tuple[Tensor, Tensor]:
    """The reference's logits (prefixes, VOCAB), and which outcomes are right (outcomes,)."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(int(ROWS.max()) + 1, VOCAB, generator=generator, dtype=torch.float64)
    return logits, torch.randperm(len(TOKENS), generator=generator) < len(TOKENS) // 4


def all_pairs(log_ref: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Chosen and rejected outcome of every pair of a right and a wrong one, and the pair's share: (pairs,) each."""
    good, bad = torch.cartesian_prod(right.nonzero()[:, 0], (~right).nonzero()[:, 0]).T
    share = (log_ref[good] + log_ref[bad]).softmax(0)
    return torch.cat([good, bad]), torch.cat([bad, good]), torch.cat([SURE * share, (1 - SURE) * share])


def train(method: str, reference: Tensor, right: Tensor, steps: int) -> Tensor:
    """Logits (prefixes, VOCAB) that start as the reference's, after Adam on the expectation over all pairs."""
    log_ref = log_probs(reference)
    chosen, rejected, share = all_pairs(log_ref, right)
    logits, beta = reference.clone().requires_grad_(), BETA
    # Rare outcomes have gradients far below Adam's usual eps; its usual memory would keep the first, large ones.
    optimizer = torch.optim.Adam([logits], lr=0.1, betas=(0.9, 0.95), eps=1e-15)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        logps = log_probs(logits)
        pairs = logps[chosen], logps[rejected], log_ref[chosen], log_ref[rejected]
        if method == "DPO-PG":
            g_w, g_l = (torch.autograd.grad(-share @ x, logits, retain_graph=True)[0] for x in pairs[:2])
            (logits.grad,) = dpo_pg.project([g_w], [g_l])
        else:
            if method == "eps-DPO":
                betas = pair_betas(logits.detach(), reference, chosen, rejected, beta)
                losses, beta = eps_dpo.eps_dpo_loss(*pairs, betas), share @ betas
            else:
                losses = LOSSES[method](*pairs)
            (logits.grad,) = torch.autograd.grad(share @ losses, logits)
        optimizer.step()
        schedule.step()
    return logits.detach()


def pair_betas(logits: Tensor, reference: Tensor, chosen: Tensor, rejected: Tensor, beta) -> Tensor:
    """eps-DPO's beta of each pair, (pairs,)."""
    tokens = (x.flatten(0, 1) for x in (logits[ROWS], reference[ROWS], TOKENS))
    minus, plus = (x.view(-1, LENGTH).sum(1) for x in eps_dpo.perturbed_logps(*tokens, EPSILON)[:2])
    # R is subtracted from all three, as in eps_dpo.forward
    r_minus, r_plus = (x[chosen] - x[rejected] for x in (minus, plus))
    return eps_dpo.adaptive_beta(torch.zeros_like(r_minus), r_minus, r_plus, beta, EPSILON)


def coverage(log_pi: Tensor, right: Tensor) -> float:
    """Expected share of the right outcomes that are among SAMPLES samples, from log-probs (outcomes,)."""
    return -torch.expm1(SAMPLES * torch.log1p(-log_pi[right].exp())).mean().item()


def right_ways(args: Args) -> dict[str, list[dict[float, tuple[float, float]]]]:
    """For every method and table: temperature -> chance of a right sample, coverage."""
    found = {method: [] for method in ("base", *WAYS)}
    for method, seed in itertools.product(found, range(args.trees)):
        reference, right = draw_table(seed)
        logits = reference if method == "base" else train(method, reference, right, 20 if args.fast else 500)
        log_pis = {t: log_probs(logits, t) for t in HEAT}
        found[method].append({t: (x[right].exp().sum().item(), coverage(x, right)) for t, x in log_pis.items()})
    return found


def mean_of(tables: list[dict], t: float, which: int) -> float:
    """Percent, mean over tables: of right samples (0), of the right ways found (1)."""
    return 100 * fmean(table[t][which] for table in tables)


def with_several_right_ways(found: dict, args: Args) -> str:
    """The second table, and what it shows."""
    hottest = {method: max(HEAT, key=lambda t: mean_of(tables, t, 1)) for method, tables in found.items()}
    most = {method: mean_of(tables, hottest[method], 1) for method, tables in found.items()}
    rows = []
    for method, tables in found.items():
        more = bootstrap([own[1.0][1] - dpo[1.0][1] for own, dpo in zip(tables, found["DPO"])])
        cells = [f"{mean_of(tables, 1.0, 0):.1f}", *(f"{mean_of(tables, t, 1):.1f}" for t in (0.5, 1.0, 2.0))]
        rows.append([method, *cells, percent(more, "+"), f"{most[method]:.1f} (T = {hottest[method]:g})"])
    header = ["method", "right, T = 1", *(f"found, T = {t}" for t in ("0.5", "1", "2")), "more than DPO, T = 1"]
    count = VOCAB**LENGTH // 4
    even = 100 * coverage(torch.full((count,), 1 / count).double().log(), torch.ones(count, dtype=torch.bool))
    dpl, dpo = (found[name] for name in ("DPL, alpha/beta 2", "DPO"))
    as_hot = [t for t in HEAT if mean_of(dpo, t, 1) >= mean_of(dpl, 1.0, 1)]
    colder = [m for m, tables in found.items() if mean_of(tables, 0.5, 1) < mean_of(tables, 1.0, 1)]
    return (
        "## Several right ways\n\n"
        f"{count} of {VOCAB**LENGTH} outcomes are right; found is the share of them among {SAMPLES} samples, in "
        f"percent, mean over {args.trees} tables (exact for each); in brackets a 95% interval over tables. A policy "
        f"that spreads evenly over the right ones finds {even:.1f}. The last column is at the best of the temperatures "
        f"{HEAT[0]:g} to {HEAT[-1]:g}.\n\n{report.table([*header, 'found, best T'], rows)}\n"
        f"Colder samples (T = 0.5 against 1) find fewer right ways for {len(colder)} of {len(found)} policies. None "
        f"of these temperatures brings the base above {most['base']:.1f}. DPO sampled at "
        + (f"T = {as_hot[0]:g} finds what DPL finds at 1" if as_hot else "no temperature finds what DPL finds at 1")
        + f"; each at its best temperature, {max(most, key=most.get)} finds most.\n"
    )


def draw(found: dict, ways: dict, n: int):
    """The toy above, several right ways below; all against the sampling temperature."""
    figure, axes = report.axes(2, 2, width=10, height=3.6)
    heat = [float(t) for t in TEMPERATURES]
    for axis, k in zip(axes[0], ("1", str(n))):
        for method, (_, passes) in found.items():
            values = [100 * passes[t]["pass@k"][k]["mean"] for t in TEMPERATURES]
            colour = report.COLOURS["reference" if method == "base" else method]
            axis.plot(heat, values, "o--" if method == "base" else "o-", color=colour, markersize=3, label=method)
        axis.set(title="toy", xlabel="sampling temperature", ylabel=f"pass@{k}, %")
    for axis, which, label in zip(axes[1], (1, 0), (f"right ways found in {SAMPLES} samples, %", "right samples, %")):
        for method, tables in ways.items():
            colour = report.COLOURS["reference" if method == "base" else method.split(",")[0]]
            style = "o--" if method == "base" else "o:" if "0.8" in method else "o-"
            values = [mean_of(tables, t, which) for t in HEAT]
            axis.plot(HEAT, values, style, color=colour, markersize=3, label=method)
        axis.set(title="several right ways", xlabel="sampling temperature", ylabel=label, xscale="log")
        axis.set_xticks([0.25, 0.5, 1, 2, 4], ["0.25", "0.5", "1", "2", "4"], minor=False)
        axis.minorticks_off()
    axes[0, 1].legend(), axes[1, 1].legend()
    return figure


def main(args: Args) -> None:
    torch.set_num_threads(1)  # the tables are worked beside the scripts
    methods = ("base", "DPO", "DPO-PG") if args.fast else ("base", *SCRIPTS)
    jobs = [lambda method=method: train_and_sample(method, args) for method in methods]
    *results, ways = report.side_by_side([*jobs, lambda: right_ways(args)])
    found = dict(zip(methods, results))
    text = on_the_toy(found, args) + "\n" + with_several_right_ways(ways, args)
    report.save(args, "methods", [], text, draw(found, ways, args.n))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
