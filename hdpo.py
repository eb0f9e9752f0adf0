"""Entropy Controllable Direct Preference Optimization (H-DPO)
https://arxiv.org/abs/2411.07595

DPO's reverse KL penalty is an entropy and a cross-entropy: KL(pi, ref) = -H(pi) + H(pi, ref). H-DPO gives the entropy a
weight of its own, alpha: below 1 the policy sharpens onto the reference's modes, above 1 it flattens; 1 is DPO.

    D_alpha = -alpha H(pi) + H(pi, ref)                                                                       (Sec. 4)
    loss = -log s( alpha * beta * (a - b) - beta * (a0 - b0) )                                                (Eq. 13)
    pi*(y|x) ~ ref(y|x)^(1/alpha) exp( r(x, y) / (alpha * beta) )                                             (Eq. 11)

    s         the logistic function
    a, b      log pi(y_w|x) and log pi(y_l|x), summed over the response's tokens; a0, b0 the same under the reference
    alpha     weight of the entropy; `--alpha 1` is this repo's DPO
    beta      weight of D_alpha against the reward

The same family as dpl.py: dpl's (alpha, beta) is alpha * beta and beta here.

On the toy (two CPU cores), on one GPU, on eight:

    python hdpo.py --model toy/model --dataset toy/train.jsonl --eval-dataset toy/test.jsonl \
        --lr 1e-5 --batch-size 16
    accelerate launch hdpo.py --gradient-checkpointing
    accelerate launch --config_file configs/fsdp2.yaml hdpo.py
"""

import math
import os
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # CPU threads that spin while they wait slow each other down

import torch
import tyro
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import logsigmoid
from tqdm import tqdm
from transformers import AutoTokenizer, get_scheduler

import common
from common import collate, fail, load_preferences, micro_batches, response_logps, step_pairs


@dataclass
class Args:
    # Model and data
    model: str = "alignment-handbook/zephyr-7b-sft-full"
    """Model to train: a name on the hub or a directory (Sec. 5.1)"""
    dataset: str = "HuggingFaceH4/ultrafeedback_binarized"
    """Preference pairs: a name on the hub, or a .json, .jsonl or .parquet file (Sec. 5.1)"""
    train_split: str = "train_prefs"
    """Split of a hub data set to train on"""
    eval_dataset: str = ""
    """Pairs for evaluation; empty: --eval-split of a --dataset on the hub, none beside a local file"""
    eval_split: str = "test_prefs"
    """Split of a hub data set to evaluate on"""
    max_length: int = 1024
    """Tokens of prompt and response together (Zephyr's recipe)"""
    max_prompt_length: int = 512
    """Tokens that the prompt keeps, its last ones, where a pair is longer than max_length (Zephyr's recipe)"""

    # ALGO: begin
    alpha: float = 0.95
    """Weight of the entropy; 1: DPO, less: sharper, more: flatter (Table 1)"""
    beta: float = 0.01
    """Weight of the penalty (Sec. 5.1: Zephyr's recipe)"""
    ref_model: str = ""
    """Reference policy; empty: the model before training"""
    # ALGO: end

    # Optimisation
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    """AdamW (Zephyr's recipe)"""
    lr: float = 5e-7
    """Peak learning rate (Zephyr's recipe)"""
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """Learning rate after the warm-up (Zephyr's recipe)"""
    warmup: float = 0.1
    """Linear warm-up: a share of all steps if below 1, else steps (Zephyr's recipe)"""
    weight_decay: float = 0.0
    """Weight decay (transformers' default)"""
    max_grad_norm: float = 1.0
    """Norm to which the gradient is clipped (transformers' default)"""
    batch_size: int = 128
    """Pairs per optimizer step, over all processes (Zephyr's recipe)"""
    epochs: int = 1
    """Passes over the pairs (Zephyr's recipe)"""
    steps: int = 0
    """Optimizer steps; 0: as many as --epochs gives"""
    seed: int = 0
    """Seed of the shuffle, of LoRA's initial weights and of its dropout"""

    # LoRA
    lora_rank: int = 0
    """Rank of the adapters on all linear layers; 0: train all weights (Zephyr's recipe)"""
    lora_alpha: float = 16
    """Scale of the adapters, times 1/rank"""
    lora_dropout: float = 0.0
    """Dropout of the adapters' input"""

    # Hardware
    tokens_per_device: int = 8192
    """Most tokens in a micro-batch (and 0.75 x hidden size, but under flex_attention); the result does not change"""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, a third more time"""
    attn_implementation: Literal["", "sdpa", "eager", "flex_attention"] = ""
    """How attention is computed; empty: transformers' choice for the model"""

    # Bookkeeping
    output_dir: str = "runs/hdpo"
    """Where args.json, metrics.jsonl, curves.png, checkpoints/ and model/ go"""
    eval_every: int = 50
    """Steps between evaluations, besides the ones at the start and at the end"""
    save_every: int = 100
    """Steps between checkpoints, besides the ones after the first and the last step"""
    resume: bool = False
    """Continue the run in --output-dir from its last checkpoint"""
    overwrite: bool = False
    """Delete the run in --output-dir first"""
    track: Literal["", "tensorboard", "wandb"] = ""
    """Also log to this tracker"""
    trust_remote_code: bool = False
    """Run code that comes with the model"""


# ALGO: begin
def hdpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    alpha: float,
    beta: float,
) -> Tensor:
    """Eq. 13 for each pair. All log-probs are sums over the response's tokens, (pairs,); returns (pairs,)."""
    chosen = alpha * chosen_logps - ref_chosen_logps  # (pairs,): alpha a - a0
    rejected = alpha * rejected_logps - ref_rejected_logps  # (pairs,): alpha b - b0
    return -logsigmoid(beta * (chosen - rejected))


def forward(model, batch, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of each pair, and what is logged of it: all (pairs,)."""
    a, b = response_logps(model, batch)
    a0, b0 = batch.ref_chosen_logps.to(a.dtype), batch.ref_rejected_logps.to(b.dtype)
    losses = hdpo_loss(a, b, a0, b0, args.alpha, args.beta)
    margins = args.alpha * args.beta * (a - b) - args.beta * (a0 - b0)
    return losses, {
        "rewards/margin": margins,
        "rewards/accuracy": (margins > 0).float(),
        "logps/chosen": a / batch.chosen_lengths,
        "logps/rejected": b / batch.rejected_lengths,
        "logps/chosen_delta": (a - a0) / batch.chosen_lengths,
        "logps/rejected_delta": (b - b0) / batch.rejected_lengths,
    }


PANELS = [
    ("loss",),
    ("logps/chosen", "logps/rejected"),
    ("logps/chosen_delta", "logps/rejected_delta"),
    ("rewards/accuracy",),
    ("rewards/margin",),
    ("grad_norm",),
]
# ALGO: end


def global_means(sums: dict[str, Tensor], count: int, accelerator: Accelerator) -> dict[str, float]:
    """Sums over this process's pairs -> means over the `count` pairs of all processes; waits for the device once."""
    values = accelerator.reduce(torch.stack([value.double() for value in sums.values()]))
    return {name: value / count for name, value in zip(sums, values.tolist())}


@torch.no_grad()
def evaluate(compute, model, dataset, row_tokens: int, accelerator: Accelerator) -> dict[str, float]:
    """Means of the loss and of all metrics that `compute` gives over the evaluation pairs."""
    model.eval()
    sums = defaultdict(float)
    pairs = list(range(len(dataset)))
    plan = micro_batches(pairs, common.pair_lengths(dataset), row_tokens, accelerator.num_processes)
    for indices in plan[accelerator.process_index]:
        batch = collate([dataset[i] for i in indices or pairs[:1]]).to(accelerator.device)
        losses, metrics = compute(batch)
        for name, values in {"loss": losses, **metrics}.items():
            sums[name] += values.sum() * bool(indices)
    model.train()
    return {f"eval/{name}": value for name, value in global_means(sums, len(dataset), accelerator).items()}


def main(args: Args) -> None:
    common.check_args(args)
    accelerator = common.start_accelerator(args)
    # ALGO: begin
    for name in ("alpha", "beta"):
        if not getattr(args, name) > 0:
            fail(f"--{name} {getattr(args, name)}: expected a number above 0")
    # ALGO: end
    common.check_run(args, accelerator)

    # Data, and how it falls into steps. Everything below that is random is a function of the seed and the step.
    tokenizer = common.from_hub(AutoTokenizer, args.model, args)
    limits = args.max_length, args.max_prompt_length
    train_data = load_preferences(args.dataset, tokenizer, args.train_split, *limits)
    eval_source = args.eval_dataset or ("" if common.is_file(args.dataset) else args.dataset)
    eval_data = load_preferences(eval_source, tokenizer, args.eval_split, *limits) if eval_source else None
    steps_per_epoch = len(train_data) // args.batch_size
    if not steps_per_epoch:
        fail(f"--batch-size {args.batch_size} is more than the {len(train_data)} pairs of {args.dataset}")
    total_steps = args.steps or args.epochs * steps_per_epoch
    lengths = common.pair_lengths(train_data)

    # Model, optimizer, schedule
    model = common.load_model(args, accelerator)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    else:
        # One parameter at a time: all at once, the square roots would be one more copy of the model.
        optimizer = torch.optim.RMSprop(trained, lr=args.lr, weight_decay=args.weight_decay, foreach=False)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]  # FSDP2 made new ones
    warmup_steps = round(args.warmup * total_steps if args.warmup < 1 else args.warmup)
    # Not prepared: a prepared schedule takes a step per process.
    schedule = get_scheduler(args.schedule, optimizer.optimizer, warmup_steps, total_steps)
    row_tokens = common.row_tokens(model, args.tokens_per_device)
    common.check_packing(model, train_data, accelerator.device)

    accelerator.print(
        f"model {args.model}: {sum(p.numel() for p in trained) / 1e6:,.2f}M trained parameters on "
        f"{accelerator.num_processes} x {accelerator.device.type}\n"
        f"{total_steps} steps of {args.batch_size} pairs, {steps_per_epoch} an epoch; the last "
        f"{len(train_data) % args.batch_size} pairs of an epoch's shuffle are left out\n"
        f"rows of at most {row_tokens} tokens, {sum(lengths) / len(lengths):.0f} tokens a pair on average\n"
        f"{common.show_pair(tokenizer, train_data[0])}"
    )

    # Output directory, or the state of the run to resume
    checkpoint = common.begin_run(args, accelerator)
    state = {"step": 0, "data": common.data_fingerprint(train_data)}
    # ALGO: begin
    # The reference is the initial policy: run once over the pairs of this run, before the first update and before a
    # checkpoint is loaded, so that no second model is ever held beside the policy.
    used = sorted(
        {i for step in range(total_steps) for i in step_pairs(step, len(train_data), args.batch_size, args.seed)}
    )
    train_data = common.add_reference(args, accelerator, model, train_data, used, "train")
    if eval_data:
        eval_data = common.add_reference(args, accelerator, model, eval_data, list(range(len(eval_data))), "eval")

    def compute(batch):
        return forward(model, batch, args)

    # ALGO: end
    if checkpoint:
        state = common.load_checkpoint(args, checkpoint, model, optimizer.optimizer, state["data"])
        schedule.load_state_dict(state["schedule"])
    history = common.read_metrics(args, state["step"])
    if not history:
        start = evaluate(compute, model, eval_data, row_tokens, accelerator) if eval_data else {}
        history = [{"step": 0, **start}]
    common.write_metrics(args, accelerator, history)

    progress = tqdm(
        total=total_steps,
        initial=state["step"],
        desc=Path(__file__).stem,
        disable=not accelerator.is_local_main_process,
    )
    for step in range(state["step"], total_steps):
        started = time.perf_counter()
        # For LoRA's dropout: a seed for each step and process, so that a resumed run drops the same.
        torch.manual_seed((args.seed * 1_000_003 + step) * 1_009 + accelerator.process_index)
        pairs = step_pairs(step, len(train_data), args.batch_size, args.seed)
        plan = micro_batches(pairs, lengths, row_tokens, accelerator.num_processes)[accelerator.process_index]
        sums = defaultdict(float)
        # ALGO: begin
        for number, indices in enumerate(plan):
            batch = collate([train_data[i] for i in indices or pairs[:1]]).to(accelerator.device)
            with common.gradient_sync(accelerator, model, last=number == len(plan) - 1):
                losses, metrics = compute(batch)
                # Processes' gradients are averaged, so this is the mean over the global batch however it was split.
                weight = bool(indices) * accelerator.num_processes / args.batch_size
                (losses.sum() * weight).backward()
            for name, values in {"loss": losses, **metrics}.items():
                sums[name] += values.detach().sum() * bool(indices)
            sums["tokens"] += torch.tensor(batch.input_ids.numel() * bool(indices), device=accelerator.device)
        # ALGO: end
        means = global_means(sums, args.batch_size, accelerator)
        grad_norm = common.whole(accelerator.clip_grad_norm_(trained, args.max_grad_norm)).item()
        if not math.isfinite(means["loss"] + grad_norm):
            fail(
                f"step {step + 1}: loss {means['loss']}, gradient norm {grad_norm}; stopped before the update. "
                f"The last checkpoint in {args.output_dir} is good; a lower --lr may help"
            )
        optimizer.step()
        optimizer.zero_grad()
        row = {"step": step + 1, **means, "grad_norm": grad_norm, "lr": schedule.get_last_lr()[0]}
        row["tokens_per_second"] = row.pop("tokens") * args.batch_size / (time.perf_counter() - started)
        schedule.step()

        done = step + 1 == total_steps
        if eval_data and (done or (step + 1) % args.eval_every == 0):
            row |= evaluate(compute, model, eval_data, row_tokens, accelerator)
            for name in ("logps/chosen", "logps/rejected"):  # likelihood displacement at a glance
                row[f"eval/{name}_delta"] = row[f"eval/{name}"] - history[0][f"eval/{name}"]
        history.append(row)
        common.log_metrics(args, accelerator, row)
        progress.update()
        progress.set_postfix(
            {name: f"{row[name]:.3f}" for name in ("loss", "rewards/accuracy", "logps/chosen", "logps/rejected")}
        )
        if done or step == 0 or (step + 1) % args.save_every == 0:
            state |= {"step": step + 1, "schedule": schedule.state_dict()}
            common.save_checkpoint(args, accelerator, model, optimizer.optimizer, state)
            common.plot_curves(args, accelerator, history, PANELS)
    progress.close()
    common.plot_curves(args, accelerator, history, PANELS)
    common.save_model(args, accelerator, model, tokenizer)
    common.print_summary(args, accelerator, history)
    accelerator.end_training()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
