"""What the two sides of speed.py share: the model, the pairs, and how a side is driven from outside.

Runs in both environments, so it needs nothing but torch and transformers. A side says one line of JSON when it is
ready; then, for every line it is sent, it takes one optimizer step and says how long that took.
"""

import json
import os
import random
import resource
import sys
import time

import torch
from lengths import pair_lengths
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

VOCABULARY = 32_000
LEARNING_RATE, BETA, MAX_GRAD_NORM = 1e-6, 0.1, 1.0
LORA = {"r": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def make_model() -> LlamaForCausalLM:
    """A Llama of 34.2M parameters with random weights, the same in every process.

    16.4M are the embeddings, which are also the head, and 17.8M the body's 8 layers.
    """
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).float()


def make_mistral(config: dict, lora: bool, device: str) -> MistralForCausalLM:
    """MistralConfig's shape, which is Mistral-7B's, with random weights, the same in every process.

    In float32, as weights that are trained must be; bf16 on a GPU under LoRA, where they are frozen.
    """
    dtype = torch.bfloat16 if lora and device == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            MistralConfig(sliding_window=None, **config), dtype=dtype, attn_implementation="sdpa"
        )


def make_pairs(name: str, count: int) -> list[dict]:
    """`count` pairs of random tokens with the lengths of distribution `name`; no response begins like the other."""
    rng = random.Random(f"tokens of {name}")
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    pairs = []
    for lengths in pair_lengths(name, count):
        ids = [[rng.randrange(3, VOCABULARY) for _ in range(length)] for length in lengths]
        ids[2][0] = 3 + (ids[1][0] - 2) % (VOCABULARY - 3)
        pairs.append(dict(zip(columns, ids)))
    return pairs


def stored_dpo_losses(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """DPO's loss with the stored log-probs of the policy as it is, which is what a first step finds: (pairs,).

    Without any reference, responses of different length would have gradients near 1e-40, and a CPU multiplies such
    numbers many times slower than others.
    """
    return -logsigmoid(BETA * ((chosen - chosen.detach()) - (rejected - rejected.detach())))


def peak_bytes() -> int:
    """The most memory that this process ever held: on the GPU where it uses one, else of the machine."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    if os.path.exists("/proc/self/status"):  # getrusage there counts what the parent held before it started this one
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def wait_for_device() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def limit_memory() -> None:
    """End with an error instead of being killed, or something else on the machine, where memory runs out (Linux)."""
    if os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as lines:
            free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        resource.setrlimit(resource.RLIMIT_DATA, (free, resource.RLIM_INFINITY))


class Line:
    """The line to speed.py. Whatever libraries print goes to stderr from now on."""

    def __init__(self):
        if not torch.cuda.is_available():
            limit_memory()
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def say(self, **message) -> None:
        print(json.dumps(message), file=self.out, flush=True)

    def wait(self) -> None:
        """Until the next step is asked for; the process ends where none will be."""
        if not sys.stdin.readline():
            os._exit(0)  # in the middle of a Trainer's loop there is no other short way out
        wait_for_device()
        self.started, self.started_cpu = time.perf_counter(), time.process_time()

    def done(self) -> None:
        wait_for_device()
        seconds, cpu_seconds = time.perf_counter() - self.started, time.process_time() - self.started_cpu
        self.say(seconds=seconds, cpu_seconds=cpu_seconds, peak=peak_bytes())
