"""This repo's side of speed.py: the scripts' training step, with DPO's loss and stored reference log-probs."""

import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate import Accelerator
from datasets import Dataset
from sides import BETA, LEARNING_RATE, MAX_GRAD_NORM, Line, make_model, make_pairs, peak_bytes

import common
import hdpo


def main(name: str, batch_size: int, steps: int, tokens_per_device: int) -> None:
    line = Line()
    accelerator = Accelerator(mixed_precision="no")
    dataset = Dataset.from_list(make_pairs(name, batch_size * steps))
    lengths, everything = common.pair_lengths(dataset), list(range(len(dataset)))
    model = make_model()
    before = peak_bytes()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    model.set_attn_implementation(common.ATTENTION)
    trained, args = list(model.parameters()), hdpo.Args(alpha=1.0, beta=BETA)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train.safetensors")
        dataset = common.reference_logps(model, dataset, everything, path, tokens_per_device)
    stored = dataset[:batch_size]
    logps = [sums for pair in zip(stored["ref_chosen_logps"], stored["ref_rejected_logps"]) for sums in pair]
    line.say(before=before, logps=logps)

    for step in range(steps):
        line.wait()
        pairs, loss = everything[step * batch_size :][:batch_size], 0.0
        for indices in common.micro_batches(pairs, lengths, tokens_per_device, num_processes=1)[0]:
            batch = common.collate([dataset[i] for i in indices]).to(accelerator.device)
            losses, _ = hdpo.forward(model, batch, args)
            (losses.sum() / batch_size).backward()
            loss += losses.detach().sum()
        float(loss)  # the scripts read the loss and the norm at every step, which waits for the device
        float(accelerator.clip_grad_norm_(trained, MAX_GRAD_NORM))
        optimizer.step()
        optimizer.zero_grad()
        line.done()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
