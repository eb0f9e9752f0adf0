"""What each way to make the training step faster is worth: the scripts' step with one thing changed, in one run.

    python benchmarks/options.py        (two CPU cores, about eight minutes)

Each variant runs in a process of its own, in turns with one that takes the step as it is shipped, on the same pairs of
HH-RLHF's lengths; a ratio is the median over the turns.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import steps

sys.path.insert(0, str(Path(__file__).parents[1]))

KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
SHIPPED = "one row, attention by segments, prompt once, log-softmax in chunks, gradient in place, fused AdamW"
VARIANTS = {
    "rows of 512": "the same in rows of at most 512 tokens, one after the other",
    "dense mask": "one row, attention over all of it under a mask of tokens x tokens (sdpa)",
    "prompt twice": "each response with a prompt of its own, packed in rows of its own",
    "padded": "the plain way: 16 sequences padded to the longest in one batch, log-softmax in one piece",
    "head everywhere": "logits at all positions, not only where a response token is predicted",
    "softmax at once": "log-softmax over all tokens in one piece, kept for the backward pass",
    "AdamW by tensor": "the optimizer neither fused nor grouped",
    "checkpointing": "--gradient-checkpointing",
    "torch.compile": "the model compiled with dynamic shapes",
    "allocator": "freed memory is kept by the process: " + " ".join(f"{k}={v}" for k, v in KEEP_MEMORY.items()),
}
TURNS, WARMUP, BATCH_SIZE = 6, 2, 8


def padded_logps(model, rows):
    """(pairs,), (pairs,) from one padded batch of plain sequences."""
    import torch

    sequences = [(row["prompt_ids"], row[f"{part}_ids"]) for part in ("chosen", "rejected") for row in rows]
    width = max(len(prompt) + len(response) for prompt, response in sequences)
    ids, mask = torch.zeros(2, len(sequences), width, dtype=torch.long)  # (sequences, width) each
    targets = torch.full((len(sequences), width), -100)
    for i, (prompt, response) in enumerate(sequences):
        length = len(prompt) + len(response)
        ids[i, :length] = torch.tensor(prompt + response)
        mask[i, :length] = 1
        targets[i, len(prompt) - 1 : length - 1] = torch.tensor(response)
    hidden = model.model(ids, attention_mask=mask).last_hidden_state
    logits = model.lm_head(hidden[targets >= 0])
    logps = -torch.nn.functional.cross_entropy(logits, targets[targets >= 0], reduction="none")
    sums = logits.new_zeros(len(sequences)).index_add(0, (targets >= 0).nonzero()[:, 0], logps)
    return sums.chunk(2)


def dense_logits(model, batch):
    """common.response_logits of a model whose attention is sdpa, under a mask of all tokens of the row."""
    import torch

    tokens, (queries, keys) = batch.input_ids.shape[1], zip(*batch.segments)
    mask = torch.full((1, 1, tokens, tokens), torch.finfo(torch.float32).min)  # added to the scores
    for q, k in zip(torch.arange(tokens).split(queries), batch.keys.split(keys)):
        mask[0, 0, q[:, None], k] *= k > q[:, None]  # 0 where a key is not behind its query
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "logits_to_keep": batch.logit_positions}
    return model(**inputs, attention_mask=mask, use_cache=False).logits.squeeze(0)


def side(variant: str, steps: int) -> None:
    """Take a step for every line on stdin, at most `steps`; say how long it took and the process's peak memory."""
    import torch
    from datasets import Dataset
    from sides import make_model, make_pairs, peak_bytes, stored_dpo_losses

    import common

    rows = make_pairs("hh", BATCH_SIZE * steps)
    lengths, model = common.pair_lengths(Dataset.from_list(rows)), make_model().train()
    parameters = list(model.parameters())
    fused = {"foreach": False} if variant == "AdamW by tensor" else {"fused": True}
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0, **fused)
    model.set_attn_implementation("sdpa" if variant in ("padded", "dense mask") else common.ATTENTION)
    if variant == "checkpointing":
        model.activation_checkpointing_enable()
    run = torch.compile(model, dynamic=True) if variant == "torch.compile" else model

    def logps(own):
        """(pairs,), (pairs,)"""
        if variant == "padded":
            return padded_logps(model, own)
        if variant == "prompt twice":
            batches = (common.collate(own, (part,)) for part in ("chosen", "rejected"))
            return [common.response_logps(model, batch)[i] for i, batch in enumerate(batches)]
        batch = common.collate(own)
        if variant == "head everywhere":
            inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
            logits = model(**inputs, packed=batch, use_cache=False).logits.squeeze(0)[batch.logit_positions]
        else:
            logits = (dense_logits if variant == "dense mask" else common.response_logits)(run, batch)
        if variant == "softmax at once":
            found = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
        else:
            found = common.token_logps(logits, batch.targets)
        return common.sum_responses(found, batch)

    for turn, _ in enumerate(sys.stdin):
        started = time.perf_counter()
        pairs = list(range(BATCH_SIZE * turn, BATCH_SIZE * (turn + 1)))
        for indices in common.micro_batches(pairs, lengths, 512 if variant == "rows of 512" else 8192, 1)[0]:
            a, b = logps([rows[i] for i in indices])
            (stored_dpo_losses(a, b).sum() / BATCH_SIZE).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(json.dumps({"seconds": time.perf_counter() - started, "peak": peak_bytes()}), flush=True)


def main() -> None:
    print("| the step, but | time | range | memory | |\n| --- | --- | --- | --- | --- |")
    print(f"| as shipped | 1 | | 1 | {SHIPPED} |", flush=True)
    for variant, what in VARIANTS.items():
        settings = {variant: KEEP_MEMORY if variant == "allocator" else {}}
        found = steps.measure(("as shipped", variant), TURNS, WARMUP, __file__, settings)
        (base, base_peak), (own, peak) = found.values()
        ratios = [one / other for one, other in zip(own, base)]
        print(
            f"| {variant} | {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} | "
            f"{peak / base_peak:.2f} | {what} |",
            flush=True,
        )


if __name__ == "__main__":
    side(sys.argv[1], int(sys.argv[2])) if len(sys.argv) > 1 else main()
