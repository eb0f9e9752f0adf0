"""epsilon-DPO: KL Penalty Control via Perturbation for Direct Preference Optimization
https://arxiv.org/abs/2502.13177

DPO keeps one KL penalty beta for all pairs. epsilon-DPO asks of each pair what a slightly smaller and a slightly larger
beta would have made of the policy, which its logits and the reference's tell without training (Prop. 1), and where the
pair's log-ratio moves with beta in one direction, takes the beta that separates the pair better.

    beta_minus = beta / (1 + eps)        log pi_minus = log_softmax( (1 + eps) f - eps f0 )                    (Prop. 1)
    beta_plus  = beta / (1 - eps)        log pi_plus  = log_softmax( (1 - eps) f + eps f0 )
    R, R_minus, R_plus = log pi(y_w|x) - log pi(y_l|x) under pi, pi_minus and pi_plus
    beta_pair = beta_minus  if R_minus > R > R_plus,  beta_plus  if R_minus < R < R_plus,  else beta         (Eq. 1-5)
    loss = -log s( beta_pair * ((a - b) - (a0 - b0)) ),  then  beta <- mean of beta_pair over the batch

    s        the logistic function
    f, f0    logits of the policy and of the reference
    a, b     log pi(y_w|x) and log pi(y_l|x), summed over the response's tokens; a0, b0 the same under the reference
    eps      size of the perturbation; 0 is DPO

On the toy (two CPU cores), on one GPU with LoRA, on eight:

    python eps_dpo.py --model toy/model --dataset toy/train.jsonl --eval-dataset toy/test.jsonl \
        --lr 1e-5 --batch-size 16
    accelerate launch eps_dpo.py --model mistralai/Mistral-7B-Instruct-v0.2 --lora-rank 16 --lr 1e-5
    accelerate launch --config_file configs/fsdp2.yaml eps_dpo.py --model mistralai/Mistral-7B-Instruct-v0.2
"""

import contextlib
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
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import logsigmoid
from tqdm import tqdm
from transformers import AutoTokenizer, get_scheduler

import common
from common import collate, fail, load_preferences, micro_batches, response_logits, step_pairs, sum_responses


@dataclass
class Args:
    # Model and data
    model: str = "mistralai/Mistral-7B-Instruct-v0.2"
    """Model to train: a name on the hub or a directory (App. B.1)"""
    dataset: str = "princeton-nlp/mistral-instruct-ultrafeedback"
    """Preference pairs: a name on the hub, or a .json, .jsonl or .parquet file (App. B.1)"""
    train_split: str = "train"
    """Split of a hub data set to train on"""
    eval_dataset: str = ""
    """Pairs for evaluation; empty: --eval-split of a --dataset on the hub, none beside a local file"""
    eval_split: str = "test"
    """Split of a hub data set to evaluate on"""
    max_length: int = 2048
    """Tokens of prompt and response together (App. B.1: SimPO's)"""
    max_prompt_length: int = 1800
    """Tokens that the prompt keeps, its last ones, where a pair is longer than max_length (App. B.1: SimPO's)"""

    # ALGO: begin
    beta: float = 0.01
    """KL penalty at the start (App. B.1)"""
    epsilon: float = 0.01
    """Size of the perturbation of beta; 0: DPO (App. B.1 searches 0.005, 0.01 and 0.02)"""
    ref_model: str = ""
    """Reference policy; empty: the model before training"""
    # ALGO: end

    # Optimisation
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    """AdamW (App. B.1)"""
    lr: float = 3e-7
    """Peak learning rate (App. B.1; 7e-7 for Llama-3)"""
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """Learning rate after the warm-up (App. B.1)"""
    warmup: float = 0.1
    """Linear warm-up: a share of all steps if below 1, else steps (App. B.1)"""
    weight_decay: float = 0.0
    """Weight decay (App. B.1)"""
    max_grad_norm: float = 1.0
    """Norm to which the gradient is clipped (transformers' default)"""
    batch_size: int = 128
    """Pairs per optimizer step, over all processes (App. B.1)"""
    epochs: int = 1
    """Passes over the pairs (App. B.1)"""
    steps: int = 0
    """Optimizer steps; 0: as many as --epochs gives"""
    seed: int = 0
    """Seed of the shuffle, of LoRA's initial weights and of its dropout"""

    # LoRA
    lora_rank: int = 0
    """Rank of the adapters on all linear layers; 0: train all weights (App. B.1)"""
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
    output_dir: str = "runs/eps_dpo"
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
def adaptive_beta(
    logratios: Tensor, logratios_minus: Tensor, logratios_plus: Tensor, beta: float | Tensor, epsilon: float
) -> Tensor:
    """beta of each pair (Eq. 1-5).

    logratios: R, log pi(y_w|x) - log pi(y_l|x), (pairs,); _minus and _plus the same under the policies at
    beta / (1 + epsilon) and beta / (1 - epsilon). Both inequalities are strict: a tie keeps beta. Returns (pairs,).
    """
    betas = torch.as_tensor(beta, dtype=logratios.dtype, device=logratios.device).expand_as(logratios)
    falling = (logratios_minus > logratios) & (logratios > logratios_plus)  # a smaller beta separates the pair better
    rising = (logratios_minus < logratios) & (logratios < logratios_plus)
    return torch.where(falling, betas / (1 + epsilon), torch.where(rising, betas / (1 - epsilon), betas))


def eps_dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float | Tensor,
) -> Tensor:
    """DPO's loss with a beta for each pair. Log-probs are sums over the response's tokens, (pairs,), as is the result;
    beta is a number or (pairs,), and a constant to the gradient.
    """
    return -logsigmoid(beta * ((chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)))


def perturbed_logps(logits: Tensor, ref_logits: Tensor, targets: Tensor, epsilon: float) -> tuple[Tensor, ...]:
    """What the perturbation does to the log-prob of each target (Prop. 1), and what is needed beside it.

    logits, ref_logits: f and f0, (tokens, vocab). Returns four tensors (tokens,): log pi_minus - log pi and
    log pi_plus - log pi of the targets, their log-prob under the reference, and KL(pi, ref) at their positions.

    With d = f - f0, log_softmax(f + eps d) - log_softmax(f) = eps d - log E_pi[exp(eps d)]. Early in training d is
    tiny, and as a difference of two log_softmax the perturbation would drown in float32 rounding; so it is not
    computed as one.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    f, f0 = logits.to(wide), ref_logits.to(wide)
    d, pi = f - f0, f.softmax(-1)  # (tokens, vocab)
    index = targets[:, None]
    own = d.gather(1, index)[:, 0]  # (tokens,)

    def log_mean_exp(scale: float) -> Tensor:  # log E_pi[exp(scale d)]
        return torch.linalg.vecdot(pi, (scale * d).expm1_()).log1p()

    minus = epsilon * own - log_mean_exp(epsilon)
    plus = -epsilon * own - log_mean_exp(-epsilon)
    kl = torch.linalg.vecdot(pi, d) + log_mean_exp(-1.0)
    return minus, plus, f0.gather(1, index)[:, 0] - f0.logsumexp(-1), kl


@torch.no_grad()
def reference_hidden(reference, batch):
    """The reference's forward up to its head; under LoRA the reference is the model with its adapters off."""
    lora = isinstance(reference, PeftModel)
    device, bare = batch.input_ids.device, reference.get_base_model() if lora else reference
    mask = common.attention_mask(bare.config.get_text_config(), batch, bare.dtype)
    with (
        reference.disable_adapter() if lora else contextlib.nullcontext(),
        torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"),
    ):
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "attention_mask": mask}
        kept = []
        handle = bare.base_model.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
        try:  # through the outermost model, where FSDP2 gathers what no layer owns; its head runs on one token
            reference(**inputs, logits_to_keep=batch.logit_positions[:1], use_cache=False)
        finally:
            handle.remove()
        return kept[0]


@torch.no_grad()
def reference_logits(reference, hidden, batch, chunk: int):
    """Yield the reference's logits of `chunk` response tokens at a time, so that never all of them exist.

    Through the model's own forward, with what its body has already computed put in the body's place: so the head keeps
    its soft-capping and scaling.
    """
    device, bare = batch.input_ids.device, reference.get_base_model() if isinstance(reference, PeftModel) else reference
    bare.base_model.forward = lambda *_, **__: hidden
    try:
        for positions in batch.logit_positions.split(chunk):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = reference(input_ids=batch.input_ids, logits_to_keep=positions, use_cache=False).logits[0]
            yield logits  # (chunk, vocab)
    finally:
        del bare.base_model.forward


def forward(model, reference, batch, beta: float, args: Args, chunk: int = 512) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of each pair, and what is logged of it: all (pairs,)."""
    hidden = reference_hidden(reference, batch)
    logits = response_logits(model, batch)  # (targets, vocab)
    with torch.no_grad():
        chunks = zip(logits.split(chunk), reference_logits(reference, hidden, batch, chunk), batch.targets.split(chunk))
        pieces = [perturbed_logps(*piece, args.epsilon) for piece in chunks]
        minus, plus, ref_logps, kl = (sum_responses(torch.cat(values), batch) for values in zip(*pieces))
        # R is subtracted from R_minus, R and R_plus, which changes no inequality (docs/eps_dpo.md, 1).
        r, r_minus, r_plus = torch.zeros_like(kl[0]), minus[0] - minus[1], plus[0] - plus[1]
        betas = adaptive_beta(r.double(), r_minus.double(), r_plus.double(), beta, args.epsilon)
    a, b = sum_responses(common.token_logps(logits, batch.targets), batch)
    losses = eps_dpo_loss(a, b, *ref_logps, betas.to(a.dtype))
    margins = betas * ((a - b) - (ref_logps[0] - ref_logps[1]))
    return losses, {
        "rewards/margin": margins,
        "rewards/accuracy": (margins > 0).float(),
        "logps/chosen": a / batch.chosen_lengths,
        "logps/rejected": b / batch.rejected_lengths,
        "logps/chosen_delta": (a - ref_logps[0]) / batch.chosen_lengths,
        "logps/rejected_delta": (b - ref_logps[1]) / batch.rejected_lengths,
        "beta": betas,
        "share/beta_minus": (betas < beta).float(),
        "share/beta_plus": (betas > beta).float(),
        "kl": (kl[0] + kl[1]) / 2,
    }


PANELS = [
    ("loss",),
    ("logps/chosen", "logps/rejected"),
    ("rewards/accuracy",),
    ("beta",),
    ("share/beta_minus", "share/beta_plus"),
    ("kl",),
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
    if not args.beta > 0:
        fail(f"--beta {args.beta}: expected a number above 0")
    if not 0 <= args.epsilon < 1:
        fail(f"--epsilon {args.epsilon}: expected a number from 0 to below 1")
    common.check_memory(args, accelerator, frozen_copies=bool(args.ref_model or not args.lora_rank))
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
    # The reference's logits are needed at every step: the model with its adapters off, or a frozen second model.
    if args.lora_rank and not args.ref_model:
        reference = accelerator.unwrap_model(model)
    else:
        reference = common.load_frozen(args.ref_model or args.model, args, accelerator)
    state["beta"] = args.beta  # moves with the run, and is saved with it

    def compute(batch):
        return forward(model, reference, batch, state["beta"], args)

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
        # ALGO: begin
        state["beta"] = means["beta"]
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
