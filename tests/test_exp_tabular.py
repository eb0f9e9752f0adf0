"""experiments/tabular.py: it holds, it can fail, and its populations and training agree with other computations."""

import json
import random

import pytest
import tabular
import torch
from tabular import Args, bradley_terry, main, plackett_luce, random_logits, train_dpl, train_hdpo

import hdpo

PAPERS = ["H-DPO Eq. 11", "DPL Prop. 3.1", "DPL Prop. 3.2", "DPL Prop. A.1", "DPL Cor. 3.1"]


def verdicts(folder):
    return {verdict["paper"]: verdict for verdict in json.loads((folder / "tabular.json").read_text())["verdicts"]}


def test_fast(tmp_path):
    main(Args(results=str(tmp_path), fast=True))
    got = verdicts(tmp_path)
    assert list(got) == PAPERS and [verdict["claim"] for verdict in got.values()] == [3, 3, 3, 3, 4]
    assert all(verdict["holds"] for verdict in got.values())
    assert got["DPL Prop. 3.1"]["numbers"].startswith("99.9999% and 99.9999%")
    page = (tmp_path / "tabular.md").read_text()
    assert "does not hold" not in page and all(f"| {paper} |" in page for paper in PAPERS)
    assert (tmp_path / "tabular.png").stat().st_size > 10_000


def test_wrong_alpha_does_not_hold(tmp_path, monkeypatch):
    """A policy trained with alpha 1% too large is found out wherever H-DPO's loss is used, and nowhere else."""
    right = hdpo.hdpo_loss
    monkeypatch.setattr(tabular.hdpo, "hdpo_loss", lambda *args: right(*args[:4], 1.01 * args[4], args[5]))
    main(Args(results=str(tmp_path), fast=True))
    failed = [paper for paper, verdict in verdicts(tmp_path).items() if not verdict["holds"]]
    assert failed == ["H-DPO Eq. 11", "DPL Prop. 3.1"]


def test_two_outcomes_in_closed_form():
    """DPL, p = 0.8, ref(y) = 0.1, alpha 0.5, beta 0.25: odds (1/9)^(1/2) 4^2 = 16/3, so pi(y) = 16/19."""
    log_ref = torch.tensor([0.1, 0.9], dtype=torch.float64).log()
    got = train_dpl(tabular.two_outcomes(0.8), log_ref, 0.5, 0.25)[0].exp().item()
    assert got == pytest.approx(16 / 19, abs=1e-7)


def test_plackett_luce_drawn():
    """Rankings by exponential races, which arrive in Plackett-Luce's order: exp(1) / exp(reward), sorted."""
    reward = random_logits(4, seed=5)[0]
    above, best = plackett_luce(reward)
    rng, count = random.Random(0), 40_000
    seen_above, seen_best = torch.zeros(4, 4), torch.zeros(4)
    for _ in range(count):
        times = [rng.expovariate(rate) for rate in reward.exp().tolist()]
        ranking = sorted(range(4), key=times.__getitem__)
        seen_best[ranking[0]] += 1 / count
        for place, i in enumerate(ranking):
            seen_above[i, ranking[place + 1 :]] += 1 / count
    torch.testing.assert_close(seen_best, best.float(), rtol=0, atol=0.01)  # four standard errors
    torch.testing.assert_close(seen_above, above.float(), rtol=0, atol=0.01)
    torch.testing.assert_close(above, bradley_terry(reward), rtol=1e-12, atol=0)  # Luce's choice axiom, pair by pair


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_trained_policy_is_the_best_of_all(alpha, beta=0.5):
    """Eq. 11 maximises E[r] + alpha beta H(pi) - beta H(pi, ref) (Eq. 9): no policy near the trained one, nor any of
    many random ones, has a larger value.
    """
    reward, logits = random_logits(4, seed=7)
    log_ref = logits.log_softmax(0)

    def value(log_pi):
        return (log_pi.exp() * (reward - alpha * beta * log_pi + beta * log_ref)).sum(-1)

    trained = train_hdpo(bradley_terry(reward), log_ref, alpha, beta)
    noise = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for scale in (1e-2, 0.1, 1.0, 5.0):
        assert (value((trained + scale * noise).log_softmax(-1)) < value(trained)).all()
