"""What eps_dpo.py, dpo_pg.py and dgpo.py cost beside DPO: one optimizer step on the same pairs, in one run.

    python benchmarks/steps.py        (two CPU cores, about three minutes)

    dpo live        DPO with a frozen second model run at every step
    dpo stored      hdpo.py: reference log-probs stored before the first step
    dgpo            dgpo.py: no reference
    eps_dpo         eps_dpo.forward, with the same frozen model
    dpo unshared    DPO with stored reference log-probs, each response run with a prompt of its own
    dpo_pg          the two passes of dpo_pg.py and the projection
    dpo_pg shared   the same gradients from one forward over packed pairs, gone back through twice

The pairs of a step are packed in one row of tokens, in "dpo unshared" and "dpo_pg" in one for chosen and one for
rejected responses. Each variant runs in a process of its own, whose peak memory is given. They take turns; a ratio is
the median over the turns.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

VARIANTS = ("dpo live", "dpo stored", "dgpo", "eps_dpo", "dpo unshared", "dpo_pg", "dpo_pg shared")
TURNS, BATCH_SIZE = 5, 8


def halves(model, own: list[dict], shared: bool):
    """The two losses of DPO-PG, sums over pairs; of one forward, the first backward must keep what both use."""
    import common

    if shared:
        batch = common.collate(own)
        logits = common.response_logits(model, batch)
        for odd in (0, 1):  # copies, as token_logps writes its gradient over what it is given
            mine = batch.response % 2 == odd
            yield -common.token_logps(logits[mine], batch.targets[mine]).sum()
    else:
        for part in ("chosen", "rejected"):
            yield -common.response_logps(model, common.collate(own, (part,)))[part == "rejected"].sum()


def side(variant: str, steps: int) -> None:
    """Take a step for every line on stdin, at most `steps`; say how long it took and the process's peak memory."""
    import torch
    from sides import BETA, make_model, make_pairs, peak_bytes, stored_dpo_losses
    from torch.nn.functional import logsigmoid

    import common
    import dgpo
    import dpo_pg
    import eps_dpo

    rows, model, reference = make_pairs("hh", BATCH_SIZE * steps), make_model().train(), None
    model.set_attn_implementation(common.ATTENTION)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
    if variant in ("dpo live", "eps_dpo"):
        reference = make_model().requires_grad_(False).eval()
        reference.set_attn_implementation(common.ATTENTION)

    def alone(own: list[dict], part: str) -> torch.Tensor:
        """(pairs,): log-probs of the responses of one kind, packed without the others."""
        return common.response_logps(model, common.collate(own, (part,)))[part == "rejected"]

    def losses(own: list[dict]) -> torch.Tensor:
        """(pairs,)"""
        if variant == "dpo unshared":
            return stored_dpo_losses(alone(own, "chosen"), alone(own, "rejected"))
        batch = common.collate(own)
        if variant == "dgpo":
            return dgpo.forward(model, batch, dgpo.Args())[0]
        if variant == "eps_dpo":
            return eps_dpo.forward(model, reference, batch, BETA, eps_dpo.Args(epsilon=0.01))[0]
        if variant == "dpo stored":
            return stored_dpo_losses(*common.response_logps(model, batch))
        with torch.no_grad():
            a0, b0 = common.response_logps(reference, batch)
        a, b = common.response_logps(model, batch)
        return -logsigmoid(BETA * ((a - a0) - (b - b0)))

    for turn, _ in enumerate(sys.stdin):
        started = time.perf_counter()
        own = rows[BATCH_SIZE * turn :][:BATCH_SIZE]
        if variant.startswith("dpo_pg"):
            gradients = []
            for loss in halves(model, own, shared := variant == "dpo_pg shared"):
                (loss / BATCH_SIZE).backward(retain_graph=shared and not gradients)
                gradients.append([parameter.grad for parameter in parameters])
                optimizer.zero_grad()
            dpo_pg.inner(*gradients), dpo_pg.inner(gradients[0], gradients[0]), dpo_pg.inner(gradients[1], gradients[1])
            for parameter, gradient in zip(parameters, dpo_pg.project(*gradients, inplace=True)):
                parameter.grad = gradient
            del gradients, gradient
        else:
            (losses(own).sum() / BATCH_SIZE).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(json.dumps({"seconds": time.perf_counter() - started, "peak": peak_bytes()}), flush=True)


def measure(
    variants: Sequence[str],
    turns: int = TURNS,
    warmup: int = 1,
    script: str = __file__,
    settings: Mapping[str, dict] = {},
) -> dict[str, tuple[list[float], int]]:
    """variant -> (seconds of each step, peak memory in bytes of its process). The variants take turns.

    warmup    first steps, which allocate and compile, that are not timed
    settings  environment variables of a variant
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    sides = {
        variant: subprocess.Popen(
            [sys.executable, script, variant, str(warmup + turns)], **pipes, env=os.environ | settings.get(variant, {})
        )
        for variant in variants
    }
    seconds, peak = {variant: [] for variant in variants}, {}
    for turn in range(warmup + turns):
        for variant, process in sides.items():
            process.stdin.write("step\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            peak[variant] = answer["peak"]
            if turn >= warmup:
                seconds[variant].append(answer["seconds"])
    for process in sides.values():
        process.communicate()
    return {variant: (seconds[variant], peak[variant]) for variant in variants}


def main() -> None:
    found = measure(VARIANTS)
    for variant, (seconds, peak) in found.items():
        print(f"{variant:<14}{statistics.median(seconds):7.2f} s a step of {BATCH_SIZE} pairs{peak / 1e6:8.0f} MB")
    for ours, base in (
        ("dgpo", "dpo live"),
        ("dgpo", "dpo stored"),
        ("eps_dpo", "dpo live"),
        ("dpo_pg", "dpo unshared"),
        ("dpo_pg shared", "dpo_pg"),
    ):
        ratios = [one / other for one, other in zip(found[ours][0], found[base][0])]
        print(
            f"{ours} / {base}: time {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}), "
            f"memory {found[ours][1] / found[base][1]:.2f}"
        )


if __name__ == "__main__":
    side(sys.argv[1], int(sys.argv[2])) if len(sys.argv) > 1 else main()
