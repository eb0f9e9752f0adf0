"""DGPO: Mitigating Likelihood Displacement with Bidirectional KL Divergence Gap
https://openreview.net/forum?id=wmi6satsIu

DPO widens the gap between chosen and rejected responses, mostly by lowering both. DGPO has no reference: it takes the
gap of their log-probs and weighs it with how likely the model finds them, so as to push softly where it has drifted.

    loss = -log s( beta * (pi_w + pi_l) * (log pi_w - log pi_l) )                                              (Eq. 11)

    s                     the logistic function
    log pi_w, log pi_l    log-probs of the chosen and the rejected response, averaged over its tokens (docs/dgpo.md)
    pi_w, pi_l            their exponentials; part of the graph, not detached (Sec. 3.2 differentiates them)

On the toy (two CPU cores, half a minute), on one GPU with LoRA, on eight:

    python dgpo.py --model toy/model --dataset toy/train.jsonl --eval-dataset toy/test.jsonl --lr 1e-5
    python dgpo.py --model mistralai/Mistral-7B-Instruct-v0.2 --lora-rank 16 --lr 1e-5 --gradient-checkpointing
    accelerate launch --config_file configs/fsdp2.yaml dgpo.py --model mistralai/Mistral-7B-Instruct-v0.2
"""

import contextlib
import json
import math
import os
import shutil
import tempfile
import time
import warnings
from collections import defaultdict
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # CPU threads that spin while they wait slow each other down

import torch
import torch.distributed.checkpoint as dcp
import tyro
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.functional import logsigmoid
from tqdm import tqdm
from transformers import get_scheduler
from transformers.modeling_layers import GradientCheckpointingLayer

import common
import look
from common import collate, fail, failing, load_model, load_preferences, micro_batches, response_logps

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it is on one device, at checkpoints


@dataclass
class Args:
    # Model and data
    model: str = "mistralai/Mistral-7B-Instruct-v0.2"  # Model to train: on the hub or a directory (Sec. 4.1)
    dataset: str = "HuggingFaceH4/ultrafeedback_binarized"  # Pairs: hub, .json, .jsonl or .parquet (Sec. 4.1)
    train_split: str = "train_prefs"  # Split to train on; of a file the part in brackets, train[:90%]
    dataset_config: str = ""  # Configuration, or folder, of a hub data set (harmless-base of Anthropic/hh-rlhf)
    eval_dataset: str = ""  # Pairs for evaluation; empty: --eval-split of --dataset
    eval_split: str = "test_prefs"  # Split to evaluate on; empty: none; of a file the part in brackets, train[90%:]
    max_length: int = 2048  # Tokens of prompt and response together (App. E)
    max_prompt_length: int = 1800  # Last tokens that the prompt of a longer pair keeps (ours, after SimPO's)

    # ALGO: begin
    beta: float = 2.5  # Weight of the gap (Sec. 4.7, Fig. 7)
    weighted: bool = True  # Weigh a pair by pi_w + pi_l (Eq. 11); --no-weighted: by 1, which is DGPO_1 (Eq. 10)
    # ALGO: end

    # Optimisation
    optimizer: Literal["adamw", "rmsprop"] = "adamw"  # AdamW (App. E) without weight decay (ours)
    lr: float = 5e-7  # Peak learning rate (ours, after SimPO's)
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"  # After warm-up (ours, after SimPO's)
    warmup: float = 0.1  # Linear warm-up: a share of all steps if below 1, else steps (App. E)
    max_grad_norm: float = 1.0  # Norm to which the gradient is clipped (transformers' default)
    batch_size: int = 16  # Pairs per optimizer step, over all processes (App. E)
    epochs: int = 1  # Passes over the pairs (App. E)
    steps: int = 0  # Optimizer steps; 0: as many as --epochs gives
    seed: int = 0  # Seed of the shuffle, and of LoRA's initial weights and dropout
    lora_rank: int = 0  # Rank of adapters on all linear layers, at scale 1; 0: train all weights (ours)
    lora_dropout: float = 0.0  # Dropout of the adapters' input

    # The run
    tokens_per_device: int = 8192  # Most tokens in a micro-batch; the result does not change
    gradient_checkpointing: bool = False  # Less memory, a third more time
    output_dir: str = "runs/dgpo"  # Where args.json, metrics.jsonl, curves.png, checkpoints/ and model/ go
    eval_every: int = 50  # Steps between evaluations, besides the first and the last one
    save_every: int = 100  # Steps between checkpoints, besides the ones after the first and the last step
    resume: bool = False  # Continue the run in --output-dir from its last checkpoint
    overwrite: bool = False  # Delete the run in --output-dir first
    track: Literal["", "tensorboard", "wandb"] = ""  # Also log to this tracker


# ALGO: begin
def dgpo_loss(chosen_logps: Tensor, rejected_logps: Tensor, beta: float, weighted: bool = True) -> Tensor:
    """Eq. 11 for each pair, of log pi_w and log pi_l averaged over the tokens: (pairs,) each, and so is the result."""
    weight = chosen_logps.exp() + rejected_logps.exp() if weighted else 1.0  # (pairs,): pi_w + pi_l; 1 makes it Eq. 10
    return -logsigmoid(beta * weight * (chosen_logps - rejected_logps))


def forward(model, batch, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of each pair, and what is logged of it: all (pairs,)."""
    chosen_logps, rejected_logps = response_logps(model, batch)
    a, b = chosen_logps / batch.chosen_lengths, rejected_logps / batch.rejected_lengths
    losses = dgpo_loss(a, b, args.beta, args.weighted)
    pi_w, pi_l = a.detach().exp(), b.detach().exp()
    weight, moves = (pi_w + pi_l, a - b) if args.weighted else (1.0, 0.0 * a)  # moves: what the weight's gradient adds
    return losses, {
        "rewards/margin": args.beta * weight * (a - b),
        "rewards/accuracy": (a > b).float(),
        "logps/chosen": a,
        "logps/rejected": b,
        "pi_w": pi_w,
        "pi_l": pi_l,
        # How hard the gradient of the loss pushes log pi_w up for each unit it pushes log pi_l down (docs/dgpo.md).
        "d_w/d_l": (weight + pi_w * moves) / (weight - pi_l * moves),
    }


MAY_BE_ZERO = {"steps", "warmup", "seed", "lora_rank", "lora_dropout"}
PANELS = {"loss": "nats", "logps/chosen logps/rejected": "nats a token", "rewards/accuracy": "share of pairs"}
PANELS |= {"rewards/margin": "nats", "pi_w pi_l": "probability", "d_w/d_l": "ratio"}
# ALGO: end


# In the order in which they are deleted: args.json, without which a folder is no run, comes last.
RUN = ("metrics.jsonl", "curves.png", "samples.md", "checkpoints", "model.writing", "model", "adapter", "reference")
RUN += ("tensorboard", "wandb", "args.json")
MAY_DIFFER = {"output_dir", "resume", "overwrite", "tokens_per_device", "save_every", "eval_every", "track"}
MAY_DIFFER |= {"gradient_checkpointing"}


def check_output_dir(args: Args) -> str:
    """Refuse a directory in use and a --resume with flags that change the result; the day on which the run began."""
    folder = Path(args.output_dir)
    with failing(f"cannot write to --output-dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    for name in ("model", "dataset", "eval_dataset", "ref_model"):
        source = Path(getattr(args, name, "") or "/")
        if source.exists() and source.resolve().is_relative_to(folder.resolve()):
            fail(f"--{name.replace('_', '-')} {source} lies in --output-dir {folder}, which the run writes to")
    taken = [name for name in RUN if (folder / name).exists()]
    if taken and "args.json" not in taken:
        fail(f"{folder} holds {', '.join(taken)} but no args.json, so it is no run: choose another --output-dir")
    if taken and args.resume == args.overwrite:
        fail(f"{folder} already holds a run: choose another --output-dir, --resume it or --overwrite it; choose one")
    with failing(f"{folder}/args.json"):
        before = json.loads((folder / "args.json").read_text()) if taken and args.resume else {}
    free = MAY_DIFFER - ({"tokens_per_device"} if args.lora_dropout else set())  # what is dropped depends on the rows
    if args.schedule == "constant_with_warmup" and not 0 < args.warmup < 1:
        free |= {"epochs", "steps"}  # a longer run has the same learning rates
    for name, now in vars(args).items():
        if before and name not in free and now != before.get(name):
            hint = "; a longer run takes a constant schedule and --warmup in steps" * (name in ("epochs", "steps"))
            fail(f"--resume with --{name.replace('_', '-')} {now}, but it was started with {before.get(name)}{hint}")
    return before.get("began", str(date.today()))


def main(args: Args) -> None:
    # What can be found wrong before anything is loaded: flags, devices, the output directory
    for name, value in vars(args).items():
        top = 1 if name == "lora_dropout" else math.inf
        if not (isinstance(value, str | bool) or 0 < value < top or value == 0 and name in MAY_BE_ZERO):
            expected = "0 or more" if name in MAY_BE_ZERO else "a number above 0"
            fail(f"--{name.replace('_', '-')} {value}: expected {expected}{', less than 1' * (top == 1)}")
    if args.max_prompt_length >= args.max_length:
        fail(f"--max-prompt-length {args.max_prompt_length} leaves no room in --max-length {args.max_length}")
    for engine in ("DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true":
            fail(f"{engine} is not supported: launch with configs/ddp.yaml, or configs/fsdp2.yaml to shard the model")
    with failing("cannot start"):
        # bf16 autocast is response_logps' own. Without cpu=True two processes on CPUs would each believe to be alone.
        cpu, trackers = not torch.cuda.is_available(), {"log_with": args.track or None, "project_dir": args.output_dir}
        accelerator = Accelerator(cpu=cpu, mixed_precision="no", **trackers)
    fsdp, main_process = accelerator.distributed_type == "FSDP", accelerator.is_main_process
    if args.track and not accelerator.log_with:
        fail(f"--track {args.track}: it is not installed; pip install {args.track}")
    if fsdp and not accelerator.is_fsdp2:
        fail("FSDP version 1 is not supported: set fsdp_version: 2, as in configs/fsdp2.yaml")
    if fsdp:
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    if args.batch_size % accelerator.num_processes:
        fail(f"--batch-size {args.batch_size} cannot be divided by {accelerator.num_processes} processes")
    began = check_output_dir(args)

    # Data, and how it falls into steps. Everything below that is random is a function of the seed and the step.
    tokenizer, limits = common.load_tokenizer(args.model), (args.max_length, args.max_prompt_length)
    train_data = load_preferences(args.dataset, tokenizer, args.train_split, *limits, args.dataset_config, began)
    held_out = args.eval_split and (not common.one_split(args.dataset) or "[" in args.eval_split)
    source, config = args.eval_dataset or (held_out and args.dataset), "" if args.eval_dataset else args.dataset_config
    eval_data = load_preferences(source, tokenizer, args.eval_split, *limits, config, began) if source else None
    steps_per_epoch, lengths = len(train_data) // args.batch_size, common.pair_lengths(train_data)
    if not steps_per_epoch:
        fail(f"--batch-size {args.batch_size} is more than the {len(train_data)} pairs of {args.dataset}")
    total_steps = args.steps or args.epochs * steps_per_epoch

    def step_pairs(step: int) -> list[int]:  # shuffled anew in each epoch, whose last incomplete batch is dropped
        epoch, position = divmod(step, steps_per_epoch)
        order = torch.randperm(len(train_data), generator=torch.Generator().manual_seed(args.seed + epoch))
        return order[position * args.batch_size :][: args.batch_size].tolist()

    # Model. Trained weights are float32: a step of 5e-7 on a bf16 weight is lost in rounding. Weights that stay frozen
    # under LoRA are bf16 on a GPU. It stays in evaluation mode, so that policy and reference agree at step 0.
    model = load_model(args.model, torch.bfloat16 if args.lora_rank and not cpu else torch.float32)
    if args.lora_rank:
        torch.manual_seed(args.seed)
        sizes = {"r": args.lora_rank, "lora_alpha": args.lora_rank, "lora_dropout": args.lora_dropout}
        towers = [name.rpartition(".")[0] for name, p in model.named_parameters() if not p.requires_grad]
        lora = LoraConfig(**sizes, target_modules="all-linear", exclude_modules=towers, task_type="CAUSAL_LM")
        model = get_peft_model(model, lora).eval()
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()
        for module in model.modules():  # in evaluation mode these would compute nothing again
            module.training = isinstance(module, GradientCheckpointingLayer)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0, fused=True)
    else:  # one parameter at a time: all at once, the square roots would be one more copy of the model
        optimizer = torch.optim.RMSprop(trained, lr=args.lr, foreach=False)
    model = accelerator.prepare(model, optimizer)[0]
    dropout = torch.nn.ModuleList(module for name, module in model.named_modules() if name.endswith("lora_dropout"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]  # FSDP2 made new ones
    warmup_steps = round(args.warmup * total_steps if args.warmup < 1 else args.warmup)
    schedule = get_scheduler(args.schedule, optimizer, warmup_steps, total_steps)  # a prepared one steps per process
    # Gradients and moments come with the first step; whether there is room shows now, as this is freed at once.
    local = sum(p.numel() for p in trained) // (accelerator.num_processes if fsdp else 1)
    torch.empty(local, 3 if args.optimizer == "adamw" else 2, dtype=torch.float32, device=accelerator.device)
    common.check_packing(model, train_data, accelerator.device, eval_data)
    accelerator.print(
        f"model {args.model}: {sum(p.numel() for p in trained) / 1e6:,.2f}M trained parameters on "
        f"{accelerator.num_processes} x {accelerator.device.type}\n"
        f"{total_steps} steps of {args.batch_size} pairs, {steps_per_epoch} an epoch without its last "
        f"{len(train_data) % args.batch_size} pairs; {sum(lengths) / len(lengths):.0f} tokens a pair; the first pair:"
    )
    for name, ids in train_data[0].items():  # a doubled BOS or a missing end token shows here
        text = repr(tokenizer.decode(ids))
        text = text if len(text) < 200 else f"{text[:95]} ... {text[-95:]}"
        accelerator.print(f"  {name[:-4]:<9}{len(ids):>5} tokens  {text}")

    # The output directory: a new run, or the last checkpoint of the one to resume
    folder, quiet = Path(args.output_dir), not accelerator.is_local_main_process
    data = common.fingerprint(train_data, eval_data and common.fingerprint(eval_data))
    resumed = args.resume and (folder / "metrics.jsonl").exists()  # else killed before it began, or as it was deleted
    checkpoints = sorted(folder.glob("checkpoints/step-*")) if resumed else []
    state = json.loads((checkpoints[-1] / "state.json").read_text()) if checkpoints else {"step": 0, "data": data}
    if state["data"] != data:
        fail(f"--resume: the pairs are not the ones that the run in {folder} was started with")
    if state["step"] > total_steps:
        fail(f"--resume: the run in {folder} has done {state['step']} steps already, more than {total_steps}")
    accelerator.wait_for_everyone()
    if main_process:
        unused = [*checkpoints[:-2], folder / "checkpoints" / "writing"]
        for path in unused if checkpoints else [folder / name for name in RUN]:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        (folder / "args.json.writing").write_text(json.dumps(vars(args) | {"began": began}, indent=2) + "\n")
        os.replace(folder / "args.json.writing", folder / "args.json")
    accelerator.wait_for_everyone()
    logs = {"": "", "tensorboard": "tensorboard", "wandb": os.environ.get("WANDB_PROJECT", "preference-optimisation")}
    wandb = {"name": os.environ.get("WANDB_NAME", folder.name), "dir": args.output_dir}
    accelerator.init_trackers(logs[args.track], config=vars(args), init_kwargs={"wandb": wandb})

    # ALGO: begin
    def compute(batch):
        return forward(model, batch, args)

    # ALGO: end

    def means(sums: dict[str, Tensor], count: int) -> dict[str, float]:  # over all processes; waits for the device once
        values = accelerator.reduce(torch.stack([value.double() for value in sums.values()]))
        return {name: value / count for name, value in zip(sums, values.tolist())}

    @torch.no_grad()
    def evaluate() -> dict[str, float]:  # means of the loss and of all metrics over the evaluation pairs
        dropout.eval()
        sums, pairs = defaultdict(float), list(range(len(eval_data)))
        plan = micro_batches(pairs, common.pair_lengths(eval_data), args.tokens_per_device, accelerator.num_processes)
        for indices in tqdm(plan[accelerator.process_index], "evaluation", leave=False, disable=quiet):
            batch = collate([eval_data[i] for i in indices or pairs[:1]]).to(accelerator.device)
            losses, metrics = compute(batch)
            for name, values in {"loss": losses, **metrics}.items():
                sums[name] += values.sum() * bool(indices)
        dropout.train()
        return {f"eval/{name}": value for name, value in means(sums, len(eval_data)).items()}

    def log(row: dict[str, float]) -> None:
        history.append(row)
        if main_process:
            print(json.dumps(row), file=metrics_file, flush=True)
        accelerator.log(row, step=row["step"])

    def training_state() -> dict:
        """Trained weights (under LoRA the adapters; a tied head counts as trained to torch) and moments."""
        weights, moments = dcp_state.get_state_dict(model, optimizer, options=trained_only)
        weights = {name: value for name, value in weights.items() if "lora_" in name or not args.lora_rank}
        return {"model_state_dict": weights, "optim_state_dict": moments}

    trained_only = dcp_state.StateDictOptions(ignore_frozen_params=True, strict=False)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)[: state["step"] + 1] if checkpoints else []
    history = [json.loads(line) for line in lines]
    if main_process:
        metrics_file = (folder / "metrics.jsonl").open("a")
        metrics_file.truncate(sum(map(len, lines)))  # without what a killed run wrote behind its last checkpoint
    if checkpoints:
        saved = training_state()
        dcp.load(saved, checkpoint_id=checkpoints[-1], no_dist=accelerator.num_processes == 1)
        dcp_state.set_state_dict(model, optimizer, **saved, options=trained_only)
        schedule.load_state_dict(state["schedule"])
        accelerator.print(f"resumed behind step {state['step']} of {total_steps}")
    else:
        log({"step": 0, **(evaluate() if eval_data else {})})

    title = f"{args.model} trained by {Path(__file__).name} on {args.dataset}"
    shown = ("loss", "logps/chosen", "logps/rejected", "rewards/accuracy")
    begin, total = state["step"] * args.batch_size, total_steps * args.batch_size
    dropout.train()
    progress = tqdm(desc=Path(__file__).stem, total=total, initial=begin, unit="pair", disable=quiet)
    for step in range(state["step"], total_steps):
        started = time.perf_counter()
        # For LoRA's dropout: a seed for each step and process, so that a resumed run drops the same.
        torch.manual_seed((args.seed * 1_000_003 + step) * 1_009 + accelerator.process_index)
        pairs = step_pairs(step)
        plan = micro_batches(pairs, lengths, args.tokens_per_device, accelerator.num_processes)
        plan, sums = plan[accelerator.process_index], defaultdict(float)
        # ALGO: begin
        for number, indices in enumerate(plan):
            batch = collate([train_data[i] for i in indices or pairs[:1]]).to(accelerator.device)
            # DDP exchanges gradients behind the last micro-batch only; FSDP behind each, to keep them sharded.
            with accelerator.no_sync(model) if not fsdp and number < len(plan) - 1 else contextlib.nullcontext():
                losses, metrics = compute(batch)
                # Processes' gradients are averaged, so this is the mean over the global batch however it was split.
                weight = bool(indices) * accelerator.num_processes / args.batch_size
                (losses.sum() * weight).backward()
            for name, values in {"loss": losses, **metrics}.items():
                sums[name] += values.detach().sum() * bool(indices)
            progress.update(len(indices) * accelerator.num_processes)
        # ALGO: end
        row = {"step": step + 1, **means(sums, args.batch_size), "lr": schedule.get_last_lr()[0]}
        row["grad_norm"] = accelerator.clip_grad_norm_(trained, args.max_grad_norm).item()
        if not math.isfinite(row["loss"] + row["grad_norm"]):
            fail(f"step {step + 1}: loss {row['loss']}, norm {row['grad_norm']}; stopped before the update: lower --lr")
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        row |= {"seconds": time.perf_counter() - started, "memory_gb": look.peak_memory(accelerator.device)}
        row["tokens_per_second"] = sum(lengths[i] for i in pairs) / row["seconds"]
        done = step + 1 == total_steps
        if eval_data and (done or (step + 1) % args.eval_every == 0):
            row |= evaluate()
            for name in ("logps/chosen", "logps/rejected"):  # likelihood displacement at a glance
                row[f"eval/{name}_delta"] = row[f"eval/{name}"] - history[0][f"eval/{name}"]
        log(row)
        progress.set_postfix({name: f"{row[name]:.3f}" for name in shown})
        if done or step == 0 or (step + 1) % args.save_every == 0:
            # Written beside and renamed into place, so that a kill at any instant leaves whole checkpoints only.
            writing = folder / "checkpoints" / "writing"
            state |= {"step": step + 1, "schedule": schedule.state_dict()}
            dcp.save(training_state(), checkpoint_id=writing, no_dist=accelerator.num_processes == 1)
            if main_process:
                (writing / "state.json").write_text(json.dumps(state))
                look.plot_curves(folder / "curves.png", title, history, PANELS)  # while a resumed run would mend it
                os.replace(writing, folder / "checkpoints" / f"step-{step + 1:08d}")
                for old in sorted(folder.glob("checkpoints/step-*"))[:-2]:
                    os.replace(old, writing)
                    shutil.rmtree(writing)
    progress.close()
    history[-1] |= evaluate() if eval_data and "eval/loss" not in history[-1] else {}  # resumed where it had to end

    # model/, in the type of the checkpoint that it came from, built anew from it: the same code for one process, DDP,
    # FSDP2, whose shards all processes gather, and LoRA, whose adapters are merged in model/ and alone in adapter/.
    options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights = dcp_state.get_model_state_dict(model, options=options)
    if main_process:
        fresh = load_model(args.model, "auto")
        fresh = get_peft_model(fresh, lora) if args.lora_rank else fresh
        assert not fresh.load_state_dict(weights, strict=False).unexpected_keys
        if args.lora_rank:
            fresh.save_pretrained(folder / "adapter")
            fresh = fresh.merge_and_unload()
        fresh.save_pretrained(folder / "model.writing")
        for path in [folder / "model.writing"] + [folder / "adapter"] * bool(args.lora_rank):
            tokenizer.save_pretrained(path)
            look.write_card(path, title, __doc__, vars(args), MAY_DIFFER, history[-1])
        shutil.rmtree(folder / "model", ignore_errors=True)
        os.replace(folder / "model.writing", folder / "model")
        del fresh, weights  # room for the models that answer, on the CPU and so last
        look.write_samples(folder / "samples.md", args.model, folder / "model", tokenizer, eval_data or train_data)
    accelerator.print(f"\n{look.summary(history, shown, args.batch_size)}\nin {folder}: model/, curves.png, samples.md")
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except torch.OutOfMemoryError:
        fail("out of memory: try a lower --tokens-per-device, --gradient-checkpointing, --lora-rank 16 or more devices")
