"""Preference pairs as token ids -> packed micro-batches -> log-prob of each response; all that the five scripts share.

    load_preferences    any of TRL's preference formats or Anthropic's HH as token ids: preferences.py
    collate             pairs -> one row of tokens `prompt + chosen + rejected | prompt + chosen + ...`, without padding
    response_logps      one forward over that row -> summed log-probs of every chosen and every rejected response

A pair's prompt is run once for both responses, as are the first tokens that these have in common. Sums and gradients
are those of one plain forward a sequence; `check_packing` tries it on the real model. No loss and no run is known here.
"""

import contextlib
import math
import os
import random
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow.compute as pc
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from datasets import Dataset, concatenate_datasets
from peft import AutoPeftModelForCausalLM, PeftConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from tqdm import tqdm
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
)
from transformers.utils import find_adapter_config_file

from preferences import common_prefix, fail, failing, fingerprint
from preferences import load_preferences as load_preferences
from preferences import one_split as one_split


@dataclass
class PreferenceBatch:
    """One packed micro-batch; segments: of each pair prompt and chosen, then rejected, which sees the prompt's keys."""

    input_ids: Tensor  # (1, tokens): prompt + chosen + rejected of each pair, end to end; a last token predicts nothing
    position_ids: Tensor  # (1, tokens): a rejected response starts again where its prompt ended
    logit_positions: Tensor  # (targets,): where in the row each response token is predicted
    targets: Tensor  # (targets,): the response tokens
    response: Tensor  # (targets,): 2 * pair for a token of the chosen response, 2 * pair + 1 of the rejected one
    keys: Tensor  # (keys,): the tokens whose keys the segments see, segment after segment
    query_starts: Tensor  # (segments + 1,), int32: where in the row each segment's queries start
    key_starts: Tensor  # (segments + 1,), int32: where in `keys` each segment's keys start
    chosen_lengths: Tensor  # (pairs,): response tokens, the end token included
    rejected_lengths: Tensor  # (pairs,)
    ref_chosen_logps: Tensor  # (pairs,): stored by reference_logps; nan where it did not run
    ref_rejected_logps: Tensor  # (pairs,)
    segments: list[tuple[int, int]]  # queries and keys of each segment
    masks: dict = field(default_factory=dict)  # made once, by the first layer that needs one

    def to(self, device) -> "PreferenceBatch":
        return replace(self, masks={}, **{n: v.to(device) for n, v in vars(self).items() if isinstance(v, Tensor)})


def collate(rows: list[dict], parts: tuple[str, ...] = ("chosen", "rejected")) -> PreferenceBatch:
    """Pack pairs into one row. With one name in `parts` only that response is packed, and the other's sums are zero."""
    ids, positions, logit_positions, targets, response, keys, segments = ([] for _ in range(7))
    for number, row in enumerate(rows):
        prompt, responses = row["prompt_ids"], [row[f"{name}_ids"] for name in parts]
        # Responses that begin alike share these tokens as they share the prompt.
        shared = common_prefix(*(r[:-1] for r in responses)) if len(responses) == 2 else 0
        begin, stem = len(ids), len(prompt) + shared
        ids += prompt + responses[0][:shared]
        positions += range(stem)
        for name, tokens in zip(parts, responses):
            own = range(len(ids), len(ids) + len(tokens[shared:-1]))
            ids += tokens[shared:-1]
            positions += range(stem, stem + len(own))
            logit_positions += [*range(begin + len(prompt) - 1, begin + stem), *own]
            targets += tokens
            response += [2 * number + (name == "rejected")] * len(tokens)
            if own or name == parts[0]:
                keys += [*range(begin, begin + stem), *own]
                segments.append((len(own) + stem * (name == parts[0]), stem + len(own)))
    starts = torch.tensor([(0, 0), *segments]).cumsum(0).int().T.contiguous()  # (2, segments + 1)
    lengths = ([len(row[f"{name}_ids"]) for row in rows] for name in ("chosen", "rejected"))
    stored = ([row.get(f"ref_{name}_logps", math.nan) for row in rows] for name in ("chosen", "rejected"))
    return PreferenceBatch(
        *(torch.tensor(v, dtype=torch.long) for v in ([ids], [positions], logit_positions, targets, response, keys)),
        *starts,
        *(torch.tensor(values, dtype=torch.float32) for values in lengths),
        *(torch.tensor(values, dtype=torch.float64) for values in stored),
        segments,
    )


def pair_lengths(dataset: Dataset) -> list[int]:
    """Tokens of each pair in a packed row, at most."""
    table = dataset.with_format("arrow")[:]
    return sum(
        pc.list_value_length(table[f"{part}_ids"]).to_numpy() for part in ("prompt", "chosen", "rejected")
    ).tolist()


def micro_batches(pairs: list[int], lengths: list[int], max_tokens: int, num_processes: int) -> list[list[list[int]]]:
    """Pairs of the given lengths -> [process][micro-batch][pair], of at most max_tokens tokens (or one pair) each.
    Shares are equal in number and close in tokens, with as many micro-batches; an empty one runs with weight zero.
    """
    plans, deal = [[] for _ in range(num_processes)], [*range(num_processes), *reversed(range(num_processes))]
    for number, pair in enumerate(sorted(pairs, key=lambda pair: -lengths[pair])):
        plan = plans[deal[number % len(deal)]]
        fits = (own for own in plan[-32:] if sum(lengths[i] for i in own) + lengths[pair] <= max_tokens)
        (next(fits, None) or plan.append([]) or plan[-1]).append(pair)  # to the first that has room, or to a new one
    return [plan + [[]] * (max(map(len, plans)) - len(plan)) for plan in plans]


MODELS = "docs/models.md lists what can be trained"


def load_tokenizer(path: str):
    """The tokenizer in path, or, of an adapter that has none, its base's; SystemExit where there is none."""
    with failing(f"cannot load {path!r}"):
        if find_adapter_config_file(path) and not (Path(path) / "tokenizer_config.json").exists():
            path = PeftConfig.from_pretrained(path).base_model_name_or_path
        return AutoTokenizer.from_pretrained(path)


def load_model(path: str, dtype):
    """The causal language model in path, a directory or a name on the hub; SystemExit where it is none. Of an adapter,
    its base with the adapter merged. Where a model has towers for images or sound, which text does not reach, these are
    frozen. It is in evaluation mode, in which nothing is random whatever a model calls it: train in it, too.
    """
    with failing(f"cannot load {path!r}"):
        if find_adapter_config_file(path):
            model = AutoPeftModelForCausalLM.from_pretrained(path, dtype=dtype).merge_and_unload().eval()
            model.name_or_path = f"{path}, merged"  # what an adapter that is trained on it names as its base
        elif type(config := AutoConfig.from_pretrained(path)) in MODEL_FOR_CAUSAL_LM_MAPPING:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        else:
            raise ValueError(f"{config.model_type} is no causal language model ({MODELS})")
    towers = model.config.get_text_config() is not model.config
    model.requires_grad_(not towers)
    for part in (model.get_decoder(), model.get_output_embeddings()) if towers else ():
        part.requires_grad_(True)
    kinds = {type(module).__name__ for module in model.modules()}  # accelerate shards by these and misses what is named
    model._no_split_modules = [kind for kind in model._no_split_modules or () if kind in kinds]
    return model


ATTENTION = "packed_pairs"  # model.set_attn_implementation(ATTENTION) makes a model ready for response_logps
# What models hand to every layer and attention has no use for
IDLE = {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits"}


def packed_attention(module, query, key, value, attention_mask, *, packed=None, scaling=None, dropout=0.0, **layer):
    """transformers' attention, for a row that collate made: a response sees its own prompt and itself.
    query (1, heads, tokens, size), key and value (1, heads or fewer, tokens, size), scaling, and in `layer` its window
    (tokens), cap of scores and sinks (heads,) are the layer's; `packed` is the batch, handed down by the model. Returns
    (1, tokens, heads, size) and None. ValueError for anything else that a layer asks for.
    """
    window, softcap, sinks = (layer.pop(name, None) for name in ("sliding_window", "softcap", "s_aux"))
    if packed is None:
        raise ValueError(f"{type(module).__name__} got no packed batch: none was given, or its model hands none down")
    unknown = [n for n, v in layer.items() if n not in IDLE and v is not None and (n, v) != ("is_causal", True)]
    unknown += ["a mask"] * (attention_mask is not None) + ["dropout"] * bool(dropout)
    if unknown:
        raise ValueError(f"{type(module).__name__} asks for {', '.join(unknown)}, which packed attention does not have")
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast rotary embeddings are float32
    key, value = (x.index_select(2, packed.keys) for x in (key, value))  # segment after segment
    plain = softcap is None and sinks is None
    if plain and flash_takes(query, value):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (tokens, heads, size)
        starts, most = (packed.query_starts, packed.key_starts), (max(lengths) for lengths in zip(*packed.segments))
        sides = (-1 if window is None else window - 1, 0)  # keys before a query's own, and behind it
        return varlen_attn(q, k, v, *starts, *most, scale=scaling, window_size=sides, enable_gqa=True)[None], None
    attend = scaled_dot_product_attention if plain else softmax_attention
    options = {"scale": scaling} | ({"enable_gqa": True} if plain else {"softcap": softcap, "sinks": sinks})
    found, (queries, keys) = [], zip(*packed.segments)
    for q, k, v in zip(query.split(queries, 2), key.split(keys, 2), value.split(keys, 2)):
        near = min(window or k.shape[2], k.shape[2])
        causal = plain and q.shape[2] == near == k.shape[2]
        mask = None if causal else lower_right(q, k.shape[2], near, packed.masks)
        found.append(attend(q, k, v, mask, is_causal=causal, **options).transpose(1, 2))
    return torch.cat(found, 1), None


AttentionInterface.register(ATTENTION, packed_attention)  # and no mask of that name, so models make none


def flash_takes(query: Tensor, value: Tensor) -> bool:
    """What FlashAttention in torch computes; everything else goes segment by segment."""
    size, half = query.shape[-1], value.dtype in (torch.bfloat16, torch.float16)
    fits = half and size == value.shape[-1] <= 256 and size % 8 == 0
    return fits and query.is_cuda and torch.cuda.get_device_capability(query.device) >= (8, 0)


def lower_right(q: Tensor, keys: int, window: int, masks: dict) -> Tensor:
    """(queries, keys), to be added to scores: the last query sees the last `window` keys, the others as many before."""
    queries, name = q.shape[2], (q.shape[2], keys, window, q.dtype)
    if name not in masks:
        seen = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        masks[name] = torch.where(seen.triu(keys - queries - window + 1), 0.0, -math.inf).to(q.dtype)
    return masks[name]


def softmax_attention(q, k, v, mask, is_causal, scale, softcap, sinks) -> Tensor:
    """Plain products, for scores that are capped (Gemma-2) or share their softmax with learned sinks (gpt-oss)."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)  # (1, heads, queries, keys)
    scores = (scores if softcap is None else softcap * (scores / softcap).tanh()) + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1, torch.promote_types(scores.dtype, torch.float32))[..., : k.shape[2]]
    return weights.to(v.dtype) @ v


def response_logits(model, batch: PreferenceBatch) -> Tensor:
    """Logits (targets, vocab) that predict the response tokens, in the type that the model computes in. Through its own
    forward, so that soft-capping, FSDP, DDP and LoRA do as elsewhere. ValueError where its attention is not ATTENTION.
    """
    attention = getattr(model, "module", model).config.get_text_config()._attn_implementation
    if attention != ATTENTION and len(batch.segments) > 1:
        raise ValueError(f"its attention is {attention}: call model.set_attn_implementation(common.ATTENTION) once")
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "logits_to_keep": batch.logit_positions}
    # bf16 on CUDA, elsewhere as the caller has it; accelerate's own autocast would copy all logits to float32.
    device = batch.input_ids.device.type
    with torch.autocast(device, torch.bfloat16, device == "cuda" or torch.is_autocast_enabled(device)):
        logits = model(**inputs, packed=batch, use_cache=False, output_router_logits=False).logits
    return logits.squeeze(0)  # the gradient of [0] would be a copy


class TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, chunk: int) -> Tensor:
        ctx.save_for_backward(logits, targets)
        ctx.chunk, ctx.wide = chunk, torch.promote_types(logits.dtype, torch.float32)
        chunks = zip(logits.split(chunk), targets.split(chunk))
        return torch.cat([-cross_entropy(x.to(ctx.wide), y, reduction="none") for x, y in chunks])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        logits, targets = ctx.saved_tensors
        for x, y, g in zip(*(tensor.split(ctx.chunk) for tensor in (logits, targets[:, None], gradient[:, None]))):
            # d logp / d logits = one-hot(target) - softmax(logits)
            x.copy_(x.to(ctx.wide).softmax(-1).mul_(-g).scatter_add_(1, y, g))
        return logits, None, None


def token_logps(logits: Tensor, targets: Tensor, chunk: int = 512) -> Tensor:
    """log softmax(logits)[target] -> (targets,), in float32 or wider, chunk by chunk: no float32 copy of all logits.
    backward() writes their gradient over `logits`, so that no second tensor of their size exists; read them before.
    """
    return TokenLogps.apply(logits, targets, chunk)


def sum_responses(values: Tensor, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
    """Values of the response tokens (targets,) -> their sums over each chosen and each rejected response, (pairs,)."""
    sums = values.new_zeros(2 * len(batch.chosen_lengths)).index_add(0, batch.response, values)
    return sums[0::2], sums[1::2]


def response_logps(model, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
    """log pi(y_w|x) and log pi(y_l|x), summed over the response tokens: two tensors (pairs,), float32 or wider."""
    return sum_responses(token_logps(response_logits(model, batch), batch.targets), batch)


def add_rounding(_module, _inputs, out: Tensor) -> Tensor:
    """A forward hook: each value off by what its type, or autocast's, cannot tell."""
    kind = torch.get_autocast_dtype(out.device.type) if torch.is_autocast_enabled(out.device.type) else out.dtype
    errors = torch.rand(out.shape, generator=torch.Generator().manual_seed(0)).to(out) - 0.5
    return out * (1 + torch.finfo(kind).eps * errors)


@torch.no_grad()
def check_packing(model, dataset: Dataset, device, more: Dataset | None = None) -> None:
    """Make ATTENTION the model's, and refuse it where packed rows of these pairs would train it wrongly: SystemExit and
    its name. Asked again it must say the same. Other tokens in place of a response, or of a pair, must not move a
    log-prob behind it; where they do (experts whose matrices change their shapes), what a later pair moves in an
    earlier one is the bound: by causality it is rounding. And log-probs must be those of plain forwards through its own
    attention, up to what a rounding error in each embedding moves in these. The longest pair is among the rows.
    """
    bare = getattr(model, "module", model)
    bare = getattr(bare, "get_base_model", lambda: bare)()  # out of DDP, and out of its adapters
    name, config = type(bare).__name__.removeprefix("FSDP"), bare.config.get_text_config()
    dataset = concatenate_datasets([dataset, more]) if more else dataset
    longest = dataset[torch.tensor(pair_lengths(dataset)).argmax().item()]
    sizes = {name: max(8, len(ids)) for name, ids in longest.items() if name.endswith("_ids")}
    if getattr(config, "output_router_logits", False):
        PartialState().print(f"{name}: its routers' auxiliary loss, which its configuration asks for, is left out")
    check_limits(name, config, bare.get_input_embeddings().weight.shape[0], dataset)
    tokens, draw = sorted({token for part in sizes for token in longest[part]}), random.Random(0).choices
    rows = first, second = [{part: draw(tokens, k=size) for part, size in sizes.items()} for _ in range(2)]
    for row in rows:  # so that the responses share no beginning
        row["rejected_ids"][0] = tokens[tokens[0] == row["chosen_ids"][0]]
    chosen, pair = len(first["chosen_ids"]), len(first["chosen_ids"] + first["rejected_ids"])

    def other(row: dict, *parts: str) -> dict:  # of the same lengths and beginnings
        return row | {part: row[part][:1] + draw(tokens, k=len(row[part]) - 1) for part in parts or row}

    def logps(*pairs: dict, seed: int = 0) -> Tensor:  # of the response tokens
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            batch = collate(pairs).to(device)
            return token_logps(response_logits(model, batch), batch.targets)

    def plain() -> Tensor:  # of the same tokens, one sequence at a time, whose positions are the model's own business
        batches = [collate([row], (part,)) for row in rows for part in ("chosen", "rejected")]
        batches = [replace(batch, position_ids=None).to(device) for batch in batches]
        return torch.cat([token_logps(response_logits(model, batch), batch.targets) for batch in batches])

    with failing(f"{name} cannot run packed pairs ({MODELS})"):
        bare.set_attn_implementation(ATTENTION)
        if config._attn_implementation != ATTENTION:
            raise ValueError("its attention cannot be replaced")
        found, again = logps(*rows), logps(*rows, seed=1)
    if not found.isfinite().all():
        fail(f"{name} gives log-probs that are no numbers (nan or inf) before any training; its weights are broken")
    exchanged = (other(first, "chosen_ids"), second), (other(first), second), (first, other(second))
    one, both, later = ((logps(*pairs) - found).abs() for pairs in exchanged)
    bound = 4 * (later[:pair].max() + torch.finfo(found.dtype).eps * found.abs().max())
    if (again - found).abs().max() > bound:
        fail(f"{name} gives other log-probs when asked again: something in it is random, in its mode of evaluation too")
    if torch.cat([one[chosen:], both[pair:]]).max() > bound:
        fail(f"{name} lets a response see what is packed before it, as recurrent layers and convolutions do ({MODELS})")
    for attention in ("eager", "sdpa"):
        with contextlib.suppress(ValueError, ImportError):  # where scores are capped or share sinks there is no sdpa
            bare.set_attn_implementation(attention)
    expected = plain()
    hook = bare.get_input_embeddings().register_forward_hook(add_rounding)
    rounding = (plain() - expected).abs().mean()
    hook.remove()
    bare.set_attn_implementation(ATTENTION)
    if not (off := (found - expected).abs().mean()) <= 2 * rounding:
        fail(f"{name} gives other log-probs packed than plain: {off:.2g} a token, rounding {rounding:.2g} ({MODELS})")


def check_limits(name: str, config, embeddings: int, dataset: Dataset) -> None:
    """SystemExit for tokens without an embedding and for pairs beyond the positions that packed rows can have."""
    table = dataset.with_format("arrow")[:]
    prompt, chosen, rejected = (table[f"{part}_ids"] for part in ("prompt", "chosen", "rejected"))
    if (token := max(pc.max(pc.list_flatten(ids)).as_py() for ids in (prompt, chosen, rejected))) >= embeddings:
        fail(f"{name} has {embeddings} embeddings, but the tokenizer gives token {token}: they do not belong together")
    prompt, chosen, rejected = map(pc.list_value_length, (prompt, chosen, rejected))
    longest = pc.max(pc.add(prompt, pc.max_element_wise(chosen, rejected))).as_py()
    rope, limit = getattr(config, "rope_parameters", None) or {}, getattr(config, "max_position_embeddings", None)
    if rope.get("rope_type") == "longrope":  # its angles change with the longest sequence of a row
        limit = rope["original_max_position_embeddings"]
    if limit and longest > limit:
        fail(f"{name} takes {limit} tokens in packed rows, but a pair has {longest}: set --max-length {limit}")
    if getattr(config, "attn_temperature_tuning", False):
        fail(f"{name} scales its attention by the place in the row, which packed pairs do not have ({MODELS})")


@torch.no_grad()
def reference_logps(model, dataset: Dataset, pairs: list[int], path: Path, max_tokens: int) -> Dataset:
    """Columns ref_chosen_logps and ref_rejected_logps: log-probs of the given pairs under `model`, nan for the others.
    One pass in micro-batches of at most max_tokens, shared by all processes, kept in path (safetensors) and made again
    where the fingerprint (the model's weights, the pairs as tokens) is another.
    """
    state, stored = PartialState(), None
    sums = [parameter.sum(dtype=torch.float64) for parameter in model.parameters()]
    weights = [(total.full_tensor() if hasattr(total, "full_tensor") else total).item() for total in sums]
    mark = {"fingerprint": fingerprint(dataset.select(pairs), weights, pairs, len(dataset))}
    if path.exists():
        with contextlib.suppress(SafetensorError, OSError), safe_open(path, "pt") as file:
            stored = file.get_tensor("logps") if file.metadata() == mark else None
        state.print(f"{path}: {'of another model or other data, made again' if stored is None else 'reused'}")
    state.wait_for_everyone()
    if stored is None:
        used, stored = dataset.select(pairs), torch.full((len(dataset), 2), math.nan, dtype=torch.float64)
        plan = micro_batches([*range(len(used))], pair_lengths(used), max_tokens, state.num_processes)
        logps = torch.zeros(len(used), 2, dtype=torch.float64, device=state.device)
        for indices in tqdm(plan[state.process_index], "reference", disable=not state.is_local_main_process):
            batch = collate([used[i] for i in indices or [0]]).to(state.device)
            logps[indices] = torch.stack(response_logps(model, batch), 1).double()[: len(indices)]
        stored[pairs] = reduce(logps, "sum").cpu()
        if state.is_main_process:
            path.parent.mkdir(exist_ok=True)
            save_file({"logps": stored}, path.with_suffix(".writing"), mark)
            os.replace(path.with_suffix(".writing"), path)
    dataset = dataset.add_column("ref_chosen_logps", stored[:, 0].tolist())
    return dataset.add_column("ref_rejected_logps", stored[:, 1].tolist())
