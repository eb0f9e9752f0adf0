"""DPO-Projected Gradient (DPO-PG), from: Differential Information Distribution, a Bayesian View of DPO (App. H)
https://arxiv.org/abs/2505.23761

DPO lowers its loss mostly by making the rejected response less likely, and drags the chosen one down with it. DPO-PG
follows the gradient that makes the chosen response more likely, less the part of it that would make the rejected one
more likely too. To first order the chosen log-prob rises, the rejected one does not, and so DPO's loss falls.

    L_w = mean over the batch of -log pi(y_w|x),  L_l the same for y_l;  g_w, g_l their gradients
    g = g_w - max(0, <g_w, g_l>) / ||g_l||^2 * g_l;   theta <- theta - lr * g                         (Definition H.1)

    <g, g_w> >= 0    the chosen log-prob does not fall   (Theorem H.4)
    <g, g_l> <= 0    the rejected one does not rise      (Theorem H.5)

Inner products run over all parameters and the whole global batch. With another optimizer than SGD, g stands where the
gradient would, and clipping clips g. No reference, no beta.

On the toy (two CPU cores), on one GPU with LoRA, on eight:

    python dpo_pg.py --model toy/model --dataset toy/near_train.jsonl --eval-dataset toy/near_test.jsonl \
        --lr 1e-5 --warmup 0
    accelerate launch dpo_pg.py --model mistralai/Mistral-7B-Instruct-v0.3 --lora-rank 16
    accelerate launch --config_file configs/fsdp2.yaml dpo_pg.py --model mistralai/Mistral-7B-Instruct-v0.3
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
from torch.distributed.tensor import DTensor, Partial
from torch.nn.functional import logsigmoid
from tqdm import tqdm
from transformers import AutoTokenizer, get_scheduler

import common
from common import collate, fail, load_preferences, micro_batches, response_logps, step_pairs


@dataclass
class Args:
    # Model and data
    model: str = "mistralai/Mistral-7B-Instruct-v0.3"
    """Model to train: a name on the hub or a directory (App. J.2: v0.3 after own fine-tuning)"""
    dataset: str = "Magpie-Align/Magpie-Llama-3.1-Pro-DPO-100K-v0.1"
    """Preference pairs: a name on the hub, or a .json, .jsonl or .parquet file (App. J.2)"""
    train_split: str = "train"
    """Split of a hub data set to train on"""
    eval_dataset: str = ""
    """Pairs for evaluation; empty: --eval-split of a --dataset on the hub, none beside a local file"""
    eval_split: str = "test"
    """Split of a hub data set to evaluate on"""
    max_length: int = 4096
    """Tokens of prompt and response together (App. J.2)"""
    max_prompt_length: int = 2048
    """Tokens that the prompt keeps, its last ones, where a pair is longer than max_length (App. J.2)"""

    # ALGO: begin
    log_dpo_loss: bool = False
    """Also log DPO's loss against the initial policy, whose log-probs are stored beforehand"""
    dpo_beta: float = 0.1
    """beta of that loss"""
    ref_model: str = ""
    """Reference policy of that loss; empty: the model before training"""
    # ALGO: end

    # Optimisation
    optimizer: Literal["adamw", "rmsprop"] = "rmsprop"
    """RMSprop (App. J.2)"""
    lr: float = 1e-6
    """Peak learning rate (App. K; J.2 lost the number)"""
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "constant_with_warmup"
    """Learning rate after the warm-up (App. J.2)"""
    warmup: float = 150
    """Linear warm-up: a share of all steps if below 1, else steps (App. J.2)"""
    weight_decay: float = 0.0
    """Weight decay (App. J.2)"""
    max_grad_norm: float = 1.0
    """Norm to which the gradient is clipped (transformers' default)"""
    batch_size: int = 64
    """Pairs per optimizer step, over all processes (App. J.2)"""
    epochs: int = 5
    """Passes over the pairs (App. J.2)"""
    steps: int = 0
    """Optimizer steps; 0: as many as --epochs gives"""
    seed: int = 0
    """Seed of the shuffle, of LoRA's initial weights and of its dropout"""

    # LoRA
    lora_rank: int = 0
    """Rank of the adapters on all linear layers; 0: train all weights (App. J.2)"""
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
    output_dir: str = "runs/dpo_pg"
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
def inner(left: list[Tensor], right: list[Tensor], unit: float = 1.0) -> Tensor:
    """<left, right / unit> over all tensors and, where they are DTensors, all shards; a float64 scalar."""
    scaled = right if unit == 1.0 else (b / unit for b in right)
    return common.whole(sum((a * b).sum(dtype=torch.float64) for a, b in zip(left, scaled)))


def largest(gradient: Tensor) -> Tensor:
    """Its largest absolute entry, over all shards (of a small tensor some processes have none); a float64 scalar."""
    local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    entry = local.abs().amax().double() if local.numel() else local.new_zeros((), dtype=torch.float64)
    if isinstance(gradient, DTensor):
        return DTensor.from_local(entry, gradient.device_mesh, [Partial("max")]).full_tensor()
    return entry


def project(grads_chosen: list[Tensor], grads_rejected: list[Tensor], inplace: bool = False) -> list[Tensor]:
    """g of Definition H.1: g_w without its component along g_l where the two point the same way.

    Lists of tensors, one a parameter, plain or DTensor; one inner product spans them all. Returns new tensors, float32
    or wider; with `inplace` (float32 or wider only) grads_chosen itself, overwritten. g_l = 0 leaves g_w as it is.
    """
    grads_chosen, grads_rejected = (
        [g.to(torch.promote_types(g.dtype, torch.float32)) for g in grads] for grads in (grads_chosen, grads_rejected)
    )
    # In units of its largest entry g_l can be as tiny or huge as it likes: ||g_l||^2 neither under- nor overflows.
    unit = torch.stack([largest(g) for g in grads_rejected]).max().item() or 1.0
    norm = common.whole(sum((g / unit).square().sum(dtype=torch.float64) for g in grads_rejected))  # ||g_l / unit||^2
    along = (inner(grads_chosen, grads_rejected, unit).clamp(min=0) / norm.clamp(min=1.0)).item()
    if not inplace:
        return [g_w - along * (g_l / unit) for g_w, g_l in zip(grads_chosen, grads_rejected)]
    for g_w, g_l in zip(grads_chosen, grads_rejected):
        g_w.sub_(along * (g_l / unit))
    return grads_chosen


def pair_metrics(a: Tensor, b: Tensor, batch, args: Args) -> dict[str, Tensor]:
    """What is logged of each pair, from the summed log-probs a of its chosen and b of its rejected response."""
    metrics = {
        "rewards/accuracy": (a / batch.chosen_lengths > b / batch.rejected_lengths).float(),
        "logps/chosen": a / batch.chosen_lengths,
        "logps/rejected": b / batch.rejected_lengths,
    }
    if args.log_dpo_loss:
        a0, b0 = batch.ref_chosen_logps.to(a.dtype), batch.ref_rejected_logps.to(b.dtype)
        margins = args.dpo_beta * ((a - a0) - (b - b0))
        metrics |= {
            "dpo_loss": -logsigmoid(margins),
            "rewards/margin": margins,
            "rewards/dpo_accuracy": (margins > 0).float(),
            "logps/chosen_delta": (a - a0) / batch.chosen_lengths,
            "logps/rejected_delta": (b - b0) / batch.rejected_lengths,
        }
    return metrics


PANELS = [
    ("loss",),
    ("logps/chosen", "logps/rejected"),
    ("gradients/cosine",),
    ("gradients/chosen_norm", "gradients/rejected_norm"),
    ("gradients/active",),
    ("rewards/accuracy",),
    ("dpo_loss",),
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
    if not args.dpo_beta > 0:
        fail(f"--dpo-beta {args.dpo_beta}: expected a number above 0")
    if args.ref_model and not args.log_dpo_loss:
        fail("--ref-model is the reference of --log-dpo-loss, which is not given")
    common.check_memory(args, accelerator, gradient_copies=1)
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
    if args.log_dpo_loss:
        # The initial policy's log-probs, before the first update and before a checkpoint is loaded.
        steps = range(total_steps)
        used = sorted({i for step in steps for i in step_pairs(step, len(train_data), args.batch_size, args.seed)})
        train_data = common.add_reference(args, accelerator, model, train_data, used, "train")
        if eval_data:
            eval_data = common.add_reference(args, accelerator, model, eval_data, list(range(len(eval_data))), "eval")

    def compute(batch):
        a, b = response_logps(model, batch)
        return -a, pair_metrics(a, b, batch, args)

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
        # Both gradients belong to the whole global batch: all chosen responses, then all rejected ones, then project.
        gradients, logps = {}, {}
        for part in ("chosen", "rejected"):
            for number, indices in enumerate(plan):
                batch = collate([train_data[i] for i in indices or pairs[:1]], (part,)).to(accelerator.device)
                with common.gradient_sync(accelerator, model, last=number == len(plan) - 1):
                    logps[part, number] = response_logps(model, batch)[part == "rejected"]  # (pairs,)
                    # Processes' gradients are averaged, so this is the mean over the global batch however it was split.
                    weight = bool(indices) * accelerator.num_processes / args.batch_size
                    (-logps[part, number].sum() * weight).backward()
                logps[part, number] = logps[part, number].detach()
                sums["tokens"] += torch.tensor(batch.input_ids.numel() * bool(indices), device=accelerator.device)
                if part == "rejected":
                    a, b = logps["chosen", number], logps["rejected", number]
                    for name, values in {"loss": -a, **pair_metrics(a, b, batch, args)}.items():
                        sums[name] += values.sum() * bool(indices)
            gradients[part] = [parameter.grad for parameter in trained]
            optimizer.zero_grad()
        g_w, g_l = gradients["chosen"], gradients["rejected"]
        product, norm_w, norm_l = inner(g_w, g_l).item(), inner(g_w, g_w).item() ** 0.5, inner(g_l, g_l).item() ** 0.5
        for parameter, gradient in zip(trained, project(g_w, g_l, inplace=True)):
            parameter.grad = gradient
        del gradients, g_w, g_l, gradient  # or both copies would live through the next step's passes
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
        # ALGO: begin
        row |= {
            "gradients/inner": product,
            "gradients/cosine": product / (norm_w * norm_l or 1.0),
            "gradients/chosen_norm": norm_w,
            "gradients/rejected_norm": norm_l,
            "gradients/active": float(product > 0),
        }
        # ALGO: end
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
