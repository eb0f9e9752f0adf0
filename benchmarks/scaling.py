"""What a pair costs as a micro-batch grows: forward and backward of the same pairs, as the scripts lay them out, and in
one long row.

    python benchmarks/scaling.py        (two CPU cores, about four minutes)

On a CPU, or under sdpa elsewhere, attention over a row costs its length squared, so the scripts cut a micro-batch into
rows of bounded length (common.row_tokens), run one after the other.
"""

import sys
import time
from pathlib import Path
from statistics import median

from datasets import Dataset
from sides import make_model, make_pairs, stored_dpo_losses

sys.path.insert(0, str(Path(__file__).parents[1]))

import common

TOKENS = (512, 1024, 2048, 4096, 8192)
TURNS = 3


def seconds(model, rows: list[dict], plan: list[list[int]]) -> float:
    """Forward and backward of all micro-batches."""
    started = time.perf_counter()
    for indices in plan:
        batch = common.collate([rows[i] for i in indices])
        stored_dpo_losses(*common.response_logps(model, batch)).sum().backward()
    passed = time.perf_counter() - started
    model.zero_grad()
    return passed


def main() -> None:
    model, rows = make_model().train(), make_pairs("hh", 64)
    lengths = common.pair_lengths(Dataset.from_list(rows))
    print("| tokens a micro-batch | pairs | rows of bounded length: ms a token | one row: ms a token |")
    print("| --- | --- | --- | --- |")
    for tokens in TOKENS:
        pairs = [i for i in range(len(rows)) if sum(lengths[: i + 1]) <= tokens]
        total, bounds = sum(lengths[i] for i in pairs), (common.row_tokens(model, tokens), tokens)
        plans = [common.micro_batches(pairs, lengths, bound, 1)[0] for bound in bounds]
        turns = [[seconds(model, rows, plan) for plan in plans] for _ in range(TURNS + 1)][1:]  # the first allocates
        bounded, one = (1000 * median(column) / total for column in zip(*turns))
        print(f"| {tokens} | {len(pairs)} | {bounded:.2f} | {one:.2f} |", flush=True)


if __name__ == "__main__":
    main()
