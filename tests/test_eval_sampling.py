"""The sample cache and the sampler: seeds, batches, kills, processes, other models, speed, messages; a tiny model."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import eval_passk  # noqa: E402
from eval_passk import Args, make_plan, read_samples, sample_batch, sample_seed  # noqa: E402
from grading import tasks  # noqa: E402

LETTERS = list("0123456789+*=.#\n abcdefghijklmnopqrstuvwxyzQA:?")
PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "max_new_tokens": 24, "stop": [], "eos": [1]}


def make_model(path: Path, seed: int = 0) -> None:
    """A random Llama over characters whose <eos> comes up about once in twenty tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    names = ["<pad>", "<eos>", "<unk>", *LETTERS]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(path)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(names), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=1, pad_token_id=0, bos_token_id=None,
        initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    # a generation_config that would ruin the samples if it were obeyed
    model.generation_config.update(top_k=1, temperature=0.01, do_sample=True)
    model.save_pretrained(path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    make_model(path / "a", 0)
    make_model(path / "b", 1)
    with open(path / "problems.jsonl", "w") as file:
        for i in range(6):
            file.write(json.dumps({"question": "7+" * i + "3=", "answer": f"#### {i + 3}", "difficulty": i % 2}) + "\n")
    return path


@pytest.fixture(scope="module")
def loaded(tiny):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny / "a", dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(tiny / "a")


def evaluate(tiny, directory, model="a", **changes):
    """main() in this process; returns results.json."""
    values = {
        "n": 6,
        "temperatures": (0.7, 1.0),
        "max_new_tokens": 24,
        "tokens_per_device": 400,
        "ks": (1, 2),
    } | changes
    args = Args(model=str(tiny / model), task=str(tiny / "problems.jsonl"), output_dir=str(directory), **values)
    eval_passk.main(args)
    return json.loads((Path(directory) / "results.json").read_text())


def lines_of(directory):
    rows = [json.loads(line) for path in directory.glob("samples*.jsonl") for line in path.read_text().splitlines()]
    return [row for row in rows if "index" in row]


def test_a_sample_depends_on_its_seed_alone(loaded):
    """Alone, in company, in another order, behind padding: the same tokens and log-probs."""
    model, tokenizer = loaded
    prompts = [tokenizer("7+7+7+3=")["input_ids"], tokenizer("3=")["input_ids"], tokenizer("7+3=")["input_ids"]]
    seeds = list(range(100, 124))
    together = sample_batch(model, tokenizer, prompts, [8, 8, 8], seeds, PLAIN)
    assert len({tuple(tokens) for tokens, _, _ in together}) > 20
    assert {end for _, _, end in together} == {"eos", "length"}
    for i, (tokens, logp, end) in enumerate(together):
        ((alone, alone_logp, alone_end),) = sample_batch(model, tokenizer, [prompts[i // 8]], [1], [seeds[i]], PLAIN)
        assert (alone, alone_end) == (tokens, end) and abs(alone_logp - logp) < 1e-4
    turned = sample_batch(model, tokenizer, prompts[::-1], [8, 8, 8], seeds[16:] + seeds[8:16] + seeds[:8], PLAIN)
    assert [t[0] for t in turned] == [t[0] for t in together[16:] + together[8:16] + together[:8]]


def test_log_probs_are_the_model_s_own(loaded):
    """Of the full distribution at temperature 1, whatever the sampling settings; from one plain forward per sample."""
    model, tokenizer = loaded
    prompt = tokenizer("7+3=")["input_ids"]
    for settings in (PLAIN, PLAIN | {"temperature": 0.5, "top_k": 5, "top_p": 0.9, "min_p": 0.05}):
        for tokens, logp, _ in sample_batch(model, tokenizer, [prompt], [4], [1, 2, 3, 4], settings):
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            assert abs(logits[range(len(tokens)), tokens].sum().item() - logp) < 1e-3


def test_samples_follow_the_model_s_distribution(loaded):
    """First tokens of 4,000 samples against softmax(logits / T), whole and truncated: total variation below 0.06."""
    model, tokenizer = loaded
    prompt = tokenizer("7+3=")["input_ids"]
    logits = model(torch.tensor([prompt])).logits[0, -1].detach()
    for changes in ({}, {"temperature": 0.6}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.2}):
        settings = PLAIN | {"max_new_tokens": 1} | changes
        drawn = sample_batch(
            model, tokenizer, [prompt], [4000], [sample_seed(0, "p", i) for i in range(4000)], settings
        )
        counts = torch.bincount(torch.tensor([tokens[0] for tokens, _, _ in drawn]), minlength=len(logits)) / 4000
        p = (logits / settings["temperature"]).softmax(-1)
        order = p.argsort(descending=True)
        if "top_k" in changes:
            p[order[4:]] = 0
        if "top_p" in changes:
            p[order[p[order].cumsum(0) - p[order] >= 0.7]] = 0
        if "min_p" in changes:
            p[p < 0.2 * p.max()] = 0
        assert (counts - p / p.sum()).abs().sum() / 2 < 0.06, changes
    greedy = sample_batch(model, tokenizer, [prompt], [3], [1, 2, 3], PLAIN | {"temperature": 0.0})
    assert greedy[0][0] == greedy[1][0] == greedy[2][0] and greedy[0][0][0] == logits.argmax()


def test_stop_strings_end_a_sample(tiny, loaded):
    from transformers import StopStringCriteria

    model, tokenizer = loaded
    prompt, stops = tokenizer("7+3=")["input_ids"], ["q", "aa", "\n"]
    free = sample_batch(model, tokenizer, [prompt], [40], list(range(40)), PLAIN)
    stopper = StopStringCriteria(tokenizer, stops)
    stopped = sample_batch(model, tokenizer, [prompt], [40], list(range(40)), PLAIN | {"stop": stops}, stopper)
    kinds = set()
    for (tokens, _, _), (short, _, end) in zip(free, stopped):
        text, brief = (
            tokenizer.decode(tokens, skip_special_tokens=True),
            tokenizer.decode(short, skip_special_tokens=True),
        )
        assert text.startswith(brief)
        assert (end == "stop") == any(stop in text for stop in stops)
        assert eval_passk.cut(text, stops) == eval_passk.cut(brief, stops)
        kinds.add(end)
    assert "stop" in kinds and len(kinds) > 1


def test_plan_covers_each_sample_once_within_the_budget():
    problems = [{"id": f"{i:03d}"} for i in range(37)]
    lengths = [random.Random(i).randrange(5, 90) for i in range(37)]
    for n, budget in ((1, 10), (6, 1000), (64, 5000), (130, 40_000)):
        plan = make_plan(problems, lengths, n, 20, budget)
        cells = [cell for batch in plan for cell in batch]
        assert sorted(cells) == [(i, j) for i in range(37) for j in range(n)]
        for batch in plan:
            assert len(batch) == 1 or len(batch) * (max(lengths[i] for i, _ in batch) + 20) <= budget
    assert make_plan(problems, lengths, 128, 20, 5000)[: len(make_plan(problems, lengths, 64, 20, 5000))] == make_plan(
        problems, lengths, 64, 20, 5000
    )


def test_killed_and_started_again(tiny, tmp_path):
    """SIGKILL at three moments, then a line torn by hand: no sample lost, none twice, the same numbers."""
    whole = evaluate(tiny, tmp_path / "whole", n=40)
    expected = {json.dumps(row, sort_keys=True) for row in lines_of(tmp_path / "whole")}
    directory = tmp_path / "killed"
    command = [sys.executable, "eval_passk.py", "--model", str(tiny / "a"), "--task", str(tiny / "problems.jsonl")]
    command += ["--output-dir", str(directory), "--n", "40", "--temperatures", "0.7", "1.0", "--max-new-tokens", "24"]
    command += ["--tokens-per-device", "400", "--ks", "1", "2"]
    seen = 0
    for moment in (1, 60, 150):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if sum(len(p.read_bytes().splitlines()) for p in directory.glob("samples*.jsonl")) > moment:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        have = len(read_samples(directory)[0])
        assert have >= seen
        seen = have
    file = directory / "samples.jsonl"
    data = file.read_bytes()
    file.write_bytes(data[: max(data.rfind(b"\n", 0, -1) + 9, 9)])  # as a kill within a write leaves it
    again = evaluate(tiny, directory, n=40)
    rows = []
    for line in file.read_text().splitlines():
        try:
            rows += [json.loads(line)]
        except ValueError:
            pass
    rows = [json.dumps(row, sort_keys=True) for row in rows if "index" in row]
    assert len(rows) == len(set(rows)) == 6 * 40 * 2 and set(rows) == expected
    assert again["temperatures"] == whole["temperatures"]


def test_more_processes_fewer_processes_and_more_samples(tiny, tmp_path):
    """Two processes draw what one draws; one finds what two drew; a larger n adds and keeps."""
    one = evaluate(tiny, tmp_path / "one", n=6)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "--",
        "eval_passk.py",
    ]
    command += [
        "--model",
        str(tiny / "a"),
        "--task",
        str(tiny / "problems.jsonl"),
        "--output-dir",
        str(tmp_path / "two"),
    ]
    command += ["--n", "6", "--temperatures", "0.7", "1.0", "--max-new-tokens", "24", "--tokens-per-device", "400"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command += ["--ks", "1", "2"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert two["temperatures"] == one["temperatures"]
    assert len(list((tmp_path / "two").glob("samples*.jsonl"))) == 2
    before = {path.name: path.read_bytes() for path in (tmp_path / "two").glob("samples*.jsonl")}
    assert evaluate(tiny, tmp_path / "two", n=6)["temperatures"] == one["temperatures"]
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "two").glob("samples*.jsonl")}
    old = {json.dumps(row, sort_keys=True) for row in lines_of(tmp_path / "two")}
    evaluate(tiny, tmp_path / "two", n=9)
    new = [json.dumps(row, sort_keys=True) for row in lines_of(tmp_path / "two")]
    assert len(new) == len(set(new)) == 6 * 9 * 2 and old < set(new)


def test_other_models_temperatures_and_prompts_are_kept_apart(tiny, tmp_path):
    first = evaluate(tiny, tmp_path, temperatures=(1.0,))
    with pytest.raises(SystemExit, match="holds results of a"):
        evaluate(tiny, tmp_path, model="b", temperatures=(1.0,))
    assert json.loads((tmp_path / "results.json").read_text()) == first
    other = evaluate(tiny, tmp_path, model="b", temperatures=(1.0,), overwrite=True)
    assert other["temperatures"] != first["temperatures"] and len(lines_of(tmp_path)) == 2 * 36
    evaluate(tiny, tmp_path, temperatures=(0.5,), overwrite=True)
    evaluate(tiny, tmp_path, temperatures=(1.0,), top_k=5)
    evaluate(tiny, tmp_path, temperatures=(1.0,), max_new_tokens=20)
    evaluate(tiny, tmp_path, temperatures=(1.0,), seed=1)
    assert len(lines_of(tmp_path)) == 6 * 36
    settings = [
        json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines() if "settings" in line
    ]
    assert len({row["config"] for row in settings}) == 6
    assert settings[0]["settings"]["top_k"] == 0 and settings[0]["settings"]["dtype"] == "float32"
    # the same weights under another name, and nothing is drawn again
    (tmp_path / "moved").symlink_to(tiny / "a")
    size = (tmp_path / "samples.jsonl").stat().st_size
    args = Args(model=str(tmp_path / "moved"), task=str(tiny / "problems.jsonl"), output_dir=str(tmp_path), n=6)
    args.temperatures, args.max_new_tokens, args.tokens_per_device, args.ks = (1.0,), 24, 400, (1, 2)
    eval_passk.main(args)
    assert (tmp_path / "samples.jsonl").stat().st_size == size
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["temperatures"] == first["temperatures"]


def test_another_prompt_is_kept_apart(tiny, tmp_path):
    """The same problems behind another prompt have other keys; their results are refused, then replaced on request."""
    args = Args(
        model=str(tiny / "a"), task="gsm8k", data=str(tiny / "problems.jsonl"), output_dir=str(tmp_path), shots=0
    )
    args.n, args.temperatures, args.max_new_tokens = 2, (1.0,), 8
    eval_passk.main(args)
    args.shots = 2
    with pytest.raises(SystemExit, match="with other prompt"):
        eval_passk.main(args)
    args.overwrite = True
    eval_passk.main(args)
    rows = lines_of(tmp_path)
    assert (
        len(rows) == 2 * 12
        and len({row["problem"] for row in rows}) == 6
        and len({row["prompt"] for row in rows}) == 12
    )


def test_results_and_comparison(tiny, tmp_path, capsys):
    evaluate(tiny, tmp_path / "a", name="before")
    result = evaluate(tiny, tmp_path / "b", model="b", name="after", compare=(str(tmp_path / "a" / "results.json"),))
    out = capsys.readouterr().out
    assert "after - before" in out and "6 shared problems" in out and "difficulty 0" in out
    assert (tmp_path / "b" / "passk.png").read_bytes()[:4] == b"\x89PNG"
    value = result["temperatures"]["1"]
    assert sum(value["ended_by"].values()) == sum(value["found_by"].values()) == 36
    assert value["diversity"]["entropy"] > 0 and result["temperatures"]["0.7"]["diversity"]["entropy"] is None
    assert value["settings"]["temperature"] == 1.0 and {p["n"] for p in value["problems"]} == {6}
    files = (str(tmp_path / "a" / "results.json"), str(tmp_path / "b" / "results.json"))
    eval_passk.main(Args(compare=files, output_dir=str(tmp_path / "c")))
    assert (tmp_path / "c" / "passk.png").stat().st_size > 20_000
    hard = evaluate(tiny, tmp_path / "b", model="b", difficulty_from=files[0])
    assert set(hard["temperatures"]["1"]["splits"]) <= {"easy (<= 4)", "medium (to 64)", "hard (> 64)"}


def test_user_errors_are_one_clear_line(tiny, tmp_path):
    files = {
        "blank.jsonl": '{"question": " ", "answer": "2"}\n',
        "words.jsonl": '{"question": "1+1", "answer": "two"}\n',
        "some.jsonl": '{"question": "1+1", "answer": "2"}\n{"question": "1+2"}\n',
        "number.jsonl": '{"question": "1+1", "answer": 2}\n',
        "empty.jsonl": "",
        "list.jsonl": "[1]\n",
        "torn.jsonl": '{"question": "1+1", "answer": "2"}\n{"quest',
        "latin.jsonl": '{"question": "\xe9", "answer": "2"}\n'.encode("latin-1"),
        "torn.jsonl.gz": gzip.compress(b'{"question": "1+1", "answer": "2"}\n')[:-12],
        "no.jsonl.gz": "plain text",
        "math.jsonl": '{"problem": "1+1", "solution": "It is 2."}\n',
        "math_empty.jsonl": '{"problem": "1+1", "solution": "It is \\\\boxed{}."}\n',
        "math_null.jsonl": '{"problem": "1+1", "solution": "It is 2.", "answer": null}\n',
        "check.jsonl": json.dumps({"prompt": "def f():\n", "entry_point": "f", "test": "def chek(f): pass\n"}),
        "name.jsonl": json.dumps({"prompt": "def f():\n", "entry_point": "g", "test": "def check(f): pass\n"}),
        "syntax.jsonl": json.dumps({"prompt": "def f():\n", "entry_point": "f", "test": "def check(f) pass\n"}),
        "other.json": '{"name": "a", "task": "math", "temperatures": {"1": {}}}',
        "unknown.jsonl": '{"question": "who?", "completion": "3"}\n',
        "no_text.jsonl": '{"question": "3="}\n',
        "uneven.jsonl": '{"question": "3=", "completion": "3"}\n' * 2 + '{"question": "7+3=", "completion": "3"}\n',
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data.encode() if isinstance(data, str) else data)
    at = {name: str(tmp_path / name) for name in files}
    tiny_args = {"model": str(tiny / "a"), "task": str(tiny / "problems.jsonl"), "output_dir": str(tmp_path / "out")}
    run, given = {"task": "humaneval", "allow_code_execution": True}, {"model": "", "temperatures": (1.0,)}
    for changes, message in (
        ({"task": "humaneval"}, "--allow-code-execution"),
        ({"task": "gsm9k"}, "--task: gsm8k, math"),
        ({"task": str(tmp_path / "none.jsonl")}, "no such file"),
        ({"task": at["blank.jsonl"]}, 'row 1: "question" is missing, empty or no text'),
        ({"task": at["words.jsonl"]}, "has no number"),
        ({"task": at["number.jsonl"]}, 'row 1: "answer" is missing, empty or no text'),
        ({"task": at["some.jsonl"]}, 'row 2: all rows must have an "answer", or none'),
        ({"task": at["empty.jsonl"]}, "it is empty"),
        ({"task": at["list.jsonl"]}, "row 1: no object"),
        ({"task": at["torn.jsonl"]}, "row 2: not JSON"),
        ({"task": at["latin.jsonl"]}, "can't decode byte"),
        ({"task": at["torn.jsonl.gz"]}, "torn.jsonl.gz: Compressed file ended"),
        ({"task": at["no.jsonl.gz"]}, "no.jsonl.gz: Not a gzipped file"),
        ({"task": "math", "data": at["math.jsonl"]}, 'row 1: "solution" has no'),
        ({"task": "math", "data": at["math_empty.jsonl"]}, 'row 1: "solution" has no'),
        ({"task": "math", "data": at["math_null.jsonl"]}, 'and there is no "answer"'),
        (run | {"data": at["check.jsonl"]}, "f: SandboxError: the test defines no check"),
        (run | {"data": at["name.jsonl"]}, "g: SandboxError: the prompt does not begin g"),
        (run | {"data": at["syntax.jsonl"]}, "f: SyntaxError"),
        ({"n": 4, "ks": (8,)}, "cannot be estimated"),
        ({"temperatures": (-1.0,)}, "--temperatures"),
        ({"temperatures": (float("nan"),)}, "--temperatures"),
        ({"top_p": 0.0}, "--top-p"),
        ({"problems": -1}, "--problems"),
        ({"seed": -1}, "--seed"),
        ({"stop": ("",)}, "--stop"),
        ({"timeout": 0.0}, "--timeout"),
        ({"timeout": -1.0}, "--timeout"),
        ({"prompt": "chat"}, "no chat template"),
        ({"compare": (at["blank.jsonl"],)}, "no results.json"),
        ({"compare": (at["other.json"],)}, "different tasks, math, problems.jsonl"),
        ({"model": ""}, "give a --model"),
        ({"model": str(tmp_path)}, "cannot be loaded"),
        ({"output_dir": at["other.json"]}, "--output-dir"),
        ({"samples": at["unknown.jsonl"]}, "takes the place of --model"),
        (given | {"samples": at["unknown.jsonl"], "temperatures": (0.5, 1.0)}, "the one temperature"),
        (given | {"samples": at["unknown.jsonl"]}, "row 1: none of question, problem, prompt, task_id"),
        (given | {"samples": at["no_text.jsonl"]}, 'row 1: "completion" is missing'),
        (given | {"samples": at["uneven.jsonl"]}, "from 1 to 2 completions"),
        (given | {"samples": at["uneven.jsonl"], "ks": (3,)}, "from 1 to 2 completions"),
    ):
        with pytest.raises(SystemExit) as error:
            eval_passk.main(Args(**(tiny_args | changes)))
            pytest.fail(f"no error for {changes}")
        assert str(error.value).startswith("error: ") and message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out" / "samples.jsonl").exists()


def sentencepiece(path: Path):
    """A tokenizer built as Llama-2's and Mistral's are: spaces are part of words, bytes where there is no word."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = ["▁", "▁▁", "▁▁▁▁", "▁return", "▁if", *map(chr, range(33, 127))]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words]
    merges = [("▁", "▁"), ("▁▁", "▁▁")]
    for whole in ("▁return", "▁if"):
        vocabulary += [whole[:i] for i in range(2, len(whole)) if whole[:i] not in vocabulary]
        merges += [(whole[:i], whole[i]) for i in range(1, len(whole))]
    core = models.BPE({token: i for i, token in enumerate(vocabulary)}, merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(core)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(path)
    return fast


def test_the_text_of_a_completion_keeps_its_first_space(tmp_path, loaded):
    """Behind its prompt a completion reads as it was written, by each kind of tokenizer; alone it would not."""
    tokenizer, body = sentencepiece(tmp_path), "    return é if é else '→'\n"
    (prompt, whole) = tokenizer(["def f(é):\n", "def f(é):\n" + body], add_special_tokens=False)["input_ids"]
    tokens = whole[len(prompt) :]
    assert whole[: len(prompt)] == prompt and tokenizer.decode(tokens) == body[1:]
    assert eval_passk.completion_text(tokenizer, prompt, tokens) == body
    assert eval_passk.completion_text(tokenizer, [1, *prompt], [*tokens, 2]) == body
    for split in range(1, len(whole)):  # in the middle of a character too: it comes whole, with what ends it
        before = tokenizer.decode(whole[:split]).rstrip("\ufffd")
        assert before + eval_passk.completion_text(tokenizer, whole[:split], whole[split:]) == "def f(é):\n" + body
    _, plain = loaded
    ids = plain("7+3= 10")["input_ids"]
    assert eval_passk.completion_text(plain, ids[:4], ids[4:]) == " 10"


def test_samples_of_a_sentencepiece_model(tiny, tmp_path):
    """Stop strings are seen, and samples of a time when the first space was lost have another key."""
    from transformers import LlamaConfig, LlamaForCausalLM, StopStringCriteria

    tokenizer = sentencepiece(tmp_path / "m")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=2, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "m")
    args = Args(model=str(tmp_path / "m"), task=str(tiny / "problems.jsonl"), output_dir=str(tmp_path / "out"), n=4)
    args.temperatures, args.max_new_tokens, args.ks = (1.0,), 12, (1,)
    eval_passk.main(args)
    settings = json.loads((tmp_path / "out" / "samples.jsonl").read_text().splitlines()[0])["settings"]
    assert settings["text"] == "behind the prompt"
    ids = tokenizer("x\n    return 1\n\ndef g", add_special_tokens=False)["input_ids"]
    criteria = StopStringCriteria(tokenizer, ["\ndef"])
    seen = [bool(criteria(torch.tensor([ids[:i]]), None)) for i in range(1, len(ids) + 1)]
    assert seen.index(True) == len(ids) - 3  # behind "def", before " g"


def test_samples_made_elsewhere(tiny, tmp_path, capsys):
    """Graded as if drawn here: of two samples of each of two problems one is right; n and the k's are the file's."""
    rows = [{"question": "3=", "completion": "#### 3"}, {"question": "7+3=", "completion": "#### 3"}]
    rows += [{"question": "7+3=", "completion": "The answer is 4.STOP 5"}, {"question": "3=", "completion": "no"}]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = Args(samples=str(tmp_path / "s.jsonl"), task=str(tiny / "problems.jsonl"), temperatures=(0.7,))
    args.output_dir, args.stop = str(tmp_path / "out"), ("STOP",)
    eval_passk.main(args)
    assert "2 completions of each of 2 of 6 problems" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    value = results["temperatures"]["0.7"]
    assert results["name"] == "s" and [p["c"] for p in value["problems"]] == [1, 1] and value["n"] == 2
    assert value["pass@k"]["1"]["mean"] == 0.5 and value["pass@k"]["2"]["mean"] == 1.0
    assert value["diversity"]["entropy"] is None and value["found_by"] == {"marker": 2, "phrase": 1, "none": 1}
    args.samples = str(tmp_path / "t.jsonl")
    (tmp_path / "t.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(SystemExit, match="holds results of s with other samples"):
        eval_passk.main(args)


def test_prompts_without_answers(tiny, tmp_path, capsys):
    """Entropy, Self-BLEU and Distinct, without grades and what comes of them."""
    with open(tmp_path / "prompts.jsonl", "w") as file:
        file.writelines(json.dumps({"prompt": "7+" * i + "3="}) + "\n" for i in range(6))
    graded = evaluate(tiny, tmp_path / "graded", temperatures=(1.0,))["temperatures"]["1"]
    args = Args(model=str(tiny / "a"), task=str(tmp_path / "prompts.jsonl"), output_dir=str(tmp_path / "out"), n=6)
    args.temperatures, args.max_new_tokens, args.tokens_per_device = (1.0,), 24, 400
    eval_passk.main(args)
    value = json.loads((tmp_path / "out" / "results.json").read_text())["temperatures"]["1"]
    assert value["diversity"]["entropy"] > 0 and value["diversity"].keys() == graded["diversity"].keys() - {
        "distinct_answers"
    }
    assert "pass@k" not in value and not (tmp_path / "out" / "passk.png").exists()
    out = capsys.readouterr().out.split("prompts.jsonl, 6 samples")[1]
    assert "self_bleu" in out and "pass@" not in out and "answers found" not in out


def test_cross_entropy_under_a_reference(tiny, loaded, tmp_path, capsys):
    """That of a plain forward for each sample; the model as its own reference gives back its own log-probs."""
    from transformers import AutoModelForCausalLM

    given = {"temperatures": (1.5,), "top_p": 0.9, "diversity_samples": 4}
    evaluate(tiny, tmp_path, **given)
    drawn = (tmp_path / "samples.jsonl").read_bytes()
    found = evaluate(tiny, tmp_path, ref_model=str(tiny / "b"), **given)["temperatures"]["1.5"]["diversity"]
    assert drawn == (tmp_path / "samples.jsonl").read_bytes()
    assert f"of a sample under {tiny / 'b'}" in capsys.readouterr().out
    reference, tokenizer = AutoModelForCausalLM.from_pretrained(tiny / "b"), loaded[1]
    problems = tasks.load_problems(str(tiny / "problems.jsonl"), "", 0, 0)
    prompts = {problem["id"]: tokenizer(problem["question"])["input_ids"] for problem in problems}
    rows, expected = [row for row in lines_of(tmp_path) if row["index"] < 4], []
    for row in rows:
        prompt = prompts[row["problem"]]
        logps = reference(torch.tensor([prompt + row["ids"]])).logits[0].log_softmax(-1)
        expected.append(-sum(logps[len(prompt) - 1 + i, token].item() for i, token in enumerate(row["ids"])))
    assert len(expected) == 24 and found["cross_entropy"] == pytest.approx(sum(expected) / 24)
    per_token = sum(nll / row["tokens"] for nll, row in zip(expected, rows)) / 24
    assert found["cross_entropy_per_token"] == pytest.approx(per_token)
    kept = (tmp_path / "reference.jsonl").read_bytes()
    (tmp_path / "reference.jsonl").write_bytes(kept[:-9])  # as a kill within a write leaves it
    assert evaluate(tiny, tmp_path, ref_model=str(tiny / "b"), **given)["temperatures"]["1.5"]["diversity"] == found
    assert (tmp_path / "reference.jsonl").read_bytes().splitlines()[-1] == kept.splitlines()[-1]
    own = evaluate(tiny, tmp_path, ref_model=str(tiny / "a"), **given)["temperatures"]["1.5"]["diversity"]
    assert own["cross_entropy_per_token"] == pytest.approx(own["nll_per_token"])


def test_cross_entropy_of_texts(tiny, tmp_path):
    """Texts from elsewhere are scored behind the reference's own prompts; a reference with other tokens is refused."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [{"question": "7+3=", "completion": "10"}, {"question": "7+3=", "completion": ""}]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = Args(samples=str(tmp_path / "s.jsonl"), task=str(tiny / "problems.jsonl"), temperatures=(0.7,))
    args.output_dir, args.ref_model = str(tmp_path / "out"), str(tiny / "b")
    eval_passk.main(args)
    value = json.loads((tmp_path / "out" / "results.json").read_text())["temperatures"]["0.7"]["diversity"]
    ids = AutoTokenizer.from_pretrained(tiny / "b")("7+3=10", return_tensors="pt")["input_ids"]
    logps = AutoModelForCausalLM.from_pretrained(tiny / "b")(ids).logits[0].log_softmax(-1)
    assert value["cross_entropy"] == pytest.approx(-(logps[3, ids[0, 4]] + logps[4, ids[0, 5]]).item() / 2)
    assert value["cross_entropy_per_token"] == pytest.approx(value["cross_entropy"] / 2) and value["entropy"] is None
    sentencepiece(tmp_path / "other")
    with pytest.raises(SystemExit, match="has other tokens than --model"):
        evaluate(tiny, tmp_path / "no", ref_model=str(tmp_path / "other"))
    assert not (tmp_path / "no").exists()


def test_prompts(tiny, loaded):
    _, tokenizer = loaded
    problem = [{"question": "How many?"}]
    text = lambda **changes: eval_passk.prompt_texts(Args(**changes), tokenizer, problem)  # noqa: E731
    ((eight,), stops) = text(task="gsm8k")
    assert eight.count("\nA: ") == eight.count("The answer is") == 8 and eight.endswith("\n\nQ: How many?\nA:")
    assert stops == ("\nQ:",)
    ((two,), _) = text(task="gsm8k", shots=2)
    assert two.count("####") == 3 and two.endswith("Q: How many?\n\nA:")
    ((two,), stops) = text(task="math")
    assert two.count("\\boxed{") == 3 and stops == ("\n###\n", "\nProblem:")
    ((code,), stops) = text(task="humaneval")
    assert code == "How many?" and "\nclass" in stops and "\nprint" in stops
    assert text(task="toy.jsonl") == (["How many?"], ())
    assert text(task="gsm8k", stop=("x",))[1] == ("x",)
    tokenizer = type(tokenizer).from_pretrained(tiny / "a")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<me>{% endif %}"
    )
    ((chat,), stops) = eval_passk.prompt_texts(Args(task="toy.jsonl"), tokenizer, problem)
    assert (chat, stops) == ("<user>How many?<me>", ())
    ((chat,), stops) = eval_passk.prompt_texts(Args(task="humaneval"), tokenizer, problem)
    assert chat.endswith("<me>```python\nHow many?") and stops == ("\n```\n",)


def test_the_answer_of_a_math_row(tmp_path):
    """The box of its solution, else its "answer", which may be a number."""
    rows = [
        {"problem": "1", "solution": "so \\boxed{2}", "answer": "3"},
        {"problem": "2", "solution": "so 4", "answer": 4},
    ]
    rows += [{"problem": "3", "answer": "5"}]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = tasks.load_problems("math", str(tmp_path / "m.jsonl"), 0, 0)
    assert [eval_passk.grade_math(f"\\boxed{{{n}}}", p["reference"]) for n, p in zip((2, 4, 5), problems)] == [True] * 3


def test_humaneval_end_to_end(tiny, tmp_path):
    """Sample, run and grade programs: the tiny model solves nothing, its samples are kept, the layers are named."""
    row = {
        "prompt": 'def f(a):\n    """a"""\n', "entry_point": "f", "test": "def check(f):\n    assert f(1) == 1\n",
    }  # fmt: skip
    with gzip.open(tmp_path / "h.jsonl.gz", "wt") as file:
        file.write(json.dumps(row) + "\n")
    args = Args(model=str(tiny / "a"), task="humaneval", data=str(tmp_path / "h.jsonl.gz"), n=4, temperatures=(1.0,))
    args.max_new_tokens, args.output_dir, args.allow_code_execution = 16, str(tmp_path / "out"), True
    eval_passk.main(args)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["temperatures"]["1"]["pass@k"]["1"]["mean"] == 0.0 and "seccomp" in results["sandbox"]
    assert eval_passk.run_humaneval(row, "    return a\n", 5.0) and not eval_passk.run_humaneval(
        row, "    return 2\n", 5.0
    )


CODE = [  # prompt with an import, completion, does it define the function in a block?
    ("    return math.floor(x)\n", False),
    ("    return math.floor(x)\n```\n\nThis rounds down:\n```python\nprint(f(1.5))\n```\n", False),
    ("Sure!\n\n```python\ndef f(x):\n    return math.floor(x)\n```\nIt rounds down.", True),
    ("```python\ndef f(x):\n    return math.floor(x)\n```", True),
    ("```py\nimport math\n\n\ndef f(x: float) -> int:\n    return math.floor(x)", True),
    ("1. Write\n   ```python\n   def f(x):\n       return math.floor(x)\n   ```\n", True),
    ("```python\ndef f(x):\n    pass\n```\nNow the body:\n```python\ndef f(x):\n    return math.floor(x)\n```", True),
    ("```python\ndef f(x):\n    return math.floor(x)\n```\nTry it:\n```python\nprint(f(1.5))\n```", True),
    (
        "<think>\n```\ndef f(x):\n    return 0\n```\n</think>\n```\ndef f(x):\n    return math.floor(x)\n```",
        True,
    ),
]


@pytest.mark.parametrize("completion, whole", CODE)
def test_code_block_of_a_chat_answer(completion, whole):
    row = {"prompt": "import math\n\n\ndef f(x):\n", "entry_point": "f"}
    row["test"] = "def check(f):\n    assert f(1.5) == 1\n"
    assert eval_passk.find_code(completion, "f").startswith("\n    pass\n") == whole
    assert eval_passk.run_humaneval(row, completion, 5.0)
    assert not eval_passk.run_humaneval(row, completion.replace("floor", "ceil"), 5.0)


def test_five_times_as_fast_as_a_plain_loop(loaded):
    """64 samples of one problem against `generate`, one sample at a time."""
    model, tokenizer = loaded
    prompt = tokenizer("7+7+3=")["input_ids"]
    sample_batch(model, tokenizer, [prompt], [2], [1, 2], PLAIN)
    start = time.monotonic()
    sample_batch(model, tokenizer, [prompt], [64], list(range(64)), PLAIN)
    ours = (time.monotonic() - start) / 64
    start = time.monotonic()
    for _ in range(8):
        model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=True, top_k=0,
            max_new_tokens=24, temperature=1.0, pad_token_id=0,
        )  # fmt: skip
    plain = (time.monotonic() - start) / 8
    print(f"samples per second: {1 / ours:.0f} against {1 / plain:.0f}, {plain / ours:.1f} times")
    assert plain > 5 * ours


@pytest.mark.slow
def test_toy_in_five_minutes(tmp_path):
    """100 problems, 64 samples, three temperatures of the toy model: before and after together take five minutes."""
    if not (ROOT / "toy" / "model").exists():
        pytest.skip("the toy is not there")
    start = time.monotonic()
    command = [
        sys.executable,
        "eval_passk.py",
        "--model",
        "toy/model",
        "--task",
        "toy/problems.jsonl",
        "--problems",
        "100",
    ]
    command += [
        "--n",
        "64",
        "--temperatures",
        "0.5",
        "1.0",
        "1.5",
        "--max-new-tokens",
        "80",
        "--output-dir",
        str(tmp_path),
    ]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert time.monotonic() - start < 150
    results = json.loads((tmp_path / "results.json").read_text())
    assert all(
        value["pass@k"]["64"]["mean"] > value["pass@k"]["1"]["mean"] for value in results["temperatures"].values()
    )
