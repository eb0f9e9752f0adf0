"""Where the time of a training step goes: operations in kinds, by torch's profiler.

    python benchmarks/operations.py                       (lengths like HH-RLHF's; about a minute on two idle cores)
    python benchmarks/operations.py --lengths worst

The step is the scripts' own with DPO's loss and stored reference log-probs, of the model that speed.py trains. "Python"
is what lies between torch's operations.
"""

import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import tyro
from lengths import DISTRIBUTIONS
from sides import LEARNING_RATE, MAX_GRAD_NORM, make_model, make_pairs, stored_dpo_losses
from torch.profiler import ProfilerActivity, profile

import common

# The first kind whose pattern an operation's name has
KINDS = {
    "matrix products": r"aten::(mm|addmm|bmm|baddbmm|_int_mm)$",
    "attention": r"scaled_dot_product|flash_attention",
    "softmax over the vocabulary": r"softmax|nll_loss|scatter_add|cross_entropy",
    "optimizer and clipping": r"adamw|rmsprop|_foreach_|linalg_vector_norm",
    "copies, gathers, new tensors": r"copy_|aten::cat|index|embedding|fill_|zero_|gather|split|empty|clone",
    "norms, activations, rotations": r"aten::",
}


@dataclass
class Args:
    lengths: Literal["hh", "ultrafeedback", "tldr", "worst"] = next(iter(DISTRIBUTIONS))
    """Length distribution (lengths.py)"""
    pairs: int = 8
    """Pairs of a step"""
    steps: int = 3
    """Steps that are profiled, behind one that warms up"""


def kind(name: str) -> str:
    """The kind of an operation of the profiler; what is no operation of torch's own counts as Python."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "Python")


def main(args: Args) -> None:
    model, rows = make_model(), make_pairs(args.lengths, args.pairs * (1 + args.steps))
    model.set_attn_implementation(common.ATTENTION)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)

    def step(own: list[dict]) -> None:
        losses = stored_dpo_losses(*common.response_logps(model, common.collate(own)))
        (losses.sum() / args.pairs).backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()

    step(rows[: args.pairs])
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for number in range(1, 1 + args.steps):
            with torch.profiler.record_function("step"):
                step(rows[args.pairs * number :][: args.pairs])
    seconds = Counter()
    for event in found.key_averages():
        seconds[kind(event.key)] += event.self_cpu_time_total / 1e6
    print(
        f"{args.lengths}: {args.steps} steps of {args.pairs} pairs, {sum(seconds.values()) / args.steps:.2f} s a step"
    )
    for name, time in seconds.most_common():
        print(f"  {name:<34}{time / sum(seconds.values()):6.1%}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
