"""All five scripts on a real model and real pairs: displacement, diversity, adaptive beta (claims 6, 7, 8 and 12)

    DGPO       https://openreview.net/forum?id=wmi6satsIu    Fig. 1, 2, Table 3: DPO lowers the chosen log-prob, DGPO
                                                             raises it
    DPO-PG     https://arxiv.org/abs/2505.23761              Fig. 8, 9: chosen up, rejected not up, and DPO's loss falls
    H-DPO      https://arxiv.org/abs/2411.07595              Table 2: diversity rises with alpha in 0.8 ... 1.2
    eps-DPO    https://arxiv.org/abs/2502.13177              Fig. 3: a larger eps adapts more often

    python experiments/real_model.py --dataset hh_harmless.jsonl.gz        (docs/real_models.md; two cores, 66 minutes)
    python experiments/real_model.py --model mistralai/Mistral-7B-Instruct-v0.2 --dataset-config "" \
        --dataset HuggingFaceH4/ultrafeedback_binarized --split train_prefs --max-tokens 2048 --held-out 500 \
        --steps 400 --batch-size 64 --lora-rank 16 --gradient-checkpointing --prompts 200 --samples 25 \
        --max-new-tokens 512 --jobs 1        (one GPU)

Every method takes the same steps on the same pairs, which are no near-duplicates. What a run has done is measured pair
by pair against the model before training, on pairs that it was trained on, as the papers' curves are, and on held-out
ones with other prompts. Errors are standard errors over pairs or prompts and, for methods that ran from several seeds,
over seeds, added as variances; a single run's error leaves out what another seed would change. The learning rate is
large because the steps are few: in pilots, eight steps at 5e-6 moved DPO's held-out log-probs by a hundredth of a nat a
token, twelve of 4 pairs at 4e-5 by a tenth. Where DPO's loss has not come down on the pairs that it trained on, nothing
was learnt and claims 6 and 8 are undecided. DPO-PG's rate is its script's; its theorems speak of a step's own pairs and
of plain gradient steps, where the paper and its script take RMSprop.
"""

import json
import math
import os
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import report
import torch
import tyro
from eps_control import paired_error

sys.path.insert(0, str(report.ROOT))

import common  # noqa: E402
import eps_dpo  # noqa: E402
import eval_passk  # noqa: E402
import preferences  # noqa: E402
from grading.metrics import distinct, self_bleu, words  # noqa: E402

MAY_DIFFER = {"seeds", "jobs", "resume", "results", "fast"}  # flags that a run may go on with

SCORING = threading.Lock()  # transformers loads wrong weights where two threads load at once

BETA = 0.1
# Arguments beside those that all share; each method's schedule and optimizer are its script's.
METHODS = {
    "DPO": ("hdpo.py", "--alpha", 1, "--beta", BETA),
    "H-DPO 0.8": ("hdpo.py", "--alpha", 0.8, "--beta", BETA),
    "H-DPO 1.2": ("hdpo.py", "--alpha", 1.2, "--beta", BETA),
    "DPL 2": ("dpl.py", "--alpha", 2 * BETA, "--beta", BETA),
    "eps-DPO": ("eps_dpo.py", "--beta", BETA, "--epsilon", 0.01),
    "DGPO": ("dgpo.py",),
    "DPO-PG": ("dpo_pg.py",),
}
WITH_SEEDS = ("DPO", "DGPO", "DPO-PG")  # the others run once
ALPHAS = {0.8: "H-DPO 0.8", 1.0: "DPO", 1.2: "H-DPO 1.2"}
EPSILONS = (0.005, 0.01, 0.02)
MEASURES = {"entropy": "entropy", "distinct_2": "Distinct-2", "self_bleu": "Self-BLEU"}

BY = "by more than two standard errors"
LEARNT = "; undecided unless DPO's loss on the pairs that it trained on has come down by as much"
LOWERS = f"DPO's chosen log-prob is lower than at the start {BY}{LEARNT}"
RAISES = f"DGPO's chosen log-prob is higher than at the start {BY}{LEARNT}"
CLAIM_7 = f"{BY}: chosen log-prob higher and DPO's loss lower than at the start, and the rejected log-prob not higher"
CLAIM_8 = f"alpha 1.2 less alpha 0.8, {BY} over prompts: entropy and Distinct-2 higher, Self-BLEU lower{LEARNT}"
OFTEN = (
    "held-out pairs under eps-DPO's policy: the share of adapted pairs rises from eps 0.005 to 0.01 and from there to "
    f"0.02, each {BY}"
)
PARTS = ("trained", "held-out")  # pairs


@dataclass
class Args:
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """Model to train: on the hub or a directory"""
    dataset: str = "Anthropic/hh-rlhf"
    """Pairs: hub, .json, .jsonl or .parquet"""
    dataset_config: str = "harmless-base"
    """Configuration, or folder, of a hub data set"""
    split: str = "test"
    """Split from which training and held-out pairs are taken"""
    max_tokens: int = 120
    """Longest pair that is used: tokens of prompt, chosen and rejected together"""
    held_out: int = 64
    """Pairs for evaluation, whose prompts are not trained on, and as many that are trained on"""
    steps: int = 40
    """Optimizer steps of a run"""
    batch_size: int = 8
    """Pairs of a step"""
    lr: float = 2e-5
    """Peak learning rate"""
    lr_pg: float = 1e-6
    """DPO-PG's, whose RMSprop moves further at the same rate"""
    lora_rank: int = 0
    """Rank of adapters; 0: train all weights"""
    gradient_checkpointing: bool = False
    """Less memory, a third more time"""
    seeds: int = 2
    """Runs of each of WITH_SEEDS"""
    prompts: int = 32
    """Held-out prompts to sample"""
    samples: int = 16
    """Samples of each"""
    max_new_tokens: int = 32
    """Longest sample"""
    jobs: int = 2
    """Runs side by side, which share the cores; 1 on a GPU"""
    runs: str = "runs/real_model"
    """Where the runs go, and a float32 copy of the model"""
    resume: bool = False
    """Go on with the runs that are there"""
    results: str = str(report.RESULTS)
    """Where the table and the figure go"""
    fast: bool = False
    """The toy and two steps, to see that it runs; its verdicts mean nothing"""


def prepare(folder: Path, args: Args) -> None:
    """Leave base/, the model in float32 (a type that keeps what small steps move), train.jsonl, trained.jsonl with some
    of its pairs, held-out.jsonl and prompts.jsonl, all of them text that is already in the model's template.
    """
    tokenizer = common.load_tokenizer(args.model)
    for part in (common.load_model(args.model, torch.float32), tokenizer):
        part.save_pretrained(folder / "base")
    source, numbers = preferences.read_rows(args.dataset, args.split, args.dataset_config)
    groups = {}  # prompt -> its pairs
    for number in numbers:
        texts = preferences.to_texts(source[number - 1], f"{args.dataset} row {number}", tokenizer, "", Counter())
        if isinstance(texts, tuple):
            prompt, chosen, rejected = map(len, preferences.encode(tokenizer, list(texts)))
            if chosen + rejected - prompt <= args.max_tokens:
                groups.setdefault(texts[0], []).append(dict(zip(("prompt", "chosen", "rejected"), texts)))
    prompts = list(groups)
    order = [prompts[i] for i in torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0))]
    test = order[: args.held_out]
    train = [row for prompt in order[args.held_out :] for row in groups[prompt]]
    rows = {
        "held-out": [groups[prompt][0] for prompt in test],
        "train": train,
        "trained": train[: args.held_out],
        "prompts": [{"question": prompt} for prompt in test[: args.prompts]],
    }
    for name, own in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))


def load_pairs(name: str, folder: Path, args: Args):
    """The pairs of a file of prepare() as token ids."""
    tokenizer = common.load_tokenizer(str(folder / "base"))
    return common.load_preferences(str(folder / f"{name}.jsonl"), tokenizer, "", args.max_tokens, args.max_tokens - 1)


def threads(args: Args) -> int:
    """CPU threads of a run."""
    return max(1, (os.cpu_count() or 1) // args.jobs)


def load(folder: Path):
    """A model ready for packed pairs."""
    model = common.load_model(str(folder), torch.float32).to("cuda" if torch.cuda.is_available() else "cpu")
    model.set_attn_implementation(common.ATTENTION)
    return model


@torch.no_grad()
def score(model, reference, dataset) -> dict[str, list[float]]:
    """What training did to each pair: changes of the log-probs, per token ("chosen", "rejected") and of the whole
    response ("margin": chosen less rejected); KL(pi, ref) of a response; and which way eps-DPO would move beta, -1, 0
    or 1, for every eps in both arithmetics ("exact 0.01", "bf16 0.01").
    """
    names = ["chosen", "rejected", "margin", "kl", *(f"{kind} {e:g}" for kind in ("exact", "bf16") for e in EPSILONS)]
    found = {name: [] for name in names}
    for row in dataset:
        batch = common.collate([row]).to(model.device)
        f, f0 = (common.response_logits(one, batch) for one in (model, reference))  # (targets, vocab)
        moved = common.token_logps(f, batch.targets) - common.token_logps(f0, batch.targets)  # (targets,)
        chosen, rejected = common.sum_responses(moved, batch)  # (1,) each
        found["chosen"].append((chosen / batch.chosen_lengths).item())
        found["rejected"].append((rejected / batch.rejected_lengths).item())
        found["margin"].append((chosen - rejected).item())
        for epsilon in EPSILONS:
            minus, plus, _, kl = eps_dpo.perturbed_logps(f, f0, batch.targets, epsilon)
            (minus_w, minus_l), (plus_w, plus_l) = (common.sum_responses(values, batch) for values in (minus, plus))
            exact = (torch.zeros_like(minus_w), minus_w - minus_l, plus_w - plus_l)
            bf16 = eps_dpo.bf16_logratios([(f, f0, batch.targets)], batch, epsilon)
            for kind, ratios in (("exact", exact), ("bf16", bf16)):
                beta = eps_dpo.adaptive_beta(*(ratio.double() for ratio in ratios), 1.0, epsilon).item()
                found[f"{kind} {epsilon:g}"].append((beta > 1) - (beta < 1))
        found["kl"].append((kl.sum() / 2).item())
    return found


def sample(model: Path, folder: Path, args: Args) -> dict[str, list[float]]:
    """Entropy (nats a token), Distinct-2 and Self-BLEU of eval_passk.py's samples of each held-out prompt."""
    report.launch(
        "eval_passk.py", "--model", model, "--output-dir", folder / "eval", "--prompt", "text", "--problems", 0,
        "--task", Path(args.runs).resolve() / "prompts.jsonl", "--n", args.samples, "--temperatures", 1,
        "--max-new-tokens", args.max_new_tokens, "--overwrite", threads=threads(args),
    )  # fmt: skip
    groups = {}  # prompt -> its samples
    for (_, prompt, *_), row in sorted(eval_passk.read_samples(folder / "eval")[0].items()):
        groups.setdefault(prompt, []).append(row)
    texts = [[words(row["text"]) for row in rows] for rows in groups.values()]
    return {
        "entropy": [fmean(-row["logp"] / max(1, row["tokens"]) for row in rows) for rows in groups.values()],
        "distinct_2": [distinct(own, 2) for own in texts],
        "self_bleu": [self_bleu(own) for own in texts],
    }


def run(method: str, seed: int, args: Args) -> dict:
    """Train once, score the model, and sample it if it is one of ALPHAS; the model itself is not kept."""
    runs = Path(args.runs).resolve()
    folder = runs / f"{method.replace(' ', '-')}-{seed}".lower()
    if (folder / "found.json").exists():
        return json.loads((folder / "found.json").read_text())
    script, *more = METHODS[method]
    report.launch(
        script, *more, "--model", runs / "base", "--dataset", runs / "train.jsonl", "--eval-dataset",
        runs / "held-out.jsonl", "--max-length", args.max_tokens, "--max-prompt-length", args.max_tokens - 1,
        "--lr", args.lr_pg if method == "DPO-PG" else args.lr, "--warmup", 0.1, "--batch-size", args.batch_size,
        "--steps", args.steps, "--seed", seed, "--eval-every", max(1, args.steps // 4), "--lora-rank", args.lora_rank,
        *["--gradient-checkpointing"] * args.gradient_checkpointing, "--output-dir", folder,
        "--resume" if args.resume else "--overwrite", threads=threads(args),
    )  # fmt: skip
    found = {name: dict(report.metrics(folder, f"eval/logps/{name}")) for name in ("chosen", "rejected")}
    found = {"curves": {name: [list(curve), list(curve.values())] for name, curve in found.items()}}
    with SCORING:
        models = load(folder / "model"), load(runs / "base")
        found["pairs"] = {part: score(*models, load_pairs(part, runs, args)) for part in PARTS}
        torch.cuda.empty_cache()  # the next run is another process on the same GPU
    if seed == 0 and method in ALPHAS.values():
        found["samples"] = sample(folder / "model", folder, args)
    (folder / "found.json").write_text(json.dumps(found))
    for name in ("model", "checkpoints"):
        shutil.rmtree(folder / name)
    return found


def mean_error(values: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The mean of (seeds, pairs or prompts), and its standard error over the latter and over the seeds, if several."""
    values = torch.tensor(values, dtype=torch.float64)
    return values.mean().item(), paired_error(values)


def shown(values: Sequence[Sequence[float]], digits: int = 4, sign: str = "+") -> str:
    """As "+0.123 ± 0.004", with the standard error; sign is "" for what is no change."""
    return "{:{sign}.{digits}f} ± {:.{digits}f}".format(*mean_error(values), sign=sign, digits=digits)


def dpo_losses(margins: Sequence[Sequence[float]]) -> list[list[float]]:
    """Change of DPO's loss of each pair, (seeds, pairs); at the start it is log 2."""
    return [[math.log1p(math.exp(-BETA * margin)) - math.log(2) for margin in own] for own in margins]


def draw(runs: dict, held_out: dict, samples: dict):
    """Above, log-probs over the steps, one scale for all methods, and KL; below, what alpha changes and eps adapts."""
    figure, axes = report.axes(3, 4, width=13, height=2.8)
    cells = axes.flat
    for method, axis in zip(METHODS, cells):
        if axis is not axes[0, 0]:
            axis.sharey(axes[0, 0])
        for (own, seed), run in runs.items():
            for name, style in (("chosen", "-"), ("rejected", "--")) if own == method else ():
                steps, values = run["curves"][name]
                changes = [value - values[0] for value in values]
                axis.plot(steps, changes, style, color=colour(method), alpha=0.8, label=None if seed else name)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_title(method)
        axis.set(xlabel="optimizer step", xticks=steps)
        axis.legend()
    for row in axes[:2]:
        row[0].set_ylabel("change of $\\log\\pi$ per token")
    kls = [fmean(held_out[method]["kl"][0]) for method in METHODS]
    axes[1, 3].barh(list(METHODS), kls, color=list(map(colour, METHODS)))
    axes[1, 3].invert_yaxis()
    axes[1, 3].set_xlabel("$KL(\\pi, \\pi_{ref})$ of a response, seed 0")
    for (name, label), axis in zip(MEASURES.items(), axes[2]):
        found = [mean_error([differences(samples, name, 1.0, alpha)]) for alpha in ALPHAS]
        axis.errorbar(list(ALPHAS), *zip(*found), fmt="o-", color=report.COLOURS["H-DPO"], capsize=3)
        axis.set(xlabel="$\\alpha$", ylabel=f"{label} less that of $\\alpha=1$")
    for kind, style in (("exact", "o-"), ("bf16", "x--")):
        shares = [share(held_out, kind, epsilon) for epsilon in EPSILONS]
        axes[2, 3].plot(EPSILONS, shares, style, color=report.COLOURS["eps-DPO"], label=kind)
    axes[2, 3].set(xlabel="$\\epsilon$", ylabel="share of adapted pairs", ylim=(-0.05, 1.05))
    axes[2, 3].legend()
    return figure


def differences(samples: dict, name: str, low: float, high: float) -> list[float]:
    """A measure at one alpha less that at another, prompt by prompt."""
    return [b - a for a, b in zip(samples[low][name], samples[high][name])]


def colour(method: str) -> str:
    return report.COLOURS[method.split()[0]]


def share(held_out: dict, kind: str, epsilon: float) -> float:
    """Share of held-out pairs for which eps-DPO's policy would move beta."""
    return fmean(map(abs, held_out["eps-DPO"][f"{kind} {epsilon:g}"][0]))


def moves(pairs: dict, name: str) -> str:
    """Words on which methods moved a log-prob, from seed 0, by more than two standard errors, and where to."""
    found = {method: report.decide(*mean_error(own[name][:1])) for method, own in pairs.items()}
    ways = {True: "raised by", False: "lowered by", None: "undecided for"}
    sides = ((way, ", ".join(method for method, holds in found.items() if holds is side)) for side, way in ways.items())
    return f"the {name} log-prob is " + ", ".join(f"{way} {names}" for way, names in sides if names)


def above(values: Sequence[Sequence[float]]) -> bool | None:
    """Whether the mean of (seeds, pairs or prompts) is above 0; None within two standard errors."""
    return report.decide(*mean_error(values))


def below(values: Sequence[Sequence[float]]) -> bool | None:
    return above([[-value for value in own] for own in values])


def judge_pairs(part: str, own: dict, learnt: bool) -> list[report.Verdict]:
    """Claims 6 and 7 on these pairs; own is method -> what score() found, each name's values (seeds, pairs)."""
    moved = {
        method: f"chosen {shown(own[method]['chosen'])}, rejected {shown(own[method]['rejected'])} a token, DPO's loss "
        f"{shown(dpo_losses(own[method]['margin']))}"
        for method in WITH_SEEDS
    }
    pg = own["DPO-PG"]
    return [
        report.Verdict(
            6, "DGPO Fig. 1, 2", f"DPO lowers the chosen log-prob; {part} pairs.", LOWERS,
            below(own["DPO"]["chosen"]) if learnt else None, moved["DPO"],
        ),
        report.Verdict(
            6, "DGPO Fig. 1, 2", f"DGPO raises the chosen log-prob; {part} pairs.", RAISES,
            above(own["DGPO"]["chosen"]) if learnt else None, moved["DGPO"],
        ),
        report.Verdict(
            7, "DPO-PG Fig. 8, 9",
            f"DPO-PG raises the chosen, never the rejected log-prob, and DPO's loss still falls; {part} pairs.",
            CLAIM_7,
            report.all_hold(
                above(pg["chosen"]), below(dpo_losses(pg["margin"])), above(pg["rejected"]) is not True
            ),
            moved["DPO-PG"],
        ),
    ]  # fmt: skip


def judge_samples(samples: dict, learnt: bool) -> report.Verdict:
    """Claim 8, from alpha -> what sample() found."""
    ends = {name: [differences(samples, name, 0.8, 1.2)] for name in MEASURES}
    ends["self_bleu"] = [[-value for value in ends["self_bleu"][0]]]
    return report.Verdict(
        8, "H-DPO Table 2", "Entropy, Distinct and inverted Self-BLEU rise with alpha in 0.8 ... 1.2.", CLAIM_8,
        report.all_hold(*map(above, ends.values())) if learnt else None,
        "from alpha 0.8 to 1.2, a run of each: "
        + ", ".join(
            f"{'inverted ' * (name == 'self_bleu')}{label} {shown(ends[name])}" for name, label in MEASURES.items()
        ),
    )  # fmt: skip


def judge_decisions(held_out: dict, kind: str, meaning: str) -> report.Verdict:
    """Claim 12, of decisions in one arithmetic."""
    decisions = [held_out["eps-DPO"][f"{kind} {epsilon:g}"][0] for epsilon in EPSILONS]
    rises = [[[abs(b) - abs(a) for a, b in zip(*both)]] for both in pairwise(decisions)]
    shares = ", ".join(f"{share(held_out, kind, epsilon):.3f}" for epsilon in EPSILONS)
    return report.Verdict(
        12, "eps-DPO Fig. 3", f"A larger eps adapts more often ({meaning}).", OFTEN,
        report.all_hold(*map(above, rises)),
        f"{shares} of the pairs; " + ", then ".join(shown(rise, 3) for rise in rises),
    )  # fmt: skip


def judge(pairs: dict, samples: dict) -> list[report.Verdict]:
    """The verdicts, from part -> method -> what score() found, and alpha -> what sample() found."""
    learnt = below(dpo_losses(pairs["trained"]["DPO"]["margin"])) is True
    verdicts = [verdict for part, own in pairs.items() for verdict in judge_pairs(part, own, learnt)]
    verdicts.append(judge_samples(samples, learnt))
    for kind, meaning in (("exact", "exact decisions"), ("bf16", "decisions in bf16, as the authors' code has them")):
        verdicts.append(judge_decisions(pairs["held-out"], kind, meaning))
    return [replace(verdict, where="real model") for verdict in verdicts]


def tables(args: Args, runs: dict, pairs: dict, samples: dict, seen: float) -> str:
    """What was found, in sentences, and every number."""
    held_out = pairs["held-out"]
    kls = {method: fmean(held_out[method]["kl"][0]) for method in METHODS}
    least, most = min(kls, key=kls.get), max(kls, key=kls.get)
    start = {name: runs["DPO", 0]["curves"][name][1][0] for name in ("chosen", "rejected")}
    text = (
        f"{Path(args.model).name} on pairs of {Path(args.dataset).name} of at most {args.max_tokens} tokens: "
        f"{args.steps} steps of {args.batch_size} pairs, peak learning rate {args.lr:g} (DPO-PG {args.lr_pg:g}), beta "
        f"{BETA:g}; {', '.join(WITH_SEEDS)} from {args.seeds} seeds. A run has seen {min(1, seen):.0%} of the training "
        f"pairs; {len(held_out['DPO']['kl'][0])} of these, and as many held-out ones, are measured.\n\n"
        "All methods from seed 0, by more than two standard errors over pairs: "
        + "; ".join(
            f"on {part} pairs {moves(own, 'chosen')} and {moves(own, 'rejected')}" for part, own in pairs.items()
        )
        + f". On held-out pairs {least} stays closest to the model before training, with a KL of {kls[least]:.3f} a "
        f"response, and {most} goes furthest, with {kls[most]:.3f}. Samples have an entropy of "
        + ", ".join(f"{fmean(own['entropy']):.3f} (alpha {alpha:g})" for alpha, own in samples.items())
        + f" nats a token. At eps {EPSILONS[1]:g}, exact decisions adapt {share(held_out, 'exact', EPSILONS[1]):.0%} "
        f"of the pairs and decisions in bf16 {share(held_out, 'bf16', EPSILONS[1]):.0%}.\n"
    )
    for part in PARTS:
        began = f", where the log-probs per token are {start['chosen']:.3f} and {start['rejected']:.3f}"
        text += (
            f"\nChanges on {part} pairs from the start{began * (part == 'held-out')}; standard errors over pairs. "
            "KL(pi, ref) is over the vocabulary along the responses, of a response.\n\n"
        )
        rows = []
        for (method, seed), run in runs.items():
            own = {name: [values] for name, values in run["pairs"][part].items()}
            cells = shown(own["chosen"]), shown(own["rejected"]), shown(dpo_losses(own["margin"]))
            rows.append([method, seed, *cells, shown(own["kl"], 3, "")])
        text += report.table(["method", "seed", "chosen", "rejected", "DPO's loss", "KL(pi, ref)"], rows)
    text += (
        f"\n{args.samples} samples of each of {len(samples[1.0]['entropy'])} held-out prompts at temperature 1, of at "
        f"most {args.max_new_tokens} tokens; entropy in nats a token; standard errors over prompts.\n\n"
    )
    rows = [[f"{alpha:g}", *(shown([own[name]], 3, "") for name in MEASURES)] for alpha, own in samples.items()]
    text += report.table(["alpha", *MEASURES.values()], rows)
    text += "\nShare of held-out pairs whose beta eps-DPO's policy would change (of those whose beta would grow).\n\n"
    rows = []
    for kind in ("exact", "bf16"):
        ways = [held_out["eps-DPO"][f"{kind} {epsilon:g}"][0] for epsilon in EPSILONS]
        rows.append([kind, *(f"{fmean(map(abs, own)):.3f} ({fmean(way > 0 for way in own):.3f})" for own in ways)])
    return text + report.table(["arithmetic", *(f"eps {epsilon:g}" for epsilon in EPSILONS)], rows)


def main(args: Args) -> None:
    if args.fast:
        args = replace(
            args, model=str(report.TOY / "model"), dataset=str(report.TOY / "test.jsonl"), max_tokens=200, held_out=6,
            steps=2, seeds=min(args.seeds, 2), prompts=3, samples=3,
        )  # fmt: skip
    folder = Path(args.runs).resolve()
    spent = folder / "seconds"  # by what came to its end here before
    report.STARTED -= float(spent.read_text()) if args.resume and spent.exists() else 0
    folder.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(args).items() if name not in MAY_DIFFER}
    if args.resume and settings != json.loads((folder / "settings.json").read_text()):
        sys.exit(f"error: --resume: {folder} was started with other flags ({folder / 'settings.json'})")
    if not args.resume:
        for path in (*folder.glob("*/found.json"), *folder.glob("*/eval/samples*.jsonl")):
            path.unlink()
        prepare(folder, args)
        (folder / "settings.json").write_text(json.dumps(settings, indent=1))
    keys = [(method, 0) for method in METHODS]
    keys += [(method, seed) for seed in range(1, args.seeds) for method in WITH_SEEDS]
    found = report.side_by_side([lambda key=key: run(*key, args) for key in keys], args.jobs)
    runs = dict(zip(keys, found))
    pairs = {
        part: {
            method: {
                name: [run["pairs"][part][name] for (own, _), run in runs.items() if own == method] for name in names
            }
            for method in METHODS
        }
        for part, names in found[0]["pairs"].items()
    }
    samples = {alpha: runs[method, 0]["samples"] for alpha, method in ALPHAS.items()}

    spent.write_text(f"{time.perf_counter() - report.STARTED}")
    seen = args.steps * args.batch_size / len((folder / "train.jsonl").read_text().splitlines())
    text = tables(args, runs, pairs, samples, seen)
    report.save(args, "real_model", judge(pairs, samples), text, draw(runs, pairs["held-out"], samples))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
