"""On hard problems a higher alpha/beta finds more with many samples (claim 10)

    https://arxiv.org/abs/2511.08594    DPL, Fig. 3 and 8, Table 1: on the hard splits of GSM8K and MATH, a policy of a
                                        higher alpha/beta starts below DPO at one sample and crosses above it at large N

    python experiments/hard_problems.py        (two CPU cores, about five minutes)

The split is the paper's (4.2): problems for which the base model needs more than 64 samples. Here, those of 2,000 new
problems of four operations. dpl.py trains adapters on the toy for 250 steps of 8 pairs (the paper: 5,000), for four
alpha/beta and three seeds. beta is 1 here, not the paper's 0.1, for the reason in alpha_sweep.py; adapters of a tiny
model need a larger learning rate, too.

Nothing is sampled: a problem has one or two right workings out (its products in either order), their probability under
a model is exact, and 1 - (1 - p)^N is best-of-N accuracy for every N. That grader is stricter than the paper's: a right
answer at the end of a wrong working out does not count.
"""

import json
import random
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import closed_form
import report
import torch
import tyro
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(report.TOY))

import make_toy  # noqa: E402

RATIOS = (1.0, 1.1, 1.2, 2.0)  # DPO, the two of Table 1, and one far beyond
NS = (1, 4, 16, 64, 128, 256)

PAPER = closed_form.PAPER
CLAIM_10 = (
    f"alpha/beta {closed_form.listed(PAPER)} are each {{}} DPO at N = {{}} by more than two standard errors, over "
    "problems and seeds, paired; undecided where one is nearer to DPO than that"
)


@dataclass
class Args:
    seeds: int = 3
    """Runs of each alpha/beta"""
    problems: int = 2000
    """Problems of four operations to look for hard ones among"""
    runs: str = "runs/hard_problems"
    """Where the runs go"""
    results: str = str(report.RESULTS)
    """Where the table and the figure go"""
    fast: bool = False
    """Two steps and few problems, to see that it runs; its verdicts mean nothing"""


def new_problems(count: int) -> list[make_toy.Problem]:
    """Problems of four operations that the toy's model and pairs have not seen."""
    seen = make_toy.PROBLEMS + make_toy.SFT_STEPS * make_toy.SFT_BATCH_SIZE
    known = {problem.question for problem in islice(make_toy.problem_stream(random.Random(make_toy.SEED)), seen)}
    for name in ("train", "test", "near_train", "near_test"):
        rows = map(json.loads, (report.TOY / f"{name}.jsonl").read_text().splitlines())
        known |= {row["prompt"][0]["content"] for row in rows}
    stream = make_toy.problem_stream(random.Random("hard problems"))
    fresh = (problem for problem in stream if problem.difficulty == 4 and problem.question not in known)
    return list(islice(fresh, count))


@torch.inference_mode()
def chances(model: str | Path, problems: list[make_toy.Problem], temperatures=(1.0,)) -> Tensor:
    """Chance that one sample is a right working out of the problem, (problems, temperatures), in float64."""
    tokenizer = AutoTokenizer.from_pretrained(report.TOY / "model")
    policy = AutoModelForCausalLM.from_pretrained(model).eval()
    rows, found = [], torch.zeros(len(problems), len(temperatures), dtype=torch.float64)
    for i, problem in enumerate(problems):
        question = [{"role": "user", "content": problem.question}]
        prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        # 16 draws of the order of two products miss one of them once in 32,768 problems
        for text in sorted({problem.solution(random.Random(seed)) for seed in range(16)}):
            answer = [*question, {"role": "assistant", "content": text}]
            whole = tokenizer.apply_chat_template(answer, tokenize=False)
            ids, start = (tokenizer(part, add_special_tokens=False).input_ids for part in (whole, prompt))
            rows.append((i, torch.tensor(ids), len(start)))
    rows.sort(key=lambda row: len(row[1]))  # so that little is padded
    for at in range(0, len(rows), 64):
        owners, ids, starts = zip(*rows[at : at + 64])
        ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
        logits = policy(ids).logits[:, :-1].double()  # padding comes last, and attention is causal
        place = torch.arange(1, ids.shape[1])
        answer = (place >= torch.tensor(starts)[:, None]) & (ids[:, 1:] != tokenizer.pad_token_id)
        for column, temperature in enumerate(temperatures):
            logps = (logits / temperature).log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            found[:, column].index_add_(0, torch.tensor(owners), (logps * answer).sum(1).exp())
    return found


def train(ratio: float, seed: int, args: Args) -> Path:
    """The model after one run of dpl.py."""
    folder = Path(args.runs, f"ratio-{ratio:g}-{seed}").resolve()
    report.launch(
        "dpl.py", "--model", report.TOY / "model", "--dataset", report.TOY / "train.jsonl", "--beta", 1,
        "--alpha", ratio, "--lr", 1e-3, "--batch-size", 8, "--warmup", 0.1, "--steps", 2 if args.fast else 250,
        "--seed", seed, "--output-dir", folder, "--overwrite",
    )  # fmt: skip
    return folder / "model"


def judge(found: dict[float, Tensor], base: dict[int, float]) -> list[report.Verdict]:
    """The crossing: above DPO at the last N, below at the first.

    found  alpha/beta -> best-of-N accuracy (seeds, problems, NS)
    base   N -> the model's before training, mean over the problems
    """
    ahead = {ratio: found[ratio] - found[1.0] for ratio in found if ratio > 1}

    def verdict(statement: str, side: str, at: int) -> report.Verdict:
        sign = 1 if side == "above" else -1
        holds = closed_form.lowest(
            [closed_form.decisions(own, sign)[NS.index(at)] for ratio, own in ahead.items() if ratio in PAPER]
        )
        numbers = [f"alpha/beta {ratio:g}: {closed_form.gains(ahead[ratio], (at,), NS)}" for ratio in ahead]
        numbers.append(f"DPO {100 * found[1.0][..., NS.index(at)].mean():.1f}%, the base model {100 * base[at]:.1f}%")
        return report.Verdict(10, "DPL Fig. 3, 8", statement, CLAIM_10.format(side, at), holds, "; ".join(numbers))

    return [
        verdict("On hard problems a higher alpha/beta is above DPO at large N.", "above", NS[-1]),
        verdict("It starts below DPO at one sample.", "below", NS[0]),
    ]


def draw(found: dict[float, Tensor]):
    """Best-of-N accuracy, and its difference to DPO with standard errors."""
    figure, ((left, right),) = report.axes(1, 2, width=9, height=3.2)
    shades = report.shades(list(found))
    for ratio, values in found.items():
        left.plot(NS, 100 * values.mean((0, 1)), "o-", color=shades[ratio], markersize=3, label=f"{ratio:g}")
        if ratio > 1:
            means, errors = closed_form.effect(values - found[1.0])
            right.errorbar(NS, means, errors, marker="o", color=shades[ratio], markersize=3)
    right.axhline(0, color="black", linewidth=0.8)
    left.set(xscale="log", xlabel="$N$ samples", ylabel="best-of-$N$ accuracy, percent")
    right.set(xscale="log", xlabel="$N$ samples", ylabel="the same less DPO's, points")
    left.legend(title="$\\alpha/\\beta$")
    return figure


def main(args: Args) -> None:
    problems = new_problems(80 if args.fast else args.problems)
    base = chances(report.TOY / "model", problems)[:, 0]
    hard = [problem for problem, chance in zip(problems, base) if chance < 1 / 64]
    if len(hard) < 2:
        raise SystemExit(f"error: {len(hard)} of {len(problems)} problems are hard for the base model; take more")
    ratios, seeds = (1.0, 1.1) if args.fast else RATIOS, range(args.seeds)
    keys = [(ratio, seed) for ratio in ratios for seed in seeds]
    models = dict(zip(keys, report.side_by_side([lambda key=key: train(*key, args) for key in keys])))
    found = {
        ratio: torch.stack([closed_form.pass_at(chances(models[ratio, s], hard)[:, 0], NS) for s in seeds])
        for ratio in ratios
    }
    rows = [
        [f"{r:g}", *(report.spread((100 * column).tolist(), 1) for column in v.mean(1).T)] for r, v in found.items()
    ]
    base = dict(zip(NS, closed_form.pass_at(base[base < 1 / 64], NS).mean(0).tolist()))
    rows.insert(0, ["base model", *(f"{100 * value:.1f}" for value in base.values())])
    text = (
        f"Best-of-N accuracy in percent on {len(hard)} hard problems of {len(problems)}, exact, at temperature 1; mean "
        f"over {args.seeds} seeds (range).\n\n" + report.table(["alpha/beta", *(f"N = {n}" for n in NS)], rows)
    )
    report.save(args, "hard_problems", judge(found, base), text, draw(found))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
