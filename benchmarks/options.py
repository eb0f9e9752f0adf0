"""What each way to make the training step faster is worth: the scripts' step with one thing changed, in one run.

    python benchmarks/options.py        (two CPU cores, about eight minutes)

Each variant runs in a process of its own, in turns with one that takes the step as it is shipped, on the same pairs of
HH-RLHF's lengths; a ratio is the median over the turns.
"""

import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import steps

sys.path.insert(0, str(Path(__file__).parents[1]))

KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
VARIANTS = {
    "as shipped": "rows of bounded length, prompt once, chunked log-softmax with its gradient in place, fused AdamW",
    "one long row": "all pairs of a micro-batch in one row of up to 8,192 tokens",
    "rows of 384": "shorter rows than the shipped ones (512 here: 0.75 x the hidden size, but no less)",
    "rows of 768": "longer rows",
    "attention by pair": "one long row, attention runs pair after pair in a function of our own",
    "prompt twice": "each response with a prompt of its own, packed in rows of its own",
    "padded": "the plain way: 16 sequences padded to the longest in one batch, log-softmax in one piece",
    "head everywhere": "logits at all positions, not only where a response token is predicted",
    "softmax at once": "log-softmax over all tokens in one piece, kept for the backward pass",
    "AdamW by tensor": "the optimizer neither fused nor grouped",
    "collate ahead": "the next micro-batch is built by a thread meanwhile",
    "checkpointing": "--gradient-checkpointing",
    "eager attention": "--attn-implementation eager",
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


def attend_by_pair(batch, config) -> None:
    """Make "by pair" the attention of transformers that runs each pair of this batch alone."""
    import torch
    from transformers import AttentionInterface

    import common

    changes = (batch.pair.diff() != 0).nonzero()[:, 0] + 1
    blocks = []
    for start, end in pairwise([0, *changes.tolist(), len(batch.pair)]):
        position_ids, pair, part = batch.position_ids[:, start:end], batch.pair[start:end], batch.part[start:end]
        alone = replace(batch, position_ids=position_ids, pair=pair, part=part)
        blocks.append((slice(start, end), common.attention_mask(config, alone, torch.float32)))

    def by_pair(_module, query, key, value, _mask, scaling=None, **_):
        found = [
            torch.nn.functional.scaled_dot_product_attention(
                query[:, :, own], key[:, :, own], value[:, :, own], attn_mask=mask, scale=scaling
            )
            for own, mask in blocks
        ]
        return torch.cat(found, 2).transpose(1, 2), None

    AttentionInterface.register("by pair", by_pair)


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
    rows_of = {"one long row": 8192, "attention by pair": 8192, "rows of 384": 384, "rows of 768": 768, "padded": 8192}
    most = rows_of.get(variant, common.row_tokens(model, 8192))
    run = model
    if variant == "checkpointing":
        model.activation_checkpointing_enable({"use_reentrant": False})
    elif variant == "eager attention":
        model.set_attn_implementation("eager")
    elif variant == "torch.compile":
        run = torch.compile(model, dynamic=True)

    def logps(batch):
        """(pairs,), (pairs,) of a collated batch, or of two, one for each response."""
        if variant == "prompt twice":
            return common.response_logps(run, batch[0])[0], common.response_logps(run, batch[1])[1]
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
        if variant == "attention by pair":
            model.config._attn_implementation = "sdpa"  # for its masks
            attend_by_pair(batch, model.config)
            model.config._attn_implementation = "by pair"
            inputs |= {"attention_mask": torch.zeros(1, 1, 1, 1), "logits_to_keep": batch.logit_positions}
            logits = run(**inputs, use_cache=False).logits.squeeze(0)
            return common.sum_responses(common.token_logps(logits, batch.targets), batch)
        if variant == "head everywhere":
            inputs["attention_mask"] = common.attention_mask(model.config, batch, model.dtype)
            logits = run(**inputs, use_cache=False).logits.squeeze(0)[batch.logit_positions]
            return common.sum_responses(common.token_logps(logits, batch.targets), batch)
        if variant == "softmax at once":
            logits = common.response_logits(run, batch)
            found = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
            return common.sum_responses(found, batch)
        return common.response_logps(run, batch)

    def build(indices):
        own = [rows[i] for i in indices]
        if variant == "padded":
            return own
        if variant == "prompt twice":
            return [common.collate(own, (part,)) for part in ("chosen", "rejected")]
        return common.collate(own)

    pool = ThreadPoolExecutor(1)
    for turn, _ in enumerate(sys.stdin):
        started = time.perf_counter()
        pairs = list(range(BATCH_SIZE * turn, BATCH_SIZE * (turn + 1)))
        plan = common.micro_batches(pairs, lengths, most, 1)[0]
        batches = pool.map(build, plan) if variant == "collate ahead" else map(build, plan)
        for batch in batches:
            a, b = padded_logps(run, batch) if variant == "padded" else logps(batch)
            (stored_dpo_losses(a, b).sum() / BATCH_SIZE).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(json.dumps({"seconds": time.perf_counter() - started, "peak": peak_bytes()}), flush=True)


def main() -> None:
    print("| the step, but | time | range | memory | |\n| --- | --- | --- | --- | --- |")
    for variant, what in VARIANTS.items():
        if variant == "as shipped":
            print(f"| {variant} | 1 | | 1 | {what} |", flush=True)
            continue
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
