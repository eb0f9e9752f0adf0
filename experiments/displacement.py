"""Likelihood displacement: what DPO, DGPO and DPO-PG do to the chosen response's log-prob (claims 6, 7 and 15)

    DGPO    https://openreview.net/forum?id=wmi6satsIu    Fig. 1, 2, Table 3: DPO lowers it, DGPO raises it
            Sec. 2.3, Fig. 8: unrelated rejected responses "alleviate" DPO's displacement
    DPO-PG  https://arxiv.org/abs/2505.23761              Fig. 8, 9: chosen up, rejected not up, and DPO's loss falls

    python experiments/displacement.py        (two CPU cores, about five minutes)

The toy's near-duplicate pairs differ in one digit, so the gradients of log pi(y_w|x) and log pi(y_l|x) nearly agree
(DGPO's Eqs. 4-7 say that then both can fall together). Every method takes the same 64 steps of 16 pairs, at three
learning rates, from three seeds; log-probs are means per token on 128 held-out pairs. The paper replaces rejected
responses by "meaningless" ones from "irrelevant datasets", which is read in two ways: another problem's response
("unrelated"), and the response's characters in a random order ("meaningless").
"""

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import report
import tyro

TOY = report.TOY
RATES = (1e-5, 3e-5, 1e-4)
# Arguments beside those that all share; each method's schedule and optimizer are its paper's.
METHODS = {
    "DPO": ("hdpo.py", "--alpha", 1, "--beta", 0.1),
    "DGPO": ("dgpo.py",),
    "DPO-PG": ("dpo_pg.py", "--log-dpo-loss", "--dpo-beta", 0.1),
    "DPO, unrelated": ("hdpo.py", "--alpha", 1, "--beta", 0.1),
    "DPO, meaningless": ("hdpo.py", "--alpha", 1, "--beta", 0.1),
}

# Thresholds. DPO-PG's theorems (H.4, H.5) are of first order, so they are judged at the smallest rate.
CLAIM_6 = (
    "at one learning rate that both use, in every seed: DPO ends with a lower chosen log-prob, DGPO with a higher one"
)
CLAIM_7 = "at lr 1e-5, in every seed: chosen log-prob higher, rejected not higher, DPO's loss lower than at the start"
CLAIM_15 = "at the rate where DPO lowers the chosen log-prob most: less than a tenth of that fall is left"


@dataclass
class Args:
    seeds: int = 3
    """Runs of each kind"""
    steps: int = 64
    """Optimizer steps of a run"""
    runs: str = "runs/displacement"
    """Where the runs go"""
    results: str = str(report.RESULTS)
    """Where the table and the figure go"""
    fast: bool = False
    """One rate and few pairs, to see that it runs; its verdicts mean nothing"""


def exchange(kind: str, source: Path, target: Path) -> Path:
    """The pairs of `source` with other rejected responses: of the next pair in a random order, or scrambled."""
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    rng = random.Random(0)
    texts = [row["rejected"][0]["content"] for row in rows]
    if kind == "unrelated":
        order = rng.sample(range(len(rows)), len(rows))
        others = {here: texts[there] for here, there in zip(order, order[1:] + order[:1])}
    else:
        others = {i: "".join(rng.sample(text, len(text))) for i, text in enumerate(texts)}
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w") as file:
        for i, row in enumerate(rows):
            file.write(json.dumps(row | {"rejected": [{"role": "assistant", "content": others[i]}]}) + "\n")
    return target


def train(method: str, rate: float, seed: int, args: Args, data: dict[str, Path]) -> Path:
    """Launch one run; returns its directory."""
    script, *more = METHODS[method]
    folder = Path(args.runs, f"{method.replace(', ', '-')}-{rate:g}-{seed}".lower()).resolve()
    report.launch(
        script, *more, "--model", TOY / "model", "--dataset", data["train"], "--eval-dataset", data["test"],
        "--lr", rate, "--warmup", 0.1, "--batch-size", 16, "--epochs", 8, "--steps", args.steps, "--seed", seed,
        "--eval-every", max(1, args.steps // 4), "--output-dir", folder, "--overwrite",
    )  # fmt: skip
    return folder


def change(folder: Path, name: str) -> float:
    """Last minus first value of a metric on the held-out pairs."""
    values = report.metrics(folder, f"eval/{name}")
    return values[-1][1] - values[0][1]


def draw(runs: dict, rates, shown: float, seeds: int):
    """Above, log-probs over the steps: DPO-PG's at the rate of claim 7, the others' at `shown`. Below, their ends."""
    figure, axes = report.axes(2, len(METHODS), width=13, height=2.9)
    for column, method in enumerate(METHODS):
        rate = rates[0] if method == "DPO-PG" else shown
        color = report.COLOURS[method.split(",")[0]]
        top, below = axes[0, column], axes[1, column]
        for seed in range(seeds):
            for name, style in (("chosen", "-"), ("rejected", "--")):
                steps, values = zip(*report.metrics(runs[method, rate, seed], f"eval/logps/{name}"))
                values = [value - values[0] for value in values]
                top.plot(steps, values, style, color=color, alpha=0.8, label=None if seed else name)
        top.axhline(0, color="black", linewidth=0.8)
        top.set_title(f"{method}\nlr {rate:g}")
        top.set_xlabel("optimizer step")
        for name, marker in (("chosen", "o"), ("rejected", "x")):
            points = [
                (rate, change(runs[method, rate, seed], f"logps/{name}")) for rate in rates for seed in range(seeds)
            ]
            below.plot(*zip(*points), marker, color=color, label=name)
        below.axhline(0, color="black", linewidth=0.8)
        below.set(xscale="log", yscale="symlog", xlabel="learning rate")
        below.set_yscale("symlog", linthresh=0.01)
        top.legend(), below.legend()
    axes[0, 0].set_ylabel("change of $\\log\\pi$ per token")
    axes[1, 0].set_ylabel("change at the end")
    return figure


def main(args: Args) -> None:
    folder = Path(args.runs)
    near = {"train": TOY / "near_train.jsonl", "test": TOY / "near_test.jsonl"}
    data = dict.fromkeys(METHODS, near)
    for kind in ("unrelated", "meaningless"):
        data[f"DPO, {kind}"] = {
            part: exchange(kind, path, folder / f"{kind}_{part}.jsonl").resolve() for part, path in near.items()
        }
    rates = RATES[-1:] if args.fast else RATES
    keys = [(method, rate, seed) for method in METHODS for rate in rates for seed in range(args.seeds)]
    folders = report.side_by_side([lambda key=key: train(*key, args, data[key[0]]) for key in keys])
    runs = dict(zip(keys, folders))

    def changes(method, rate, name):
        return [change(runs[method, rate, seed], name) for seed in range(args.seeds)]

    rows = []
    for method in METHODS:
        for rate in rates:
            cells = [report.spread(changes(method, rate, f"logps/{name}"), 4) for name in ("chosen", "rejected")]
            loss = report.spread(changes(method, rate, "dpo_loss" if method == "DPO-PG" else "loss"), 4)
            chosen, rejected = (sum(changes(method, rate, f"logps/{name}")) for name in ("chosen", "rejected"))
            rows.append([method, f"{rate:g}", *cells, loss, f"{chosen / (chosen - rejected):+.3f}"])
    starts = {
        method: report.metrics(runs[method, rates[0], 0], "eval/logps/rejected")[0][1]
        for method in ("DPO", "DPO, unrelated", "DPO, meaningless")
    }
    start = report.metrics(folders[0], "eval/logps/chosen")[0][1]
    text = (
        f"Change of the mean log-prob per token on held-out pairs after {args.steps} steps of 16 pairs, from "
        f"{start:.4f} (chosen) and {', '.join(f'{value:.2f}' for value in starts.values())} (rejected: near-"
        f"duplicates, unrelated, meaningless); mean over {args.seeds} seeds (range). "
        "The loss is each method's own, for DPO-PG it is DPO's (beta 0.1). The last column is the chosen change for "
        "each nat that the margin, chosen less rejected, has gained.\n\n"
        + report.table(["method", "lr", "chosen", "rejected", "loss", "chosen / margin"], rows)
    )

    shown = [r for r in rates if max(changes("DPO", r, "logps/chosen")) < 0 < min(changes("DGPO", r, "logps/chosen"))]
    pg = {name: changes("DPO-PG", rates[0], name) for name in ("logps/chosen", "logps/rejected", "dpo_loss")}
    worst = min(rates, key=lambda rate: sum(changes("DPO", rate, "logps/chosen")))
    falls = changes("DPO", worst, "logps/chosen")
    fall = sum(falls) / args.seeds
    every = "; ".join(
        f"lr {rate:g}: DPO {report.spread(changes('DPO', rate, 'logps/chosen'), 4)}, "
        f"DGPO {report.spread(changes('DGPO', rate, 'logps/chosen'), 4)}"
        for rate in rates
    )
    verdicts = [
        report.Verdict(
            6, "DGPO Fig. 1, 2, Table 3", "On near-duplicate pairs DPO lowers the chosen log-prob and DGPO raises it.",
            CLAIM_6, bool(shown), f"at {len(shown)} of {len(rates)} rates. {every}",
        ),
        report.Verdict(
            7, "DPO-PG Fig. 8, 9", "DPO-PG raises the chosen, never the rejected log-prob, and DPO's loss still falls.",
            CLAIM_7,
            min(pg["logps/chosen"]) > 0 and max(pg["logps/rejected"]) <= 0 and max(pg["dpo_loss"]) < 0,
            f"lr {rates[0]:g}: chosen {report.spread(pg['logps/chosen'], 4)}, rejected "
            f"{report.spread(pg['logps/rejected'], 4)}, DPO's loss {report.spread(pg['dpo_loss'], 4)}",
        ),
    ]  # fmt: skip
    for kind in ("unrelated", "meaningless"):
        ends = changes(f"DPO, {kind}", worst, "logps/chosen")
        left = sum(ends) / args.seeds / fall
        statement = f"DPO's displacement goes away with rejected responses that are {kind}."
        numbers = (
            f"chosen at lr {worst:g}: {report.spread(ends, 4)}, near-duplicates {report.spread(falls, 4)}; "
            f"{100 * left:.0f}% of the fall is left"
        )
        verdicts.append(
            report.Verdict(15, "DGPO Sec. 2.3, Fig. 8", statement, CLAIM_15, fall < 0 and left < 0.1, numbers)
        )
    report.save(args, "displacement", verdicts, text, draw(runs, rates, worst, args.seeds))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
