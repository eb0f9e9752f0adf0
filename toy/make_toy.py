"""Makes the embedded toy from nothing: a tiny language model, supervised on chains of arithmetic in GSM8K's form, and
preference pairs sampled from that very model and judged by the final answer, as on-policy preference data are made.

    python toy/make_toy.py                          # writes toy/, five to ten minutes on two CPU cores
    python toy/make_toy.py --output-dir /tmp/toy    # the same bytes somewhere else

A problem is an expression, its solution works out one operation per line:

    user        47+38*6
    assistant   38*6=228
                47+228=275
                #### 275

What it writes:
    model/              LlamaForCausalLM (float32 safetensors) and a character-level tokenizer with a chat template
    train.jsonl         preference pairs: a right sample (chosen) and a wrong one (rejected) for the same problem
    test.jsonl          the same on other problems
    near_train.jsonl    near-duplicate pairs: rejected is chosen with one digit of one result changed
    near_test.jsonl     the same on other problems
    problems.jsonl      problems that neither the model nor any pair has seen, for pass@k
"""

import dataclasses
import itertools
import json
import operator
import os
import random
import re
import shutil
import time
from functools import partial
from pathlib import Path

# Threads that spin while they wait make a step many times slower as soon as another process wants a core.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import torch
import tyro
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 1
THREADS = 2  # the order of float sums, and with it the bytes of the weights, depends on the number of threads

# The task. The difficulty of a problem is its number of operations; x stands for 10..99 and y for 2..6.
TEMPLATES = {2: "x+x*y", 3: "x+x*y-x", 4: "x*y+x*y-x"}

# The supervised model. It learns from right solutions first, which sets what it knows, and then from careless teachers:
# each operation has the chance SLIP_RATE of one wrong digit, and the steps after it go on from there. So it slips as
# often as they do although it knows better, and that is what preferences can mend. Without slips it errs only where it
# does not know, and no 2,000 pairs teach it that: preference training then made it worse.
HIDDEN_SIZE, MLP_SIZE, LAYERS, HEADS = 128, 344, 4, 4
SFT_STEPS, SFT_BATCH_SIZE, SFT_LR, SFT_WARMUP = 1100, 64, 2e-3, 50
SLIP_STEPS = 150  # the last of SFT_STEPS
SLIP_RATE = 0.15

# The data. Samples are drawn at temperature 1 from the full distribution.
TRAIN_PAIRS, TEST_PAIRS, NEAR_TRAIN_PAIRS, NEAR_TEST_PAIRS, PROBLEMS = 2048, 256, 512, 128, 400
PAIRS_PER_PROBLEM = 3
SAMPLES_PER_PROBLEM = 8
PASS_K, PASS_PROBLEMS = 64, 120
MAX_NEW_TOKENS = 72  # the longest right solution has 53 characters
SAMPLING_BATCH = 1024

# The text with add_generation_prompt=True is a prefix of the text with the answer, and so are its tokens.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'Q: ' + message['content'] + '\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'A: ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('the toy knows the roles user and assistant only') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
)


@dataclasses.dataclass
class Args:
    output_dir: Path = Path(__file__).parent
    """where the toy goes; what is already there is replaced at the very end, or not at all"""


# ---------------------------------------------------------------------------------------------------------- the task


def change_digit(text: str, start: int, end: int, rng: random.Random) -> str:
    """Another digit at one place of the number text[start:end]; none gets a leading zero."""
    where = rng.randrange(start, end)
    digits = "123456789" if where == start and end - start > 1 else "0123456789"
    return text[:where] + rng.choice(digits.replace(text[where], "")) + text[where + 1 :]


@dataclasses.dataclass(frozen=True)
class Problem:
    question: str
    difficulty: int

    def solution(self, rng: random.Random | None = None, slip_rate: float = 0.0) -> str:
        """Products first, then sums from the left. With rng the products come in random order, so that a problem has
        several right solutions and a model that solves it need not collapse onto one."""

        def compute(x: str, operation: str, y: str) -> str:
            result = str({"*": operator.mul, "+": operator.add, "-": operator.sub}[operation](int(x), int(y)))
            if slip_rate and rng.random() < slip_rate:
                result = change_digit(result, result.startswith("-"), len(result), rng)
            lines.append(f"{x}{operation}{y}={result}")
            return result

        lines = []
        terms = re.split(r"([+-])", self.question)
        products = [i for i, term in enumerate(terms) if "*" in term]
        if rng:
            rng.shuffle(products)
        for i in products:
            x, y = terms[i].split("*")
            terms[i] = compute(x, "*", y)
        total = terms[0]
        for sign, term in zip(terms[1::2], terms[2::2], strict=True):
            total = compute(total, sign, term)
        return "\n".join(lines + [f"#### {total}"])


def answer_of(completion: str) -> str | None:
    match = re.search(r"#### (-?\d+)$", completion)
    return match and match[1]


def problem_stream(rng: random.Random):
    """Endless problems, the difficulties taking turns. None comes twice, so whatever is drawn from one stream for
    different splits is disjoint."""
    seen = set()
    for difficulty in itertools.cycle(TEMPLATES):
        while True:
            question = re.sub("x", lambda _: str(rng.randint(10, 99)), TEMPLATES[difficulty])
            question = re.sub("y", lambda _: str(rng.randint(2, 6)), question)
            if question not in seen and not answer_of(Problem(question, difficulty).solution()).startswith("-"):
                break
        seen.add(question)
        yield Problem(question, difficulty)


# --------------------------------------------------------------------------------------------- the model, supervised


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character: more than the task needs, so that any English text can be tried."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    characters = ["\n"] + [chr(i) for i in range(32, 127)]
    vocabulary = {token: i for i, token in enumerate(special + characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",  # generation continues at the right end
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=MLP_SIZE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,  # ends up in generation_config.json, where `generate` learns when to stop
    )
    return LlamaForCausalLM(config)


def sft_batch(tokenizer, problems: list[Problem], slip_rate: float, rng: random.Random):
    """Right-padded token ids and labels, both (problems, tokens); only the response is learned."""
    prompts, texts = [], []
    for problem in problems:
        messages = [{"role": "user", "content": problem.question}]
        prompts.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        messages.append({"role": "assistant", "content": problem.solution(rng, slip_rate)})
        texts.append(tokenizer.apply_chat_template(messages, tokenize=False))
    rows = tokenizer(texts, add_special_tokens=False).input_ids
    prompt_rows = tokenizer(prompts, add_special_tokens=False).input_ids
    ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for i, (row, prompt) in enumerate(zip(rows, prompt_rows, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, len(prompt) : len(row)] = ids[i, len(prompt) : len(row)]
    return ids, labels


def supervise(model: LlamaForCausalLM, tokenizer, problems, rng: random.Random) -> None:
    """One pass over fresh problems. No attention mask: with padding on the right the causal one is enough, and
    attention without an explicit mask is faster."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=SFT_LR, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / SFT_WARMUP, (SFT_STEPS - step) / (SFT_STEPS - SFT_WARMUP))
    )
    progress = tqdm(range(SFT_STEPS), desc="supervise", unit="step", mininterval=1)
    for step in progress:
        slip_rate = 0.0 if step < SFT_STEPS - SLIP_STEPS else SLIP_RATE
        ids, labels = sft_batch(tokenizer, list(itertools.islice(problems, SFT_BATCH_SIZE)), slip_rate, rng)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


# ------------------------------------------------------------------------------------------------------- the samples


@torch.inference_mode()
def sample(model, tokenizer, problems: list[Problem], count: int) -> list[list[str | None]]:
    """`count` completions of each problem; None for one that did not stop by itself."""
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": problem.question}], tokenize=False, add_generation_prompt=True
        )
        for problem in problems
    ]
    inputs = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
    output = model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        do_sample=True,
        temperature=1.0,
        top_k=0,  # the library's default of 50 would cut the distribution
        top_p=1.0,
        num_return_sequences=count,
        max_new_tokens=MAX_NEW_TOKENS,
    )[:, inputs.input_ids.shape[1] :]
    stopped = (output == tokenizer.eos_token_id).any(1).tolist()
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    texts = [text if stop else None for text, stop in zip(texts, stopped, strict=True)]
    return [texts[i : i + count] for i in range(0, len(texts), count)]


def right_and_wrong(problem: Problem, completions: list[str | None]) -> tuple[list[str], list[str]]:
    """The distinct completions that stopped, in the order of sampling, judged by the final answer alone."""
    answer = answer_of(problem.solution())
    distinct = [text for text in dict.fromkeys(completions) if text]
    return [t for t in distinct if answer_of(t) == answer], [t for t in distinct if answer_of(t) != answer]


def pair(problem: Problem, chosen: str, rejected: str) -> dict:
    return {
        "prompt": [{"role": "user", "content": problem.question}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def sampled_pairs(problem: Problem, completions: list[str | None]) -> list[dict]:
    """Right against wrong. No sample serves in two pairs, unless the right ones are all the same."""
    right, wrong = right_and_wrong(problem, completions)
    right = list(itertools.islice(itertools.cycle(right), len(wrong)))
    return [pair(problem, *texts) for texts in zip(right, wrong, strict=False)][:PAIRS_PER_PROBLEM]


def near_pairs(problem: Problem, completions: list[str | None], rng: random.Random) -> list[dict]:
    """The first right sample against itself with one digit of one result changed, and nothing else."""
    right, _ = right_and_wrong(problem, completions)
    if not right:
        return []
    results = [match.span(1) for match in re.finditer(r"(?:=|#### )(\d+)$", right[0], flags=re.MULTILINE)]
    return [pair(problem, right[0], change_digit(right[0], *rng.choice(results), rng))]


def collect(make_pairs, count: int, samples_per_problem: int, model, tokenizer, problems, name: str) -> list[dict]:
    """Goes on sampling from fresh problems until there are `count` pairs."""
    rows = []
    with tqdm(total=count, desc=f"sample {name}", unit="pair") as progress:
        while len(rows) < count:
            fresh = list(itertools.islice(problems, SAMPLING_BATCH // samples_per_problem))
            for problem, texts in zip(fresh, sample(model, tokenizer, fresh, samples_per_problem), strict=True):
                rows += make_pairs(problem, texts)
            rows = rows[:count]
            progress.update(len(rows) - progress.n)
    return rows


def pass_rates(model, tokenizer, problems: list[Problem]) -> dict[str, tuple[float, float]]:
    """pass@1 and pass@PASS_K, overall and by difficulty."""
    samples = []
    size = SAMPLING_BATCH // PASS_K
    for start in tqdm(range(0, len(problems), size), desc=f"pass@{PASS_K}", unit="batch"):
        samples += sample(model, tokenizer, problems[start : start + size], PASS_K)
    rates = {}
    for name in ["overall", *TEMPLATES]:
        hits = [
            [answer_of(text or "") == answer_of(problem.solution()) for text in texts]
            for problem, texts in zip(problems, samples, strict=True)
            if name in ("overall", problem.difficulty)
        ]
        rates[name] = (sum(map(sum, hits)) / (len(hits) * PASS_K), sum(map(any, hits)) / len(hits))
    return rates


# --------------------------------------------------------------------------------------------------------- the files


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def assert_disjoint(splits: dict[str, set[str]]) -> None:
    for (name, questions), (other, others) in itertools.combinations(splits.items(), 2):
        assert not questions & others, f"{name} and {other} share {sorted(questions & others)[:3]}"


def main(args: Args) -> None:
    begin = time.perf_counter()
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    rng = random.Random(SEED)
    problems = problem_stream(rng)
    # Everything is made beside its place and renamed at the end: a run that is killed leaves the old toy as it was.
    new = args.output_dir / ".new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)

    held_out = list(itertools.islice(problems, PROBLEMS))
    supervised = list(itertools.islice(problems, SFT_STEPS * SFT_BATCH_SIZE))
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    supervise(model, tokenizer, iter(supervised), rng)
    model.save_pretrained(new / "model")
    tokenizer.save_pretrained(new / "model")
    sft_seconds = time.perf_counter() - begin
    # One token at a time is too little work to share: a second thread hardly helps, and on a busy machine it hinders.
    torch.set_num_threads(1)

    splits = {"sft": {problem.question for problem in supervised}}
    counts = {}
    for name, make_pairs, count, samples_per_problem in (
        ("train", sampled_pairs, TRAIN_PAIRS, SAMPLES_PER_PROBLEM),
        ("test", sampled_pairs, TEST_PAIRS, SAMPLES_PER_PROBLEM),
        ("near_train", partial(near_pairs, rng=rng), NEAR_TRAIN_PAIRS, SAMPLES_PER_PROBLEM // 4),
        ("near_test", partial(near_pairs, rng=rng), NEAR_TEST_PAIRS, SAMPLES_PER_PROBLEM // 4),
    ):
        rows = collect(make_pairs, count, samples_per_problem, model, tokenizer, problems, name)
        assert all(row["chosen"] != row["rejected"] for row in rows)
        write_jsonl(new / f"{name}.jsonl", rows)
        splits[name] = {row["prompt"][0]["content"] for row in rows}
        counts[name] = f"{len(rows)} pairs on {len(splits[name])} problems"

    rows = [{"question": p.question, "answer": p.solution(), "difficulty": p.difficulty} for p in held_out]
    write_jsonl(new / "problems.jsonl", rows)
    splits["problems"] = {problem.question for problem in held_out}
    assert_disjoint(splits)

    tried = held_out[:PASS_PROBLEMS]
    rates = pass_rates(model, tokenizer, tried)

    for path in sorted(path for path in new.rglob("*") if path.is_file()):
        target = args.output_dir / path.relative_to(new)
        target.parent.mkdir(exist_ok=True)
        os.replace(path, target)
    shutil.rmtree(new)

    print(f"parameters     {sum(p.numel() for p in model.parameters()):,}")
    for name, text in counts.items():
        print(f"{name:<15}{text}")
    print(f"problems       {len(held_out)}, the first {len(tried)} tried {PASS_K} times each at temperature 1:")
    for name, (first, best) in rates.items():
        label = name if name == "overall" else f"{name} operations"
        print(f"  {label:<13}pass@1 {first:.3f}   pass@{PASS_K} {best:.3f}")
    print(f"time           {time.perf_counter() - begin:.0f} s, of which {sft_seconds:.0f} s supervised training")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
