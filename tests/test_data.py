"""Every data format through every family's chat template, against the template applied to the whole conversation."""

import json

import pytest
import tiny
from datasets import Dataset

from common import load_preferences

END = {"mistral": "</s>", "llama3": "<|eot_id|>", "zephyr": "</s>", "qwen": "<|im_end|>", "thinking": "<|im_end|>"}
USER = {"role": "user", "content": "What is 12 + 1?"}
TURNS = [USER, {"role": "assistant", "content": "13"}, {"role": "user", "content": "the same, in words"}]
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("12 and 1: thirteen", "the tenth, é\n\n 12"))
HH = "\n\nHuman: What is 12 + 1?\n\nAssistant: 13\n\nHuman: the same, in words\n\nAssistant:"


def load(tmp_path, tokenizer, *rows, suffix="jsonl", max_length=512, max_prompt_length=256):
    path = tmp_path / f"pairs.{suffix}"
    if suffix == "parquet":
        Dataset.from_list(list(rows)).to_parquet(path)
    else:
        path.write_text(json.dumps(rows) if suffix == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    return load_preferences(str(path), tokenizer, "train", max_length, max_prompt_length).to_list()


def conversation(tokenizer, messages, end):
    """The template's own tokens of the whole conversation, cut behind the end token, with the BOS of plain text."""
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    end = tokenizer.convert_tokens_to_ids(end)
    ids = ids[: len(ids) - ids[::-1].index(end)]
    return ids if tokenizer.bos_token_id in (None, ids[0]) else [tokenizer.bos_token_id, *ids]


def texts(tokenizer, row):
    return [tokenizer.decode(row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")]


def check_conversation(tokenizer, row, end, prompt=TURNS, good=(GOOD,), bad=(BAD,)):
    for name, response in (("chosen", good), ("rejected", bad)):
        ids = row["prompt_ids"] + row[f"{name}_ids"]
        assert ids == conversation(tokenizer, [*prompt, *response], end)
        assert row[f"{name}_ids"][-1] == tokenizer.convert_tokens_to_ids(end)
        assert ids.count(1) == (tokenizer.bos_token_id is not None)
        assert tokenizer.decode(row[f"{name}_ids"]).find(response[0]["content"].strip()) >= 0


@pytest.mark.parametrize("merges", [True, False], ids=["merges", "characters"])
@pytest.mark.parametrize("template", tiny.TEMPLATES)
def test_templates(template, merges, tmp_path):
    """prompt + response is the template's whole conversation, with one BOS and the end token last."""
    tokenizer = tiny.tokenizer(template, bos=template not in ("qwen", "thinking"), merges=merges)
    row = {"prompt": TURNS, "chosen": [GOOD], "rejected": [BAD]}
    one_turn = {"prompt": [USER], "chosen": [BAD], "rejected": [GOOD]}
    loaded = load(tmp_path, tokenizer, row, one_turn)
    check_conversation(tokenizer, loaded[0], END[template])
    check_conversation(tokenizer, loaded[1], END[template], [USER], [BAD], [GOOD])
    assert TURNS[-1]["content"] in tokenizer.decode(loaded[0]["prompt_ids"])
    assert GOOD["content"] not in tokenizer.decode(loaded[0]["prompt_ids"])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": TURNS, "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [*TURNS, GOOD], "rejected": [*TURNS, BAD]},
        {"prompt": None, "chosen": [*TURNS, GOOD], "rejected": [*TURNS, BAD]},
        {"prompt": "a label, as in UltraFeedback", "chosen": [*TURNS, GOOD], "rejected": [*TURNS, BAD]},
        {"chosen": f"{HH} {GOOD['content']}", "rejected": f"{HH} {BAD['content']}"},
        {"prompt": HH, "chosen": f" {GOOD['content']}", "rejected": f" {BAD['content']}"},
    ],
    ids=["prompt", "implicit", "no prompt here", "label", "hh", "hh with prompt"],
)
@pytest.mark.parametrize("template", ["mistral", "zephyr"])
def test_conversational_shapes(template, row, tmp_path):
    """All shapes of the same conversation give the same tokens."""
    tokenizer = tiny.tokenizer(template)
    check_conversation(tokenizer, load(tmp_path, tokenizer, row)[0], END[template])


def test_an_empty_system_turn_stays(tmp_path):
    """What docs/hdpo.md offers for Zephyr's recipe: an empty system turn before a row is before its prompt."""
    turns = [{"role": "system", "content": ""}, *TURNS]
    tokens = tiny.tokenizer("zephyr")
    row = load(tmp_path, tokens, {"chosen": [*turns, GOOD], "rejected": [*turns, BAD]})[0]
    assert tokens.decode(row["prompt_ids"]).startswith("<s><|system|>\n</s>\n<|user|>\n")


def test_prompt_string_beside_lone_answers(tmp_path):
    """A prompt string is the question where the messages hold answers only."""
    tokenizer = tiny.tokenizer("llama3")
    row = {"prompt": USER["content"], "chosen": [GOOD], "rejected": [BAD]}
    check_conversation(tokenizer, load(tmp_path, tokenizer, row)[0], "<|eot_id|>", [USER])


def test_responses_of_several_messages(tmp_path):
    """Conversations may part at an assistant's turn in the middle only if no user's turn follows."""
    tokenizer = tiny.tokenizer("zephyr")
    tool = {"role": "tool", "content": "12"}
    rows = [{"prompt": [USER], "chosen": [GOOD, tool, GOOD], "rejected": [BAD]}]
    row = load(tmp_path, tokenizer, *rows, {"chosen": [USER, GOOD, USER, BAD], "rejected": [USER, BAD]})
    assert len(row) == 1
    check_conversation(tokenizer, row[0], "</s>", [USER], [GOOD, tool, GOOD])


def test_template_that_asks_otherwise_than_it_writes(tmp_path):
    """Asked for an answer it opens a thought, in the finished conversation it does not: the common part is prompt."""
    template = tiny.TEMPLATES["qwen"].replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    tokenizer = tiny.tokenizer(template)
    row = load(tmp_path, tokenizer, {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]})[0]
    check_conversation(tokenizer, row, "<|im_end|>", [USER])
    assert texts(tokenizer, row)[:2] == [
        f"<s><|im_start|>user\n{USER['content']}<|im_end|>\n<|im_start|>assistant\n",
        f"{GOOD['content']}<|im_end|>",
    ]


def test_template_without_end_token(tmp_path):
    """The tokenizer's own end token is added where the template writes none."""
    tokenizer = tiny.tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}")
    row = load(tmp_path, tokenizer, {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]})[0]
    assert texts(tokenizer, row)[1:] == [f"assistant: {m['content']} </s>" for m in (GOOD, BAD)]


@pytest.mark.parametrize("suffix", ["parquet", "json", "jsonl"])
def test_keys_in_some_messages_only(suffix, tmp_path):
    """Arrow fills the keys of other rows' messages with None; the template must not see them."""
    tokenizer = tiny.tokenizer("{% for m in messages %}{{ m.keys() | sort | join(',') }}:{{ m.content }};{% endfor %}")
    named = {"prompt": [{**USER, "name": "Ann"}], "chosen": [GOOD], "rejected": [BAD]}
    rows = load(tmp_path, tokenizer, {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, named, suffix=suffix)
    assert texts(tokenizer, rows[0])[0] == f"<s>content,role:{USER['content']};"
    assert texts(tokenizer, rows[1])[0] == f"<s>content,name,role:{USER['content']};"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "1+1=", "chosen": "2", "rejected": "3"}, ["1+1=", "2", "3"]),
        ({"prompt": "1+1=", "chosen": "2</s>", "rejected": "3</s>"}, ["1+1=", "2", "3"]),
        ({"chosen": "1+1= 2", "rejected": "1+1= 3"}, ["1+1=", " 2", " 3"]),
        ({"prompt": "", "chosen": "yes", "rejected": "no"}, ["", "yes", "no"]),
        ({"chosen": f"{HH} yes", "rejected": f"{HH} yesterday"}, [HH, " yes", " yesterday"]),
        ({"prompt": HH, "chosen": " yes", "rejected": " no"}, [HH, " yes", " no"]),
    ],
    ids=["prompt", "eos already there", "implicit", "empty prompt", "hh", "hh with prompt"],
)
def test_text(row, expected, tmp_path):
    """Text goes without a template: one BOS in front, one end token behind each response, whatever was there."""
    for bos in (True, False):
        tokenizer = tiny.tokenizer(bos=bos, merges=False)
        if not bos and not expected[0]:
            continue  # there would be nothing to predict the first token from
        prompt, chosen, rejected = texts(tokenizer, load(tmp_path, tokenizer, row)[0])
        assert [prompt, chosen, rejected] == ["<s>" * bos + expected[0], f"{expected[1]}</s>", f"{expected[2]}</s>"]


def test_text_stays_text_beside_a_template(tmp_path):
    """A chat template is for messages and HH only."""
    tokenizer = tiny.tokenizer("llama3")
    row = load(tmp_path, tokenizer, {"prompt": "1+1=", "chosen": "2", "rejected": "3"})[0]
    assert texts(tokenizer, row) == ["<s>1+1=", "2</s>", "3</s>"]


@pytest.mark.parametrize(("prompt", "chosen", "rejected"), [("1", "2", "3"), ("a t", "he", "o"), ("x]", " y", " z")])
def test_tokens_on_the_border(prompt, chosen, rejected, tmp_path):
    """A token that straddles prompt and response belongs to the responses, and none is lost or torn."""
    tokenizer = tiny.tokenizer()
    row = load(tmp_path, tokenizer, {"prompt": prompt, "chosen": chosen, "rejected": rejected})[0]
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        assert row["prompt_ids"] + row[f"{name}_ids"] == tokenizer(f"{prompt}{response}</s>")["input_ids"]
    assert row["prompt_ids"] == tokenizer(prompt)["input_ids"][: len(row["prompt_ids"])]
    assert len(row["prompt_ids"]) < len(tokenizer(prompt)["input_ids"])


def test_files_are_equal(tmp_path):
    """parquet, json and jsonl of the same rows give the same tokens."""
    rows = [{"prompt": TURNS[:n], "chosen": [GOOD], "rejected": [BAD]} for n in (1, 3)]
    loaded = [load(tmp_path, tiny.tokenizer("llama3"), *rows, suffix=s) for s in ("parquet", "json", "jsonl")]
    assert loaded[0] == loaded[1] == loaded[2] and len(loaded[0]) == 2


@pytest.mark.parametrize("bos", [True, False])
def test_truncation(bos, tmp_path):
    """Too long a pair keeps its prompt's last tokens and BOS, and its responses' first ones; no other pair changes."""
    tokenizer = tiny.tokenizer(bos=bos, merges=False)
    prompts, responses = ["p", "qrstuvw", "0123456789abcdefghij"], ["x", "zyxwvutsrqponmlk", "nmlkjihgf"]
    rows = [{"prompt": p, "chosen": c, "rejected": "!" + r} for p in prompts for c in responses for r in responses]
    loaded = load(tmp_path, tokenizer, *rows, max_length=18, max_prompt_length=6)
    assert len(loaded) == len(rows)
    for row, ids in zip(rows, loaded):
        prompt = tokenizer(row["prompt"])["input_ids"]
        whole = {n: tokenizer(row[n] + "</s>", add_special_tokens=False)["input_ids"] for n in ("chosen", "rejected")}
        if len(prompt) + max(map(len, whole.values())) > 18 and len(prompt) > 6:
            prompt = [1] * bos + prompt[-6 + bos :]
        assert ids["prompt_ids"] == prompt
        assert {n: ids[f"{n}_ids"] for n in whole} == {n: whole[n][: 18 - len(prompt)] for n in whole}


def test_drops_are_counted(tmp_path, capsys):
    """Pairs that teach nothing are dropped by reason; the line says how many of each."""
    tokenizer = tiny.tokenizer("mistral", merges=False)
    system = {"role": "system", "content": "be kind"}
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        {"prompt": TURNS, "chosen": [GOOD], "rejected": [GOOD]},
        {"chosen": [USER, GOOD], "rejected": [USER, GOOD]},
        {"prompt": "a", "chosen": " \n", "rejected": "b"},
        {"prompt": [USER], "chosen": [], "rejected": [BAD]},
        {"chosen": [USER, GOOD, *TURNS], "rejected": [USER, BAD]},
        {"prompt": [system, USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "a", "chosen": "b" * 60 + "c", "rejected": "b" * 60 + "d"},
        {"prompt": "a" * 60, "chosen": "b", "rejected": "c"},
    ]
    assert len(load(tmp_path, tokenizer, *rows, max_length=50, max_prompt_length=20)) == 2
    first, second = capsys.readouterr().out.splitlines()
    assert first == (
        f"{tmp_path}/pairs.jsonl: 2 of 10 pairs kept, 2 truncated, 3 dropped: chosen equals rejected (first: row 2), "
        "2 dropped: empty response (first: row 5), 1 dropped: a response holds a turn of 'user' (first: row 7), "
        "1 dropped: nothing left to compare after truncation (first: row 9), "
        "1 dropped: the chat template fails: roles must alternate (first: row 8)"
    )
    assert second.endswith(
        "5 pairs are text, which this chat model gets without its template; write messages to use it"
    )


def test_hh_whose_questions_differ(tmp_path):
    """Two different questions are no pair; their common beginning must not be taken for a prompt."""
    pair = {"chosen": "\n\nHuman: tell a joke\n\nAssistant: x", "rejected": "\n\nHuman: tell a story\n\nAssistant: y"}
    good = {"chosen": f"{HH} yes", "rejected": f"{HH} no"}
    assert len(load(tmp_path, tiny.tokenizer(), pair, good)) == 1


def test_prompt_without_tokens_is_dropped(tmp_path, capsys):
    """Without a BOS nothing predicts the first token of a response to an empty prompt."""
    tokenizer = tiny.tokenizer(bos=False)
    empty = {"prompt": "", "chosen": "x", "rejected": "y"}
    assert len(load(tmp_path, tokenizer, empty, {**empty, "prompt": "a"})) == 1
    assert "1 dropped: empty prompt" in capsys.readouterr().out


def test_none_left_is_an_error(tmp_path):
    """The reasons of all drops are in the error."""
    same, empty = {"prompt": "a", "chosen": "b", "rejected": "b"}, {"prompt": "a", "chosen": "", "rejected": "b"}
    with pytest.raises(
        SystemExit, match="none of its 2 rows is a usable pair; 1 dropped: chosen equals .*empty response"
    ):
        load(tmp_path, tiny.tokenizer(), same, empty)


def test_more_rows_than_are_tokenized_at_once(tmp_path):
    """Rows are tokenized a thousand at a time; order and number stay."""
    rows = [{"prompt": f"{number}=", "chosen": "x", "rejected": "y"} for number in range(2001)]
    tokenizer = tiny.tokenizer(merges=False)
    loaded = load(tmp_path, tokenizer, *rows)
    assert [tokenizer.decode(row["prompt_ids"]) for row in loaded] == [f"<s>{number}=" for number in range(2001)]
