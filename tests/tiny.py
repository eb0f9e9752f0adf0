"""Tokenizers, models and data small enough to be made in every test."""

import contextlib
import json
import random
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import common

ROOT = Path(__file__).parents[1]

# The shapes of four families' chat templates, written anew: who writes the BOS, what ends a turn, what follows the end.
TEMPLATES = {
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% else %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "zephyr": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "qwen": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "thinking": (  # as Qwen3's: the last answer is written with an empty thought, the request for one is not
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}
SPECIAL = [
    "<unk>",
    "<s>",
    "</s>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|im_start|>",
    "<|im_end|>",
]
CHARACTERS = sorted(set(map(chr, range(32, 127))) | {"\n", "é", "ß"})


def tokenizer(template: str | None = None, bos: bool = True, merges: bool = True) -> PreTrainedTokenizerFast:
    """Characters and a few merged pairs, so that tokens can straddle the border between prompt and response."""
    pairs = [(" ", "t"), ("h", "e"), (" t", "he"), ("\n", "\n"), ("]", " "), ("1", "2")] if merges else []
    vocabulary = SPECIAL + CHARACTERS + [a + b for a, b in pairs]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, pairs, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r".+|\n+"), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens(SPECIAL)
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>" if bos else None, eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    made.chat_template = TEMPLATES.get(template, template)
    return made


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 120}
ROPE = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512}
SLIDING = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
PACKABLE = {
    "llama": {**ROPE, "tie_word_embeddings": True},
    "mistral": {**ROPE, "sliding_window": 7},
    "qwen2": {**ROPE, "use_sliding_window": True, "max_window_layers": 1, "sliding_window": 7},
    "qwen3": ROPE,
    "gemma2": {**ROPE, **SLIDING, "query_pre_attn_scalar": 8},
    "gemma3_text": {**ROPE, **SLIDING, "query_pre_attn_scalar": 8},
    "gpt_oss": {**ROPE, **SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo2": ROPE,
    "phi3": {**ROPE, "sliding_window": 7, "pad_token_id": 0},
    "cohere": ROPE,
    "granite": {**ROPE, "attention_multiplier": 0.2},
    "smollm3": {**ROPE, "pad_token_id": 0},
    "glm": {**ROPE, "pad_token_id": 0},
    "starcoder2": {**ROPE, "sliding_window": 7},
    "gpt_neox": {**SIZES, "intermediate_size": 48, "max_position_embeddings": 512},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 120, "n_positions": 512},
    "opt": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 512},
    "qwen3_moe": {**ROPE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
LINEAR |= {f"linear_num_{part}_heads": 2 for part in ("key", "value")}
LINEAR |= {f"linear_{part}_head_dim": 8 for part in ("key", "value")}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16}
NO_EXPERTS = {"num_local_experts": 0, "shared_intermediate_size": 48}
ZAMBA = {"intermediate_size": 48, "num_key_value_heads": 4, "mamba_d_state": 8, "mamba_headdim": 16}
ZAMBA |= {"n_mamba_heads": 4, "chunk_size": 16, "mamba_ngroups": 1, "num_mem_blocks": 1, "use_mem_rope": True}
REFUSED = {
    "falcon": SIZES,
    "stablelm": ROPE,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 120},
    "mamba": {**SIZES, "state_size": 4},
    "lfm2": {**ROPE, "layer_types": ["conv", "full_attention"]},
    "qwen3_next": {**ROPE, **LINEAR, **EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": {**ROPE, **LINEAR},
    "olmo_hybrid": {**ROPE, **LINEAR, "pad_token_id": 0},
    "granitemoehybrid": {**ROPE, **MAMBA, **NO_EXPERTS, "layer_types": ["mamba", "attention"]},
    "bamba": {**ROPE, **MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**ROPE, **MAMBA, "mamba_d_ssm": 64},
    "jamba": {**ROPE, "attn_layer_offset": 1, "attn_layer_period": 2, "num_experts": 2, "mamba_dt_rank": 4},
    "zamba2": {**SIZES, **ZAMBA, "num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"]},
}
FAMILIES = {**PACKABLE, **REFUSED}


def model(family: str = "llama", attention: str | None = None, dtype=torch.float64, seed: int = 0, **changes):
    """A random model with weights large enough that attention to a wrong token shows."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
    made = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    if dtype == torch.float64 and any("experts" in name for name in FAMILIES[family]):
        made.set_experts_implementation("eager")  # the grouped one has no float64
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim > 1 and "conv" not in name:
                parameter.normal_(0, 0.15)
    return made.eval()


@contextlib.contextmanager
def packed(*models):
    """In this block the models attend as packed rows need it, before and behind it as in plain forwards."""
    before = [model.config._attn_implementation for model in models]
    for model in models:
        model.set_attn_implementation(common.ATTENTION)
    yield
    for model, attention in zip(models, before):
        model.set_attn_implementation(attention)


def pair_rows(count: int = 6, seed: int = 0, vocabulary: int = 110) -> list[dict]:
    """Token ids of pairs with unequal lengths, some of whose responses begin alike."""
    rng = random.Random(seed)

    def tokens(low, high):
        return [rng.randrange(8, vocabulary) for _ in range(rng.randint(low, high))]

    rows = []
    for number in range(count):
        start = tokens(1, 4) if number % 3 == 2 else []
        row = {"prompt_ids": tokens(1, 24), "chosen_ids": start + tokens(1, 18), "rejected_ids": start + tokens(1, 18)}
        rows.append(row)
    rows[1 % count]["rejected_ids"] = rows[1 % count]["chosen_ids"][:1]  # one response may be the other's beginning
    return rows


def write_pairs(path: Path, count: int = 40, seed: int = 0) -> Path:
    """Additions as text: the right sum chosen, a wrong one rejected."""
    rng = random.Random(seed)
    with path.open("w") as file:
        for _ in range(count):
            a, b = rng.randint(1, 99), rng.randint(1, 99)
            steps = "".join(f" {a} and {b}." for _ in range(rng.randint(0, 3)))
            wrong = a + b + rng.choice([-10, -1, 1, 10])
            row = {"prompt": f"{a}+{b}=", "chosen": f"{steps} #### {a + b}", "rejected": f"{steps} #### {wrong}"}
            file.write(json.dumps(row) + "\n")
    return path


def step_pairs(step: int, pairs: int, batch_size: int, seed: int = 0) -> list[int]:
    """The pairs of a run's step: shuffled anew in each epoch, whose last incomplete batch is dropped."""
    epoch, position = divmod(step, pairs // batch_size)
    order = torch.randperm(pairs, generator=torch.Generator().manual_seed(seed + epoch))
    return order.split(batch_size)[position].tolist()


def write_model(folder: Path, template: str | None = None, dtype=torch.float32, **changes) -> Path:
    tokens = tokenizer(template)
    model("llama", dtype=dtype, vocab_size=len(tokens), **changes).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def metrics(run: Path) -> list[dict]:
    """Rows of metrics.jsonl without the one number that time decides."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if name not in ("seconds", "tokens_per_second", "memory_gb")}
        for row in rows
    ]


def run(*command, check: bool = True, **options) -> subprocess.CompletedProcess:
    """Run a script of the repo as a user does."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, **options)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done
