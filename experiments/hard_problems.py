"""On hard problems a higher alpha/beta finds more with many samples (claim 10)

    https://arxiv.org/abs/2511.08594    DPL, Fig. 3 and 8, Table 1: on the hard splits of GSM8K and MATH, a policy of a
                                        higher alpha/beta starts below DPO at one sample and crosses above it at large N

    python experiments/hard_problems.py        (two CPU cores, about ten minutes)

The split is the paper's (4.2): problems for which the base model needs more than 64 samples. Here, those of 200 new
problems of four operations that the toy's model does not solve in 64. dpl.py trains adapters on the toy for 250 steps
of 8 pairs (the paper: 5,000), for four alpha/beta and three seeds; eval_passk.py then draws 128 samples of each hard
problem. beta is 1 here, not the paper's 0.1, for the reason in alpha_sweep.py; adapters of a tiny model need a larger
learning rate, too.
"""

import json
import random
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean

import report
import tyro

sys.path.insert(0, str(report.TOY))

import make_toy  # noqa: E402

RATIOS = (1.0, 1.2, 1.5, 2.0)

CLAIM_10 = (
    "for one alpha/beta above 1, means over seeds: pass@1 below DPO's and pass@128 above it, the latter by more than "
    "two standard errors of the difference over seeds"
)


@dataclass
class Args:
    seeds: int = 3
    """Runs of each alpha/beta"""
    problems: int = 200
    """Problems of four operations to look for hard ones among"""
    n: int = 128
    """Samples of each problem (4.2)"""
    runs: str = "runs/hard_problems"
    """Where the runs go"""
    results: str = str(report.RESULTS)
    """Where the table and the figure go"""
    fast: bool = False
    """Two steps and few problems, to see that it runs; its verdict means nothing"""


def new_problems(count: int) -> list[dict]:
    """Problems of four operations that the toy's model and pairs have not seen."""
    seen = make_toy.PROBLEMS + make_toy.SFT_STEPS * make_toy.SFT_BATCH_SIZE
    known = {problem.question for problem in islice(make_toy.problem_stream(random.Random(make_toy.SEED)), seen)}
    for name in ("train", "test", "near_train", "near_test"):
        rows = map(json.loads, (report.TOY / f"{name}.jsonl").read_text().splitlines())
        known |= {row["prompt"][0]["content"] for row in rows}
    stream = make_toy.problem_stream(random.Random("hard problems"))
    fresh = (problem for problem in stream if problem.difficulty == 4 and problem.question not in known)
    return [{"question": problem.question, "answer": problem.solution()} for problem in islice(fresh, count)]


def find_hard(args: Args) -> Path:
    """A file of the problems that the toy's model does not solve in 64 samples."""
    folder = Path(args.runs).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rows = new_problems(args.problems)

    def look(part: int) -> list[dict]:
        """Half of the problems, so that both cores sample."""
        half = folder / f"new_{part}.jsonl"
        half.write_text("".join(json.dumps(row) + "\n" for row in rows[part::2]))
        found = report.passk(report.TOY / "model", folder / f"base_{part}", half, len(rows), 4 if args.fast else 64)
        return [row for row, own in zip(rows[part::2], found["problems"]) if own["c"] == 0]

    hard = sum(report.side_by_side([lambda part=part: look(part) for part in range(2)]), [])
    if not hard:
        raise SystemExit(
            f"error: the base model solves all of {len(rows)} problems, so none is hard; take more of them"
        )
    (folder / "hard.jsonl").write_text("".join(json.dumps(row) + "\n" for row in hard))
    return folder / "hard.jsonl"


def train_and_sample(ratio: float, seed: int, hard: Path, args: Args) -> dict[int, float]:
    """k -> pass@k on the hard problems after one run of dpl.py."""
    folder = Path(args.runs, f"ratio-{ratio:g}-{seed}").resolve()
    report.launch(
        "dpl.py", "--model", report.TOY / "model", "--dataset", report.TOY / "train.jsonl", "--beta", 1,
        "--alpha", ratio, "--lr", 1e-3, "--batch-size", 8, "--warmup", 0.1, "--steps", 2 if args.fast else 250,
        "--seed", seed, "--output-dir", folder, "--overwrite",
    )  # fmt: skip
    found = report.passk(folder / "model", folder / "eval", hard, args.problems, args.n)["pass@k"]
    return {int(k): value["mean"] for k, value in found.items()}


def standard_error(differences: list[float]) -> float:
    mean = fmean(differences)
    return (sum((d - mean) ** 2 for d in differences) / max(1, len(differences) - 1) / len(differences)) ** 0.5


def draw(found: dict, ratios, seeds: int):
    figure, axes = report.axes(1, 2, width=9, height=3.2)
    shades, every = report.shades(ratios), range(seeds)
    ks = list(found[1.0, 0])
    shown = [k for k in ks if all(found[1.0, s][k] for s in every)]  # where DPO solved anything
    for ratio in ratios:
        means = [fmean(found[ratio, s][k] for s in every) for k in ks]
        axes[0, 0].plot(ks, means, "o-", color=shades[ratio], markersize=3, label=f"{ratio:g}")
        if shown:
            gains = [[found[ratio, s][k] / found[1.0, s][k] for k in shown] for s in every]
            axes[0, 1].plot(shown, [fmean(g) for g in zip(*gains)], "o-", color=shades[ratio], markersize=3)
            low, high = ([f(g) for g in zip(*gains)] for f in (min, max))
            axes[0, 1].fill_between(shown, low, high, color=shades[ratio], alpha=0.15)
    axes[0, 0].set(xscale="log", xlabel="$N$ samples", ylabel="best-of-$N$ accuracy, hard problems")
    axes[0, 1].set(xscale="log", xlabel="$N$ samples", ylabel="the same, relative to DPO")
    axes[0, 0].legend(title="$\\alpha/\\beta$")
    return figure


def main(args: Args) -> None:
    hard = find_hard(args)
    count = len(hard.read_text().splitlines())
    ratios = (1.0, 2.0) if args.fast else RATIOS
    keys = [(ratio, seed) for ratio in ratios for seed in range(args.seeds)]
    jobs = [lambda key=key: train_and_sample(*key, hard, args) for key in keys]
    found = dict(zip(keys, report.side_by_side(jobs)))
    every, ks = range(args.seeds), list(found[1.0, 0])

    def difference(ratio, k):
        return [found[ratio, s][k] - found[1.0, s][k] for s in every]

    crossing = [
        ratio
        for ratio in ratios
        if ratio > 1
        and fmean(difference(ratio, ks[0])) < 0
        and fmean(difference(ratio, ks[-1])) > 2 * standard_error(difference(ratio, ks[-1]))
    ]
    text = (
        f"Best-of-N accuracy in percent on {count} hard problems, {args.n} samples each at temperature 1; mean over "
        f"{args.seeds} seeds (range).\n\n"
        + report.table(
            ["alpha/beta", *(f"N = {k}" for k in ks)],
            [[f"{r:g}", *(report.spread([100 * found[r, s][k] for s in every], 1) for k in ks)] for r in ratios],
        )
    )
    numbers = [
        f"alpha/beta {ratio:g} against DPO: {100 * fmean(difference(ratio, ks[0])):+.1f} points at N = 1, "
        f"{100 * fmean(difference(ratio, ks[-1])):+.1f} (standard error "
        f"{100 * standard_error(difference(ratio, ks[-1])):.1f}) at N = {ks[-1]}"
        for ratio in ratios
        if ratio > 1
    ]
    verdict = report.Verdict(
        10, "DPL Fig. 3, 8", "On hard problems a higher alpha/beta crosses above DPO at large N.", CLAIM_10,
        bool(crossing), "; ".join(numbers),
    )  # fmt: skip
    report.save(args, "hard_problems", [verdict], text, draw(found, ratios, args.seeds))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
