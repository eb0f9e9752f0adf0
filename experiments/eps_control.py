"""Does epsilon-DPO adapt more often when epsilon is larger (Fig. 3 of the paper)? It depends on the arithmetic.

    python experiments/eps_precision.py        (two CPU cores, about two minutes)

Three seeds of eps_dpo.py on the toy, 40 steps each. Then, on the toy's test pairs, the share of pairs whose beta is
adapted, for three epsilons and two ways to compute R, R_minus and R_plus of Eqs. 1-5:

    exact    eps_dpo.perturbed_logps, in float32
    bf16     as a trainer does whose model returns bf16 logits: perturbed logits, log_softmax and sums all in bf16

For small epsilon R_minus - R and R - R_plus are both epsilon times the same derivative, so they nearly always have one
sign: in exact arithmetic almost every pair is adapted, whatever epsilon is. In bf16 a sum of log-probs has two to three
digits, most perturbations round to a tie, and a larger epsilon breaks more ties.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import eps_dpo  # noqa: E402

EPSILONS = (0.005, 0.01, 0.02)


def bf16_logratios(logits, targets, batch):
    """log pi(y_w|x) - log pi(y_l|x), with log_softmax, token log-probs and their sums in bf16."""
    logps = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    sums = [logps[batch.response == i].sum() for i in range(2)]
    return sums[0] - sums[1]


@torch.no_grad()
def shares(policy, reference, dataset):
    """{(arithmetic, epsilon): share of pairs with beta_minus or beta_plus}"""
    counts = {(kind, epsilon): 0 for kind in ("exact", "bf16") for epsilon in EPSILONS}
    for row in dataset:
        batch = common.collate([row])
        f, f0 = (common.response_logits(model, batch) for model in (policy, reference))
        h, h0 = f.bfloat16(), f0.bfloat16()
        r = bf16_logratios(h, batch.targets, batch)
        for epsilon in EPSILONS:
            minus, plus, _, _ = eps_dpo.perturbed_logps(f, f0, batch.targets, epsilon)
            (minus_w, minus_l), (plus_w, plus_l) = (common.sum_responses(v, batch) for v in (minus, plus))
            beta = eps_dpo.adaptive_beta(torch.zeros(1), minus_w - minus_l, plus_w - plus_l, 1.0, epsilon)
            counts["exact", epsilon] += bool(beta != 1)
            r_minus = bf16_logratios((1 + epsilon) * h - epsilon * h0, batch.targets, batch)
            r_plus = bf16_logratios((1 - epsilon) * h + epsilon * h0, batch.targets, batch)
            counts["bf16", epsilon] += bool((r_minus > r > r_plus) or (r_minus < r < r_plus))
    return {key: count / len(dataset) for key, count in counts.items()}


def main():
    toy = ROOT / "toy"
    tokenizer = AutoTokenizer.from_pretrained(toy / "model")
    dataset = common.load_preferences(str(toy / "test.jsonl"), tokenizer, "test", 512, 256)
    results = []
    for seed in range(3):
        out = ROOT / f"runs/eps_precision_{seed}"
        args = eps_dpo.Args(
            model=str(toy / "model"), dataset=str(toy / "train.jsonl"), eval_dataset=str(toy / "test.jsonl")
        )
        args.lr, args.batch_size, args.steps, args.seed = 1e-5, 16, 40, seed
        args.output_dir, args.overwrite = str(out), True
        eps_dpo.main(args)
        policy, reference = (AutoModelForCausalLM.from_pretrained(path) for path in (out / "model", toy / "model"))
        results.append(shares(policy, reference, dataset))
    print("\nshare of adapted pairs, mean over 3 seeds (min-max)")
    for kind in ("exact", "bf16"):
        for epsilon in EPSILONS:
            values = [result[kind, epsilon] for result in results]
            print(f"  {kind:<6} eps {epsilon:<6} {sum(values) / 3:.3f} ({min(values):.3f}-{max(values):.3f})")


if __name__ == "__main__":
    main()
