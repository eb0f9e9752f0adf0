"""What the five scripts share: preference data -> token ids -> packed micro-batches -> log-prob of each response.

    load_preferences    any of TRL's preference formats or Anthropic's HH, from the hub or a local file
    collate             pairs -> one row of tokens `prompt + chosen + rejected | prompt + chosen + ...`, without padding
    response_logps      one forward over that row -> summed log-probs of every chosen and every rejected response

A pair's prompt is run once for both of its responses (and so are the first tokens of the responses as long as they are
the same), and no token of another pair or of the other response is ever seen. Sums and gradients equal those of one
plain forward per sequence; `check_packing` proves it on the real model before anything is trained. Nothing here knows
of any loss. To use a script elsewhere, copy it and this file.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset, Features, List, Value, concatenate_datasets, load_dataset
from jinja2 import TemplateError
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import create_block_mask
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

# A run on one device is one process without a group; torch warns of it at every checkpoint.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def fail(message: str) -> NoReturn:
    """End the run with exit code 1 and one line on stderr; for mistakes that the user can mend, so no traceback."""
    raise SystemExit(f"error: {' '.join(message.split())}")


# ---------------------------------------------------------------------------------------------------------------------
# Preference data -> token ids


def load_preferences(source: str, tokenizer, split: str, max_length: int, max_prompt_length: int) -> Dataset:
    """Read preference pairs and tokenize them.

    source is a local .json, .jsonl or .parquet file, or a data set on the hub, of which `split` is taken. Rows have
    `chosen` and `rejected`, and where those do not contain it a `prompt`: text, or lists of {"role", "content"}
    messages, which go through the tokenizer's chat template.

    Returns a Dataset with `prompt_ids`, `chosen_ids`, `rejected_ids` (lists of int). prompt + response is the tokenized
    whole, cut behind its end token; a token that straddles the border belongs to the responses. A pair longer than
    max_length keeps the last max_prompt_length tokens of its prompt (and the BOS), then the responses lose their ends.
    Pairs that teach nothing are dropped, and how many of which kind is printed.

    Raises SystemExit, naming file, row and column, for data that is not what it should be.
    """
    rows = read_rows(source, split)
    columns = Features({f"{name}_ids": List(Value("int32")) for name in ("prompt", "chosen", "rejected")})
    tables, dropped, truncated = [], Counter(), 0
    main = PartialState().is_local_main_process
    for start in tqdm(range(0, len(rows), 1000), desc="tokenizing", disable=not main or len(rows) <= 1000):
        texts = []
        for number in range(start, min(start + 1000, len(rows))):
            pair = to_texts(rows[number], f"{source} row {number + 1}", tokenizer)
            if isinstance(pair, str):
                dropped[pair] += 1
            else:
                texts.extend(pair)
        ids = encode(tokenizer, texts)
        table = {name: [] for name in columns}
        for prompt, chosen, rejected in zip(ids[0::3], ids[1::3], ids[2::3]):
            shared = common_prefix(prompt, chosen, rejected)
            prompt, chosen, rejected = prompt[:shared], chosen[shared:], rejected[shared:]
            if chosen == rejected:
                dropped["chosen equals rejected"] += 1
                continue
            if shared + max(len(chosen), len(rejected)) > max_length:
                truncated += 1
                if shared > max_prompt_length:
                    bos = prompt[: prompt[0] == tokenizer.bos_token_id]
                    prompt = bos + prompt[shared - max_prompt_length + len(bos) :]
                room = max(0, max_length - len(prompt))
                chosen, rejected = chosen[:room], rejected[:room]
            if not prompt:
                dropped["empty prompt"] += 1
            elif chosen == rejected or not chosen or not rejected:
                dropped["nothing left to compare after truncation"] += 1
            else:
                for name, value in zip(columns, (prompt, chosen, rejected)):
                    table[name].append(value)
        tables.append(Dataset.from_dict(table, features=columns))
    dataset = concatenate_datasets(tables)
    if main:
        reasons = "".join(f", {count} dropped: {reason}" for reason, count in sorted(dropped.items()))
        print(f"{source}: {len(dataset)} of {len(rows)} pairs kept, {truncated} truncated{reasons}")
    if not len(dataset):
        fail(f"{source}: none of its {len(rows)} rows is a usable pair ({', '.join(dropped)}, max length {max_length})")
    return dataset


def read_rows(source: str, split: str) -> list[dict] | Dataset:
    """The rows of a file or of a hub data set; json is read here because `datasets` does not name the row at fault."""
    path = Path(source)
    if not is_file(source):
        if path.is_file():
            fail(f"{source}: expected a .json, .jsonl or .parquet file or the name of a data set on the hub")
        try:
            rows = load_dataset(source, split=split)
        except Exception as error:  # whatever the hub, the network or a loading script come up with
            fail(f"cannot load split {split!r} of data set {source!r}: {error}")
    elif not path.is_file():
        fail(f"{source}: no such file")
    elif path.suffix == ".parquet":
        try:
            rows = load_dataset("parquet", data_files=source, split="train")
        except Exception as error:
            fail(f"{source}: not a readable parquet file: {error}")
    else:
        try:
            text = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            fail(f"{source}: {error}")
        rows = []
        for number, line in enumerate(text.split("\n") if path.suffix == ".jsonl" else [text] if text else [], start=1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                fail(f"{source} row {number}: not JSON ({error})" if line else f"{source}: row {number} is empty")
        if path.suffix == ".json" and rows:
            rows = rows[0] if isinstance(rows[0], list) else fail(f"{source}: expected a list of rows")
    if not len(rows):
        fail(f"{source}: it is empty")
    return rows


def to_texts(row: dict, where: str, tokenizer) -> tuple[str, str, str] | str:
    """(prompt, prompt + chosen, prompt + rejected) as the model will see them, or the reason to drop the pair."""
    if not isinstance(row, dict):
        fail(f"{where}: expected an object with prompt, chosen and rejected, found {type(row).__name__}")
    for column in ("chosen", "rejected"):
        if column not in row:
            fail(f'{where}: no column "{column}" (found: {", ".join(row) or "none"})')
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    for column, value in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        messages = isinstance(value, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) for m in value
        )
        if messages and not all(isinstance(m.get("content"), str) for m in value):
            fail(f'{where}: a message of "{column}" has no text as its "content"')
        if not (isinstance(value, str) or messages or (column == "prompt" and value is None)):
            kind = "a number" if isinstance(value, int | float) else type(value).__name__
            fail(f'{where}: "{column}" is {kind}, expected text or a list of messages')
    if isinstance(chosen, str) != isinstance(rejected, str):
        fail(f'{where}: one of "chosen" and "rejected" is text and the other a list of messages')

    if isinstance(chosen, str):
        if isinstance(prompt, list):
            fail(f'{where}: "prompt" is a list of messages, but "chosen" is text')
        if tokenizer.chat_template and ((prompt or "") + chosen).startswith("\n\nHuman:"):
            # Anthropic HH: a chat model gets its own turns, any other model the text as it stands.
            chosen, rejected = hh_messages((prompt or "") + chosen), hh_messages((prompt or "") + rejected)
            prompt = None
    if isinstance(chosen, str):
        if prompt is None:
            prompt = os.path.commonprefix([chosen, rejected])
            if chosen.startswith("\n\nHuman:"):
                if "\n\nAssistant:" not in prompt:
                    return "the questions differ"
                prompt = prompt[: prompt.rfind("\n\nAssistant:") + len("\n\nAssistant:")]
            prompt = prompt.rstrip(" ")  # the space before a word belongs to its token
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        if not chosen.strip() or not rejected.strip():
            return "empty response"
        eos = tokenizer.eos_token or ""
        return prompt, *(prompt + (text if eos and text.endswith(eos) else text + eos) for text in (chosen, rejected))

    if tokenizer.chat_template is None:
        fail(f"{where}: conversational data, but the tokenizer has no chat template; use an instruct model or text")
    if not isinstance(prompt, list):
        turns = 0
        while turns < min(len(chosen), len(rejected)) and chosen[turns] == rejected[turns]:
            turns += 1
        if turns == len(chosen) == len(rejected):
            return "chosen equals rejected"
        # Beside whole conversations a prompt string is only a label; beside lone answers it is the question.
        label = turns or not isinstance(prompt, str)
        prompt = chosen[:turns] if label else [{"role": "user", "content": prompt}]
        chosen, rejected = (chosen[turns:], rejected[turns:]) if label else (chosen, rejected)
    elif chosen[: len(prompt)] == rejected[: len(prompt)] == prompt:
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    for response in (chosen, rejected):
        if not "".join(message["content"] for message in response).strip():
            return "empty response"
        if any(message["role"] == "user" for message in response):
            return "a response holds a user's turn"
    if prompt and prompt[-1]["role"] == "assistant":
        return "the prompt ends with the assistant's own turn"
    if not prompt:
        fail(f'{where}: "chosen" and "rejected" have no leading turn in common and there is no "prompt"')
    try:
        start = chat_text(tokenizer, prompt, row, add_generation_prompt=True)
        whole = [chat_text(tokenizer, prompt + response, row) for response in (chosen, rejected)]
        if not all(text.startswith(start) for text in whole):
            # Some templates open the answer differently when they ask for one (say, with an empty thought).
            start = os.path.commonprefix([start, *whole])
            if not start.startswith(chat_text(tokenizer, prompt, row)):
                fail(f"{where}: the chat template writes the prompt differently when the answer follows")
    except TemplateError:
        return "the chat template refuses it"
    return start, *(end_text(tokenizer, text) for text in whole)


def hh_messages(text: str) -> list[dict]:
    turns = re.split(r"\n\n(Human|Assistant):", text)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[role], "content": said.strip()} for role, said in zip(turns[1::2], turns[2::2])]


def chat_text(tokenizer, messages: list[dict], row: dict, add_generation_prompt: bool = False) -> str:
    """The conversation through the template, with the row's `tools` and `chat_template_kwargs`, as TRL has them."""
    tools, options = row.get("tools") or None, row.get("chat_template_kwargs") or {}
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt, **options
    )


def end_text(tokenizer, text: str) -> str:
    """Cut what a template writes behind the end token (a newline, mostly); add the end token where it writes none."""
    ends = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return text.rstrip() if text.rstrip().endswith(ends) else text + (tokenizer.eos_token or "")


def encode(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, special tokens in it recognised, with one BOS in front where the tokenizer uses one.

    Templates disagree on who writes the BOS; here it is there exactly once, as in the tokenizer's plain text.
    """
    if not texts:
        return []
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer("a")["input_ids"][0] != bos:
        return ids
    return [row if row[:1] == [bos] else [bos, *row] for row in ids]


def common_prefix(*lists: list[int]) -> int:
    """Length of the longest common beginning."""
    for length, tokens in enumerate(zip(*lists)):
        if any(token != tokens[0] for token in tokens):
            return length
    return min(map(len, lists))


# ---------------------------------------------------------------------------------------------------------------------
# Token ids -> packed micro-batches


@dataclass
class PreferenceBatch:
    """One packed micro-batch: a row of `tokens` tokens for `pairs` pairs, of which `targets` response tokens count."""

    input_ids: Tensor  # (1, tokens): prompt + chosen + rejected of each pair, end to end; a last token predicts nothing
    position_ids: Tensor  # (1, tokens): a rejected response starts again where its prompt ended
    pair: Tensor  # (tokens,): which pair a token belongs to
    part: Tensor  # (tokens,): 0 seen by both responses (the prompt), 1 chosen, 2 rejected
    logit_positions: Tensor  # (targets,): where in the row each response token is predicted
    targets: Tensor  # (targets,): the response tokens
    response: Tensor  # (targets,): 2 * pair for a token of the chosen response, 2 * pair + 1 of the rejected one
    chosen_lengths: Tensor  # (pairs,): response tokens, the end token included
    rejected_lengths: Tensor  # (pairs,)
    ref_chosen_logps: Tensor  # (pairs,): stored by add_reference; nan where it did not run
    ref_rejected_logps: Tensor  # (pairs,)

    def to(self, device) -> "PreferenceBatch":
        tensors = [getattr(self, field.name) for field in fields(self)]
        if torch.device(device).type == "cuda":  # from pinned memory the copies run beside the computation
            tensors = [tensor.pin_memory() for tensor in tensors]
        return PreferenceBatch(*(tensor.to(device, non_blocking=True) for tensor in tensors))


def collate(rows: list[dict], parts: tuple[str, ...] = ("chosen", "rejected")) -> PreferenceBatch:
    """Pack pairs into one row. With one name in `parts` only that response is packed, and the other's sums are zero."""
    ids, positions, pair, part, logit_positions, targets, response = ([] for _ in range(7))
    for number, row in enumerate(rows):
        prompt, responses = row["prompt_ids"], [row[f"{name}_ids"] for name in parts]
        # Responses that begin alike share these tokens as they share the prompt.
        shared = common_prefix(*(r[:-1] for r in responses)) if len(responses) == 2 else 0
        begin, stem = len(ids), len(prompt) + shared
        ids += prompt + responses[0][:shared]
        positions += range(stem)
        part += [0] * stem
        for name, tokens in zip(parts, responses):
            own = tokens[shared:-1]
            logit_positions += range(begin + len(prompt) - 1, begin + stem)
            logit_positions += range(len(ids), len(ids) + len(own))
            ids += own
            positions += range(stem, stem + len(own))
            part += [1 if name == "chosen" else 2] * len(own)
            targets += tokens
            response += [2 * number + (name == "rejected")] * len(tokens)
        pair += [number] * (len(ids) - begin)
    tokens = ([ids], [positions], pair, part, logit_positions, targets, response)
    lengths = ([len(row[f"{name}_ids"]) for row in rows] for name in ("chosen", "rejected"))
    stored = ([row.get(f"ref_{name}_logps", math.nan) for row in rows] for name in ("chosen", "rejected"))
    return PreferenceBatch(
        *(torch.tensor(values, dtype=torch.long) for values in tokens),
        *(torch.tensor(values, dtype=torch.float32) for values in lengths),
        *(torch.tensor(values, dtype=torch.float64) for values in stored),
    )


@lru_cache(maxsize=2)
def shuffled(num_pairs: int, seed: int) -> list[int]:
    return torch.randperm(num_pairs, generator=torch.Generator().manual_seed(seed)).tolist()


def step_pairs(step: int, num_pairs: int, batch_size: int, seed: int) -> list[int]:
    """The pairs of optimizer step 0, 1, ...: shuffled anew each epoch, of which the last incomplete batch is dropped.

    A function of its arguments alone, so every process and every resumed run takes the same pairs.
    """
    epoch, position = divmod(step, num_pairs // batch_size)
    return shuffled(num_pairs, seed + epoch)[position * batch_size : (position + 1) * batch_size]


def micro_batches(pairs: list[int], lengths: list[int], max_tokens: int, num_processes: int) -> list[list[list[int]]]:
    """Split pairs over the processes, and each share into micro-batches of at most max_tokens tokens.

    lengths are tokens per pair; a longer pair is a micro-batch by itself. Returns [process][micro-batch][pair]. Shares
    are equal in number and close in tokens. Every process gets as many micro-batches (FSDP would hang otherwise): an
    empty list stands for one that must run with weight zero.
    """
    room = -(-len(pairs) // num_processes)
    shares: list[list[int]] = [[] for _ in range(num_processes)]
    loads = [0] * num_processes
    for pair in sorted(pairs, key=lambda p: -lengths[p]):
        lightest = min((n for n in range(num_processes) if len(shares[n]) < room), key=loads.__getitem__)
        shares[lightest].append(pair)
        loads[lightest] += lengths[pair]
    plans = []
    for share in shares:
        bins: list[list[int]] = []
        filled: list[int] = []
        for pair in share:  # first fit, longest first
            fits = next((i for i, tokens in enumerate(filled) if tokens + lengths[pair] <= max_tokens), None)
            if fits is None:
                bins.append([pair])
                filled.append(lengths[pair])
            else:
                bins[fits].append(pair)
                filled[fits] += lengths[pair]
        plans.append(bins)
    return [bins + [[]] * (max(map(len, plans)) - len(bins)) for bins in plans]


# ---------------------------------------------------------------------------------------------------------------------
# Packed micro-batch -> log-probs


def attention_mask(config, batch: PreferenceBatch, dtype: torch.dtype):
    """Token i sees token j when j is not behind it, of the same pair, and of the prompt or of the same response.

    4-D, so that `transformers` passes it on untouched: additive for sdpa and eager (which would add a bool as 0 or 1),
    a BlockMask for flex_attention. Where layers slide their window, it is measured on position_ids; models with
    both kinds of layers get a dict of two masks.
    """
    position = batch.position_ids[0]

    def mask(window: int | None):
        def visible(_batch, _head, i, j):
            same = (batch.pair[i] == batch.pair[j]) & ((batch.part[j] == 0) | (batch.part[j] == batch.part[i]))
            near = True if window is None else position[i] - position[j] < window
            return same & (j <= i) & near

        if config._attn_implementation == "flex_attention":
            return create_block_mask(visible, None, None, len(position), len(position), device=position.device)
        row = torch.arange(len(position), device=position.device)
        seen = visible(None, None, row[:, None], row[None, :])[None, None]  # (1, 1, tokens, tokens)
        # sdpa would take a bool as well, but turn it into floats anew in every layer and keep those for the backward
        # pass. Rows are a multiple of 16 apart in memory, as its kernel on CUDA wants them.
        kind = torch.bfloat16 if seen.is_cuda else dtype
        width = -(-len(position) // 16) * 16
        bias = torch.zeros(1, 1, len(position), width, dtype=kind, device=seen.device)[..., : len(position)]
        return bias.masked_fill_(~seen, torch.finfo(kind).min)

    window = getattr(config, "sliding_window", None)
    layer_types = set(getattr(config, "layer_types", None) or ())
    if not window or layer_types == {"full_attention"}:
        return mask(None)
    if layer_types <= {"sliding_attention"}:
        return mask(window)
    return {"full_attention": mask(None), "sliding_attention": mask(window)}


def response_logits(model, batch: PreferenceBatch) -> Tensor:
    """Logits (targets, vocab) that predict the response tokens, in the type that the model computes in.

    Through the model's own forward, so that soft-capping, logit scaling, FSDP, DDP and LoRA do as they do elsewhere;
    the head runs on the positions that predict a response token and on no other.
    """
    bare = getattr(model, "module", model)  # DDP hides the config
    device = batch.input_ids.device
    # Accelerate's own autocast would copy all logits to float32.
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        return model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=attention_mask(bare.config.get_text_config(), batch, bare.dtype),
            logits_to_keep=batch.logit_positions,
            use_cache=False,
        ).logits.squeeze(0)  # whose gradient is a view; that of [0] would be a copy


class TokenLogps(torch.autograd.Function):
    """token_logps, whose backward pass writes the gradient over the logits: nothing needs them any more, and no second
    tensor of their size is made. Where autograd still needs them it sees the change and raises.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, chunk: int) -> Tensor:
        ctx.save_for_backward(logits, targets)
        ctx.chunk, ctx.wide = chunk, torch.promote_types(logits.dtype, torch.float32)
        chunks = zip(logits.split(chunk), targets.split(chunk))
        return torch.cat([-torch.nn.functional.cross_entropy(x.to(ctx.wide), y, reduction="none") for x, y in chunks])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        logits, targets = ctx.saved_tensors
        for start in range(0, len(targets), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            # d logp / d logits = one-hot(target) - softmax(logits)
            slope = logits[rows].to(ctx.wide).softmax(-1).mul_(-gradient[rows, None])
            logits[rows] = slope.scatter_add_(1, targets[rows, None], gradient[rows, None])
        return logits, None, None


def token_logps(logits: Tensor, targets: Tensor, chunk: int = 512) -> Tensor:
    """log softmax(logits)[target] -> (targets,), in float32 or wider.

    Chunk by chunk, so that no float32 copy of all logits ever exists. backward() writes their gradient over `logits`:
    read what else you want of them before.
    """
    return TokenLogps.apply(logits, targets, chunk)


def sum_responses(values: Tensor, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
    """Values of the response tokens (targets,) -> their sums over each chosen and each rejected response, (pairs,)."""
    sums = values.new_zeros(2 * len(batch.chosen_lengths)).index_add(0, batch.response, values)
    return sums[0::2], sums[1::2]


def response_logps(model, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
    """log pi(y_w|x) and log pi(y_l|x), summed over the response tokens: two tensors (pairs,), float32 or wider."""
    return sum_responses(token_logps(response_logits(model, batch), batch.targets), batch)


# ---------------------------------------------------------------------------------------------------------------------
# Start-up


def is_file(source: str) -> bool:
    return Path(source).suffix in (".json", ".jsonl", ".parquet")


def check_args(args) -> None:
    """Numbers that cannot be, found before anything is loaded."""
    above_zero = (
        "lr batch_size epochs max_length max_prompt_length max_grad_norm lora_alpha tokens_per_device eval_every"
    )
    zero_or_more = "steps warmup weight_decay lora_rank lora_dropout seed"
    for name in f"{above_zero} save_every {zero_or_more}".split():
        value, zero = getattr(args, name), name in zero_or_more.split()
        if not (value >= 0 if zero else value > 0) or math.isinf(value):
            fail(f"--{name.replace('_', '-')} {value}: expected {'0 or more' if zero else 'a number above 0'}")
    if args.lora_dropout >= 1:
        fail(f"--lora-dropout {args.lora_dropout}: expected less than 1")
    if args.max_prompt_length >= args.max_length:
        fail(f"--max-prompt-length {args.max_prompt_length} leaves no room in --max-length {args.max_length}")


def start_accelerator(args) -> Accelerator:
    """DDP or FSDP2 as `accelerate launch` was told; engines that this repo was never run with are refused by name."""
    for engine in ("DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true":
            fail(f"{engine} is not supported: launch with configs/ddp.yaml, or configs/fsdp2.yaml to shard the model")
    try:
        # Mixed precision is response_logits' own: accelerate's would copy all logits to float32.
        # Without cpu=True two processes on a machine without a GPU would each believe to be alone.
        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision="no",
            log_with=args.track or None,
            project_dir=args.output_dir,
        )
    except (ImportError, ValueError) as error:
        fail(f"cannot start: {error}")
    if args.track and not accelerator.log_with:
        fail(f"--track {args.track}: it is not installed; pip install {args.track}")
    if accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            fail("FSDP version 1 is not supported: set fsdp_version: 2, as in configs/fsdp2.yaml")
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    if "MASTER_ADDR" in os.environ and accelerator.num_processes == 1 and "WORLD_SIZE" not in os.environ:
        print("note: one process only; accelerate launch --cpu starts several through MPI alone, torchrun without it")
    if args.batch_size % accelerator.num_processes:
        fail(f"--batch-size {args.batch_size} cannot be divided by {accelerator.num_processes} processes")
    return accelerator


def gradient_sync(accelerator: Accelerator, model, last: bool):
    """DDP's processes exchange gradients behind the last micro-batch only; FSDP's behind each, to keep them sharded."""
    wait = not last and accelerator.distributed_type != DistributedType.FSDP
    return accelerator.no_sync(model) if wait else contextlib.nullcontext()


def whole(value: Tensor) -> Tensor:
    """The full tensor of a sharded one."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def show_pair(tokenizer, row: dict) -> str:
    """The first pair as the model sees it, special tokens included: a doubled BOS or a missing end token shows here."""
    lines = []
    for name in ("prompt", "chosen", "rejected"):
        text = repr(tokenizer.decode(row[f"{name}_ids"]))
        text = text if len(text) < 200 else f"{text[:95]} ... {text[-95:]}"
        lines.append(f"  {name:<9}{len(row[f'{name}_ids']):>5} tokens  {text}")
    return "first pair\n" + "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The model


def from_hub(kind, name: str, args, **options):
    """kind.from_pretrained(name), from the hub or a directory."""
    try:
        return kind.from_pretrained(name, trust_remote_code=args.trust_remote_code, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # torn files and unknown names surface as errors of many libraries
        fail(f"cannot load {name!r}: {error or type(error).__name__}")


def load_model(args, accelerator: Accelerator):
    """The policy. Refuses what would not fit into memory before it loads a weight.

    Weights that are trained are float32: a step of 5e-7 on a bf16 weight is lost in rounding. Weights that stay frozen
    under LoRA are bf16 on a GPU. Dropout of the model itself is off, so that policy and reference agree at step 0.
    """
    check_memory(args, accelerator)
    dtype = frozen_type(accelerator) if args.lora_rank else torch.float32
    model = from_hub(
        AutoModelForCausalLM, args.model, args, dtype=dtype, attn_implementation=args.attn_implementation or None
    )
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    if args.lora_rank:
        torch.manual_seed(args.seed)
        options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        lora = LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout, **options)
        model = get_peft_model(model, lora)
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def load_frozen(name: str, args, accelerator: Accelerator):
    """A second model that is never trained, whole on every device, in the types that the policy computes in."""
    # Float32 weights under autocast keep embeddings, norms and residuals in float32; bf16 ones there would put a
    # rounding error of 1e-2 between policy and reference before any training.
    all_bf16 = args.lora_rank or accelerator.distributed_type == DistributedType.FSDP
    options = {"dtype": frozen_type(accelerator) if all_bf16 else torch.float32}
    model = from_hub(AutoModelForCausalLM, name, args, **options, attn_implementation=args.attn_implementation or None)
    return freeze(model, frozen_type(accelerator)).to(accelerator.device)


def freeze(model, dtype: torch.dtype):
    """Linear layers in dtype, as autocast would have them at every call; what it leaves in float32 stays so."""
    embeddings = model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.weight is not embeddings:
            module.to(dtype)
    return model.requires_grad_(False).eval()


def frozen_type(accelerator: Accelerator) -> torch.dtype:
    return torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32


def check_memory(args, accelerator: Accelerator, frozen_copies: int = 0, gradient_copies: int = 0) -> None:
    """Refuse what cannot fit: trained weights with gradients and moments, frozen ones, and what the engine adds."""
    config = from_hub(AutoConfig, args.model, args)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=args.trust_remote_code)
    count, devices = sum(p.numel() for p in empty.parameters()), accelerator.num_processes
    frozen = frozen_type(accelerator).itemsize
    # AdamW: 4 for the weight, 4 for the gradient, 8 for two moments; RMSprop has one moment less.
    trained = (16 if args.optimizer == "adamw" else 12) + 4 * gradient_copies
    if accelerator.distributed_type == DistributedType.MULTI_GPU:
        trained += 4  # DDP's buckets
    if accelerator.device.type == "cuda" and accelerator.distributed_type != DistributedType.FSDP:
        trained += 2  # autocast's bf16 copy; under FSDP2 it is a layer's at a time
    needed = count * (frozen if args.lora_rank else trained)
    if accelerator.distributed_type == DistributedType.FSDP:
        needed //= devices
    needed += count * frozen * frozen_copies
    if accelerator.device.type == "cuda":
        there = torch.cuda.get_device_properties(accelerator.device).total_memory
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // devices
    if needed > there:
        fail(
            f"{args.model}: {count / 1e9:.2f}B parameters need {needed / 1e9:.0f} GB on each of {devices} devices "
            f"before any activation, and each has {there / 1e9:.0f} GB: take more devices with configs/fsdp2.yaml, "
            f"--lora-rank 16, or a larger device"
        )


def row_tokens(model, tokens_per_device: int) -> int:
    """Tokens of a packed row. Under a dense mask attention costs the row's length squared, so rows stop where that is
    an eighth of the matrix multiplications (24 h^2 a token and layer against 4 h * row); a block mask has no such cost.
    """
    config = getattr(model, "module", model).config
    if config._attn_implementation == "flex_attention":
        return tokens_per_device
    return min(tokens_per_device, max(512, 3 * config.get_text_config().hidden_size // 4))


@torch.no_grad()
def check_packing(model, dataset: Dataset, device) -> None:
    """Compare one packed row with a plain forward per sequence on the real model; SystemExit where they differ.

    The row holds the longest pair, so that sliding windows are met and too little memory is found out now.
    """
    name, training = type(getattr(model, "module", model)).__name__, model.training
    lengths = pair_lengths(dataset)
    rows = [dataset[lengths.index(max(lengths))], dataset[0]]
    model.eval()
    try:
        packed = torch.stack(response_logps(model, collate(rows).to(device)), 1).flatten()
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, KeyError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        fail(f"{name} cannot run packed pairs ({error}); use a plain decoder such as Llama, Mistral or Qwen")
    plain, counts = [], []
    for row in rows:
        for response in (row["chosen_ids"], row["rejected_ids"]):
            ids = torch.tensor([row["prompt_ids"] + response], device=device)
            with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"):
                logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(response) + 1).logits[0, :-1]
            plain.append(token_logps(logits, ids[0, -len(response) :]).sum())
            counts.append(len(response))
    off = ((packed - torch.stack(plain)).abs().sum() / sum(counts)).item()  # a token, over all of them
    # Noise is about 1e-6 a token in float32 and 1e-2 in bf16; a token that sees what it must not moves far more.
    if not math.isfinite(off):
        fail(f"{name} gives log-probs that are no numbers (nan or inf) before any training; its weights are broken")
    if not off < (5e-2 if logits.dtype == torch.bfloat16 else 1e-4):
        fail(
            f"{name} gives other log-probs for packed pairs than for plain sequences ({off:.2g} a token), so it "
            f"ignores 4-D masks or position_ids (recurrent, ALiBi?); use a plain decoder such as Llama, Mistral or Qwen"
        )
    model.train(training)


def pair_lengths(dataset: Dataset) -> list[int]:
    """Tokens of each pair in a packed row, at most."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [sum(map(len, pair)) for pair in zip(*(dataset[name] for name in names))]


def data_fingerprint(dataset: Dataset, *more) -> str:
    """A hash of the pairs' token ids, and so of data, tokenizer, template and truncation."""
    digest = hashlib.sha256(json.dumps(more).encode())
    for row in dataset:
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()


@torch.no_grad()
def add_reference(args, accelerator: Accelerator, model, dataset: Dataset, pairs: list[int], name: str) -> Dataset:
    """Columns ref_chosen_logps and ref_rejected_logps: log-probs of the given pairs under the reference policy.

    The reference is `model` before its first update (adapters are zero then), or args.ref_model, loaded here and
    freed again. One pass, shared by all processes, kept in reference/<name>.safetensors and made again where the
    fingerprint (the reference's weights, the pairs as tokens) is another. Pairs outside `pairs` get nan.
    """
    path = Path(args.output_dir, "reference", f"{name}.safetensors")
    reference = load_frozen(args.ref_model, args, accelerator) if args.ref_model else model
    weights = [whole(parameter.sum(dtype=torch.float64)).item() for parameter in reference.parameters()]
    fingerprint = {"fingerprint": data_fingerprint(dataset.select(pairs), weights, pairs, len(dataset))}

    stored = None
    if path.exists():
        with contextlib.suppress(SafetensorError, OSError), safe_open(path, "pt") as file:
            stored = file.get_tensor("logps") if file.metadata() == fingerprint else None
        accelerator.print(f"{path}: {'of another model or other data, made again' if stored is None else 'reused'}")
    accelerator.wait_for_everyone()
    if stored is None:
        stored = torch.zeros(len(dataset), 2, dtype=torch.float64, device=accelerator.device)  # (dataset, 2)
        training, lengths = reference.training, pair_lengths(dataset)
        max_tokens = row_tokens(reference, args.tokens_per_device)
        reference.eval()
        progress = tqdm(
            total=len(pairs), desc=f"reference, {name} pairs", disable=not accelerator.is_local_main_process
        )
        for start in range(0, len(pairs), 1024):
            some = pairs[start : start + 1024]
            for indices in micro_batches(some, lengths, max_tokens, accelerator.num_processes)[
                accelerator.process_index
            ]:
                batch = collate([dataset[i] for i in indices or some[:1]]).to(accelerator.device)
                logps = torch.stack(response_logps(reference, batch), 1).double()  # (pairs, 2)
                if indices:
                    stored[indices] = logps
            progress.update(len(some))
        progress.close()
        reference.train(training)
        stored = accelerator.reduce(stored).cpu()
        stored = torch.full_like(stored, math.nan).index_copy(0, torch.tensor(pairs), stored[pairs])
        if accelerator.is_main_process:
            path.parent.mkdir(exist_ok=True)
            save_file({"logps": stored}, path.with_suffix(".writing"), fingerprint)
            os.replace(path.with_suffix(".writing"), path)
    for column, values in zip(("ref_chosen_logps", "ref_rejected_logps"), stored.unbind(1)):
        dataset = dataset.add_column(column, values.tolist())
    return dataset


# ---------------------------------------------------------------------------------------------------------------------
# A run on disk: args.json, metrics.jsonl, curves.png, checkpoints/, model/

RUN = ("metrics.jsonl", "curves.png", "checkpoints", "model", "adapter", "reference")
MAY_DIFFER = {"output_dir", "resume", "overwrite", "tokens_per_device", "save_every", "track", "gradient_checkpointing"}


def check_run(args, accelerator: Accelerator) -> None:
    """Refuse an output directory in use, and a --resume whose arguments would change the result."""
    folder, saved = Path(args.output_dir), Path(args.output_dir, "args.json")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot write to --output-dir {folder}: {error}")
    if not os.access(folder, os.W_OK):
        fail(f"cannot write to --output-dir {folder}")
    if args.resume and args.overwrite:
        fail("--resume continues the run in --output-dir and --overwrite deletes it: choose one")
    for name in ("model", "ref_model", "dataset", "eval_dataset"):
        source = Path(getattr(args, name, "") or "/")
        if source.exists() and source.resolve().is_relative_to(folder.resolve()):
            fail(f"--{name.replace('_', '-')} {source} lies in --output-dir {folder}, which the run writes to")
    if not saved.exists():
        foreign = [name for name in RUN if (folder / name).exists()]
        if foreign:
            fail(f"{folder} holds {', '.join(foreign)} but no args.json, so it is no run: choose another --output-dir")
        return
    if args.overwrite:
        return
    if not args.resume:
        fail(f"{folder} already holds a run: choose another --output-dir, --resume it or --overwrite it")
    old = json.loads(saved.read_text())
    for name, value in asdict(args).items():
        free = name in MAY_DIFFER and not (name == "tokens_per_device" and args.lora_dropout)  # dropout sees rows
        if not free and old.get(name) != value:
            flag = name.replace("_", "-")
            fail(f"--resume with --{flag} {value}, but the run in {folder} was started with {old.get(name)}")


def write_json(path: Path, value) -> None:
    temporary = path.with_name(path.name + ".writing")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)


def begin_run(args, accelerator: Accelerator) -> Path | None:
    """Open the output directory; returns the checkpoint to resume from, if any. Nothing is deleted before this."""
    folder = Path(args.output_dir)
    checkpoints = sorted(folder.glob("checkpoints/step-*")) if args.resume else []
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for path in checkpoints[:-2] if checkpoints else [folder / name for name in RUN]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        write_json(folder / "args.json", asdict(args))
        (folder / "checkpoints").mkdir(exist_ok=True)
    accelerator.wait_for_everyone()
    if args.track:
        accelerator.init_trackers(folder.name, config=asdict(args))
    return checkpoints[-1] if checkpoints else None


def training_state(args, model, optimizer) -> dict:
    """What a checkpoint holds of weights (under LoRA the adapters only) and optimizer; sharded under FSDP."""
    weights, moments = get_state_dict(model, optimizer, options=StateDictOptions(ignore_frozen_params=True))
    if args.lora_rank:  # a tied head counts as trained to torch
        weights = {name: value for name, value in weights.items() if "lora_" in name}
    return {"model": weights, "optimizer": moments}


def save_checkpoint(args, accelerator: Accelerator, model, optimizer, state: dict) -> None:
    """Weights and optimizer of all processes, and `state` (JSON, with the step), under checkpoints/step-N.

    Written beside and renamed into place, so a kill at any instant leaves whole checkpoints only. Keeps the last two.
    """
    folder = Path(args.output_dir, "checkpoints")
    writing = folder / "writing"
    if accelerator.is_main_process:
        shutil.rmtree(writing, ignore_errors=True)
    accelerator.wait_for_everyone()
    saved = training_state(args, model, optimizer)
    dcp.save(saved, checkpoint_id=writing, no_dist=accelerator.num_processes == 1)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(writing / "state.json", state)
        os.replace(writing, folder / f"step-{state['step']:08d}")
        for old in sorted(folder.glob("step-*"))[:-2]:
            os.replace(old, writing)  # so that a kill while deleting leaves no half checkpoint under a good name
            shutil.rmtree(writing)
    accelerator.wait_for_everyone()


def load_checkpoint(args, path: Path, model, optimizer, data: str) -> dict:
    """Put a checkpoint's weights and optimizer state in place; returns its `state`. `data`: the pairs' fingerprint."""
    state = json.loads((path / "state.json").read_text())
    if state["data"] != data:
        fail(f"--resume: the pairs are not the ones that the run in {args.output_dir} was started with")
    saved = training_state(args, model, optimizer)
    dcp.load(saved, checkpoint_id=path, no_dist=not torch.distributed.is_initialized())
    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    weights, moments = saved["model"], saved["optimizer"]
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=options)
    return state


def read_metrics(args, last_step: int) -> list[dict]:
    """The lines of metrics.jsonl up to last_step; what a killed run wrote behind its last checkpoint is forgotten."""
    path, kept = Path(args.output_dir, "metrics.jsonl"), []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # the kill came in the middle of this line
            break
        if row["step"] > last_step:
            break
        kept.append(row)
    return kept


def write_metrics(args, accelerator: Accelerator, rows: list[dict]) -> None:
    if accelerator.is_main_process:
        temporary = Path(args.output_dir, "metrics.jsonl.writing")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(temporary, Path(args.output_dir, "metrics.jsonl"))


def log_metrics(args, accelerator: Accelerator, row: dict) -> None:
    if accelerator.is_main_process:
        with Path(args.output_dir, "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    if args.track:
        accelerator.log(row, step=row["step"])


def print_summary(args, accelerator: Accelerator, history: list[dict]) -> None:
    """What changed between the start and the end of the run, and where everything lies."""
    prefix = "eval/" if "eval/loss" in history[0] else ""
    first, last = (history[0] if prefix else history[1]), history[-1]
    accelerator.print(f"\n{'evaluation pairs' if prefix else 'training batches'}: start -> end")
    for name in ("loss", "logps/chosen", "logps/rejected", "rewards/accuracy"):
        accelerator.print(f"  {name:<18}{first[prefix + name]:9.4f} -> {last[prefix + name]:9.4f}")
    accelerator.print(f"figure  {args.output_dir}/curves.png\nmodel   {args.output_dir}/model")


def plot_curves(args, accelerator: Accelerator, rows: list[dict], panels: list[tuple[str, ...]]) -> None:
    """Draw the named metrics, a panel each, over the steps: training as lines, evaluation as lines with dots."""
    if not accelerator.is_main_process:
        return
    import matplotlib

    panels = [
        names for names in panels if any(f"{prefix}{name}" in rows[-1] for name in names for prefix in ("", "eval/"))
    ]
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(3, len(panels))
    figure, axes = plt.subplots(
        -(-len(panels) // columns), columns, figsize=(5 * columns, 3.2 * -(-len(panels) // columns)), squeeze=False
    )
    for axis, names in zip(axes.flat, panels):
        for color, name in enumerate(names):
            for key, style in (
                (name, {"alpha": 0.6, "linewidth": 1}),
                (f"eval/{name}", {"marker": "o", "markersize": 3}),
            ):
                points = [(row["step"], row[key]) for row in rows if key in row]
                if points:
                    axis.plot(*zip(*points), color=f"C{color}", label=key, **style)
        axis.set_xlabel("optimizer step")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.tight_layout()
    path = Path(args.output_dir, "curves.png")
    figure.savefig(path.with_suffix(".writing.png"), dpi=110)
    plt.close(figure)
    os.replace(path.with_suffix(".writing.png"), path)


def save_model(args, accelerator: Accelerator, model, tokenizer) -> None:
    """Write model/ (and adapter/ under LoRA, merged in model/) in the type of the checkpoint that it came from.

    Built anew from the initial model on the CPU, so it is the same code for one process, DDP, FSDP2 and LoRA.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    trained = get_model_state_dict(model, options=options)  # all processes gather the shards of FSDP
    if accelerator.is_main_process:
        folder = Path(args.output_dir)
        fresh = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", trust_remote_code=args.trust_remote_code)
        if args.lora_rank:
            fresh = get_peft_model(fresh, accelerator.unwrap_model(model).peft_config["default"])
        unknown = fresh.load_state_dict(trained, strict=False).unexpected_keys
        assert not unknown, f"weights without a place in {args.model}: {unknown}"
        if args.lora_rank:
            fresh.save_pretrained(folder / "adapter")
            fresh = fresh.merge_and_unload()
        writing = folder / "model.writing"
        shutil.rmtree(writing, ignore_errors=True)
        fresh.save_pretrained(writing)
        tokenizer.save_pretrained(writing)
        shutil.rmtree(folder / "model", ignore_errors=True)
        os.replace(writing, folder / "model")
    accelerator.wait_for_everyone()
