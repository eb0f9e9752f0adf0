"""What people feed a trainer: columns, messages, files and templates that go wrong in silence where nobody looks."""

import datetime
import gzip
import json

import pytest
import tiny
from datasets import Dataset, DatasetDict

import preferences
from common import load_preferences

USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in zip(("user", "assistant", "assistant"), ("q?", "4", "5"))
)
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TOOLS = "{% for t in tools or [] %}[{{ t | tojson }}]{% endfor %}"
CALLS = (
    TOOLS + "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    '<call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</call>{% endfor %}'
    "<|im_end|>\n{% endfor %}" + ASK
)
KNOWN = (
    "You are here to help with this. {% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}"
    "<|im_end|>\n{% elif m.role == 'assistant' %}<|im_start|>assistant\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}"
) + ASK
CUT_THOUGHTS = (  # as DeepSeek-R1's: past answers without their thoughts, and a thought opened for the next
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>{% else %}"
    "<|im_start|>assistant\n{{ m.content.split('</think>')[-1] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
LAST_SYSTEM = (  # as Mistral's: the system's text goes into the user's turn that is the last message
    "{% set rest = messages[1:] if messages[0].role == 'system' else messages %}{% for m in rest %}"
    "{% if m.role == 'user' %}[INST] {% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}\n\n"
    "{% endif %}{{ m.content }} [/INST]{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% else %}"
    "{{ raise_exception('only user and assistant, please') }}{% endif %}{% endfor %}"
)


def call(name="add", **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def pair(*prompt, chosen=GOOD, rejected=BAD, **more):
    return {"prompt": list(prompt or [USER]), "chosen": [chosen], "rejected": [rejected], **more}


def load(rows, template=None, split="train", tokenizer=None, **more):
    """prompt, chosen and rejected of each pair that is kept, as text."""
    tokenizer = tokenizer or tiny.tokenizer(template, bos=False, merges=False)
    loaded = load_preferences(rows if isinstance(rows, list) else str(rows), tokenizer, split, 4096, 2048, **more)
    return [tuple(tokenizer.decode(row[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")) for row in loaded]


def refused(rows, template=None, **more):
    with pytest.raises(SystemExit) as caught:
        load(rows, template, **more)
    assert caught.value.code.startswith("error: ") and "\n" not in caught.value.code
    return caught.value.code


def write(path, rows):
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# Columns


@pytest.mark.parametrize(
    "row",
    [
        {"system": "", "question": "10+2=", "chosen": "12 is it", "rejected": "13 is it not"},
        {"instruction": "add", "input": "10 2", "chosen": "12 is it", "rejected": "13 is it not"},
        {"question": "10+2=", "chosen": [GOOD], "rejected": [BAD]},
    ],
    ids=["question", "instruction", "messages"],
)
def test_question_in_a_column_of_another_name(row):
    """What the answers begin with in common must not be taken for the prompt."""
    message = refused([row], "qwen")
    assert 'rows row 1: no column "prompt"' in message
    assert all(name in message for name in row)


def test_columns_that_are_not_used_are_named_once(capsys):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "system": "s", "score": 3}] * 3
    assert len(load([*rows, {**rows[0], "source": "x"}])) == 4
    assert capsys.readouterr().out.splitlines()[1:] == ["the rows: columns that are not used: system, score, source"]


@pytest.mark.parametrize(
    "prompt, chosen, rejected",
    [
        ("2+2=", "2+2= 4", "2+2= 5"),
        ("\n\nHuman: 2+2=\n\nAssistant:", "\n\nHuman: 2+2=\n\nAssistant: 4", "\n\nHuman: 2+2=\n\nAssistant: 5"),
        ("2+2=", "\n\nHuman: 2+2=\n\nAssistant: 4", "\n\nHuman: 2+2=\n\nAssistant: 5"),
        ("a label", "Human: 2+2=\n\nAssistant: 4", "Human: 2+2=\n\nAssistant: 5"),
    ],
    ids=["text", "hh", "hh and its question", "hh and a label"],
)
@pytest.mark.parametrize("template", [None, "qwen"])
def test_prompt_beside_answers_that_hold_it(template, prompt, chosen, rejected):
    """It is not written twice, with a chat template or without."""
    [texts] = load([{"prompt": prompt, "chosen": chosen, "rejected": rejected}], template)
    assert texts[0].count("2+2=") == 1 and [text.count("2+2=") for text in texts[1:]] == [0, 0]
    assert "4" in texts[1] and "5" in texts[2]


def test_answers_of_which_one_begins_with_the_prompt():
    """By chance: the prompt stays."""
    assert load([{"prompt": "1", "chosen": "12", "rejected": "3"}]) == [("1", "12</s>", "3</s>")]


def test_text_for_a_chat_model_is_told_once(capsys):
    rows = [{"prompt": "2+2=", "chosen": " 4", "rejected": " 5"}] * 3
    assert load(rows, "qwen")[0] == ("2+2=", " 4</s>", " 5</s>")
    said = capsys.readouterr().out.splitlines()[1:]
    assert said == [
        "the rows: 3 pairs are text, which this chat model gets without its template; write messages to use it"
    ]
    load(rows)
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_messages_in_a_string():
    """As JSON they are messages; as Python writes lists, or with other keys, an error; other brackets are text."""
    rows = [{name: json.dumps(value) for name, value in pair().items()}]
    assert load(rows, "qwen") == load([pair()], "qwen")
    assert "not one in JSON" in refused([{name: str(value) for name, value in pair().items()}], "qwen")
    turns = json.dumps([{"from": "human", "value": "q?"}])
    assert "not one in JSON" in refused([{"chosen": turns, "rejected": turns}], "qwen")
    assert load([{"prompt": "as JSON:", "chosen": '[{"a": 4}]', "rejected": "{}"}])[0][1] == '[{"a": 4}]</s>'
    later = {"prompt": "q?", "chosen": '[{"id": 1, "role": "assistant", "content": "4"}]', "rejected": json.dumps(BAD)}
    assert load([later], "qwen") == load([pair()], "qwen")


def test_rows_without_a_prompt_among_others(capsys):
    """One null does not make the answers' common beginning a prompt, and does not end a run."""
    text = {"id": 1, "prompt": "1+1=", "chosen": "2", "rejected": "3"}
    odd = {**text, "prompt": None, "chosen": "12 is it", "rejected": "13 is it not"}
    assert len(load([text, odd, {**odd, "id": 2}])) == 1
    assert "2 dropped: no prompt (first: row 2)" in capsys.readouterr().out
    for prompt in (None, [], ""):
        assert len(load([pair(), {**pair(), "prompt": prompt}], "qwen")) == 1
    assert len(load([text, {**text, "chosen": None}, {**text, "chosen": ""}])) == 1
    assert "2 dropped: empty response (first: row 2)" in capsys.readouterr().out


@pytest.mark.parametrize("column", ["prompt_text", "tools_used", "chosen_score", "prompts"])
def test_columns_that_begin_like_others(column, capsys):
    row = {"prompt": "1+1=", "chosen": "2", "rejected": "3", column: ["a"]}
    assert load([row]) == [("1+1=", "2</s>", "3</s>")]
    assert f"not used: {column}" in capsys.readouterr().out
    assert "no column" in refused([{name: value for name, value in row.items() if name != "prompt"}])


def test_question_beside_answers_that_share_turns():
    """A prompt string is a label only where a user's turn is in the conversations already."""
    shared = [{"role": "assistant", "content": "", "tool_calls": [call(a=2)]}, {"role": "tool", "content": "sun"}]
    row = {"prompt": "WHAT?", "chosen": [*shared, GOOD], "rejected": [*shared, BAD]}
    [(prompt, chosen, _)] = load([row], CALLS)
    assert prompt.startswith("<|im_start|>user\nWHAT?<|im_end|>") and "sun" in prompt and chosen == "4<|im_end|>"
    system = {"role": "system", "content": "Be kind."}
    [(prompt, _, _)] = load([{"prompt": "WHAT?", "chosen": [system, GOOD], "rejected": [system, BAD]}], CALLS)
    assert prompt.index("Be kind.") < prompt.index("WHAT?")


def test_turns_in_an_answer_that_are_not_the_models(capsys):
    more = [{"role": "human", "content": "more?"}, GOOD]
    assert len(load([pair(), {**pair(), "chosen": [GOOD, *more]}], "qwen")) == 1
    assert "a response holds a turn of 'human' (first: row 2)" in capsys.readouterr().out
    dialogues = ["\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: c\n\nHuman: d\n\nAssistant: e"]
    for template in (None, "qwen"):
        rows = [dict(zip(("chosen", "rejected"), order)) for order in (dialogues, dialogues[::-1])]
        assert "none of its 2 rows" in refused(rows, template)


def test_half_a_character():
    assert (
        len(
            load(
                [
                    {"prompt": "a", "chosen": "\ud800 x", "rejected": "b"},
                    {"prompt": "a", "chosen": "c", "rejected": "b"},
                ]
            )
        )
        == 1
    )


# Messages


def test_answer_that_is_a_call():
    """An answer without words but with a call says something; its content may be null, as the standard has it."""
    for content in ({"content": ""}, {"content": None}, {}):
        answer = {"role": "assistant", "tool_calls": [call(a=2)], **content}
        [(_, chosen, rejected)] = load([pair(chosen=answer)], CALLS)
        assert chosen == '<call>{"name": "add", "arguments": {"a": 2}}</call><|im_end|>' and rejected == "5<|im_end|>"


def test_call_in_the_prompt():
    prompt = [USER, {"role": "assistant", "content": None, "tool_calls": [call(a=2)]}, {"role": "tool", "content": "4"}]
    [texts] = load([pair(*prompt)], CALLS)
    assert '"arguments": {"a": 2}' in texts[0] and texts[1] == "4<|im_end|>"


@pytest.mark.parametrize("arguments", ['{"a": 2}', {"a": 2}])
@pytest.mark.parametrize("form", [lambda function: {"function": function}, lambda function: function])
def test_arguments_as_a_string(arguments, form):
    """Templates walk through objects; a call may stand without its "function", too."""
    walk = CALLS.replace(
        "{{ c.function.arguments | tojson }}",
        "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}",
    )
    answer = {"role": "assistant", "content": "", "tool_calls": [form({"name": "add", "arguments": arguments})]}
    assert "a=2" in load([pair(chosen=answer)], walk)[0][1]


def test_template_that_wants_arguments_as_a_string():
    joined = CALLS.replace("{{ c.function.arguments | tojson }}", "{{ '' + c.function.arguments }}")
    answer = {"role": "assistant", "content": "", "tool_calls": [call(a=2)]}
    assert '"arguments": {"a": 2}' in load([pair(chosen=answer)], joined)[0][1]


@pytest.mark.parametrize(
    "broken",
    [
        {"tool_calls": [{"function": {"name": "add", "arguments": "{a"}}]},
        {"tool_calls": [{"function": {"arguments": "{}"}}]},
        {"tool_calls": ["add"]},
        {"tool_calls": "add"},
    ],
)
def test_broken_calls(broken):
    message = refused([pair(), pair(chosen={"role": "assistant", "content": "", **broken})], CALLS)
    assert 'row 2: "chosen": a tool call lacks a name, or its arguments are not JSON' in message


@pytest.mark.parametrize(
    "name, value", [("tools", "[{"), ("tools", 5), ("tools", ["add"]), ("chat_template_kwargs", "[1]")]
)
def test_broken_tools_and_options(name, value):
    assert f'row 1: "{name}" is not' in refused([pair(**{name: value})], CALLS)


def test_tools_as_json():
    tools = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {}}}]
    assert load([pair(tools=json.dumps(tools))], CALLS) == load([pair(tools=tools)], CALLS)
    assert '"name": "add"' in load([pair(tools=tools)], CALLS)[0][0]


def test_content_in_parts():
    """Parts of text are joined; a picture is no text."""
    parts = [{"type": "text", "text": "4"}, {"type": "text", "text": "2"}]
    assert load([pair(chosen={**GOOD, "content": parts})], "qwen")[0][1] == "42<|im_end|>"
    message = refused([pair({**USER, "content": [{"type": "image"}, *parts]})], "qwen")
    assert "row 1: \"prompt\": the content of a message is no text: {'type': 'image'}" in message


CALLING, TOOL = {"role": "assistant", "content": ""}, {"role": "tool", "content": "sun"}
ROWS = [
    pair(USER, {**CALLING, "tool_calls": [call("weather", city="Paris")]}, {**TOOL, "name": "weather"}, tools=None),
    pair(USER, {**CALLING, "tool_calls": [call(a=2, b={"c": [1, 2]})], "content": None}, TOOL),
    pair(tools=[{"type": "function", "function": {"name": "f", "parameters": {"a": {"type": "string"}}}}]),
    pair(tools=[{"type": "function", "function": {"name": "g", "parameters": {"b": {"type": "number"}}}}]),
    pair({"role": "system", "content": "be kind"}, USER, chosen={**GOOD, "reasoning_content": None}),
]


@pytest.mark.parametrize("kind", ["parquet", "folder", "saved", "rows"])
def test_arrow_and_json_are_equal(kind, tmp_path):
    """Arrow fills what an object of a list lacks with nulls: the same rows give the same tokens wherever they lie."""
    template = CALLS.replace("{{ m.content }}", "{{ m.keys() | sort | join(',') }}:{{ m.content }}")
    expected = load(write(tmp_path / "rows.jsonl", ROWS), template)
    assert len(expected) == len(ROWS) and "null" not in str(expected) and "None" not in str(expected)
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "train.parquet", ROWS)
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    paths = {"parquet": tmp_path / "folder/train.parquet", "folder": tmp_path / "folder", "saved": tmp_path / "saved"}
    assert load(paths.get(kind, ROWS), template) == expected


# Templates


@pytest.mark.parametrize("question", ["2+2?", "hi", "e", "You are here"])
def test_role_that_the_template_does_not_know(question):
    """Its words are looked for where it stands: the template's own words do not hide that they are missing."""
    human = pair({"role": "human", "content": question})
    message = refused([human], KNOWN)
    assert 'leaves out something of "human" in the prompt (roles that it names: user, assistant)' in message
    assert "(first: row 1)" in message
    assert len(load([pair(), human, pair()], KNOWN)) == 2


@pytest.mark.parametrize(
    "thought", [{"content": "<think>\nadd\n</think>\n\n4"}, {"reasoning_content": "add"}, {"thinking": "add"}]
)
def test_thought_that_the_template_cuts(thought):
    message = refused([pair(chosen={**GOOD, **thought})], CUT_THOUGHTS)
    assert 'leaves out something of "assistant" in the answer' in message
    if "content" in thought:
        assert load([pair(chosen={**GOOD, **thought})], CHATML + ASK)[0][1] == f"{thought['content']}<|im_end|>"


def test_thought_that_generation_opens(capsys):
    """Answers without one are trained on without it; that generation asks otherwise is told once."""
    assert load([pair(), pair()], CUT_THOUGHTS)[1][1:] == ("4<|im_end|>", "5<|im_end|>")
    assert r"2 pairs are asked for with '<think>\n' at the end, which training does not see" in capsys.readouterr().out


def test_calls_and_tools_that_the_template_does_not_write():
    answer = {"role": "assistant", "content": "", "tool_calls": [call(a=2)]}
    assert 'of "assistant" in the answer' in refused([pair(chosen=answer)], CHATML + ASK)
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    assert 'of "tools" in the prompt' in refused([pair(tools=tools)], CHATML + ASK)
    half = CALLS.replace("{{ c.function.arguments | tojson }}", "{{ c.function.arguments.a }}")
    answer = {"role": "assistant", "content": "", "tool_calls": [call(a=2, b="some")]}
    assert 'of "assistant" in the answer' in refused([pair(chosen=answer)], half)


def test_one_mention_proves_one_thing():
    """A call is not written because the answer's words name it, nor tools because the question does, nor a thought."""
    answer = {"role": "assistant", "content": "I call add for 2 and some.", "tool_calls": [call(a=2, b="some")]}
    assert 'of "assistant" in the answer' in refused([pair(chosen=answer)], CHATML + ASK)
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    question = {"role": "user", "content": "Use add, please: add"}
    assert 'of "tools" in the prompt' in refused([pair(question, tools=tools)], CHATML + ASK)
    assert len(load([pair(question, tools=tools), pair(question, chosen=answer)], CALLS)) == 2
    first_only = CALLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
    answer = {"role": "assistant", "content": "", "tool_calls": [call(a=1, b=2), call(a=2, b=1)]}
    assert len(load([pair(chosen=answer)], CALLS)) == 1
    assert 'of "assistant" in the answer' in refused([pair(chosen=answer)], first_only)
    answer = {"role": "assistant", "content": "The sum is 4.", "reasoning_content": "sum"}
    assert 'of "assistant" in the answer' in refused([pair(chosen=answer)], CHATML + ASK)


def test_keys_of_messages_that_nobody_checks(capsys):
    assert len(load([pair(chosen={**GOOD, "refusal": "no", "name": "x"})], "qwen")) == 1
    assert '1 pairs have "refusal" in messages; nobody checks what becomes of it' in capsys.readouterr().out
    answer = {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 2}'}}
    assert '<call>{"name": "add", "arguments": {"a": 2}}</call>' in load([pair(chosen=answer)], CALLS)[0][1]
    answer = {"role": "assistant", "content": None, "tool_calls": json.dumps([call(a=2)])}
    assert '<call>{"name": "add", "arguments": {"a": 2}}</call>' in load([pair(chosen=answer)], CALLS)[0][1]


def test_border_where_answers_begin_like_the_thought():
    """Generation opens <think>, the answers begin with < of their own: the border is not inside of theirs."""
    html = pair(chosen={**GOOD, "content": "<html>4"}, rejected={**BAD, "content": "<body>5"})
    [(prompt, chosen, rejected)] = load([html], CUT_THOUGHTS.replace("<think>", "<|start_header_id|>"))
    assert prompt.endswith("assistant\n") and (chosen, rejected) == ("<html>4<|im_end|>", "<body>5<|im_end|>")


def test_options_that_would_move_the_border():
    row = pair(chat_template_kwargs={"add_generation_prompt": True, "tokenize": True})
    assert load([row], "qwen") == load([pair()], "qwen")


def test_messages_out_of_order():
    """Users' turns first, then the answers: all is there, and no conversation any more."""
    turn = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    roles = [f"{{% for m in messages if m.role == '{role}' %}}{turn}{{% endfor %}}" for role in ("user", "assistant")]
    message = refused([pair(USER, GOOD, {**USER, "content": "again?"})], "".join(roles) + ASK)
    assert 'it leaves out something of "user" in the prompt' in message


def test_system_turn_in_the_last_question():
    """The prompt is what generation is asked with, its system turn too, and the answer follows as it is written."""
    system = {"role": "system", "content": "Be kind."}
    rows = [pair(), pair(system, USER), pair(system, USER, GOOD, {**USER, "content": "and now?"})]
    assert load(rows, LAST_SYSTEM) == [
        ("[INST] q? [/INST]", " 4</s>", " 5</s>"),
        ("[INST] Be kind.\n\nq? [/INST]", " 4</s>", " 5</s>"),
        ("[INST] q? [/INST] 4</s>[INST] Be kind.\n\nand now? [/INST]", " 4</s>", " 5</s>"),
    ]


def test_prompt_whose_border_cannot_be_found(capsys):
    """What stands between the last words and the answer is another once an answer follows: dropped, the others stay."""
    behind = (
        "{{ m.content }} {% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}[/INST]"
    )
    template = LAST_SYSTEM[: LAST_SYSTEM.index("{% if loop.last")] + behind + LAST_SYSTEM.partition(" [/INST]")[2]
    system = {"role": "system", "content": "Be kind."}
    assert load([pair(system, USER), pair()], template) == [("[INST] q? [/INST]", " 4</s>", " 5</s>")]
    assert "1 dropped: the chat template fails: it words the prompt differently" in capsys.readouterr().out


def test_the_templates_own_reason(capsys):
    """One row that it refuses does not end a run; a template that fails in any other way does neither."""
    assert len(load([pair(), pair({"role": "tool", "content": "4"}), pair()], LAST_SYSTEM)) == 2
    assert (
        "1 dropped: the chat template fails: only user and assistant, please (first: row 2)" in capsys.readouterr().out
    )
    assert "is undefined" in refused([pair()], "{{ nothing.at.all }}")
    assert "unsupported operand" in refused([pair()], "{{ messages - 1 }}")


@pytest.mark.parametrize(
    "behind, eos, end",
    [
        ("<|im_start|>", "<|im_end|>", "<|im_end|>"),  # Cohere's next header
        ("{% if not add_generation_prompt %}</s>{% endif %}", "</s>", "<|im_end|>"),  # Phi-3's end of text
        ("<|im_start|>assistant\n<|start_header_id|>", "<|im_end|>", "<|im_end|>"),  # asks for the next answer unasked
        ("", "</s>", "<|im_end|>"),
    ],
    ids=["header", "end of text", "question", "newline"],
)
def test_what_stands_behind_the_end(behind, eos, end):
    """A response ends with the end of its own turn, whatever is written behind it."""
    tokenizer = tiny.tokenizer(CHATML + (behind or ASK), bos=False, merges=False)
    tokenizer.eos_token = eos
    calling = {"role": "assistant", "content": "<|im_start|>4"}
    for row in (pair(), pair(USER, GOOD, USER), pair(chosen=calling)):
        [(_, chosen, rejected)] = load([row], tokenizer=tokenizer)
        assert chosen.endswith(f"4{end}") and rejected.endswith(f"5{end}") and rejected.count(end) == 1


def test_text_that_ends_with_the_end_token():
    row = {"prompt": "2+2=", "chosen": "4</s>\n", "rejected": "5 <|im_end|>\n"}
    assert load([row]) == [("2+2=", "4</s>", "5 <|im_end|>")]


@pytest.mark.parametrize(
    "form", ["strftime_now('%d %b %Y')", 'strftime_now( "%d %b %Y" )', "strftime_now (format='%d %b %Y')"]
)
def test_date_in_a_prompt(form):
    """The prompt's day is the one asked for; else today's, as at generation."""
    template = "{% if strftime_now is defined %}{{ " + form + " }}{% endif %}" + CHATML + ASK
    assert load([pair()], template, day="2024-02-29")[0][0].startswith("29 Feb 2024<")
    assert load([pair()], template)[0][0].startswith(datetime.date.today().strftime("%d %b %Y"))


# Files


def test_files_as_people_have_them(tmp_path):
    """A byte order mark, blank lines, gzip, a list, rows in memory."""
    rows = [pair(), pair(chosen=BAD, rejected=GOOD), pair({**USER, "content": "\u2028 é"})]
    expected = load(rows, "qwen")
    lines = "\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n \n"
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(rows), encoding="utf-8")
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    (tmp_path / "lines.json").write_text(lines, encoding="utf-8")
    assert len(expected) == 3
    for name in ("a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "lines.json"):
        assert load(tmp_path / name, "qwen") == expected, name
    assert load_preferences(Dataset.from_list(rows), tiny.tokenizer("qwen"), "", 512, 256).num_rows == 3
    (tmp_path / "b.jsonl.gz").write_bytes(b"torn")
    assert "b.jsonl.gz: " in refused(tmp_path / "b.jsonl.gz")


@pytest.mark.parametrize(
    "split, kept",
    [("train[:2]", [0, 1]), ("train_prefs[50%:]", [2, 3]), ("a[:1]+a[-1:]", [0, 3]), ("test", [0, 1, 2, 3])],
)
def test_part_of_a_file(split, kept, tmp_path):
    """What stands in brackets counts, as `datasets` has it; names of splits do not, for a file has none."""
    rows = [{"prompt": f"{n}=", "chosen": "4", "rejected": "5"} for n in range(4)]
    expected = [load(rows)[n] for n in kept]
    for name in ("a.jsonl", "a.parquet"):
        assert load(write(tmp_path / name, rows), split=split) == expected
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    assert load(tmp_path / "saved", split=split) == expected


def test_part_that_cannot_be(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "1=", "chosen": "4", "rejected": "5"}])
    assert "a.jsonl: split 'train[half]'" in refused(path, split="train[half]")
    assert "a.jsonl: it is empty" in refused(path, split="train[:0]")
    assert "a.jsonl: split 'train+test' takes rows twice" in refused(path, split="train+test")


def test_rows_outside_the_part(tmp_path):
    """What is not read cannot be wrong."""
    path = write(tmp_path / "a.jsonl", [{"prompt": "1=", "chosen": "4", "rejected": "5"}, 5, [{}]])
    assert len(load(path, split="train[:1]")) == 1


def test_splits_and_configurations_of_a_data_set(tmp_path):
    """A folder is as on the hub: splits by their names, configurations that its README declares, folders within."""
    rows = [{"prompt": f"{n}=", "chosen": "4", "rejected": "5"} for n in range(4)]
    DatasetDict(train=Dataset.from_list(rows), test=Dataset.from_list(rows[3:])).save_to_disk(tmp_path / "saved")
    splits = ("train", "test", "train[:3]", "train[:2]+test")
    assert [len(load(tmp_path / "saved", split=split)) for split in splits] == [4, 1, 3, 3]
    assert load(tmp_path / "saved", split="train[:1]+test")[1][0] == "3="
    message = refused(tmp_path / "saved", split="test_prefs")
    assert "cannot load split 'test_prefs'" in message and "'train', 'test'" in message
    for folder, count in (("helpful", 3), ("harmless", 2)):
        (tmp_path / "hub" / folder).mkdir(parents=True)
        write(tmp_path / "hub" / folder / "train.jsonl", rows[:count])
    assert [len(load(tmp_path / "hub", config=name)) for name in ("helpful", "harmless")] == [3, 2]
    parts = ["---", "configs:"]
    for name, folder in (("short", "helpful"), ("other", "harmless")):
        parts += [f"- config_name: {name}", f"  data_files: {folder}/*"]
    card = "\n".join([*parts, "---", ""])
    (tmp_path / "hub" / "README.md").write_text(card)
    assert [len(load(tmp_path / "hub", config=name)) for name in ("short", "other")] == [3, 2]
    assert "cannot load split 'test'" in refused(tmp_path / "hub", split="test", config="short")


def test_a_message_is_not_changed_in_the_rows():
    """Rows in memory are the caller's."""
    answer = {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": '{"a": 2}'}]}
    rows = [pair(chosen=answer)]
    before = json.dumps(rows)
    load(rows, CALLS)
    assert json.dumps(rows) == before and preferences.without_nulls(rows) is not rows
