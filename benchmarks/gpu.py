"""Training steps of a 7B model on one GPU beside TRL's: Mistral-7B's shape with random weights, bf16 compute.

    python benchmarks/gpu.py        # one GPU; without one it says so and measures nothing
    python benchmarks/gpu.py --save benchmarks/results/gpu

LoRA (rank 16, base in bf16) and full fine-tuning (float32 weights, gradient checkpointing), for three objectives: DPO
with stored reference log-probs (hdpo.py), DPO with the reference run at every step (a frozen copy, or the model with
its adapters off), and DGPO, which has none. Each runs in a process of its own; one that runs out of memory says so in
the table. What is timed is the whole step: collating, forward, loss, backward, clipping, AdamW. TRL's DPOTrainer takes
the same steps with stored reference log-probs, under sdpa, at its fastest per-device batch, in the environment that
speed.py installs (with a torch for CUDA); collating is not in its time. The report is written anew after every line, so
a run that is stopped keeps what it has.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
import tyro
from lengths import describe
from peft import LoraConfig, get_peft_model
from sides import BETA, LORA, make_mistral, make_pairs, peak_bytes, stored_dpo_losses, wait_for_device
from speed import CHOOSING, SLOWER, Failed, Side, out_of_memory, trl_environment
from torch.nn.functional import logsigmoid

import common
import dgpo
import eps_dpo

OBJECTIVES = ("dpo stored", "dpo live", "dgpo")
# Dense bf16 operations a second, as the vendor states them; the PCIe and NVL parts are slower.
PEAK = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA A100-SXM4-80GB": 312e12}
TOKENS_PER_DEVICE = 8192
WARMUP = CHOOSING  # steps that allocate


@dataclass
class Args:
    lengths: tuple[str, ...] = ("hh", "ultrafeedback")
    """Length distributions (lengths.py)"""
    tunings: tuple[Literal["lora", "full"], ...] = ("lora", "full")
    """What is trained"""
    objectives: tuple[Literal["dpo stored", "dpo live", "dgpo"], ...] = OBJECTIVES
    """Losses, and where the reference's log-probs come from"""
    pairs: int = 32
    """Pairs per optimizer step"""
    steps: int = 4
    """Timed steps, after three that are not"""
    trl: bool = True
    """Measure TRL as well"""
    trl_batches: tuple[int, ...] = (2, 4, 8, 16)
    """TRL's per-device batches to choose the fastest from, ascending divisors of --pairs, to which they accumulate"""
    trl_python: str = ""
    """A Python with TRL; empty: make a virtual environment with the pinned versions"""
    save: str = ""
    """Write the table to SAVE.md and all numbers to SAVE.json"""


def make_model(config: dict, tuning: str, device: str):
    """The policy with random weights, in the types that the scripts give it."""
    model = make_mistral(config, tuning == "lora", device)
    if tuning == "lora":
        return get_peft_model(model, LoraConfig(**LORA))
    model.activation_checkpointing_enable()
    return model


def frozen_copy(model, config: dict, tuning: str, device: str):
    """The live reference, as eps_dpo.py has it: under LoRA the model itself, else a second one."""
    if tuning == "lora":
        return model
    copy = eps_dpo.freeze(make_mistral(config, False, device), torch.bfloat16 if device == "cuda" else torch.float32)
    copy.set_attn_implementation(common.ATTENTION)
    return copy


def step_flops(model, tuning: str, rows: list[dict]) -> float:
    """Operations of a step in which every token runs once, checkpointing not counted.

    Forward 2, backward to the activations 2 and to the weights 2 (not under LoRA) operations for each weight of the
    body and token, and of the head and response token; attention 12 (LoRA too) for each layer, hidden unit and visible
    pair of tokens. Adapters are left out, as is the last token of a response, which predicts nothing.
    """
    config = getattr(model, "module", model).config
    head = config.vocab_size * config.hidden_size
    body = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name) - 2 * head
    factor, total = 4 if tuning == "lora" else 6, 0
    for row in rows:
        prompt, *responses = (len(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
        seen = prompt * (prompt + 1) / 2 + sum((r - 1) * prompt + (r - 1) * r / 2 for r in responses)
        total += factor * (body * (prompt + sum(responses) - 2) + head * sum(responses))
        total += 12 * config.num_hidden_layers * config.hidden_size * seen
    return total


def matmul_rate(device: str, size: int = 8192, repeats: int = 20) -> float:
    """bf16 operations a second of a square matrix product, the fastest of a few."""
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16).unbind()
    times = []
    for _ in range(repeats):
        wait_for_device()
        started = time.perf_counter()
        a @ b
        wait_for_device()
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times)


@torch.no_grad()
def noise(model, rows: list[dict], device: str) -> tuple[float, float, list[float]]:
    """Largest difference of a response's summed log-prob to one plain forward: packed, and of a padded plain batch.

    Both change nothing in exact arithmetic; the second is what any trainer that pads accepts. Third, the plain sums.
    The model comes with plain attention, and is left ready for packed rows.
    """
    sequences = [(row["prompt_ids"], row[f"{part}_ids"]) for row in rows for part in ("chosen", "rejected")]
    longest = max(len(prompt) + len(response) for prompt, response in sequences)

    def plain(group: list[tuple], width: int) -> list[float]:
        ids = torch.zeros(len(group), width, dtype=torch.long, device=device)
        for i, (prompt, response) in enumerate(group):
            ids[i, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(input_ids=ids, use_cache=False).logits  # (sequences, tokens, vocab)
        found = []
        for i, (prompt, response) in enumerate(group):
            own = logits[i, len(prompt) - 1 : len(prompt) + len(response) - 1].float().log_softmax(-1)
            found.append(own.gather(1, torch.tensor(response, device=device)[:, None]).sum().item())
        return found

    alone = [plain([one], len(one[0]) + len(one[1]))[0] for one in sequences]
    padded = plain(sequences, longest)
    model.set_attn_implementation(common.ATTENTION)
    packed = torch.stack(common.response_logps(model, common.collate(rows).to(device)), 1).flatten().tolist()
    return *(max(abs(a - b) for a, b in zip(one, alone)) for one in (packed, padded)), alone


def side(config: dict, tuning: str, objective: str, name: str, device: str, args: Args) -> dict:
    """All numbers of one line of the table."""
    rows = make_pairs(name, args.pairs * (WARMUP + args.steps))
    model = make_model(config, tuning, device).train()
    reference = frozen_copy(model, config, tuning, device) if objective == "dpo live" else None
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-7, fused=True)
    lengths, seconds = [sum(map(len, row.values())) for row in rows], []
    off, off_padded, plain = noise(model, rows[:4], device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(WARMUP + args.steps):
        wait_for_device()
        started = time.perf_counter()
        pairs = list(range(step * args.pairs, (step + 1) * args.pairs))
        for indices in common.micro_batches(pairs, lengths, TOKENS_PER_DEVICE, 1)[0]:
            batch = common.collate([rows[i] for i in indices]).to(device)
            if objective == "dgpo":
                losses = dgpo.forward(model, batch, dgpo.Args())[0]
            elif objective == "dpo stored":
                losses = stored_dpo_losses(*common.response_logps(model, batch))
            else:
                with torch.no_grad(), model.disable_adapter() if tuning == "lora" else contextlib.nullcontext():
                    a0, b0 = common.response_logps(reference, batch)
                a, b = common.response_logps(model, batch)
                losses = -logsigmoid(BETA * ((a - a0) - (b - b0)))
            (losses.sum() / args.pairs).backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        assert norm.isfinite(), "the gradient is not finite"
        optimizer.step()
        optimizer.zero_grad()
        wait_for_device()
        seconds.append(time.perf_counter() - started)
    operations = step_flops(model, tuning, rows[args.pairs * WARMUP :])
    own = {"peak": peak_bytes(), "off": off, "off_padded": off_padded, "plain": plain}
    return own | rates(seconds[WARMUP:], rows[args.pairs * WARMUP :], operations)


def rates(seconds: list[float], rows: list[dict], operations: float) -> dict:
    """What the table says of timed steps over these rows."""
    return {
        "seconds": seconds,
        "pairs_per_second": len(rows) / len(seconds) / median(seconds),
        "tokens_per_second": sum(len(ids) for row in rows for ids in row.values()) / sum(seconds),
        "flops": operations / sum(seconds),
    }


def trl(python: str, config: dict, tuning: str, name: str, device: str, args: Args, ours: dict) -> dict:
    """TRL's line of the table, at the per-device batch where its steps took least time; `ours` is this repo's line."""
    spec = {"name": name, "batch_size": args.pairs, "steps": WARMUP + args.steps}
    rows, best = make_pairs(name, args.pairs * (WARMUP + args.steps))[args.pairs * WARMUP :], None
    operations, tried = step_flops(make_mistral(config, tuning == "lora", "meta"), tuning, rows), {}
    for device_batch in args.trl_batches:
        try:
            one = Side(
                python, "trl_side.py", device_batch=device_batch, tuning=tuning, config=config, device=device, **spec
            )
            steps = [one.step() for _ in range(WARMUP + args.steps)]
        except Failed as failure:
            tried[device_batch] = "out of memory" if out_of_memory(failure) else str(failure).strip().splitlines()[-1]
            break
        one.end()
        seconds = [step["seconds"] for step in steps[WARMUP:]]
        tried[device_batch] = median(seconds)
        if best is None or sum(seconds) < sum(best["seconds"]):
            off = max((abs(a - b) for a, b in zip(one.ready["logps"], ours.get("plain", []))), default=math.nan)
            best = {"peak": steps[-1]["peak"], "off": off, "off_padded": math.nan, "device_batch": device_batch}
            best |= rates(seconds, rows, operations)
        elif sum(seconds) > SLOWER * sum(best["seconds"]):
            break
    return (best or {"failed": tried[device_batch]}) | {"tried": tried}


def table(results: dict[str, dict], rate: float, peak: float | None) -> str:
    """Markdown, a line for each variant."""
    lines = [
        "| lengths, tuning, objective | pairs/s | tokens/s | peak memory | MFU | of matmul rate | "
        "log-probs off by, packed | padded |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for title, one in results.items():
        if "failed" in one:
            lines.append(f"| {title} | {one['failed']} | | | | | | |")
            continue
        share = f"{one['flops'] / peak:.0%}" if peak else "-"
        off, off_padded = ("-" if math.isnan(one[name]) else f"{one[name]:.1e}" for name in ("off", "off_padded"))
        lines.append(
            f"| {title} | {one['pairs_per_second']:.1f} | {one['tokens_per_second']:.0f} | "
            f"{one['peak'] / 1e9:.1f} GB | {share} | {one['flops'] / rate:.0%} | "
            f"{off} | {off_padded} |"
        )
    return "\n".join(lines)


REPORT = """# Training steps of a 7B model on one {device}

`python benchmarks/gpu.py {options}`, torch {version}; {pairs} pairs a step, {steps} steps (pairs/s by their median).
TRL's lines end with its per-device batch. A bf16 matrix product runs at {rate:.0f} TFLOP/s here; MFU is against
{peak}. Every token is counted once; recomputation and a reference's forward are not counted.

{table}

{lengths}
"""


def report(results: dict[str, dict], rate: float, args: Args) -> None:
    """Print the table so far, and save it."""
    device = torch.cuda.get_device_name()
    peak = PEAK.get(device)
    text = REPORT.format(
        device=device,
        options=" ".join("PYTHON" if a == args.trl_python else a for a in sys.argv[1:]),
        version=torch.__version__,
        pairs=args.pairs,
        steps=args.steps,
        rate=rate / 1e12,
        peak=f"{peak / 1e12:.0f} TFLOP/s" if peak else "a peak that this script does not know",
        table=table(results, rate, peak),
        lengths="\n".join(f"- {name}: {describe(name)}" for name in args.lengths),
    )
    print(text, flush=True)
    if args.save:
        Path(f"{args.save}.md").write_text(text)
        Path(f"{args.save}.json").write_text(json.dumps(results, indent=1) + "\n")


def main(args: Args) -> None:
    if not torch.cuda.is_available():
        print("no GPU here: nothing was measured")
        return
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # TRL's trainer refuses a process that sees several
    rate, results = matmul_rate("cuda"), {}
    torch.cuda.empty_cache()
    for name, tuning, objective in product(args.lengths, args.tunings, args.objectives):
        title = f"{name}, {tuning}, {objective}"
        spec = json.dumps([tuning, objective, name, args.pairs, args.steps])
        done = subprocess.run([sys.executable, __file__, spec], stdout=subprocess.PIPE, text=True)
        failed = {"failed": f"failed with exit code {done.returncode}"}
        results[title] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else failed
        report(results, rate, args)
    if not args.trl:
        return
    try:
        python = args.trl_python or trl_environment()
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"error: TRL cannot be installed ({error}); its lines are missing from the table") from None
    for name, tuning in product(args.lengths, args.tunings):
        ours = results.get(f"{name}, {tuning}, dpo stored", {})
        beside = trl(python, {}, tuning, name, "cuda", args, ours)
        results[f"{name}, {tuning}, dpo stored, TRL {beside.get('device_batch', '')}"] = beside
        report(results, rate, args)


def line(spec: str) -> None:
    """One variant in this process; its numbers are the last line that it prints."""
    tuning, objective, name, pairs, steps = json.loads(spec)
    try:
        args = Args(pairs=pairs, steps=steps)
        print(json.dumps(side({}, tuning, objective, name, "cuda", args)))
    except torch.OutOfMemoryError:
        print(json.dumps({"failed": "out of memory"}))


if __name__ == "__main__":
    line(sys.argv[1]) if len(sys.argv) > 1 and sys.argv[1].startswith("[") else main(
        tyro.cli(Args, description=__doc__)
    )
