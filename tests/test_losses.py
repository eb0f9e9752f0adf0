"""The losses of dgpo.py, hdpo.py and dpl.py against closed forms, the papers' optimal policies, and TRL."""

import itertools
import sys
from pathlib import Path

import pytest
import tiny
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

import common
import hdpo
from dgpo import Args as DgpoArgs
from dgpo import dgpo_loss
from dgpo import forward as dgpo_forward
from dpl import dpl_loss
from hdpo import hdpo_loss


def dpo_loss(a, b, a0, b0, beta):
    """DPO as TRL's trainer writes its `sigmoid` loss: log-ratios to the reference first, then their difference."""
    return -logsigmoid(beta * ((a - a0) - (b - b0)))


def random_logps(count=10_000, seed=0):
    """a, b, a0, b0 of responses from likely to hopeless; policy and reference are close, as they are in training."""
    generator = torch.Generator().manual_seed(seed)
    ref = -300 * torch.rand(2, count, dtype=torch.float64, generator=generator) ** 2
    policy = ref + 10 * torch.randn(2, count, dtype=torch.float64, generator=generator)
    return *policy, *ref


# ---------------------------------------------------------------------------------------------------------------------
# DGPO


def grid():
    """Averaged log-probs on both sides of -1 and of each other, without a == b."""
    points = torch.linspace(-6, -0.01, 40, dtype=torch.float64)
    pairs = torch.cartesian_prod(points, points)
    return pairs[pairs[:, 0] != pairs[:, 1]].unbind(1)


@pytest.mark.parametrize("beta", [0.5, 2.5, 10.0])
def test_dgpo_gradient(beta):
    """d loss / da = -beta s(-beta h) d_w and d loss / db = beta s(-beta h) d_l, where h = (e^a + e^b)(a - b),
    d_w = e^a (a - b) + e^a + e^b and d_l = e^a + e^b - e^b (a - b).
    """
    a, b = (x.requires_grad_() for x in grid())
    got = torch.autograd.grad(dgpo_loss(a, b, beta).sum(), (a, b))
    d_w = a.exp() * (a - b) + a.exp() + b.exp()
    d_l = a.exp() + b.exp() - b.exp() * (a - b)
    push = beta * torch.sigmoid(-beta * (a.exp() + b.exp()) * (a - b))
    torch.testing.assert_close(got[0], -push * d_w, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(got[1], push * d_l, rtol=1e-12, atol=1e-15)
    assert (d_w > 0).all() and (d_l > 0).all()
    assert ((got[0] / -got[1] > 1) == (a > b)).all()


def test_dgpo_1():
    """Where pi_w + pi_l = 1 the weight of Eq. 11 is 1, which leaves Eq. 10, DGPO_1: -log s(beta (a - b)); and so does
    weighted=False, anywhere.
    """
    pi = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    a, b = pi.log(), (1 - pi).log()
    torch.testing.assert_close(dgpo_loss(a, b, 2.5), -logsigmoid(2.5 * (a - b)), rtol=1e-12, atol=0)
    a, b = grid()
    torch.testing.assert_close(dgpo_loss(a, b, 2.5, False), -logsigmoid(2.5 * (a - b)), rtol=1e-12, atol=0)


def test_dgpo_of_sums_has_no_gradient():
    """Eq. 11 of log-probs summed over 300 tokens, near -1 each: nothing is left of the gradient (docs/dgpo.md, 1)."""
    a, b = (torch.tensor([300 * x], requires_grad=True) for x in (-1.0, -1.1))
    assert all(gradient.item() == 0 for gradient in torch.autograd.grad(dgpo_loss(a, b, 2.5).sum(), (a, b)))


def kl_gap(p, q):
    """Forward less reverse KL divergence of two distributions given as log-probs, summed over positions."""
    return ((p.exp() + q.exp()) * (p - q)).sum()


def test_eq_10_is_no_identity():
    """The gap of the two divergences is not the gap of the log-probs: not with (0.8, 0.2) and (0.2, 0.8), where it is 0
    and not log 4 (docs/dgpo.md), and not on a small Llama, position by position as in App. C.
    """
    p, q = (torch.tensor([x], dtype=torch.float64).log() for x in ((0.8, 0.2), (0.2, 0.8)))
    assert kl_gap(p, q).item() == pytest.approx(0, abs=1e-15)
    assert (p - q)[0, 0].exp().item() == pytest.approx(4)
    model, divergences, logps = tiny.model(), [], []
    for row in tiny.pair_rows(24):
        whole = [row["prompt_ids"] + row[name] for name in ("chosen_ids", "rejected_ids")]
        n = min(len(ids) for ids in whole) - len(row["prompt_ids"])  # positions that both responses have
        with torch.no_grad():
            ends = [model(torch.tensor([ids])).logits[0, len(row["prompt_ids"]) - 1 :][:n] for ids in whole]
        p, q = (logits.double().log_softmax(1) for logits in ends)
        chosen, rejected = (torch.tensor(row[name][:n])[:, None] for name in ("chosen_ids", "rejected_ids"))
        divergences.append(kl_gap(p, q))
        logps.append((p.gather(1, chosen) - q.gather(1, rejected)).sum())
    divergences, logps = torch.stack(divergences), torch.stack(logps)
    assert divergences.abs().mean() < 0.1 * logps.abs().mean()
    assert (divergences.sign() != logps.sign()).sum() > 6


@pytest.mark.parametrize("weighted", [True, False])
def test_dgpo_forward(weighted):
    """Log-probs are averaged over tokens; d_w/d_l as logged is the ratio of the two derivatives of the loss."""
    model, rows = tiny.model(), tiny.pair_rows()
    batch = common.collate(rows)
    with tiny.packed(model):
        losses, metrics = dgpo_forward(model, batch, DgpoArgs(beta=2.5, weighted=weighted))
        chosen, rejected = common.response_logps(model, batch)
    a = (chosen / torch.tensor([len(row["chosen_ids"]) for row in rows])).detach().requires_grad_()
    b = (rejected / torch.tensor([len(row["rejected_ids"]) for row in rows])).detach().requires_grad_()
    expected = dgpo_loss(a, b, 2.5, weighted)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    d_w, d_l = torch.autograd.grad(expected.sum(), (a, b))
    torch.testing.assert_close(metrics["d_w/d_l"].double(), -d_w / d_l, rtol=1e-5, atol=1e-5)
    margin = (a.exp() + b.exp() if weighted else 1.0) * (a - b) * 2.5
    torch.testing.assert_close(metrics["rewards/margin"], margin, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(metrics["pi_w"] + metrics["pi_l"], a.exp() + b.exp(), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# H-DPO and DPL


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_alpha_1_is_dpo(beta):
    """alpha = 1: TRL's sigmoid loss to the last bit of float64."""
    logps = random_logps()
    assert torch.equal(hdpo_loss(*logps, 1.0, beta), dpo_loss(*logps, beta))


def test_eq_13():
    """-log s(alpha beta (a - b) - beta (a0 - b0)) with alpha 0.5, beta 0.1: a - b = 4 and a0 - b0 = 1 give
    -log s(0.2 - 0.1) = log(1 + e^-0.1) = 0.644396660073571; DPL with alpha 0.05, beta 0.1 is the same loss.
    """
    values = [torch.tensor([x], dtype=torch.float64) for x in (-3.0, -7.0, -5.0, -6.0)]
    assert hdpo_loss(*values, 0.5, 0.1).item() == pytest.approx(0.644396660073571, abs=1e-14)
    assert dpl_loss(*values, 0.05, 0.1).item() == pytest.approx(0.644396660073571, abs=1e-14)


@pytest.mark.parametrize("alpha, beta", [(0.12, 0.1), (0.1, 0.1), (1.0, 0.1), (0.05, 0.2)])
def test_dpl_is_hdpo(alpha, beta):
    """dpl(alpha, beta) == hdpo(alpha / beta, beta), gradients too."""
    logps = [x.requires_grad_() for x in random_logps(1000)]
    ours, theirs = dpl_loss(*logps, alpha, beta), hdpo_loss(*logps, alpha / beta, beta)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    for x, y in zip(torch.autograd.grad(ours.sum(), logps), torch.autograd.grad(theirs.sum(), logps)):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-14)


def test_dpl_without_a_reference():
    """beta 1e-9 leaves the reward alpha log pi, the loss -log s(alpha (a - b)) (docs/dpl.md)."""
    a, b, a0, b0 = random_logps(1000)
    expected = torch.log1p(torch.exp(-0.1 * (a - b)))
    torch.testing.assert_close(dpl_loss(a, b, a0, b0, 0.1, 1e-9), expected, rtol=1e-6, atol=1e-6)


def plain_logps(model, rows):
    """Summed log-probs of both responses, one plain forward a sequence."""
    sums = []
    for name in ("chosen_ids", "rejected_ids"):
        for row in rows:
            response = torch.tensor(row[name])
            logits = model(torch.tensor([row["prompt_ids"] + row[name]])).logits[0, len(row["prompt_ids"]) - 1 : -1]
            sums.append(logits.log_softmax(-1).gather(1, response[:, None]).sum())
    return torch.stack(sums).chunk(2)


def test_alpha_1_gradient_of_a_model(wide):
    """Loss and every parameter's gradient of DPO on plain forwards, to 1e-9 (norms are float32 inside but not here)."""
    model, reference, rows = tiny.model(seed=1), tiny.model(seed=2), tiny.pair_rows()
    with torch.no_grad():
        a0, b0 = plain_logps(reference, rows)
    expected = dpo_loss(*plain_logps(model, rows), a0, b0, 0.1)
    gradients = torch.autograd.grad(expected.mean(), list(model.parameters()))
    stored = [
        {**row, "ref_chosen_logps": a, "ref_rejected_logps": b} for row, a, b in zip(rows, a0.tolist(), b0.tolist())
    ]
    with tiny.packed(model):
        losses, _ = hdpo.forward(model, common.collate(stored), hdpo.Args(alpha=1.0, beta=0.1))
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-9)
    for ours, plain in zip(torch.autograd.grad(losses.mean(), list(model.parameters())), gradients):
        assert (ours - plain).abs().max() < 1e-9 * max(1.0, plain.abs().max())


# ---------------------------------------------------------------------------------------------------------------------
# Tabular policies trained to convergence


def train_table(loss, weights, ref):
    """The log-policy (outcomes,) that minimises sum_ij weights_ij loss(i preferred to j), by Newton's method.

    The losses are convex in the logits; the Hessian is singular along a constant shift, which changes no policy.
    """

    def total(logits):
        log_pi = logits.log_softmax(0)
        i, j = torch.cartesian_prod(torch.arange(len(ref)), torch.arange(len(ref))).T
        return (weights[i, j] * loss(log_pi[i], log_pi[j], ref[i], ref[j])).sum()

    logits = ref.clone()
    for _ in range(100):
        gradient, hessian = torch.func.grad(total)(logits), torch.func.hessian(total)(logits)
        step = torch.linalg.pinv(hessian, rtol=1e-12, hermitian=True) @ gradient
        size = 1.0
        while size > 1e-9 and total(logits - size * step) > total(logits):
            size /= 2
        logits = logits - size * step
    return logits.log_softmax(0)


def random_table(seed, outcomes=5):
    generator = torch.Generator().manual_seed(seed)
    reward = torch.randn(outcomes, generator=generator, dtype=torch.float64)
    ref = torch.randn(outcomes, generator=generator, dtype=torch.float64).log_softmax(0)
    return reward, ref


@pytest.mark.parametrize("alpha", [0.8, 0.95, 1.0, 1.2, 3.0])
def test_hdpo_reaches_eq_11(alpha, beta=0.3):
    """Raters prefer i to j with probability s(r_i - r_j); then pi* ~ ref^(1/alpha) exp(r / (alpha beta))."""
    reward, ref = random_table(seed=0)
    population = torch.sigmoid(reward[:, None] - reward[None, :])
    got = train_table(lambda *logps: hdpo_loss(*logps, alpha, beta), population, ref)
    expected = (ref / alpha + reward / (alpha * beta)).log_softmax(0)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert (got.exp() - expected.exp()).abs().max() < 1e-6


@pytest.mark.parametrize("loss", [dpl_loss, lambda *x: hdpo_loss(*x[:4], 1.0, x[5])], ids=["dpl", "hdpo --alpha 1"])
def test_prop_3_1(loss):
    """80% of the raters prefer y, beta 0.1, flat reference: pi(y) = 0.8^10 / (0.8^10 + 0.2^10) = 1 / (1 + 4^-10)
    = 0.99999905, the paper's 99.9999%.
    """
    population, ref = torch.tensor([[0, 0.8], [0.2, 0]]).double(), torch.tensor([0.5, 0.5]).double().log()
    got = train_table(lambda *logps: loss(*logps, 0.1, 0.1), population, ref).exp()
    assert got[0].item() == pytest.approx(1 / (1 + 4**-10), abs=1e-12) and f"{got[0]:.4%}" == "99.9999%"


@pytest.mark.parametrize("alpha, beta", [(0.1, 0.1), (0.12, 0.1), (0.4, 0.1), (1.0, 0.1), (1.0, 1.0)])
@pytest.mark.parametrize("share, prior", [(0.8, 0.5), (0.8, 0.1), (0.55, 0.3)])
def test_prop_3_2(alpha, beta, share, prior):
    """pi(y) ~ ref(y)^(beta/alpha) p^(1/alpha) for two outcomes, in log-odds."""
    population = torch.tensor([[0, share], [1 - share, 0]]).double()
    ref = torch.tensor([prior, 1 - prior]).double().log()
    got = train_table(lambda *logps: dpl_loss(*logps, alpha, beta), population, ref)
    p = torch.tensor([share, 1 - share]).double().log()
    expected = beta / alpha * ref + p / alpha
    assert (got[0] - got[1]).item() == pytest.approx((expected[0] - expected[1]).item(), abs=1e-6)
    if (alpha, prior) == (1.0, 0.5):  # proportional representation
        assert got[0].exp().item() == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize("alpha, beta", [(0.3, 0.3), (0.5, 0.3), (1.0, 0.2)])
def test_prop_a_1(alpha, beta):
    """Four outcomes, every ranking counted with its Plackett-Luce share; all pairs of a ranking are training data.
    pi(y) ~ ref(y)^(beta/alpha) p_best(y)^(1/alpha), p_best being the share of rankings that y leads.
    """
    reward, ref = random_table(seed=3, outcomes=4)
    population, best = torch.zeros(4, 4).double(), torch.zeros(4).double()
    for ranking in itertools.permutations(range(4)):
        share = torch.ones(()).double()
        for place in range(4):
            share = share * reward[list(ranking[place:])].softmax(0)[0]
        best[ranking[0]] += share
        for i, j in itertools.combinations(ranking, 2):
            population[i, j] += share
    assert best.sum().item() == pytest.approx(1)
    got = train_table(lambda *logps: dpl_loss(*logps, alpha, beta), population, ref)
    expected = (beta / alpha * ref + best.log() / alpha).log_softmax(0)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Ten optimizer steps of `hdpo.py --alpha 1`

STEPS, BETA, LR = 10, 0.1, 1e-3


def ten_steps(folder: Path, base: Path, data: Path, batch: int) -> dict[str, torch.Tensor]:
    """The model that hdpo.main leaves."""
    hdpo.main(
        hdpo.Args(
            model=str(base),
            dataset=str(data),
            output_dir=str(folder / "run"),
            alpha=1.0,
            beta=BETA,
            lr=LR,
            batch_size=batch,
            steps=STEPS,
            tokens_per_device=600,
        )
    )
    return AutoModelForCausalLM.from_pretrained(folder / "run" / "model").state_dict()


def furthest(ours, theirs, base) -> float:
    """The largest |difference| / |change| over all parameters, both as norms of a parameter's change by training."""
    initial = AutoModelForCausalLM.from_pretrained(base).state_dict()
    changes = {name: (ours[name] - value, theirs[name] - value) for name, value in initial.items()}
    assert all(there.norm() > 0 for _, there in changes.values())
    return max(((here - there).norm() / there.norm()).item() for here, there in changes.values())


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """They take longer than the runs."""
    for name in ("plot_curves", "write_samples"):  # both take longer than these runs
        monkeypatch.setattr(hdpo.look, name, lambda *_: None)


def test_ten_steps_of_a_slow_dpo(tmp_path, wide):
    """One plain forward a sequence, DPO, clipping, AdamW and the cosine schedule: every parameter's change to 1e-9.

    In float64: where entries of a gradient all but cancel, AdamW makes up to a whole step of a rounding error.
    """
    base = tiny.write_model(tmp_path / "base", dtype=torch.float64)
    data = tiny.write_pairs(tmp_path / "train.jsonl", 40)
    ours = ten_steps(tmp_path, base, data, batch=8)
    model, reference = (AutoModelForCausalLM.from_pretrained(base) for _ in range(2))
    pairs = common.load_preferences(str(data), AutoTokenizer.from_pretrained(base), "", 1024, 512)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    schedule = get_scheduler("cosine", optimizer, round(0.1 * STEPS), STEPS)
    for step in range(STEPS):
        rows = [pairs[i] for i in tiny.step_pairs(step, len(pairs), 8)]
        with torch.no_grad():
            a0, b0 = plain_logps(reference, rows)
        dpo_loss(*plain_logps(model, rows), a0, b0, BETA).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert furthest(ours, model.state_dict(), base) < 1e-9


@pytest.mark.slow
def test_ten_steps_of_trl(tmp_path):
    """TRL's DPOTrainer on the toy with the same pairs in the same order: every parameter's change to 1e-4.

    Batches of 32: with few pairs some entries of the gradient all but cancel, to the size of AdamW's epsilon, and there
    TRL's rounding is 2% of an update (a DPO in float64 agrees with hdpo.py).
    """
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    base, data = tiny.ROOT / "toy" / "model", tiny.ROOT / "toy" / "train.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(base)
    ours = ten_steps(tmp_path, base, data, batch=32)
    pairs = common.load_preferences(str(data), tokenizer, "", 1024, 512)
    rows = common.read_rows(str(data), "")
    assert len(rows) == len(pairs)  # so that numbers of pairs are numbers of rows
    order = [i for step in range(STEPS) for i in tiny.step_pairs(step, len(pairs), 32)]
    config = DPOConfig(
        output_dir=str(tmp_path / "trl"),
        loss_type="sigmoid",
        beta=BETA,
        learning_rate=LR,
        lr_scheduler_type="cosine",
        warmup_steps=round(0.1 * STEPS),
        max_steps=STEPS,
        per_device_train_batch_size=32,
        train_sampling_strategy="sequential",
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_length=1024,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
    )
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base),
        ref_model=AutoModelForCausalLM.from_pretrained(base),
        args=config,
        train_dataset=Dataset.from_list([rows[i] for i in order]),
        processing_class=tokenizer,
    )
    for theirs, i in zip(trainer.train_dataset, order):  # the same tokens
        mine = pairs[i]
        assert theirs["prompt_ids"] + theirs["chosen_ids"] == mine["prompt_ids"] + mine["chosen_ids"]
        assert theirs["prompt_ids"] + theirs["rejected_ids"] == mine["prompt_ids"] + mine["rejected_ids"]
    trainer.train()
    off = furthest(ours, trainer.model.state_dict(), base)
    print(f"hdpo.py --alpha 1 and TRL after ten steps: {off:.2e} of a parameter's change at most", file=sys.stderr)
    assert off < 1e-4
