"""This repo's side of speed.py: the scripts' training step, with DPO's loss and stored reference log-probs."""

import json
import sys
from pathlib import Path

import torch
from torch.nn.functional import logsigmoid

sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate import Accelerator
from datasets import Dataset
from sides import BETA, LEARNING_RATE, MAX_GRAD_NORM, Line, make_model, make_pairs, peak_bytes

import common
from common import collate, micro_batches, response_logps


@torch.no_grad()
def reference_logps(model, dataset, plan, device) -> torch.Tensor:
    """(pairs, 2): log-probs of chosen and rejected under the initial model, by the packed path."""
    sums = torch.zeros(len(dataset), 2)
    for indices in plan:
        sums[indices] = torch.stack(response_logps(model, collate([dataset[i] for i in indices]).to(device)), 1).cpu()
    return sums


def main(name: str, batch_size: int, steps: int, tokens_per_device: int) -> None:
    line = Line()
    accelerator = Accelerator(mixed_precision="no")
    dataset = Dataset.from_list(make_pairs(name, batch_size * steps))
    lengths = common.pair_lengths(dataset)
    model = make_model()
    before = peak_bytes()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    trained = list(model.parameters())
    row_tokens = common.row_tokens(model, tokens_per_device)
    everything = micro_batches(list(range(len(dataset))), lengths, row_tokens, 1)[0]
    reference = reference_logps(model, dataset, everything, accelerator.device)
    line.say(before=before, logps=reference[:batch_size].flatten().tolist(), row_tokens=row_tokens)

    for step in range(steps):
        line.wait()
        pairs = list(range(step * batch_size, (step + 1) * batch_size))
        plan = micro_batches(pairs, lengths, row_tokens, accelerator.num_processes)[accelerator.process_index]
        loss = 0.0
        for number, indices in enumerate(plan):
            batch = collate([dataset[i] for i in indices]).to(accelerator.device)
            ref_chosen, ref_rejected = reference[indices].to(accelerator.device).unbind(1)
            with common.gradient_sync(accelerator, model, last=number == len(plan) - 1):
                chosen, rejected = response_logps(model, batch)
                losses = -logsigmoid(BETA * ((chosen - ref_chosen) - (rejected - ref_rejected)))
                (losses.sum() * (accelerator.num_processes / batch_size)).backward()
            loss += losses.detach().sum()
        float(loss)  # the scripts read the loss and the norm at every step, which waits for the device
        float(accelerator.clip_grad_norm_(trained, MAX_GRAD_NORM))
        optimizer.step()
        optimizer.zero_grad()
        line.done()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
