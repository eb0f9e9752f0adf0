"""Preference data -> token ids: any of TRL's preference formats or Anthropic's HH, from the hub or a local file.

    load_preferences    rows of text or messages -> a Dataset of prompt_ids, chosen_ids, rejected_ids

A prompt and its answer go through the tokenizer as one text, as the model's own chat template writes it. Templates drop
what they do not know (roles, thoughts, calls): a pair that is not written in full is dropped and counted.
"""

import contextlib
import gzip
import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from datetime import date
from functools import lru_cache, partial
from pathlib import Path
from typing import NoReturn

import datasets
import torch
from accelerate import PartialState
from datasets import Dataset, Features, List, ReadInstruction, Value, load_dataset
from tqdm import tqdm


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


READ = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")  # columns; the last two are TRL's
SAID = ("content", "reasoning_content", "reasoning", "thinking", "thought", "tool_plan")  # texts of a message
ANYWHERE = ("tools", "system", "developer")  # turns that some templates put elsewhere
RESULTS = ("tool", "ipython", "function")  # turns with what a call gave
HH = re.compile(r"\s*Human:.*?\n\nAssistant:", re.DOTALL)  # how a dialogue of Anthropic's HH begins


def load_preferences(
    source, tokenizer, split: str, max_length: int, max_prompt_length: int, config: str = "", day: str = ""
) -> Dataset:
    """Preference pairs as a Dataset with `prompt_ids`, `chosen_ids`, `rejected_ids` (lists of int).
    source is a .json, .jsonl or .parquet file, a folder or a data set on the hub, of which `split` and `config` are
    taken, or a list of rows. Those have `chosen` and `rejected`, and where these do not contain it a `prompt`: text, or
    lists of {"role", "content"} messages, which the tokenizer's chat template renders as on `day` (2026-11-25; empty:
    today). SystemExit names file, row and column of what is wrong.
    prompt + response is the tokenized whole, cut behind its end token; a token that straddles the border belongs to the
    responses. A pair longer than max_length keeps the last max_prompt_length tokens of its prompt (and the BOS), then
    the responses lose their ends. Pairs that teach nothing, or that the template does not write in full, are dropped,
    and how many of which kind is printed.
    """
    rows, numbers = read_rows(source, split, config)
    name, state = source if isinstance(source, str) else "the rows", PartialState()
    columns = Features({part: List(Value("int32")) for part in ("prompt_ids", "chosen_ids", "rejected_ids")})
    tables, dropped, notes, truncated = [], defaultdict(list), Counter(), 0
    for start in tqdm(range(0, len(numbers), 1000), "tokenizing", disable=not state.is_local_main_process):
        texts, kept, table = [], [], {part: [] for part in columns}
        for number in numbers[start : start + 1000]:
            found = to_texts(rows[number - 1], f"{name} row {number}", tokenizer, day, notes)
            if isinstance(found, str):
                dropped[found].append(number)
            elif re.search(r"[\ud800-\udfff]", "".join(found)):
                dropped["half a character, which no tokenizer takes"].append(number)
            else:
                texts += found
                kept.append(number)
        ids = iter(encode(tokenizer, texts))
        for number, *whole in zip(kept, ids, ids, ids):
            found, too_long = cut_ids(*whole, tokenizer.bos_token_id, max_length, max_prompt_length)
            truncated += too_long
            if isinstance(found, str):
                dropped[found].append(number)
            else:
                for part, values in zip(columns, found):
                    table[part].append(values)
        tables.append(Dataset.from_dict(table, columns))
    dataset = datasets.concatenate_datasets(tables)
    often = sorted(dropped.items(), key=lambda item: (-len(item[1]), item[0]))
    reasons = [f"{len(found)} dropped: {why} (first: row {min(found)})" for why, found in often[:5]]
    reasons += [f"and {sum(len(found) for _, found in often[5:])} for other reasons"] * (len(often) > 5)
    counts = f"{len(dataset)} of {len(numbers)} pairs kept, {truncated} truncated"
    state.print(f"{name}: {', '.join([counts, *reasons])}")
    given = rows.column_names if isinstance(rows, Dataset) else dict.fromkeys(c for n in numbers for c in rows[n - 1])
    if unused := ", ".join(column for column in given if column not in READ):
        state.print(f"{name}: columns that are not used: {unused}")
    for note, count in notes.items():
        state.print(f"{name}: {count} pairs {note}")
    if not len(dataset):
        fail(f"{name}: none of its {len(numbers)} rows is a usable pair; {', '.join(reasons)}; max length {max_length}")
    return dataset


def one_split(source: str) -> bool:
    """Whether a data set has no splits with names: a file, or what `save_to_disk` wrote of a single one."""
    return Path(source).is_file() or (Path(source) / "state.json").is_file()


def read_rows(source, split: str, config: str) -> tuple[list | Dataset, list[int]]:
    """All rows, and the numbers, from 1, of those in `split`. A file or a list is one split whatever its name, of which
    what stands in brackets counts (train[:50%]). json is read here because `datasets` does not name the row at fault.
    """
    path = Path(source if isinstance(source, str) else "")
    kind = Path(path.name.removesuffix(".gz")).suffix
    file, wanted = kind in (".json", ".jsonl", ".parquet"), split or "all"
    if not isinstance(source, str):
        rows = source
    elif file != path.is_file():
        fail(f"{source}: {'no such file' if file else 'expected a .json, .jsonl or .parquet file or a hub data set'}")
    elif kind == ".parquet":
        with failing(f"{source}: not a readable parquet file"):
            rows = load_dataset("parquet", data_files=source, split="train")
    elif file:
        with failing(source), (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as stream:
            text, rows = stream.read(), []
        whole = kind == ".json" and text.lstrip().startswith("[")  # else lines, as to_json writes them
        for line in filter(str.strip, [text] if whole else text.split("\n")):
            with failing(f"{source} row {len(rows) + 1}: not JSON"):
                rows.append(json.loads(line))
        rows = rows[0] if whole else rows
    else:
        with failing(f"cannot load split {split!r} of data set {source!r}"):
            if one_split(source):
                rows = datasets.load_from_disk(source)
            elif (path / "dataset_dict.json").is_file():
                saved, wanted = datasets.load_from_disk(source), "all"
                parts = ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in saved.items()})
                parts = [saved[part.splitname].select(range(part.from_, part.to)) for part in parts]
                rows = datasets.concatenate_datasets(parts)
            else:
                is_name = not config or config in datasets.get_dataset_config_names(source)  # else a folder, as HH has
                rows = load_dataset(source, split=split, **{"name" if is_name else "data_dir": config or None})
                wanted = "all"
    with failing(f"{source}: split {split!r}"):
        sizes = dict.fromkeys(re.findall(r"[\w.-]+(?=\[|\s*\+|$)", wanted), len(rows))
        parts = ReadInstruction.from_spec(wanted).to_absolute(sizes)
    numbers = [number for part in parts for number in range(part.from_ + 1, part.to + 1)]
    if len(set(numbers)) < len(numbers):
        fail(f"{source}: split {split!r} takes rows twice, for it is one split whatever its name")
    return (rows, numbers) if numbers else fail(f"{source}: it is empty")


def to_texts(row: dict, where: str, tokenizer, day: str, notes: Counter) -> tuple[str, str, str] | str:
    """(prompt, prompt + chosen, prompt + rejected) as the model will see them, or the reason to drop the pair."""
    if not isinstance(row, dict):
        fail(f"{where}: expected an object with prompt, chosen and rejected, found {type(row).__name__}")
    found, columns = {"prompt": None}, ", ".join(row) or "none"
    for name in ("chosen", "rejected", *(["prompt"] if row.get("prompt") is not None else [])):
        if name not in row:
            fail(f'{where}: no column "{name}" (found: {columns})')
        if row[name] is None:
            return "empty response"
        found[name] = read_column(row[name], f'{where}: "{name}"', notes)
    prompt, chosen, rejected = found.values()
    if isinstance(chosen, str) != isinstance(rejected, str):
        fail(f'{where}: one of "chosen" and "rejected" is text and the other a list of messages')
    if isinstance(chosen, list):
        return chat_texts(prompt, chosen, rejected, row, where, tokenizer, day, notes)
    if isinstance(prompt, list):
        fail(f'{where}: "prompt" is a list of messages, but "chosen" is text')
    whole, dialogues = (chosen, rejected), HH.match(chosen) and HH.match(rejected)
    if prompt and not dialogues:
        repeated = chosen.startswith(prompt) and rejected.startswith(prompt)
        notes.update(["repeat the prompt in both answers; it is taken once"] if repeated else [])
        whole = whole if repeated else (prompt + chosen, prompt + rejected)
    if tokenizer.chat_template and all(map(HH.match, whole)):  # other models get HH as it stands
        return chat_texts(None, *map(hh_messages, whole), row, where, tokenizer, day, notes)
    if tokenizer.chat_template:
        notes.update(["are text, which this chat model gets without its template; write messages to use it"])
    if dialogues or prompt is None:
        if not dialogues and "prompt" in row:
            return "no prompt"
        if not dialogues and not row.keys() <= {*READ}:
            fail(f'{where}: no column "prompt", and the answers hold no dialogue; rename one of: {columns}')
        prompt = os.path.commonprefix(whole)
        if dialogues:
            prompt = prompt[: prompt.rfind("\n\nAssistant:") + len("\n\nAssistant:")]
            if not prompt.endswith("\n\nAssistant:") or any("\n\nHuman:" in text[len(prompt) :] for text in whole):
                return "the questions differ"
        prompt = prompt.rstrip(" ")  # the space before a word belongs to its token
    if not all(text[len(prompt) :].strip() for text in whole):
        return "empty response"
    return prompt, *(ended(text, tokenizer) for text in whole)


def ended(text: str, tokenizer, behind: str = "") -> str:
    """Cut behind the special token that ends it, or with the tokenizer's end token where none does."""
    cut = text.removesuffix(behind).rstrip()
    return cut if cut.endswith(special_tokens(tokenizer)) else text + (tokenizer.eos_token or "")


@lru_cache
def special_tokens(tokenizer) -> tuple[str, ...]:
    return tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)


def without_nulls(value):
    """Arrow gives every object of a list the keys of all, so a null stands for a key that nobody wrote."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def read_column(value, where: str, notes: Counter) -> str | list[dict]:
    """Text, or messages: the `content` of each as text, the arguments of its calls as objects."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            read = json.loads(value) if value.lstrip()[:1] in ("[", "{") else None
            read = [read] if isinstance(read, dict) else read or [None]
            value = read if all(isinstance(message, dict) and "role" in message for message in read) else value
    if isinstance(value, str):  # other JSON is text
        if re.match(r"""\s*\[\s*\{\s*['"](role|content|from|value)['"]\s*:""", value):
            fail(f"{where} begins as a list of messages, but is not one in JSON")
        return value
    if not isinstance(value, list) or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value):
        kind = "a number" if isinstance(value, int | float) else type(value).__name__
        fail(f"{where} is {kind}, expected text or a list of messages, each with a role")
    messages = without_nulls(value)
    for message in messages:
        parts = message.get("content", "")
        parts = [{"text": parts}] if isinstance(parts, str) else parts if isinstance(parts, list) else [parts]
        if other := [part for part in parts if not isinstance(part, dict) or not isinstance(part.get("text"), str)]:
            fail(f"{where}: the content of a message is no text: {str(other[0])[:60]}")
        message["content"] = "".join(part["text"] for part in parts)
        with failing(f"{where}: a tool call lacks a name, or its arguments are not JSON"):
            calls = message.get("tool_calls") or [call for call in [message.get("function_call")] if call]
            calls = json.loads(calls) if isinstance(calls, str) else calls
            message |= {"tool_calls": [read_call(call) for call in calls]} if calls else {}
        others = message.keys() - {*SAID, "role", "name", "tool_calls", "tool_call_id", "function_call"}
        notes.update(f'have "{key}" in messages; nobody checks what becomes of it' for key in others)
    return messages


def read_call(call: dict) -> dict:
    function = call.get("function") or call
    given = function.get("arguments") or {}
    given = json.loads(given) if isinstance(given, str) else given
    return call | {"type": "function", "function": {"name": str(function["name"]), "arguments": given}}


def chat_texts(prompt, chosen, rejected, row, where, tokenizer, day, notes) -> tuple[str, str, str] | str:
    """to_texts of lists of messages; prompt is one too, or a string, or None."""
    if tokenizer.chat_template is None:
        fail(f"{where}: conversational data, but the tokenizer has no chat template; use an instruct model or text")
    turns = common_prefix(chosen, rejected)
    if isinstance(prompt, list):
        turns = len(prompt) * (chosen[: len(prompt)] == rejected[: len(prompt)] == prompt)
    elif turns == len(chosen) == len(rejected):
        return "chosen equals rejected"
    else:
        shared = chosen[:turns]
        if isinstance(prompt, str) and prompt.strip() and not any(message["role"] == "user" for message in shared):
            first = next((n for n, message in enumerate(shared) if message["role"] not in ANYWHERE), len(shared))
            prompt = [*shared[:first], {"role": "user", "content": prompt}, *shared[first:]]
        else:  # beside whole conversations a prompt string is only a label
            prompt = shared
    responses = chosen[turns:], rejected[turns:]
    if not all("".join(str(piece) for message in answer for piece in said(message)).strip() for answer in responses):
        return "empty response"
    if others := {message["role"] for answer in responses for message in answer} - {"assistant", *RESULTS}:
        return f"a response holds a turn of {min(others)!r}"
    if not prompt and "prompt" in row:
        return "no prompt"
    if not prompt:
        fail(f'{where}: no column "prompt", and the answers have no turn in common (found: {", ".join(row)})')
    if prompt[-1]["role"] == "assistant":
        return "the prompt ends with the assistant's own turn"
    options = {}
    for name, value in row.items():
        if name in READ[3:] and value:
            with failing(f'{where}: "{name}" is not {"a list" if name == "tools" else "an object"} in JSON'):
                value = without_nulls(json.loads(value) if isinstance(value, str) else value) or []
                options |= {"tools": list(map(dict, value))} if name == "tools" else dict(value)
    try:
        try:
            return render_pair(prompt, responses, options, tokenizer, day, notes)
        except TypeError:  # some templates want the arguments of calls as text
            for call in [call for m in [*prompt, *responses[0], *responses[1]] for call in m.get("tool_calls", [])]:
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
            return render_pair(prompt, responses, options, tokenizer, day, notes)
    except Exception as error:  # templates raise what they like
        return f"the chat template fails: {str(error) or type(error).__name__}"


def render_pair(prompt, responses, options: dict, tokenizer, day: str, notes: Counter) -> tuple[str, str, str]:
    """The texts of messages that are known to be a pair. ValueError where the template does not write all of them."""
    now, tools = date.fromisoformat(day or str(date.today())), options.get("tools", [])
    template = tokenizer.get_chat_template(tools=tools or None)
    template = re.sub(
        r"""strftime_now\s*\(\s*(?:format\s*=\s*)?(['"])(.*?)\1\s*\)""", lambda m: repr(now.strftime(m[2])), template
    )
    render = partial(tokenizer.apply_chat_template, **options | {"tokenize": False, "chat_template": template})
    tools = [{"role": "tools", "tool_calls": [t if "function" in t else {"function": t} for t in tools]}]

    def compose(prompt, *answers, anew: bool | None = None):  # what generation is asked with, both wholes, if made anew
        asked = render(prompt, add_generation_prompt=True)
        whole = [render(prompt + answer, add_generation_prompt=False) for answer in answers]
        start = os.path.commonprefix([asked, *whole])  # some ask with a thought opened that no answer has
        anew = start != asked and bool(left_out(tools + prompt, start)) if anew is None else anew
        if anew:  # it words the prompt differently once an answer follows: that goes behind what it asks with
            border = prompt[-1]["content"].strip() or "\0"
            border += asked.rpartition(border)[2]
            place = os.path.commonprefix(whole).rfind(border)
            if place < 0:
                raise ValueError("it words the prompt differently when an answer follows")
            whole = [asked + text[place + len(border) :] for text in whole]
        return asked, whole, anew

    marked = [  # so that a text is told from the same words elsewhere
        [m | {"content": m["content"] and f"{m['content']}~{name}{n}~"} for n, m in enumerate(messages)]
        for name, messages in zip("pcr", (prompt, *responses))
    ]
    _, whole, anew = compose(*marked)
    for answer, text in zip(marked[1:], whole):
        if lost := left_out(tools + marked[0] + answer, text):
            part = "the answer" if lost in answer else "the prompt"
            known = ", ".join(dict.fromkeys(re.findall(r"""role\W+==\s*['"](\w+)""", template)))
            raise ValueError(f'it leaves out something of "{lost["role"]}" in {part} (roles that it names: {known})')
    asked, whole, _ = compose(prompt, *responses, anew=anew)
    if extra := asked.removeprefix(os.path.commonprefix([asked, *whole]).rstrip("<")):
        notes[f"are asked for with {extra!r} at the end, which training does not see"] += 1
    return asked, *(ended(text, tokenizer, turn_end(tokenizer, template)) for text in whole)


@lru_cache
def turn_end(tokenizer, template: str) -> str:
    """What the template writes behind the token that ends an answer: mostly a newline."""
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "~b~"}]
    render = partial(tokenizer.apply_chat_template, chat_template=template, tokenize=False)
    try:
        last, followed = (render(talk + more).rpartition("~b~")[2] for more in ([], talk[:1]))
    except Exception:  # it refuses this talk
        return ""
    both, eos = os.path.commonprefix([last, followed]), tokenizer.eos_token
    candidates = [eos] if eos and eos in both else special_tokens(tokenizer)
    return last[max((both.rfind(token) + len(token) for token in candidates if token in both), default=len(last)) :]


def said(message: dict) -> list:
    """What a message says: its texts, and of its calls the names and every single argument."""
    functions = [call["function"] for call in message.get("tool_calls", [])]
    return [message[name] for name in SAID if isinstance(message.get(name), str)] + leaves(
        [[function["name"], function.get("arguments", [])] for function in functions]
    )


def leaves(value) -> list:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return [value] if items is None else [leaf for item in items for leaf in leaves(item)]


def left_out(messages: list[dict], text: str) -> dict | None:
    """The first message of which text does not hold everything, in order and but for white space. Words that were found
    are taken out, so that they stand for one thing only; what may stand anywhere is looked for last.
    """
    text, place = "".join(text.split()), 0
    for message in sorted(messages, key=lambda message: message["role"] in ANYWHERE):
        begin, reached = 0 if message["role"] in ANYWHERE else place, place
        for piece in sorted(said(message), key=lambda piece: -len(str(piece))):
            forms = (str(piece), *(json.dumps(piece, ensure_ascii=ascii).strip('"') for ascii in (True, False)))
            forms = ["".join(form.split()) for form in forms]
            spans = [(at, at + len(form)) for form in forms if (at := text.find(form, begin)) >= 0]
            if not spans:
                return message
            at, end = min(spans, key=lambda span: span[1])
            text, reached = text[:at] + "\0" * (end - at) + text[end:], max(reached, end)
        place = place if message["role"] in ANYWHERE else reached
    return None


def hh_messages(text: str) -> list[dict]:
    turns, roles = re.split(r"(?:^\s*|\n\n)(Human|Assistant):", text), {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[role], "content": words.strip()} for role, words in zip(turns[1::2], turns[2::2])]


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
