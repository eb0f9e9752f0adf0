"""What fits where: the peak memory of one optimizer step, simulated on a CPU at the shape of any model.

    python benchmarks/memory.py --save benchmarks/results/memory        # the page
    python benchmarks/memory.py --model Qwen3-32B --devices 8 16 --lora-rank 16 --gradient-checkpointing
    python benchmarks/memory.py --model DIR_OR_HUB_NAME --devices 8     # one's own; of the hub only config.json is read

The step is the script's own: packed rows through common.response_logps, backward, clipping, AdamW or RMSprop, in its
types, and over several devices as accelerate shards it for configs/fsdp2.yaml. Its tensors have shapes and types but no
memory (torch's FakeTensorMode), its collectives move nothing (the process group "fake"), and MemTracker counts what
would live at a time. The second step is simulated, in which the moments are there from the start.

Fake tensors are on the CPU, as torch without CUDA has no others; attention and bf16 autocast are those of a GPU. Not
counted: the CUDA context, NCCL's buffers, and what the allocator loses to fragments.
"""

import json
import os
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Literal
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(1, str(Path(__file__).parents[1] / "experiments"))

import torch
import torch.distributed as dist
import tyro
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import LoraConfig, get_peft_model
from report import commit, machine, said, table
from sides import peak_bytes
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops, sync_ops
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, _sharding_prop
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config
from transformers.modeling_layers import GradientCheckpointingLayer

import common
import dgpo
import dpo_pg
import eps_dpo

# Shapes as their authors published them; what is not named is the class's default and costs no memory.
LLAMA = {"vocab_size": 128_256, "num_key_value_heads": 8, "max_position_embeddings": 131_072}
SHAPES = {
    "Mistral-7B": (
        MistralConfig,
        {"vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": None},
    ),
    "Llama-3.1-8B": (
        LlamaConfig,
        LLAMA | {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32},
    ),
    "Qwen3-32B": (
        Qwen3Config,
        {"vocab_size": 151_936, "hidden_size": 5120, "intermediate_size": 25_600, "num_hidden_layers": 64,
         "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128},
    ),
    "Llama-3.1-70B": (
        LlamaConfig,
        LLAMA | {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64},
    ),
    "SmolLM2-135M": (
        LlamaConfig,
        {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
         "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    ),
    "34M of sides.py": (
        LlamaConfig,
        {"vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 768, "num_hidden_layers": 8,
         "num_attention_heads": 8, "tie_word_embeddings": True},
    ),
    "tiny": (
        LlamaConfig,
        {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
         "num_attention_heads": 2, "max_position_embeddings": 16_384},
    ),
}  # fmt: skip
GIB = 2**30
CARDS, FILLED = (24, 40, 80, 141), 0.9  # GiB, and the share that a step may take: ours, for what is not counted
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc keeps what is freed below its threshold, which else grows
LINEAR = 2.1  # what twice the tokens a row may take at most of a real step; written before it was measured
DEPTHS = 3, 4  # layers from which the page draws its lines to a model's own number


COLLECTIVES = collective_ops - sync_ops


@dataclass
class Args:
    model: str = ""
    """Directory, name on the hub, or one of SHAPES in the file; empty: the whole page, which takes only --save"""
    script: Literal["dgpo", "eps_dpo", "dpo_pg"] = "dgpo"
    """Whose step; hdpo.py's and dpl.py's take what dgpo.py's does"""
    devices: tuple[int, ...] = (1,)
    """GPUs that the model is sharded over, a line for each number"""
    lora_rank: int = 0
    """Rank of adapters on all linear layers; 0: train all weights"""
    gradient_checkpointing: bool = False
    """As the scripts' flag"""
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    """As the scripts' flag"""
    tokens_per_device: int = 8192
    """As the scripts' flag"""
    pairs: int = 16
    """Pairs a step over all devices, at least one each"""
    prompt: int = 300
    """Tokens of each prompt"""
    response: int = 300
    """Tokens of each response"""
    save: str = ""
    """Write the page to SAVE.md and its numbers to SAVE.json"""


class Tracker(MemTracker):
    """The most bytes alive in each phase of a step, and the bytes that collectives handle."""

    def __init__(self):
        super().__init__()
        self.phase, self.peaks, self.handled = "", Counter(), 0

    def nothing(self, *_):
        """In place of statistics of every module, which know no frozen weights and no second micro-batch."""

    _pre_fw_hook = _post_fw_hook = _pre_bw_hook = _post_bw_hook = nothing

    def _update_peak_stats(self, _state):
        alive = sum(sizes["Total"] for sizes in self._curr_mem_snap.values())
        self.peaks[self.phase] = max(self.peaks[self.phase], alive)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func in COLLECTIVES:
            self.handled += CollectiveOp.get_comm_tensor_size(func, result, args, kwargs)
        return result


def make_config(name: str, layers: int = 0):
    """The configuration of a shape, or that in a directory or on the hub; with another number of layers, if given."""
    if name not in SHAPES:
        with common.failing(f"cannot load {name!r}"):
            return AutoConfig.from_pretrained(name)
    kind, numbers = SHAPES[name]
    return kind(**numbers | ({"num_hidden_layers": layers} if layers else {}))


def load(config, dtype: torch.dtype):
    """common.load_model with random weights."""
    make = AutoModelForCausalLM.from_config
    with (
        patch.object(common.AutoConfig, "from_pretrained", lambda _path: config),
        patch.object(common.AutoModelForCausalLM, "from_pretrained", lambda _, dtype: make(config, dtype=dtype).eval()),
    ):
        return common.load_model(str(Path(__file__).parent), dtype)


def make_models(config, args: Args, gpu: bool, fsdp: bool) -> tuple:
    """The policy and, of eps_dpo.py, its reference, in the types that the scripts' main() gives them."""
    model = load(config, torch.bfloat16 if args.lora_rank and gpu else torch.float32)
    if args.lora_rank:
        sizes = {"r": args.lora_rank, "lora_alpha": args.lora_rank, "target_modules": "all-linear"}
        model = get_peft_model(model, LoraConfig(**sizes, task_type="CAUSAL_LM")).eval()
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()
        for module in model.modules():
            module.training = isinstance(module, GradientCheckpointingLayer)
    reference = None
    if args.script == "eps_dpo" and not args.lora_rank:
        reference = load(config, torch.bfloat16 if gpu and fsdp else torch.float32)
        reference = eps_dpo.freeze(reference, torch.bfloat16 if gpu else torch.float32)
    for one in filter(None, (model, reference)):
        getattr(one, "get_base_model", lambda one=one: one)().set_attn_implementation(common.ATTENTION)
    return model, reference


def materialise(model) -> None:
    """Parameters and buffers off the meta device, the tied ones once."""
    made = {}
    for module in model.modules():
        for name, own in module._parameters.items():
            if own is not None and own not in made:
                made[own] = torch.nn.Parameter(torch.empty(own.shape, dtype=own.dtype), own.requires_grad)
            module._parameters[name] = made.get(own)
        for name, own in module._buffers.items():
            module._buffers[name] = None if own is None else torch.empty(own.shape, dtype=own.dtype)


def shard(model, devices: int):
    """As accelerator.prepare() does under configs/fsdp2.yaml with the scripts' types."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True,
        cpu_ram_efficient_loading=False, mixed_precision_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32),
    )  # fmt: skip
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        mesh = dist.init_device_mesh("cpu", (devices,), mesh_dim_names=("fsdp",))
    own = {"state": SimpleNamespace(fsdp_plugin=plugin), "mixed_precision": "no", "is_main_process": True}
    own |= {"torch_device_mesh": mesh, "parallelism_config": SimpleNamespace(fsdp_dim_names=["fsdp"])}
    model = fsdp2_prepare_model(SimpleNamespace(**own, device=torch.device("cpu")), model)
    model._get_fsdp_state()._lazy_init()  # as by check_packing: with the adapters off, no type of a gradient were known
    return model


def make_optimizer(trained: list, args: Args):
    """The scripts' optimizer after a first step, so with its moments."""
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.0, fused=True)
    else:
        optimizer = torch.optim.RMSprop(trained, lr=1e-6, foreach=False)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def make_plan(args: Args, devices: int) -> list[list[int]]:
    """Pairs of each micro-batch of process 0."""
    pairs = max(args.pairs, devices)
    if pairs % devices:
        common.fail(f"--pairs {pairs} cannot be divided by {devices} devices")
    lengths = [args.prompt + 2 * args.response] * pairs
    return common.micro_batches([*range(pairs)], lengths, args.tokens_per_device, devices)[0]


def take_step(model, reference, trained: list, optimizer, args: Args, plan: list, at=lambda _phase: None) -> None:
    """One optimizer step of a process, in the order of the scripts' main(), whose variables keep their names here, as
    they decide what lives how long; at() is told each phase.
    """
    row = {"prompt_ids": [1] * args.prompt, "chosen_ids": [2] * args.response, "rejected_ids": [3] * args.response}
    gradients, logps = {}, {}
    for part in ("chosen", "rejected") if args.script == "dpo_pg" else ():
        for number, indices in enumerate(plan):
            batch = common.collate([row for _ in indices], (part,))
            at("forward")
            logps[part, number] = common.response_logps(model, batch)[part == "rejected"]
            at("backward")
            (-logps[part, number].sum() / args.pairs).backward()
        gradients[part] = [parameter.grad for parameter in trained]
        optimizer.zero_grad()
    for indices in () if args.script == "dpo_pg" else plan:
        batch = common.collate([row for _ in indices])
        at("forward")
        if args.script == "dgpo":
            losses, metrics = dgpo.forward(model, batch, dgpo.Args())
        else:
            losses, metrics = eps_dpo.forward(model, reference or model, batch, 0.1, eps_dpo.Args())
        at("backward")
        (losses.sum() / args.pairs).backward()
    at("update")
    if args.script == "dpo_pg":
        g_w, g_l = gradients["chosen"], gradients["rejected"]
        dpo_pg.inner(g_w, g_l), dpo_pg.inner(g_w, g_w), dpo_pg.inner(g_l, g_l)
        for parameter, gradient in zip(trained, dpo_pg.project(g_w, g_l, inplace=True)):
            parameter.grad = gradient
        del gradients, g_w, g_l, gradient
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def local_bytes(tensors) -> int:
    """Of the shards on this process, a tied tensor once."""
    locals_ = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return sum(tensor.numel() * tensor.element_size() for tensor in locals_)


def on_gpu(query, value) -> bool:
    """common.flash_takes on a card of compute capability 8 or above."""
    return value.dtype == torch.bfloat16 and query.shape[-1] == value.shape[-1] <= 256 and query.shape[-1] % 8 == 0


def simulate(config, args: Args, devices: int = 1, gpu: bool = True) -> dict:
    """Bytes of a device: weights, gradients, moments, what it sends in a step, and the peak of each phase.

    gpu  bf16 autocast and FlashAttention; False: float32 and attention by segments, which is what a CPU computes
    """
    plan = make_plan(args, devices)
    dist.init_process_group("fake", rank=0, world_size=devices, store=FakeStore())
    with torch.device("meta"):  # peft cannot move a fake tensor
        model, reference = make_models(config, args, gpu, devices > 1)
    with ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        stack.enter_context(FakeTensorMode())
        # DTensor works shapes out on whole tensors under the mode that it finds; MemTracker leaves another's out.
        stack.enter_context(patch.object(_sharding_prop, "detect_fake_mode", lambda: None))
        stack.enter_context(patch.object(torch.Tensor, "item", lambda _: 1.0))  # there are no values
        if gpu:
            stack.enter_context(patch.object(common, "flash_takes", on_gpu))
        for one in filter(None, (model, reference)):
            materialise(one)
            if gpu:
                one.forward = torch.autocast("cpu", torch.bfloat16)(one.forward)
        model = shard(model, devices) if devices > 1 else model
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer, tracker = make_optimizer(trained, args), Tracker()
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]

        def at(phase: str) -> None:
            tracker.phase = phase

        def again(number: int, *_) -> None:  # checkpointed layers run again in the backward pass, the last one first
            if tracker.phase.startswith("backward"):
                tracker.phase = f"backward {number}"

        for number, layer in enumerate(layers):  # not the layer's own, which is not called anew
            next(layer.children()).register_forward_pre_hook(partial(again, number))
        tracker.track_external(model, optimizer, *filter(None, [reference]))
        with tracker:
            take_step(model, reference, trained, optimizer, args, plan[:2], at)  # any further repeats the second
        moments = [value for state in optimizer.state.values() for value in state.values()]
        return {
            "weights": local_bytes(part for one in filter(None, (model, reference)) for part in one.parameters()),
            "gradients": local_bytes(trained),
            "moments": local_bytes(moments),
            # A ring passes on all but a device's own share; all micro-batches exchange the same.
            "sent": tracker.handled * (devices - 1) / devices * len(plan) / len(plan[:2]),
            "peaks": dict(tracker.peaks),
        }


def peak(found: dict) -> float:
    """GiB"""
    return max(found["peaks"].values()) / GIB


def at_depth(name: str, args: Args, devices: int) -> dict:
    """simulate() of a shape on GPUs, each number on the line through those of two smaller depths. What lives in the
    backward pass of a layer is linear in its number but for the first and the last one, so the most is at the two first
    or the two last layers; which of these or of the other phases is highest may change with depth.
    """
    two, layers = [], make_config(name).num_hidden_layers
    for depth in DEPTHS:
        two.append(simulate(make_config(name, depth), args, devices))
        peaks = two[-1]["peaks"]
        if args.gradient_checkpointing:
            own = [peaks.pop(f"backward {number}") for number in range(depth)]
            peaks |= {"backward 0": own[0], "backward 1": own[1], "backward -2": own[-2], "backward -1": own[-1]}

    def line(a: float, b: float) -> float:
        return a + (b - a) * (layers - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])

    few, more = two
    peaks = {phase: line(few["peaks"][phase], more["peaks"][phase]) for phase in few["peaks"]}
    return {key: line(few[key], more[key]) for key in few if key != "peaks"} | {"peaks": peaks}


def measured(name: str, args: Args) -> int:
    """Bytes that a real step on this CPU, in float32, adds at its peak to a process that has taken one of a tiny
    model, weights included.
    """
    torch.set_num_threads(1)

    def run(name: str, args: Args) -> None:
        model, reference = make_models(make_config(name), args, gpu=False, fsdp=False)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        take_step(model, reference, trained, make_optimizer(trained, args), args, make_plan(args, 1))

    run("tiny", replace(args, pairs=1, prompt=8, response=8))
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")  # resident now (Linux)
    run(name, args)
    return peak_bytes() - before


def real(name: str, args: Args, environment: dict[str, str]) -> int:
    """measured() in a process of its own."""
    with patch.dict(os.environ, environment), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measured, name, args).result()


def card(gib: float) -> str:
    """The smallest card whose share such a peak leaves free."""
    return next((f"{size} GB" for size in CARDS if gib <= FILLED * size), "none")


# The page's
LARGE, DEVICES = ("Mistral-7B", "Llama-3.1-8B", "Qwen3-32B", "Llama-3.1-70B"), (1, 2, 4, 8, 16, 64, 512)
TUNINGS = {"LoRA": ({"lora_rank": 16}, 1), "full": ({}, 8)}  # flags, and devices outside the first table
REAL = ("34M of sides.py", 4), ("SmolLM2-135M", 2)  # models that are trained for comparison, and pairs
REAL_TOKENS = 4096, 8192, 16_384  # in a row of "tiny"
PAGE = Args(gradient_checkpointing=True)
PARTS = ["weights", "gradients", "moments"]
HEAD = [*PARTS, "the rest", "peak GiB", "card", "GB sent a step"]


def parts(found: dict) -> list[str]:
    """Cells: weights, gradients, moments, the rest and the peak in GiB, the card, and what is sent in GB."""
    sizes = [found[part] / GIB for part in PARTS]
    sizes += [peak(found) - sum(sizes), peak(found)]
    return [*(f"{size:.1f}" for size in sizes), card(peak(found)), f"{found['sent'] / 1e9:.1f}"]


def fits(cell) -> str:
    """How many of each card hold a step of every large model; its peak over the devices and what each of them sends."""
    rows = []
    for name, (tuning, (flags, _)) in product(LARGE, TUNINGS.items()):
        found = {count: cell(name, replace(PAGE, **flags), count) for count in DEVICES}
        fewest = (next((n for n, one in found.items() if peak(one) <= FILLED * size), "-") for size in CARDS)
        cells = (f"{peak(one):.1f}" + f" ({one['sent'] / 1e9:.0f})" * (n > 1) for n, one in found.items())
        rows.append([name, tuning, "simulated", *fewest, *cells])
    head = [*(f"{size} GB" for size in CARDS), *(f"{count} x" for count in DEVICES)]
    return table(["model", "trained", "", *head], rows)


def made_of(cell) -> str:
    """What a step of each script holds."""
    rows = []
    for (tuning, (flags, count)), script in product(TUNINGS.items(), ("dgpo", "eps_dpo", "dpo_pg")):
        found = cell(LARGE[0], replace(PAGE, **flags, script=script), count)
        rows.append([script, tuning, count, *parts(found)])
    return table(["script", "trained", "devices", *HEAD], rows)


def less_room(cell) -> str:
    """LoRA in shorter rows, with and without checkpointing."""
    rows = []
    for tokens, checkpointing in product((8192, 2048), (True, False)):
        own = Args(lora_rank=16, gradient_checkpointing=checkpointing, tokens_per_device=tokens)
        rows.append([tokens, "yes" if checkpointing else "no", *parts(cell(LARGE[0], own, 1))[3:-1]])
    return table(["--tokens-per-device", "checkpointing", *HEAD[3:-1]], rows)


def long_pairs(cell) -> str:
    """Pairs of many tokens, one a row."""
    rows = []
    for tokens, (tuning, (flags, count)) in product((4096, 16_384), TUNINGS.items()):
        sizes = {"prompt": tokens - tokens // 16, "response": tokens // 32, "tokens_per_device": tokens, "pairs": 8}
        rows.append([tokens, tuning, count, *parts(cell(LARGE[0], replace(PAGE, **flags, **sizes), count))[3:-1]])
    return table(["tokens a pair", "trained", "devices", *HEAD[3:-1]], rows)


def beside_real(numbers: dict) -> tuple[str, float]:
    """Simulated beside measured, and the largest growth of the measured where the tokens double."""
    steps = [(name, Args(pairs=pairs)) for name, pairs in REAL]
    for tokens in REAL_TOKENS:
        steps.append(("tiny", replace(PAGE, pairs=1, prompt=tokens - 512, response=256, tokens_per_device=tokens)))
    rows, measured = [], []
    for name, own in steps:
        found = {
            "simulated": max(simulate(make_config(name), own, gpu=False)["peaks"].values()),
            "measured": real(name, own, GIVE_BACK),
            "without the setting": real(name, own, {}),
        }
        numbers[f"a real step, {key(name, own, 1)}"] = found
        measured.append(found["measured"])
        cells = (f"{found[side] / 2**20:.0f} ({found[side] / found['simulated']:.2f})" for side in found)
        step = f"{own.pairs} x ({own.prompt} + 2 x {own.response})"
        rows.append([name + ", checkpointing" * own.gradient_checkpointing, step, *cells])
    longer = measured[-len(REAL_TOKENS) :]
    growth = max(two / one for one, two in zip(longer, longer[1:]))
    return table(["model", "pairs x tokens", *found], rows), growth


def key(name: str, args: Args, devices: int) -> str:
    """What is simulated, with all flags that are not as Args has them."""
    flags = [f"{flag} {value}" for flag, value in vars(args).items() if value != getattr(Args, flag)]
    return ", ".join([name, f"{devices} devices", *flags])


def page() -> tuple[str, dict]:
    """The page in markdown, and its numbers."""
    numbers = {}

    def cell(name: str, own: Args, devices: int) -> dict:
        if (known := key(name, own, devices)) not in numbers:
            numbers[known] = at_depth(name, own, devices)
            print(f"{known}: {peak(numbers[known]):.1f} GiB", file=sys.stderr, flush=True)
        return numbers[known]

    checks, growth = beside_real(numbers)
    text = f"""# What fits where

`python benchmarks/memory.py --save benchmarks/results/memory`, at commit {commit()} on {machine()}.

**All numbers are simulated**, but for the measured ones of the last table: no GPU was used. A step of {PAGE.pairs}
pairs, a prompt of {PAGE.prompt} and responses of {PAGE.response} tokens each, AdamW, bf16 compute, --tokens-per-device
{PAGE.tokens_per_device}; over more than {PAGE.pairs} devices one pair each. dpo_pg.py has AdamW here, too; its default
is RMSprop, which has one moment instead of two. A card is said to hold a step that takes at most {FILLED:.0%} of it, as
the CUDA context, NCCL's buffers and fragments are not counted. Peaks are extrapolated linearly from {DEPTHS[0]} and
{DEPTHS[1]} layers, separately for each phase of the step (tests/test_memory.py checks it with a small model).

## What fits, and how it scales

With --gradient-checkpointing; LoRA of rank 16 over frozen bf16 weights, full in float32. One device is the plain
script, more are sharded as by configs/fsdp2.yaml. Under a card: the fewest of that size, among the numbers shown (-:
more). Under a number of devices: GiB at the peak of each, and in brackets the GB that it sends a step.

{fits(cell)}
## What it is made of

{LARGE[0]}, as above. dgpo.py, hdpo.py and dpl.py take the same: two of them store the reference's log-probs before.
eps_dpo.py runs a reference at every step: without LoRA a second model, on each device whole. dpo_pg.py has a second
gradient. Sent: by each device in a ring, for all-gathers in bf16 and reduce-scatters in float32.

{made_of(cell)}
## Saving memory

{LARGE[0]}, LoRA, one device.

{less_room(cell)}
## Long pairs

{LARGE[0]}, pairs of so many tokens, one a row, 15/16 of them the prompt; --gradient-checkpointing, 8 pairs a step.

{long_pairs(cell)}
## Against real steps

On this CPU, in float32, all weights trained, AdamW, with all layers: the peak of a process's memory above what it had
before it built the model, in MiB, and in brackets its ratio to the simulation of the same. Measured is with
{" ".join("=".join(one) for one in GIVE_BACK.items())}, so that the process gives back what a step frees; without that
setting glibc keeps some of it, for which a GPU's allocator has its own ways. On a CPU the rejected response has a mask
of its own tokens by its keys, on a GPU none.

Memory grows with the tokens of a row, not with their square (twice the tokens at most {LINEAR} times the memory, in the
last rows): **{said(growth <= LINEAR)}**, at most {growth:.2f} times.

{checks}"""
    return text, numbers


def main(args: Args) -> None:
    if args.model:
        rows = []
        for count in args.devices:
            rows.append([args.script, count, *parts(simulate(make_config(args.model), args, count))])
        print(f"{args.model}, simulated; weights to peak in GiB per device\n")
        print(table(["script", "devices", *HEAD], rows))
        return
    if args != Args(save=args.save):
        common.fail("the page takes no flag but --save; for numbers of your own name a --model")
    text, numbers = page()
    print(text)
    if args.save:
        data = {"commit": commit(), "machine": machine(), "bytes": numbers}
        Path(f"{args.save}.json").write_text(json.dumps(data, indent=1) + "\n")
        Path(f"{args.save}.md").write_text(text)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
