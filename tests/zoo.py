"""Every type that AutoModelForCausalLM knows, made tiny: exact in packed rows, or refused by name?

python tests/zoo.py > docs/models.md
"""

import contextlib
import re
import sys
import warnings
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path[:0] = [str(Path(__file__).parents[1])]

import tiny  # noqa: E402

import common  # noqa: E402

# Sizes by the names that configs give them. Windows, chunks and numbers of chosen keys are shorter than the sequences,
# so that what a layer does with them shows.
SIZES = {
    1: "n_group topk_group num_expert_group first_k_dense_replace n_groups moe_layer_start_index num_dense_layers",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers num_blocks "
    "num_encoder_layers num_experts_per_tok moe_topk moe_k moe_top_k num_experts_per_token linear_num_key_heads "
    "linear_num_value_heads index_topk_blocks index_block_size kv_n_heads max_window_layers",
    4: "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads mamba_n_heads mamba_num_heads "
    "n_mamba_heads index_n_heads linear_num_heads num_experts n_routed_experts num_local_experts moe_num_experts "
    "zero_expert_num qk_rope_head_dim rotary_dim index_topk num_query_groups",
    7: "sliding_window sliding_window_size window_size attention_window_size attention_chunk_size local_attention",
    8: "head_dim v_head_dim qk_nope_head_dim kv_lora_rank q_lora_rank o_lora_rank linear_key_head_dim index_head_dim "
    "linear_value_head_dim linear_head_dim mamba_d_state ssm_state_size state_size dim_head kv_channels swa_head_dim "
    "swa_v_head_dim hidden_size_per_layer_input attention_head_size d_head laurel_rank mamba_dt_rank time_step_rank "
    "floor_scale log_scaling_n_floor query_pre_attn_scalar",
    16: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size mamba_d_head mamba_head_dim "
    "moe_shared_expert_intermediate_size shared_experts_intermediate_size mamba_headdim mamba_chunk_size chunk_size "
    "attention_head_dim router_hidden_size",
    32: "hidden_size d_model n_embd dim_model emb_dim embedding_dim embedding_size word_embed_proj_dim lru_width "
    "attention_hidden_size input_embedding_size output_embedding_size ple_embed_dim hidden_size_global adapter_in_dim "
    "adapter_input_size adapter_out_dim",
    48: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim dense_intermediate_size intermediate_size_mlp dff "
    "shared_intermediate_size dim_ff ffn_hidden_size feed_forward_size",
    120: "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size shape_vocab_size "
    "pronunciation_vocab_size encoder_hash_byte_group_vocab",
    512: "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions",
}
SIZES = {name: size for size, names in SIZES.items() for name in names.split()}
LAYERS = [name for name in SIZES if SIZES[name] == 2 and name.endswith(("layers", "layer", "num_blocks"))]

# What the defaults of a config lack, or what does not follow from names.
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
SCALED = {**ROPE, "factor": 4.0, "original_max_position_embeddings": 20}
YARN, DYNAMIC = ({**SCALED, "rope_type": name} for name in ("yarn", "dynamic"))
LONG = {**SCALED, "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
HYBRID = {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4, "attention_hidden_size": 64}
SWA = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "head_dim": 12}
SWA |= {"qk_nope_head_dim": 8, "v_head_dim": 8}
INDEXER = {"n_heads": 2, "kv_heads": 1, "head_dim": 8, "budget": 4, "compress_ratio": 2}
EXTRAS = {
    "cohere_compass_text": {**SLIDING, "rope_parameters": dict.fromkeys(SLIDING["layer_types"], ROPE)},
    "dbrx": {"attn_config": {"rope_theta": 10_000.0, "clip_qkv": 8.0}},
    "deepseek_v2": EXPERTS,
    "dots1": {**EXPERTS, **SLIDING},
    "dots3_note_text": {f"swa_{name}": value for name, value in SWA.items()},
    "gemma3n_text": {**SLIDING, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.5, 0.0]},
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "laguna": SLIDING,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "mellum": SLIDING,
    "minimax_m3_vl_text": {"layer_types": ["minimax_m3_sparse", "full_attention"]},
    "ministral": {**SLIDING, "head_dim": 8},
    "ministral3": {"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1}},
    "nemotron": {"num_key_value_heads": 2},
    "qwen2_moe": {**SLIDING, "use_sliding_window": True, "sliding_window": 7},
    "qwen4_exp_text": {f"indexer_{name}": value for name, value in INDEXER.items()},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "smollm3": {**SLIDING, "use_sliding_window": True, "sliding_window": 7},
    "xmod": {"default_language": "en_XX"},
    "zamba": HYBRID,
    "zamba2": {**HYBRID, **tiny.ZAMBA},
    "zaya": {"num_experts_per_tok": 1},
}

# Options that a default config has not: among them rope whose frequencies follow the longest sequence of a call, and
# scores that are scaled by a token's place in the row.
SHARED = {"num_kv_shared_layers": 2, "num_hidden_layers": 4, "layer_types": SLIDING["layer_types"] * 2}
VARIANTS = {
    "bert as decoder": ("bert", {"is_decoder": True}),
    "falcon without ALiBi": ("falcon", {"alibi": False}),
    "gemma3_text, bidirectional": ("gemma3_text", {"use_bidirectional_attention": True}),
    "gemma4_text, shared keys": ("gemma4_text", SHARED),
    "gpt2, scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
    "llama, dynamic rope": ("llama", {"max_position_embeddings": 20, "rope_parameters": DYNAMIC}),
    "llama, yarn rope": ("llama", {"rope_parameters": YARN}),
    "llama4_text, long rows": ("llama4_text", {"floor_scale": 130, "attention_chunk_size": 512}),
    "mixtral, output_router_logits": ("mixtral", {"output_router_logits": True}),
    "opt, norms behind": ("opt", {"do_layer_norm_before": False}),
    "phi3, longrope": ("phi3", {"original_max_position_embeddings": 20, "rope_parameters": LONG}),
    "roberta as decoder": ("roberta", {"is_decoder": True}),
}
CASES = {kind: (kind, {}) for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} | VARIANTS
WORDS = ("exact", "refused", "neither", "not built")
NO_NOISE = {"diffllama"}  # its attention refuses dropout itself
NOISE = re.compile("drop|jitter|noise")


def small(config: PreTrainedConfig) -> dict:
    """Arguments for a config of the same class: narrow, and of its layers two, or one of each kind."""
    changes, values = {}, config.to_dict()
    for name, value in values.items():
        if type(value) is int and value > 0 and name in SIZES:
            changes[name] = SIZES[name]
        elif name in ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads") and value:
            changes[name] = 4 if value == values.get("num_attention_heads") else 2
        elif type(value) is int and value >= 110 and name.endswith(("token_id", "token_index")):
            changes[name] = 3
        elif isinstance(value, list) and name.endswith("token_id"):
            changes[name] = 2
    if "head_dim" in changes and "qk_rope_head_dim" in values:
        changes["head_dim"] = SIZES["qk_rope_head_dim"]
    count = next((name for name in LAYERS if type(values.get(name)) is int), None)
    layers = {n: v for n, v in values.items() if count and isinstance(v, list) and len(v) == values[count]}
    kinds = [tuple(value for value in layer if isinstance(value, str)) for layer in zip(*layers.values())]
    picked = sorted(map(kinds.index, set(kinds)))
    picked = picked if len(picked) > 1 else [0, 1]
    changes |= {n: [SIZES.get(n, v[i]) for i in picked] for n, v in layers.items()}
    changes |= {count: len(picked)} if layers else {}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            changes[name] = {"model_type": value.model_type, **arguments(value)}
    return changes


def arguments(config: PreTrainedConfig) -> dict:
    extras = EXTRAS.get(config.model_type, {})
    changes = small(config)
    parts = {name: {**value, **extras.get(name, {})} for name, value in changes.items() if isinstance(value, dict)}
    return tiny.FAMILIES.get(config.model_type) or {**changes, **extras, **parts}


def build(case: str):
    """A random model, its weights large enough that attention to a wrong token shows, with all noise that it offers."""
    kind, changes = CASES[case]
    make = CONFIG_MAPPING[kind]
    config = make(**{**arguments(make()), **changes})
    for part in (config, *(value for value in vars(config).values() if isinstance(value, PreTrainedConfig))):
        for name, value in vars(part).items():
            if NOISE.search(name) and type(value) is float and kind not in NO_NOISE:
                setattr(part, name, 0.5)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > 5e6:
        raise ValueError(f"{size / 1e6:.0f} million parameters where the rest is tiny")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:  # gates and sinks that begin at zero would hide what they let through
                parameter.add_(0.05 * torch.randn_like(parameter))
            elif "conv" not in name:
                parameter.normal_(0, 0.15)
    return model.eval()


def token_logps(model, rows: list[dict], packed: bool) -> Tensor:
    """Log-probs of all response tokens, response after response; plain: the model's own forward of each sequence."""
    if packed:
        batch = common.collate(rows)
        return common.token_logps(common.response_logits(model, batch), batch.targets)[
            batch.response.argsort(stable=True)
        ]
    found = []
    for row in rows:
        for response in (row["chosen_ids"], row["rejected_ids"]):
            logits = model(input_ids=torch.tensor([row["prompt_ids"] + response]), use_cache=False).logits
            logps = logits[0, -len(response) - 1 : -1].log_softmax(-1)
            found.append(logps.gather(1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(found)


def gradients(model, logps: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (logps * torch.linspace(1, 2, len(logps))).sum().backward()  # weights of their own, so that swapped tokens show
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def apart(found: dict[str, Tensor], plain: dict[str, Tensor]) -> float:
    """The largest difference of an entry, in units of the largest entry of its gradient. Where that is zero but for
    rounding (a bias of keys moves no softmax), in units of a thousandth of the largest entry of all.
    """
    if found.keys() != plain.keys():
        return float("inf")
    most = {name: gradient.abs().max().item() for name, gradient in plain.items()}
    floor = 1e-3 * max(most.values())
    return max((found[n] - plain[n]).abs().max().item() / max(most[n], floor) for n in plain)


def moved(model) -> float:
    """How far other tokens in a response, or in a pair, move the log-probs of what is packed behind them."""
    first, second = ({n: ids + [20, 30, 40] for n, ids in row.items()} for row in tiny.pair_rows(2))
    first["rejected_ids"][0] = (first["chosen_ids"][0] + 1) % 100
    other = {n: [*ids[:1], *((token + 1) % 100 + 8 for token in ids[1:])] for n, ids in first.items()}
    one = {**first, "chosen_ids": other["chosen_ids"]}
    with torch.no_grad():
        found, with_one, with_other = (token_logps(model, [row, second], packed=True) for row in (first, one, other))
    chosen, pair = len(first["chosen_ids"]), len(first["chosen_ids"] + first["rejected_ids"])
    assert not torch.equal(with_one[:chosen], found[:chosen])
    return max((with_one - found)[chosen:].abs().max().item(), (with_other - found)[pair:].abs().max().item())


def still(model):
    """As the scripts train: in evaluation mode, in which nothing of a model is random."""
    return model.eval()


def refusal(model) -> str:
    """What check_packing says against the model, or nothing."""
    try:
        common.check_packing(model, Dataset.from_list(tiny.pair_rows()), torch.device("cpu"))
    except SystemExit as end:
        name, said = type(model).__name__, str(end)
        assert said.startswith(f"error: {name} "), f"a refusal that does not name {name}: {said}"
        return said.removeprefix(f"error: {name} ")
    return ""


def faults(case: str, model) -> str:
    """In float32: a packed row in the mode of training against plain forwards in evaluation mode."""
    rows, own = tiny.pair_rows(), build(case)
    plain = token_logps(own, rows, packed=False)
    expected = gradients(own, plain)
    with torch.no_grad():
        again = token_logps(model, rows, packed=True)
    packed = token_logps(model, rows, packed=True)
    found = [
        ("log-probs", (packed - plain).abs().max().item(), 1e-5),
        ("two forwards", (packed - again).abs().max().item(), 0),
        ("gradients", apart(gradients(model, packed), expected), 1e-4),
        ("other tokens before it", moved(model), 1e-5),  # of experts the shapes change, and with them rounding
    ]
    return ", ".join(f"{name}: off by {value:.1g}" for name, value, limit in found if not value <= limit)


def faults_in_bf16(model) -> str:
    far = moved(model)
    return f"other tokens before it: off by {far:.1g}" if far else ""


def judge(case: str, model, bf16: bool) -> tuple[str, str]:
    """exact, refused, or what none may be: neither; and why."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        if why := refusal(still(model)):
            return "refused", why
        try:
            wrong = faults_in_bf16(model) if bf16 else faults(case, model)
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
    return ("neither", wrong) if wrong else ("exact", "")


def verdict(case: str) -> tuple[str, str, str, str]:
    """The model's class; what it is in float32 and under bf16 autocast; why."""
    try:
        model = build(case)
    except Exception as error:  # a package that is missing, or a config that cannot be small
        return "", "not built", "not built", f"{type(error).__name__}: {error}"
    (float32, why), (bf16, other) = (judge(case, model, bf16) for bf16 in (False, True))
    if (float32, bf16) == ("refused", "exact"):  # what autocast rounds hides what is wrong
        bf16 = "neither"
    return type(model).__name__, float32, bf16, why or other


def row(case: str) -> str:
    name, float32, bf16, why = verdict(case)
    why = re.sub(r"; [^:]*| \([^)]*\)", "", " ".join(why.split())).replace("|", "\\|")  # no advice, no numbers
    return f"| {case} | {name} | {float32} | {bf16} | {why[:150]} |"


PAGE = """# Which models can be trained

`AutoModelForCausalLM` of transformers {transformers} knows {types} types. Each was made tiny with random weights and
all the dropout, jitter and noise that its config offers, some of them again with options that matter here, and went
through the start-up check of every run (`common.check_packing`):

    python tests/zoo.py > docs/models.md

- **exact** ({exact}): accepted, and right. float32: packed log-probs are those of one plain forward a sequence to 1e-5
  a token, gradients to 1e-4 of each one's largest entry; two forwards are equal. bf16
  autocast: other tokens in what is packed before a response move its log-probs by exactly 0.
- **refused** ({refused}): a run ends before its first step with a line that names the class.
- **neither** ({neither}): accepted, and wrong. There should be none.
- **not built** ({unbuilt}): no tiny model could be made here.

The numbers count float32. Sizes and options are the defaults of each config class as far as they can be small, so a
checkpoint with other options can fare otherwise; the check runs on the real model either way. A type is a checkpoint's
`model_type` in config.json.

| type | class | float32 | bf16 autocast | why |
| --- | --- | --- | --- | --- |
"""

if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    with contextlib.redirect_stdout(sys.stderr):
        rows = [row(case) for case in sys.argv[1:] or CASES]
    words = [line.split(" | ")[2] for line in rows]
    counts = {name: words.count(word) for name, word in zip(("exact", "refused", "neither", "unbuilt"), WORDS)}
    versions = {"transformers": transformers.__version__, "types": len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}
    print(PAGE.format(**counts, **versions) + "\n".join(rows))
