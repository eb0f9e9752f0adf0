"""What a token costs as rows grow: forward and backward of the same pairs, in rows of at most 512 to 8,192 tokens.

    python benchmarks/scaling.py        (two CPU cores, about two minutes)

Attention runs over segments (common.packed_attention), so a longer row should cost no more a token: at 8,192 tokens at
most 1.15 times the cost at 512. All lengths take turns; a ratio is the median over the turns.
"""

import os
import sys
import time
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # CPU threads that spin while they wait slow each other down

from datasets import Dataset
from sides import make_model, make_pairs, stored_dpo_losses

sys.path.insert(0, str(Path(__file__).parents[1]))

import common

TOKENS = (512, 1024, 2048, 4096, 8192)
TURNS = 3


def seconds(model, rows: list[dict], plan: list[list[int]]) -> float:
    """Forward and backward of all rows of tokens."""
    started = time.perf_counter()
    for indices in plan:
        batch = common.collate([rows[i] for i in indices])
        stored_dpo_losses(*common.response_logps(model, batch)).sum().backward()
    passed = time.perf_counter() - started
    model.zero_grad()
    return passed


def main() -> None:
    model, rows = make_model().train(), make_pairs("hh", 64)
    model.set_attn_implementation(common.ATTENTION)
    lengths = common.pair_lengths(Dataset.from_list(rows))
    pairs = [i for i in range(len(rows)) if sum(lengths[: i + 1]) <= max(TOKENS)]
    plans = [common.micro_batches(pairs, lengths, tokens, 1)[0] for tokens in TOKENS]
    turns = [[seconds(model, rows, plan) for plan in plans] for _ in range(TURNS + 1)][1:]  # the first allocates
    print(
        "| tokens a row, at most | rows | ms a token | range | to 512 | range |\n| --- | --- | --- | --- | --- | --- |"
    )
    for tokens, plan, column in zip(TOKENS, plans, zip(*turns)):
        costs = [1000 * one / sum(lengths[i] for i in pairs) for one in column]
        ratios = [one / turn[0] for one, turn in zip(column, turns)]
        print(
            f"| {tokens} | {len(plan)} | {median(costs):.2f} | {min(costs):.2f} to {max(costs):.2f} | "
            f"{median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |"
        )


if __name__ == "__main__":
    main()
