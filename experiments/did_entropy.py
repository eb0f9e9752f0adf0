"""Entropy of the Differential Information Distribution: what a policy has learned beyond its reference (claim 13)

    https://arxiv.org/abs/2505.23761    Claim 4.1, Table 2: reinforcing the policy (DPO-PG) goes with a DID of lower
                                        entropy than DPO's; appendix K estimates it

    python experiments/did_entropy.py                                          (two CPU cores, about six minutes)
    python experiments/did_entropy.py --model runs/dgpo/model --reference toy/model --dataset toy/train.jsonl \
        --eval-dataset toy/test.jsonl                                          (any two models and local pairs)

The DID q(y|x) is the distribution proportional to pi(y|x) / ref(y|x). Its entropy is estimated as in appendix K:

    1. y_w ~ pi(.|x), y_l ~ ref(.|x) for each prompt. Then p(y_w > y_l) = q(y_w|x) / (q(y_w|x) + q(y_l|x))    (App. F.2)
    2. train pi', from ref, on these pairs with the reward log pi':  loss = -log s( log pi'(y_w|x) - log pi'(y_l|x) ),
       whose optimum is pi' = q                                                                       (Theorem 2.1)
    3. H(q) is about the mean of -log pi'(y|x) over y ~ pi'(.|x), on prompts that 2. has not seen

The second step stops long before its optimum, in the paper (one epoch at lr 1e-6) as here. So a number means something
only beside another one from the same settings. Appendix K decodes greedily in the first step; here it samples, which is
what the identity of App. F.2 is about. In the paper's Table 2, too, one DPO setting has a lower entropy than DPO-PG;
K.1 calls it an outlier.

did_exact.py counts the DID of a tiny model and makes this estimate beside it: there it is near for DPO-PG, but off by
more than a nat for DPO in one language of four, after many more pairs, too, and K.1's slope stays below 1, the
optimum's. It also compares DPO and DPO-PG at the same loss, which this file does not. So claim 13 is judged there; the
verdict here is about the estimate.

What Claim 4.1 expects beside that, H(DID) below H(ref) where a policy reinforces ref, is not judged here: it is false
for a policy proportional to ref^tau with tau between 1 and 2, whose DID is ref^(tau - 1) (did_energy.py).
"""

import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import report
import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

sys.path.insert(0, str(report.ROOT))

import common  # noqa: E402
import eval_passk  # noqa: E402
import hdpo  # noqa: E402

CLAIM_13 = (
    "by App. K's estimate after 64 steps, at both learning rates: the DID of DPO-PG has a lower entropy than that of "
    "DPO, trained as many steps on the same near-duplicate pairs, by more than two standard errors over seeds"
)
RUNS = [("DPO", 1e-5), ("DPO", 1e-4), ("DPO-PG", 1e-5), ("DPO-PG", 1e-4)]
SCRIPTS = {"DPO": ("hdpo.py", "--alpha", 1, "--beta", 0.1), "DPO-PG": ("dpo_pg.py",)}


@dataclass
class Args:
    model: str = ""
    """Policy pi; empty: train DPO and DPO-PG on the toy and compare them"""
    reference: str = ""
    """Reference policy ref, with the same tokenizer"""
    dataset: str = str(report.TOY / "train.jsonl")
    """Pairs whose prompts are used in step 1"""
    eval_dataset: str = str(report.TOY / "test.jsonl")
    """Pairs whose prompts are used in step 3"""
    max_prompt_length: int = 512
    """Tokens of a prompt"""
    max_new_tokens: int = 80
    """Tokens of a sample"""
    samples: int = 8
    """Samples of each prompt in step 3"""
    lr: float = 3e-5
    """Learning rate of RMSprop in step 2, after a linear warm-up (App. K: 1e-6, for a 7B model)"""
    batch_size: int = 16
    """Pairs of one optimizer step in step 2 (App. K: 64)"""
    steps: int = 64
    """Optimizer steps in step 2, the first tenth of them warm-up"""
    prompts: int = 0
    """Prompts of step 1 and of step 3, at most; 0: all"""
    seeds: int = 3
    """Runs of each kind, without --model"""
    seed: int = 0
    """Seed of the samples and of the order of the pairs"""
    runs: str = "runs/did_entropy"
    """Where the runs go"""
    results: str = str(report.RESULTS)
    """Where the table and the figure go"""
    fast: bool = False
    """Few steps and prompts, to see that it runs; its verdict means nothing"""


def read_prompts(source: str, tokenizer, args: Args) -> list[list[int]]:
    """Token ids of the distinct prompts of a file of preference pairs."""
    rows = common.load_preferences(source, tokenizer, "train", 1 << 20, args.max_prompt_length)
    prompts = list(map(list, dict.fromkeys(map(tuple, rows["prompt_ids"]))))
    return prompts[: args.prompts or None]


@torch.no_grad()
def sample(model, ends: list[int], prompts: list[list[int]], seed: int, args: Args) -> list[list[int]]:
    """Token ids of a sample for each prompt, at temperature 1 from the whole distribution, up to one of `ends`."""
    torch.manual_seed(seed)
    responses = []
    for first in range(0, len(prompts), 256):
        chunk = prompts[first : first + 256]
        width = max(map(len, chunk))
        ids = torch.tensor([[ends[0]] * (width - len(prompt)) + prompt for prompt in chunk])  # (prompts, width)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in chunk])
        out = model.generate(
            ids.to(model.device), attention_mask=mask.to(model.device), do_sample=True, temperature=1.0, top_k=0,
            top_p=1.0, max_new_tokens=args.max_new_tokens, eos_token_id=ends, pad_token_id=ends[0],
        )  # fmt: skip
        for row in out[:, width:].tolist():
            length = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
            responses.append(row[:length])
    return responses


def rows_of(prompts, chosen, rejected) -> list[dict]:
    """As load_preferences makes them."""
    return [{"prompt_ids": p, "chosen_ids": w, "rejected_ids": r} for p, w, r in zip(prompts, chosen, rejected)]


@contextlib.contextmanager
def packed(model):
    """With the attention that response_logps needs in this block, and the model's own, for generate(), behind it."""
    own = model.config._attn_implementation
    model.set_attn_implementation(common.ATTENTION)
    yield
    model.set_attn_implementation(own)


@torch.no_grad()
def entropy(model, ends: list[int], prompts: list[list[int]], args: Args) -> tuple[float, float]:
    """Monte-Carlo entropy of a response, in nats: of the whole response and per token."""
    drawn = [sample(model, ends, prompts, 1000 + args.seed * args.samples + i, args) for i in range(args.samples)]
    sums, tokens = [], 0
    for left, right in zip(drawn[::2], drawn[1::2]):
        rows = rows_of(prompts, left, right)
        with packed(model):
            for first in range(0, len(rows), 8):
                batch = common.collate(rows[first : first + 8]).to(model.device)
                sums += torch.cat(common.response_logps(model, batch)).tolist()
        tokens += sum(map(len, left + right))
    return -fmean(sums), -sum(sums) / tokens


def did_entropy(model: str, reference: str, args: Args) -> dict[str, float]:
    """H(pi), H(ref) and H(DID), whole responses and per token, on the prompts of --eval-dataset."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy, ref, learner = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).eval()
        for path in (model, reference, reference)
    )
    for one in (policy, ref, learner):
        one.generation_config = GenerationConfig()  # the model's own may cut the distribution or penalise repetition
    tokenizer = AutoTokenizer.from_pretrained(reference)
    ends = eval_passk.end_tokens(tokenizer, eval_passk.find_weights(reference))
    prompts = read_prompts(args.dataset, tokenizer, args)
    unseen = read_prompts(args.eval_dataset, tokenizer, args)

    # Step 1; as many pairs as step 2 will take, whatever the share of prompts where pi and ref draw the same response.
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(args.seed)).tolist()
    pairs, wanted, drawn = [], args.steps * args.batch_size, 0
    for turn in range(20):
        used = [prompts[order[(drawn + i) % len(order)]] for i in range(wanted)]
        chosen = sample(policy, ends, used, 10_000 * args.seed + 2 * turn, args)
        rejected = sample(ref, ends, used, 10_000 * args.seed + 2 * turn + 1, args)
        rows = rows_of(used, chosen, rejected)
        pairs += [row for row in rows if row["chosen_ids"] != row["rejected_ids"]]
        drawn += wanted
        if len(pairs) >= wanted:
            break
    else:
        common.fail(
            f"{model} and {reference} draw the same response to nearly all prompts, so there is no DID to learn"
        )
    same, pairs = 1 - len(pairs) / drawn, pairs[:wanted]

    # Step 2: pi' has no reference, so hdpo_loss gets log-probs of zero for it.
    optimizer = torch.optim.RMSprop(learner.parameters(), lr=args.lr)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (0.1 * args.steps)))
    with packed(learner):
        for first in range(0, len(pairs), args.batch_size):
            batch = common.collate(pairs[first : first + args.batch_size]).to(device)
            a, b = common.response_logps(learner, batch)
            hdpo.hdpo_loss(a, b, torch.zeros_like(a), torch.zeros_like(b), alpha=1, beta=1).mean().backward()
            torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            warmup.step()

    found = {"same samples": same}
    for name, one in (("pi", policy), ("ref", ref), ("DID", learner)):
        found[f"H({name})"], found[f"H({name}) per token"] = entropy(one, ends, unseen, args)
    return found


def train_and_measure(method: str, rate: float, seed: int, args: Args) -> dict[str, float]:
    """One run on the near-duplicate pairs as in displacement.py, and its DID, estimated by the other command."""
    folder = Path(args.runs, f"{method}-{rate:g}-{seed}".lower()).resolve()
    steps, toy = 4 if args.fast else 64, report.TOY
    report.launch(
        *SCRIPTS[method], "--model", toy / "model", "--dataset", toy / "near_train.jsonl", "--lr", rate,
        "--warmup", 0.1, "--batch-size", 16, "--epochs", 8, "--steps", steps, "--seed", seed, "--output-dir", folder,
        "--overwrite",
    )  # fmt: skip
    few = ("--steps", 2, "--prompts", 8, "--samples", 2) if args.fast else ()
    out = report.launch(
        "experiments/did_entropy.py", "--model", folder / "model", "--reference", toy / "model", "--seed", seed, *few
    )
    return json.loads([line for line in out.splitlines() if line.startswith("{")][-1])


def draw(found: dict, seeds: int):
    figure, axes = report.axes(1, 3, width=9, height=2.9)
    for axis, name in zip(axes.flat, ("H(ref)", "H(pi)", "H(DID)")):
        for place, (method, rate) in enumerate(RUNS):
            values = [found[method, rate, seed][name] for seed in range(seeds)]
            axis.plot([place] * seeds, values, "o", color=report.COLOURS[method], alpha=0.6)
        axis.set_xticks(range(len(RUNS)), [f"{method}\n{rate:g}" for method, rate in RUNS])
        axis.set_title({"H(ref)": "$H(\\pi_{ref})$", "H(pi)": "$H(\\pi)$", "H(DID)": "$H(DID)$"}[name])
        axis.margins(0.15)
    axes[0, 0].set_ylabel("nats of a response")
    return figure


def main(args: Args) -> None:
    if args.model or args.reference:
        if not (args.model and args.reference):
            common.fail("--model and --reference go together: pi and the policy that it came from")
        found = did_entropy(args.model, args.reference, args)
        for name, value in found.items():
            print(f"{name:<20}{value:10.4f}")
        print(json.dumps(found))
        return
    keys = [(*run, seed) for run in RUNS for seed in range(args.seeds)]
    jobs = [lambda key=key: train_and_measure(*key, args) for key in keys]
    found = dict(zip(keys, report.side_by_side(jobs)))

    def values(run, name):
        return [found[(*run, seed)][name] for seed in range(args.seeds)]

    names = ["H(pi)", "H(ref)", "H(DID)", "H(DID) per token", "same samples"]
    rows = [
        [method, f"{rate:g}", *(report.spread(values((method, rate), name)) for name in names)] for method, rate in RUNS
    ]
    text = (
        f"Nats of a response on unseen prompts; mean over {args.seeds} seeds (range). "
        '"same samples": share of prompts where pi and ref drew the same response, which makes no pair.\n\n'
        + report.table(["method", "lr", *names], rows)
    )
    more = [
        [dpo - pg for dpo, pg in zip(values(("DPO", rate), "H(DID)"), values(("DPO-PG", rate), "H(DID)"))]
        for rate in (1e-5, 1e-4)
    ]
    verdict = report.Verdict(
        13, "DID Claim 4.1, Table 2",
        "Reinforcing (DPO-PG) goes with a lower DID entropy than DPO, by App. K's estimate.", CLAIM_13,
        report.all_hold(*map(report.above_zero, more)),
        "; ".join(
            f"{method} at lr {rate:g} {report.spread(values((method, rate), 'H(DID)'), 2)}" for method, rate in RUNS
        )
        + " nats, estimated",
    )  # fmt: skip
    report.save(args, "did_entropy", [verdict], text, draw(found, args.seeds))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
