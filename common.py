"""What the five scripts share: preference data -> token ids -> packed micro-batches -> log-prob of each response.

    load_preferences    any of TRL's preference formats or Anthropic's HH, from the hub or a local file
    collate             pairs -> one row of tokens `prompt + chosen + rejected | prompt + chosen + ...`, without padding
    response_logps      one forward over that row -> summed log-probs of every chosen and every rejected response

A pair's prompt is run once for both responses, as are the first tokens that these have in common. Sums and gradients
are those of one plain forward a sequence; `check_packing` tries it on the real model. No loss and no run is known here.
"""

import contextlib
import hashlib
import json
import math
import os
import random
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from datasets import Dataset, Features, List, Value, concatenate_datasets, load_dataset
from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from tqdm import tqdm
from transformers import AttentionInterface


def fail(message: str) -> NoReturn:
    """End the run with exit code 1 and one line on stderr; for mistakes that the user can mend, so no traceback."""
    raise SystemExit(f"error: {' '.join(message.split())}")


@contextlib.contextmanager
def failing(message: str):
    """What a library raises in this block ends the run with this message and the library's own, in one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # torn files, unknown names and the network surface as errors of many libraries
        fail(f"{message}: {str(error) or type(error).__name__}")


def load_preferences(source: str, tokenizer, split: str, max_length: int, max_prompt_length: int) -> Dataset:
    """Preference pairs as a Dataset with `prompt_ids`, `chosen_ids`, `rejected_ids` (lists of int).
    source is a local .json, .jsonl or .parquet file, or a data set on the hub, of which `split` is taken. Rows have
    `chosen` and `rejected`, and where those do not contain it a `prompt`: text, or lists of {"role", "content"}
    messages, which go through the tokenizer's chat template. SystemExit names file, row and column of what is wrong.
    prompt + response is the tokenized whole, cut behind its end token; a token that straddles the border belongs to the
    responses. A pair longer than max_length keeps the last max_prompt_length tokens of its prompt (and the BOS), then
    the responses lose their ends. Pairs that teach nothing are dropped, and how many of which kind is printed.
    """
    rows, state = read_rows(source, split), PartialState()
    columns = Features({name: List(Value("int32")) for name in ("prompt_ids", "chosen_ids", "rejected_ids")})
    tables, dropped, truncated = [], Counter(), 0
    for start in tqdm(range(0, len(rows), 1000), "tokenizing", disable=not state.is_local_main_process):
        texts, table = [], {name: [] for name in columns}
        for number in range(start, min(start + 1000, len(rows))):
            found = to_texts(rows[number], f"{source} row {number + 1}", tokenizer)
            dropped.update([found]) if isinstance(found, str) else texts.extend(found)
        ids = iter(encode(tokenizer, texts))
        for whole in zip(ids, ids, ids):
            found, too_long = cut_ids(*whole, tokenizer.bos_token_id, max_length, max_prompt_length)
            dropped.update([found]) if isinstance(found, str) else [table[n].append(v) for n, v in zip(columns, found)]
            truncated += too_long
        tables.append(Dataset.from_dict(table, columns))
    dataset = concatenate_datasets(tables)
    reasons = "".join(f", {count} dropped: {reason}" for reason, count in sorted(dropped.items()))
    state.print(f"{source}: {len(dataset)} of {len(rows)} pairs kept, {truncated} truncated{reasons}")
    if not len(dataset):
        fail(f"{source}: none of its {len(rows)} rows is a usable pair ({', '.join(dropped)}, max length {max_length})")
    return dataset


def read_rows(source: str, split: str) -> list[dict] | Dataset:
    """The rows of a file or of a hub data set; json is read here because `datasets` does not name the row at fault."""
    path, kind = Path(source), Path(source).suffix
    file = kind in (".json", ".jsonl", ".parquet")
    if file != path.is_file():
        fail(f"{source}: {'no such file' if file else 'expected a .json, .jsonl or .parquet file or a hub data set'}")
    if kind in (".json", ".jsonl"):
        with failing(source):
            text, rows = path.read_text(encoding="utf-8").strip(), []
        for number, line in enumerate((text.split("\n") if kind == ".jsonl" else [text]) if text else [], start=1):
            with failing(f"{source} row {number}: not JSON" if line else f"{source}: row {number} is empty"):
                rows.append(json.loads(line))
        if kind == ".json" and rows:
            rows = rows[0] if isinstance(rows[0], list) else fail(f"{source}: expected a list of rows")
    elif file:
        with failing(f"{source}: not a readable parquet file"):
            rows = load_dataset("parquet", data_files=source, split="train")
    else:
        with failing(f"cannot load split {split!r} of data set {source!r}"):
            rows = load_dataset(source, split=split)
    return rows if len(rows) else fail(f"{source}: it is empty")


def to_texts(row: dict, where: str, tokenizer) -> tuple[str, str, str] | str:
    """(prompt, prompt + chosen, prompt + rejected) as the model will see them, or the reason to drop the pair."""
    if not isinstance(row, dict):
        fail(f"{where}: expected an object with prompt, chosen and rejected, found {type(row).__name__}")
    for column in ("chosen", "rejected", *(["prompt"] if row.get("prompt") is not None else [])):
        if column not in row:
            fail(f'{where}: no column "{column}" (found: {", ".join(row) or "none"})')
        value, kind = row[column], "a number" if isinstance(row[column], int | float) else type(row[column]).__name__
        if isinstance(value, list) and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value):
            if not all(isinstance(message.get("content"), str) for message in value):
                fail(f'{where}: a message of "{column}" has no text as its "content"')
        elif not isinstance(value, str):
            fail(f'{where}: "{column}" is {kind}, expected text or a list of messages')
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str) != isinstance(rejected, str):
        fail(f'{where}: one of "chosen" and "rejected" is text and the other a list of messages')
    if isinstance(chosen, list):
        return chat_texts(prompt, chosen, rejected, row, where, tokenizer)
    if isinstance(prompt, list):
        fail(f'{where}: "prompt" is a list of messages, but "chosen" is text')
    whole = [(prompt or "") + text for text in (chosen, rejected)]
    if tokenizer.chat_template and whole[0].startswith("\n\nHuman:"):  # HH; other models get the text as it stands
        return chat_texts(None, *map(hh_messages, whole), row, where, tokenizer)
    if prompt is None:
        prompt = os.path.commonprefix(whole)
        if chosen.startswith("\n\nHuman:"):
            prompt = prompt[: prompt.rfind("\n\nAssistant:") + len("\n\nAssistant:")]
            if not prompt.endswith("\n\nAssistant:"):
                return "the questions differ"
        prompt = prompt.rstrip(" ")  # the space before a word belongs to its token
    if not all(text[len(prompt) :].strip() for text in whole):
        return "empty response"
    eos = tokenizer.eos_token or ""
    return prompt, *(text.removesuffix(eos) + eos for text in whole)


def chat_texts(prompt, chosen, rejected, row: dict, where: str, tokenizer) -> tuple[str, str, str] | str:
    """to_texts of lists of messages; prompt is one too, or a string, or None."""
    if tokenizer.chat_template is None:
        fail(f"{where}: conversational data, but the tokenizer has no chat template; use an instruct model or text")
    turns = common_prefix(chosen, rejected)
    if isinstance(prompt, list):
        turns = len(prompt) * (chosen[: len(prompt)] == rejected[: len(prompt)] == prompt)
    elif turns == len(chosen) == len(rejected):
        return "chosen equals rejected"
    else:  # beside whole conversations a prompt string is only a label; beside lone answers it is the question
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) and not turns else chosen[:turns]
    responses = chosen[turns:], rejected[turns:]
    if not all("".join(message["content"] for message in response).strip() for response in responses):
        return "empty response"
    if any(message["role"] == "user" for response in responses for message in response):
        return "a response holds a user's turn"
    if not prompt:
        fail(f'{where}: "chosen" and "rejected" have no leading turn in common and there is no "prompt"')
    if prompt[-1]["role"] == "assistant":
        return "the prompt ends with the assistant's own turn"
    tools, given = row.get("tools") or None, [row[n] or {} for n in row if n.startswith("chat_template_k")]  # TRL's
    options = {"tools": json.loads(tools) if isinstance(tools, str) else tools, "tokenize": False} | dict(*given)
    try:
        start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)
        whole = [tokenizer.apply_chat_template(prompt + response, **options) for response in responses]
        if not all(text.startswith(start) for text in whole):
            # Some templates open the answer differently when they ask for one (say, with an empty thought).
            start = os.path.commonprefix([start, *whole])
            if not start.startswith(tokenizer.apply_chat_template(prompt, **options)):
                fail(f"{where}: the chat template writes the prompt differently when the answer follows")
    except TemplateError:
        return "the chat template refuses it"
    # Cut what a template writes behind the end token (a newline, mostly); add the end token where it writes none.
    ends = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return start, *(t.rstrip() if t.rstrip().endswith(ends) else t + (tokenizer.eos_token or "") for t in whole)


def hh_messages(text: str) -> list[dict]:
    turns, roles = re.split(r"\n\n(Human|Assistant):", text), {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[role], "content": said.strip()} for role, said in zip(turns[1::2], turns[2::2])]


def encode(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, with one BOS where the tokenizer uses one in plain text: templates disagree on it."""
    ids, bos = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [], tokenizer.bos_token_id
    used = bos is not None and tokenizer("a")["input_ids"][0] == bos
    return [[bos, *row] if used and row[:1] != [bos] else row for row in ids]


def cut_ids(prompt, chosen, rejected, bos: int | None, max_length: int, max_prompt_length: int) -> tuple:
    """Ids of the prompt and of both wholes -> ids of prompt, chosen, rejected or the reason to drop them; too long?"""
    shared = common_prefix(prompt, chosen, rejected)
    prompt, chosen, rejected = prompt[:shared], chosen[shared:], rejected[shared:]
    if chosen == rejected:
        return "chosen equals rejected", False
    too_long = shared + max(len(chosen), len(rejected)) > max_length
    if too_long:
        start = prompt[: prompt[:1] == [bos]]
        prompt = start + prompt[max(len(start), shared - max_prompt_length + len(start)) :]
        chosen, rejected = (ids[: max(0, max_length - len(prompt))] for ids in (chosen, rejected))
    if not prompt:
        return "empty prompt", too_long
    if chosen == rejected or not chosen or not rejected:
        return "nothing left to compare after truncation", too_long
    return (prompt, chosen, rejected), too_long


def common_prefix(*lists: list) -> int:
    """Length of the longest common beginning."""
    same = (all(item == items[0] for item in items) for items in zip(*lists))
    return next((n for n, equal in enumerate(same) if not equal), min(map(len, lists)))


def fingerprint(dataset: Dataset, *more) -> str:
    """A hash of the pairs' token ids, and so of data, tokenizer, template and truncation."""
    digest = hashlib.sha256(json.dumps(more).encode())
    for row in dataset:
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()


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
    return [sum(map(len, ids)) for ids in zip(*(dataset[f"{name}_ids"] for name in ("prompt", "chosen", "rejected")))]


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
    if unknown or attention_mask is not None or dropout:
        unknown = ", ".join(unknown) or "a mask or dropout"
        raise ValueError(f"{type(module).__name__} asks for {unknown}, which packed attention does not have")
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
        return model(**inputs, packed=batch, use_cache=False).logits.squeeze(0)  # the gradient of [0] would be a copy


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


@torch.no_grad()
def check_packing(model, dataset: Dataset, device) -> None:
    """Make ATTENTION the model's, and refuse it where packed rows would train it wrongly: SystemExit with its name.
    Other tokens in place of a response, or of a pair, must not move a log-prob behind it; where they do (experts whose
    matrices change their shapes), what a later pair moves in an earlier one is the bound: by causality it is rounding.
    And log-probs must be those of plain forwards through the model's own attention, up to what a rounding error in each
    embedding moves in these. The longest pair is among the rows, for sliding windows and for memory.
    """
    bare = getattr(model, "module", model)
    bare = getattr(bare, "get_base_model", lambda: bare)()  # out of DDP, and out of its adapters
    name, training, lengths = type(bare).__name__.removeprefix("FSDP"), model.training, pair_lengths(dataset)
    advice, longest = "use a plain decoder such as Llama, Mistral or Qwen", dataset[lengths.index(max(lengths))]
    sizes = {name: max(8, len(ids)) for name, ids in longest.items() if name.endswith("_ids")}
    tokens, draw = sorted({token for name in sizes for token in longest[name]}), random.Random(0).choices
    rows = first, second = [{name: draw(tokens, k=size) for name, size in sizes.items()} for _ in range(2)]
    for row in rows:  # so that the responses share no beginning
        row["rejected_ids"][0] = tokens[tokens[0] == row["chosen_ids"][0]]
    chosen, pair = len(first["chosen_ids"]), len(first["chosen_ids"] + first["rejected_ids"])

    def other(row: dict, *parts: str) -> dict:  # of the same lengths and beginnings
        return row | {part: row[part][:1] + draw(tokens, k=len(row[part]) - 1) for part in parts or row}

    def logps(*pairs: dict, parts: tuple[str, ...] = ("chosen", "rejected")) -> Tensor:  # of the response tokens
        batch = collate(pairs, parts).to(device)
        return token_logps(response_logits(model, batch), batch.targets)

    def rounded(_module, _inputs, out: Tensor) -> Tensor:
        kind = torch.get_autocast_dtype(out.device.type) if torch.is_autocast_enabled(out.device.type) else out.dtype
        errors = torch.rand(out.shape, generator=torch.Generator().manual_seed(0)).to(out) - 0.5
        return out * (1 + torch.finfo(kind).eps * errors)

    model.eval()
    bare.set_attn_implementation(ATTENTION)
    with failing(f"{name} cannot run packed pairs; {advice}"):
        found = logps(*rows)
    if not found.isfinite().all():
        fail(f"{name} gives log-probs that are no numbers (nan or inf) before any training; its weights are broken")
    exchanged = (other(first, "chosen_ids"), second), (other(first), second), (first, other(second))
    one, both, later = ((logps(*pairs) - found).abs() for pairs in exchanged)
    bound = 4 * (later[:pair].max() + torch.finfo(found.dtype).eps * found.abs().max())
    if torch.cat([one[chosen:], both[pair:]]).max() > bound:
        fail(f"{name} lets a response see what is packed before it, as recurrent layers and convolutions do; {advice}")
    for attention in ("eager", "sdpa"):
        with contextlib.suppress(ValueError, ImportError):  # where scores are capped or share sinks there is no sdpa
            bare.set_attn_implementation(attention)
    singles = [(row, (part,)) for row in rows for part in ("chosen", "rejected")]
    plain = torch.cat([logps(row, parts=part) for row, part in singles])
    hook = bare.get_input_embeddings().register_forward_hook(rounded)
    rounding = (torch.cat([logps(row, parts=part) for row, part in singles]) - plain).abs().mean()
    hook.remove()
    bare.set_attn_implementation(ATTENTION)
    if not (off := (found - plain).abs().mean()) <= 4 * rounding:
        fail(f"{name} gives other log-probs packed than plain ({off:.2g} a token, rounding {rounding:.2g}); {advice}")
    model.train(training)


@torch.no_grad()
def reference_logps(model, dataset: Dataset, pairs: list[int], path: Path, max_tokens: int) -> Dataset:
    """Columns ref_chosen_logps and ref_rejected_logps: log-probs of the given pairs under `model`, nan for the others.
    One pass in micro-batches of at most max_tokens, shared by all processes, kept in path (safetensors) and made again
    where the fingerprint (the model's weights, the pairs as tokens) is another.
    """
    state, training, stored = PartialState(), model.training, None
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
        model.eval()
        for indices in tqdm(plan[state.process_index], "reference", disable=not state.is_local_main_process):
            batch = collate([used[i] for i in indices or [0]]).to(state.device)
            logps[indices] = torch.stack(response_logps(model, batch), 1).double()[: len(indices)]
        model.train(training)
        stored[pairs] = reduce(logps, "sum").cpu()
        if state.is_main_process:
            path.parent.mkdir(exist_ok=True)
            save_file({"logps": stored}, path.with_suffix(".writing"), mark)
            os.replace(path.with_suffix(".writing"), path)
    dataset = dataset.add_column("ref_chosen_logps", stored[:, 0].tolist())
    return dataset.add_column("ref_rejected_logps", stored[:, 1].tolist())
