"""eps_dpo.py against the equations written out over full logits, and its beta over steps, processes and kills."""

import copy
import itertools
import json
import math
from collections import defaultdict

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_reference import in_processes, until
from tiny import metrics
from torch.nn.functional import logsigmoid

import common
import eps_dpo

ARGS = eps_dpo.Args(beta=0.1, epsilon=0.02)
BOTH = ("chosen", "rejected")


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """They take longer than the runs."""
    for name in ("plot_curves", "write_samples"):  # both take longer than these runs
        monkeypatch.setattr(eps_dpo.look, name, lambda *_: None)


def policy_of(reference, size=0.02, seed=1):
    """The reference after some training: its weights moved a little."""
    policy = copy.deepcopy(reference)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += size * torch.randn_like(parameter)
    return policy


def pair_beta(r, r_minus, r_plus, beta, epsilon):
    """Eq. 1-5 of one pair."""
    if r_minus > r > r_plus:
        return beta / (1 + epsilon)
    if r_minus < r < r_plus:
        return beta / (1 - epsilon)
    return beta


def slow(policy, reference, rows, beta, epsilon):
    """Loss and metrics of each pair from whole logits of one plain forward a sequence, equation by equation."""
    losses, metrics = [], []
    for row in rows:
        logp = {}  # summed over the response's tokens
        for name in BOTH:
            ids, start = row["prompt_ids"] + row[f"{name}_ids"], len(row["prompt_ids"])
            f = policy(torch.tensor([ids])).logits[0, start - 1 : -1]
            with torch.no_grad():
                f0 = reference(torch.tensor([ids])).logits[0, start - 1 : -1]
            response = torch.tensor(row[f"{name}_ids"])[:, None]
            logits = {"": f, "0": f0, "-": (1 + epsilon) * f - epsilon * f0, "+": (1 - epsilon) * f + epsilon * f0}
            for which, values in logits.items():
                logp[name, which] = values.log_softmax(-1).gather(1, response).sum()
            logp[name, "kl"] = (f.softmax(-1) * (f.log_softmax(-1) - f0.log_softmax(-1))).sum()
        a, b, a0, b0 = (logp[name, which] for which in ("", "0") for name in BOTH)
        r, r_minus, r_plus = ((logp["chosen", w] - logp["rejected", w]).item() for w in ("", "-", "+"))
        chosen = pair_beta(r, r_minus, r_plus, beta, epsilon)
        margin = chosen * ((a - b) - (a0 - b0))
        losses.append(-logsigmoid(margin))
        metrics.append(
            {
                "rewards/margin": margin.item(),
                "rewards/accuracy": float(margin > 0),
                "logps/chosen": a.item() / len(row["chosen_ids"]),
                "logps/rejected": b.item() / len(row["rejected_ids"]),
                "logps/chosen_delta": (a - a0).item() / len(row["chosen_ids"]),
                "logps/rejected_delta": (b - b0).item() / len(row["rejected_ids"]),
                "beta": chosen,
                "share/beta_minus": float(r_minus > r > r_plus),
                "share/beta_plus": float(r_minus < r < r_plus),
                "kl": (logp["chosen", "kl"] + logp["rejected", "kl"]).item() / 2,
            }
        )
    columns = {name: torch.tensor([m[name] for m in metrics], dtype=torch.float64) for name in metrics[0]}
    return torch.stack(losses), columns


def forward(policy, reference, rows, args=ARGS, chunk=512):
    with tiny.packed(policy, reference):
        return eps_dpo.forward(policy, reference, common.collate(rows), args.beta, args, chunk)


def assert_equal(ours, theirs, tolerance=1e-10):
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=tolerance)
    assert ours[1].keys() == theirs[1].keys()
    for name, values in theirs[1].items():
        torch.testing.assert_close(ours[1][name].double(), values.double(), rtol=tolerance, atol=tolerance, msg=name)


# ---------------------------------------------------------------------------------------------------------------------
# The equations


def test_adaptive_beta():
    """Every order of three log-ratios, ties included; 0.1 / 1.25 = 0.08 and 0.1 / 0.75 = 0.1333..."""
    triples = list(itertools.product((-1.0, 0.0, 1.0), repeat=3))
    columns = torch.tensor(triples, dtype=torch.float64).unbind(1)
    got = eps_dpo.adaptive_beta(*columns, 0.1, 0.25)
    assert got.tolist() == [pair_beta(*triple, 0.1, 0.25) for triple in triples]
    assert torch.equal(got, eps_dpo.adaptive_beta(*columns, torch.tensor(0.1, dtype=torch.float64), 0.25))
    assert got[triples.index((0, 1, -1))].item() == pytest.approx(0.08)
    assert got[triples.index((0, -1, 1))].item() == pytest.approx(0.4 / 3)
    assert sum(beta == 0.1 for beta in got.tolist()) == 27 - 2


def test_eps_dpo_loss():
    """beta 0.1: -log s(0.1 (4 - 1)) = log(1 + e^-0.3) = 0.554355244468527; one beta a pair, no gradient to it."""
    a, b, a0, b0 = (torch.tensor([x, x], dtype=torch.float64, requires_grad=True) for x in (-3.0, -7.0, -5.0, -6.0))
    got = eps_dpo.eps_dpo_loss(a, b, a0, b0, 0.1)
    assert got.tolist() == pytest.approx([0.554355244468527] * 2, abs=1e-14)
    two = eps_dpo.eps_dpo_loss(a, b, a0, b0, torch.tensor([0.1, 0.2], dtype=torch.float64))
    assert two.tolist() == pytest.approx([0.554355244468527, math.log1p(math.exp(-0.6))], abs=1e-14)
    gradient = torch.autograd.grad(two.sum(), a)[0]
    assert gradient.tolist() == pytest.approx([-beta / (1 + math.exp(3 * beta)) for beta in (0.1, 0.2)], abs=1e-14)


@pytest.mark.parametrize("family, attention", [("llama", "sdpa"), ("qwen3", "eager"), ("gemma2", "eager")])
def test_equals_the_equations(family, attention, wide):
    """Loss, every metric, every gradient, to 1e-10; Gemma-2's cap of 2 bends its logits, and is in the equations."""
    changes = {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0} if family == "gemma2" else {}
    reference = tiny.model(family, attention, **changes).requires_grad_(False)
    policy = policy_of(reference).requires_grad_(True)
    rows = tiny.pair_rows(12)
    ours, expected = forward(policy, reference, rows), slow(policy, reference, rows, 0.1, 0.02)
    assert_equal(ours, expected)
    assert len(set(ours[1]["beta"].tolist())) > 1
    if family == "gemma2":
        assert policy(torch.tensor([[9, 10]])).logits.abs().max() <= 2
    weights = [p for p in policy.parameters() if p.requires_grad]
    for mine, theirs in zip(*(torch.autograd.grad(losses.sum(), weights) for losses in (ours[0], expected[0]))):
        assert (mine - theirs).abs().max() < 1e-9 * max(1.0, theirs.abs().max())


def test_all_three_decisions_are_met(wide):
    """With enough pairs: beta_minus, beta_plus and beta, each as the equations have it."""
    reference = tiny.model()
    policy, rows = policy_of(reference, 0.1), tiny.pair_rows(60)
    args = eps_dpo.Args(beta=0.1, epsilon=0.6)  # so large that a pair's log-ratio need not move in one direction
    got, expected = forward(policy, reference, rows, args)[1], slow(policy, reference, rows, 0.1, 0.6)[1]
    torch.testing.assert_close(got["beta"], expected["beta"], rtol=1e-14, atol=0)
    assert set(got["beta"].tolist()) == {0.1, 0.1 / 1.6, 0.1 / 0.4}


@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
def test_chunks(chunk, wide, monkeypatch):
    """The perturbation chunk by chunk is the same, and no chunk of the two models' logits is larger than asked."""
    reference = tiny.model().requires_grad_(False)
    policy, rows, seen = policy_of(reference), tiny.pair_rows(), []
    whole, real = forward(policy, reference, rows), eps_dpo.perturbed_logps

    def perturbed_logps(logits, ref_logits, *more):
        seen.append((len(logits), len(ref_logits)))
        return real(logits, ref_logits, *more)

    monkeypatch.setattr(eps_dpo, "perturbed_logps", perturbed_logps)
    assert_equal(forward(policy, reference, rows, chunk=chunk), whole, 1e-12)
    assert max(max(seen)) <= chunk
    assert [sum(lengths) for lengths in zip(*seen)] == 2 * [len(common.collate(rows).targets)]


def test_one_forward_of_each_model():
    """One pass of each model's layers and of its head a micro-batch, the head at the response tokens and no other."""
    reference = tiny.model().requires_grad_(False)
    policy, rows, seen = policy_of(reference).requires_grad_(True), tiny.pair_rows(), defaultdict(list)
    for model in (policy, reference):
        for module in (*model.model.layers, model.lm_head):
            module.register_forward_hook(lambda module, _inputs, output: seen[module].append(output.shape[-2]))
    losses, _ = forward(policy, reference, rows, chunk=5)
    losses.sum().backward()
    batch = common.collate(rows)
    for model in (policy, reference):
        assert [seen[layer] for layer in model.model.layers] == 2 * [[batch.input_ids.shape[1]]]
        assert seen[model.lm_head] == [len(batch.targets)]
    assert all(parameter.grad is None for parameter in reference.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties(dtype):
    """Policy == reference: nothing moves, every pair keeps beta to the bit, the loss is log 2 and the KL zero."""
    reference = tiny.model(dtype=dtype)
    losses, metrics = forward(copy.deepcopy(reference), reference, tiny.pair_rows(20))
    assert metrics["beta"].tolist() == [0.1] * 20
    assert not metrics["share/beta_minus"].any() and not metrics["share/beta_plus"].any()
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)), rtol=0, atol=1e-5)
    assert metrics["kl"].abs().max() < 1e-5


def test_equal_log_ratios():
    """A policy that differs by a constant in its logits, or a pair whose responses move alike, keeps beta."""
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(6, 30, dtype=torch.float64, generator=generator)
    targets = torch.tensor([1, 2, 3, 1, 2, 3])
    for f0 in (f, f - 0.5):
        minus, plus, _, kl = eps_dpo.perturbed_logps(f, f0, targets, 0.01)
        assert minus.abs().max() < 1e-15 and plus.abs().max() < 1e-15 and kl.abs().max() < 1e-14
    same = f[:3].repeat(2, 1), torch.randn(3, 30, generator=generator).double().repeat(2, 1)
    minus, plus, _, _ = eps_dpo.perturbed_logps(*same, targets, 0.01)
    r_minus, r_plus = (x[:3].sum() - x[3:].sum() for x in (minus, plus))
    beta = eps_dpo.adaptive_beta(torch.zeros(1).double(), r_minus[None], r_plus[None], 0.1, 0.01)
    assert beta.tolist() == [0.1]


def test_epsilon_0_is_dpo(wide):
    """epsilon = 0 is DPO's loss and gradient exactly; epsilon -> 0 goes there as fast as epsilon does."""
    reference = tiny.model(dtype=torch.float64).requires_grad_(False)
    policy, rows = policy_of(reference).requires_grad_(True), tiny.pair_rows(12)
    batch = common.collate(rows)
    with tiny.packed(policy, reference):
        (a, b), (a0, b0) = (common.response_logps(model, batch) for model in (policy, reference))
    dpo = -logsigmoid(0.1 * ((a - b) - (a0 - b0)))
    losses, metrics = forward(policy, reference, rows, eps_dpo.Args(beta=0.1, epsilon=0.0))
    torch.testing.assert_close(losses, dpo, rtol=1e-14, atol=1e-14)
    assert metrics["beta"].tolist() == [0.1] * 12
    weights = [p for p in policy.parameters() if p.requires_grad]
    for mine, theirs in zip(*(torch.autograd.grad(x.sum(), weights) for x in (losses, dpo))):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    for epsilon in (1e-3, 1e-6):
        near, _ = forward(policy, reference, rows, eps_dpo.Args(beta=0.1, epsilon=epsilon))
        assert 0 < (near - dpo).abs().max() < 10 * epsilon


def test_decisions_in_float32():
    """A policy one step from its reference: differences far below float32's rounding of the log-probs still decide."""
    generator = torch.Generator().manual_seed(0)
    tokens, pairs = 40, 200
    f0 = 3 * torch.randn(2 * pairs * tokens, 50, dtype=torch.float64, generator=generator)
    f = (f0 + 1e-5 * torch.randn(f0.shape, dtype=torch.float64, generator=generator)).float()
    f0, targets = f0.float(), torch.randint(50, (len(f0),), generator=generator)

    def betas(minus, plus):
        r_minus, r_plus = (
            x.double().view(pairs, 2, tokens).sum(2) @ torch.tensor([1.0, -1]).double() for x in (minus, plus)
        )
        return eps_dpo.adaptive_beta(torch.zeros(pairs).double(), r_minus, r_plus, 0.1, 0.01)

    got = betas(*eps_dpo.perturbed_logps(f, f0, targets, 0.01)[:2])
    f, f0 = f.double(), f0.double()
    own = f.log_softmax(-1)
    exact = [(((1 + e) * f - e * f0).log_softmax(-1) - own).gather(1, targets[:, None])[:, 0] for e in (0.01, -0.01)]
    assert (got == betas(*exact)).double().mean() > 0.98


def bf16_decision(policy, reference, row, epsilon):
    """-1, 0 or 1 for beta_minus, beta, beta_plus, as a trainer decides whose logits, log_softmax and sums are bf16."""
    ratios = []
    for e in (0, epsilon, -epsilon):
        sums = []
        for name in BOTH:
            ids, start = torch.tensor([row["prompt_ids"] + row[f"{name}_ids"]]), len(row["prompt_ids"])
            with torch.no_grad():
                f, f0 = (model(ids).logits[0, start - 1 : -1].to(torch.bfloat16) for model in (policy, reference))
            perturbed = f if e == 0 else (1 + e) * f - e * f0
            sums.append(perturbed.log_softmax(-1).gather(1, ids[0, start:, None]).sum())
        ratios.append(sums[0] - sums[1])
        assert ratios[-1].dtype == torch.bfloat16
    r, r_minus, r_plus = (ratio.item() for ratio in ratios)
    return (r_minus < r < r_plus) - (r_minus > r > r_plus)


def test_bf16_decisions(wide):
    """--bf16-decisions decides as the authors' arithmetic does, pair by pair, whatever the chunks; exact arithmetic
    adapts every pair at every epsilon, bf16 few, and more of them as epsilon grows (docs/eps_dpo.md, 2).
    """
    reference = tiny.model().requires_grad_(False)
    policy, rows = policy_of(reference, size=0.2), tiny.pair_rows(40)
    adapted = []
    for epsilon in (0.005, 0.02, 0.1):
        exact, args = (eps_dpo.Args(beta=0.1, epsilon=epsilon, bf16_decisions=bf16) for bf16 in (False, True))
        expected = torch.tensor([bf16_decision(policy, reference, row, epsilon) for row in rows])
        for chunk in (512, 7):
            losses, metrics = forward(policy, reference, rows, args, chunk)
            assert torch.equal(metrics["share/beta_plus"] - metrics["share/beta_minus"], expected.to(losses.dtype))
        adapted.append(expected.abs().sum().item())
        assert (forward(policy, reference, rows, exact)[1]["beta"] != 0.1).sum() > 36
    assert adapted[0] < adapted[1] < adapted[2] and adapted[0] < 12


def test_step_epsilon(wide):
    """Decisions with --epsilon, steps with --step-epsilon: beta / 1.25 and beta / 0.75 where it would be by 0.02."""
    reference = tiny.model().requires_grad_(False)
    policy, rows = policy_of(reference), tiny.pair_rows(12)
    one = forward(policy, reference, rows)[1]["beta"]
    two = forward(policy, reference, rows, eps_dpo.Args(beta=0.1, epsilon=0.02, step_epsilon=0.25))[1]["beta"]
    steps = {0.1 / 1.02: 0.1 / 1.25, 0.1 / 0.98: 0.1 / 0.75, 0.1: 0.1}
    expected = [
        next(new for old, new in steps.items() if beta == pytest.approx(old, rel=1e-9)) for beta in one.tolist()
    ]
    assert len(set(expected)) > 1 and two.tolist() == pytest.approx(expected, rel=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Micro-batches and LoRA


@pytest.mark.parametrize("sizes", [[1] * 12, [5, 7], [3, 3, 3, 3], [11, 1]], ids=str)
def test_decisions_of_any_split(sizes, wide):
    """A pair's beta depends on nothing else in its micro-batch."""
    reference = tiny.model()
    policy, rows = policy_of(reference), tiny.pair_rows(12)
    losses, whole = forward(policy, reference, rows)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    parts = [forward(policy, reference, rows[start : start + size]) for start, size in zip(starts, sizes)]
    assert torch.equal(torch.cat([metrics["beta"] for _, metrics in parts]), whole["beta"])
    torch.testing.assert_close(torch.cat([loss for loss, _ in parts]), losses, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_lora(training, wide):
    """Adapters off is the frozen copy of the base; they are on again afterwards, are trained, and the base is not."""
    base = tiny.model()
    reference, rows = copy.deepcopy(base).requires_grad_(False), tiny.pair_rows(12)
    lora = LoraConfig(r=4, lora_dropout=0.3 if training else 0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    policy = get_peft_model(base, lora).train(training)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    asked = {name: parameter.requires_grad for name, parameter in policy.named_parameters()}
    results = []
    for off in (policy, reference):
        torch.manual_seed(1)  # the same dropout
        results.append(forward(policy, off, rows))
    assert_equal(*results)
    if not training:
        assert_equal(results[0], slow(policy, reference, rows, 0.1, 0.02))
        ids = torch.tensor([rows[0]["prompt_ids"]])
        assert (policy(ids).logits - reference(ids).logits).abs().max() > 0.1
    assert {name: parameter.requires_grad for name, parameter in policy.named_parameters()} == asked
    results[0][0].sum().backward()
    for name, parameter in policy.named_parameters():
        assert (parameter.grad is not None and parameter.grad.any()) if "lora_" in name else parameter.grad is None


@pytest.mark.parametrize("tied", [True, False])
def test_frozen_model_keeps_what_autocast_keeps(tied):
    """On a GPU: linear layers in bf16, but embeddings (a tied head with them) and norms in float32."""
    model = eps_dpo.freeze(tiny.model(dtype=torch.float32, tie_word_embeddings=tied), torch.bfloat16)
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    narrow = {name for name, kind in kinds.items() if kind == torch.bfloat16}
    assert narrow == {name for name in kinds if "_proj" in name or name == "lm_head.weight"}
    assert (model.lm_head.weight.dtype == torch.float32) == tied
    assert not any(parameter.requires_grad for parameter in model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    tiny.write_model(folder / "base")
    tiny.write_model(folder / "wide", dtype=torch.float64)
    tiny.write_pairs(folder / "train.jsonl", 30)
    return folder


def run_args(out, made, **changes):
    options = {"model": str(made / "base"), "dataset": str(made / "train.jsonl"), "output_dir": str(out)}
    options |= {"lr": 1e-3, "batch_size": 6, "steps": 6, "save_every": 2, "beta": 0.1, "epsilon": 0.05, "warmup": 0}
    return eps_dpo.Args(**{**options, **changes})


def saved_betas(out):
    return [json.loads(path.read_text())["beta"] for path in sorted(out.glob("checkpoints/step-*/state.json"))]


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    eps_dpo.main(run_args(out, made))
    return out


def test_beta_is_state(whole):
    """beta <- mean of beta_pair over the batch: beta (1 + shares), from a first step in which no pair can decide."""
    rows, beta = metrics(whole)[1:], 0.1
    assert rows[0]["share/beta_minus"] == rows[0]["share/beta_plus"] == 0
    for row in rows:
        minus, plus = row["share/beta_minus"], row["share/beta_plus"]
        beta = beta * (1 - minus - plus + minus / 1.05 + plus / 0.95)
        assert row["beta"] == pytest.approx(beta, rel=1e-6)
    assert rows[-1]["beta"] != 0.1 and all(0 <= row["share/beta_plus"] <= 1 for row in rows)
    assert saved_betas(whole) == [rows[3]["beta"], rows[5]["beta"]]


@pytest.mark.parametrize("step", [3, 4, 5])
def test_resume(step, made, whole, tmp_path):
    """Ended behind a step and resumed, beta and everything else goes on bit for bit."""
    out = tmp_path / "run"
    until(step, eps_dpo.main, run_args(out, made))
    eps_dpo.main(run_args(out, made, resume=True))
    assert metrics(out) == metrics(whole)
    assert saved_betas(out) == saved_betas(whole)
    weights = [load_file(run / "model" / "model.safetensors") for run in (out, whole)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def same_decisions(one, other):
    for ours, theirs in zip(metrics(one)[1:], metrics(other)[1:], strict=True):
        for name in ("share/beta_minus", "share/beta_plus", "beta"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-12, abs=1e-12)
        if ours["step"] == 1:  # margins are zero, so their signs are rounding
            ours = {**ours, "rewards/accuracy": theirs["rewards/accuracy"]}
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_micro_batches_of_a_run(made, whole, tmp_path):
    eps_dpo.main(run_args(tmp_path / "run", made, tokens_per_device=64))
    same_decisions(tmp_path / "run", whole)


def test_two_processes(made, whole, tmp_path):
    """The same decisions and the same beta at every step, which every process then uses."""
    in_processes(eps_dpo.main, run_args(tmp_path / "run", made))
    same_decisions(tmp_path / "run", whole)


def test_lora_run(made, tmp_path, wide):
    """Trained with adapters: the reference stays the base, so the deltas start at zero and move."""
    eps_dpo.main(run_args(tmp_path / "run", made, model=str(made / "wide"), lora_rank=4, lr=1e-2))
    rows = metrics(tmp_path / "run")[1:]
    assert abs(rows[0]["logps/chosen_delta"]) < 1e-12 and rows[0]["kl"] < 1e-12
    assert abs(rows[-1]["logps/chosen_delta"]) > 1e-3 and rows[-1]["kl"] > 1e-5


@pytest.mark.parametrize(
    "flag, value, expected",
    [
        ("epsilon", 1.0, "a number from 0 to below 1"),
        ("step_epsilon", 1.0, "a number from 0 to below 1"),
        *(("epsilon", value, "0 or more") for value in (-0.1, math.nan)),
        *(("beta", value, "a number above 0") for value in (0.0, -1.0, math.nan)),
    ],
)
def test_bad_input(flag, value, expected, tmp_path):
    """One line that names the flag, before anything is looked for."""
    changes = {"model": "/no/such/model", "dataset": "/no/such.jsonl", "output_dir": str(tmp_path / "run"), flag: value}
    with pytest.raises(SystemExit) as error:
        eps_dpo.main(eps_dpo.Args(**changes))
    assert str(error.value) == f"error: --{flag.replace('_', '-')} {value}: expected {expected}"
    assert not (tmp_path / "run").exists()
