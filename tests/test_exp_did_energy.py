"""experiments/did_energy.py: its divergence, its DID and its optima against what can be computed another way."""

import json
import math

import did_energy
import pytest
import torch
from did_energy import Args, did, js_divergence, main, normals, optimum, preference_error, rejected_policy

import hdpo


def policies(tau, seed=0, classes=8):
    """Reference and target, log-probs (classes,)."""
    logits = normals(seed, classes)[0]
    return logits.log_softmax(0), (tau * logits).log_softmax(0)


def test_js_divergence():
    """(1, 0) and (1/2, 1/2) have the middle (3/4, 1/4): JS = (log 4/3 + 1/2 log 2/3 + 1/2 log 2) / 2 = 0.2158 nats.
    Policies have full support, so 1e-300 stands for 0.
    """
    p, q = torch.tensor([[1, 1e-300], [0.5, 0.5]], dtype=torch.float64).log()
    expected = (math.log(4 / 3) + math.log(2 / 3) / 2 + math.log(2) / 2) / 2
    assert js_divergence(p, q).item() == pytest.approx(expected, abs=1e-12)
    assert js_divergence(q, p).item() == pytest.approx(expected, abs=1e-12)
    assert js_divergence(p, p).item() == js_divergence(q, q).item() == 0
    assert js_divergence(p, p.flip(0)).item() == pytest.approx(math.log(2), abs=1e-12)  # nothing in common
    both = js_divergence(torch.stack([p, q]), q)
    assert both.shape == (2,) and both[1] == 0


@pytest.mark.parametrize("tau", [1.5, 0.5])
def test_did_by_hand(tau):
    """Ratios, and their sum, one class at a time; ref / l is the DID to the power of beta, normalised."""
    ref, target = policies(tau)
    ratios = [math.exp(t) / math.exp(r) for t, r in zip(target.tolist(), ref.tolist())]
    expected = torch.tensor([ratio / sum(ratios) for ratio in ratios], dtype=torch.float64)
    torch.testing.assert_close(did(target, ref).exp(), expected, rtol=1e-12, atol=0)
    for beta in (0.5, 1.0):
        rejected = rejected_policy(target, ref, beta)
        assert rejected.exp().sum().item() == pytest.approx(1)
        power = expected**beta / (expected**beta).sum()
        torch.testing.assert_close(did(ref, rejected).exp(), power, rtol=1e-12, atol=0)


def test_preferences_counted():
    """Thm 3.3 on drawn pairs: how often i is the chosen one of {i, j}, against s(log q(i) - log q(j)). The error is 0
    for the right target, and is seen for the wrong one.
    """
    ref, target = policies(0.5, classes=3)
    assert preference_error(target, ref, 1.0) < 1e-12
    generator = torch.Generator().manual_seed(0)
    draws = [
        torch.multinomial(policy.exp(), 400_000, replacement=True, generator=generator)
        for policy in (ref, rejected_policy(target, ref, 1.0))
    ]
    counts = torch.zeros(3, 3).index_put_(tuple(draws), torch.ones(400_000), accumulate=True)
    q = did(target, ref)
    torch.testing.assert_close(
        counts / (counts + counts.T), torch.sigmoid(q[:, None] - q).float(), rtol=0, atol=0.01
    )  # the standard error is 0.004 for the rarest of the pairs
    off = (counts / (counts + counts.T) - torch.sigmoid(target[:, None] - target)).abs().max()
    assert off > 0.05


@pytest.mark.parametrize("tau", [1.5, 0.5])
def test_optima(tau, beta=1.0):
    """With infinitely many pairs: DPO ends at the target, log pi at the DID, f-DPO where its reward is log q + C, that
    is at pi = ref / (C - log q) with C such that this sums to 1; the others at neither.
    """
    ref, target = policies(tau)
    rejected, q = rejected_policy(target, ref, beta), did(target, ref)
    ends = {name: optimum(loss, ref, rejected, beta) for name, loss in did_energy.OBJECTIVES.items()}
    assert (ends["DPO"].exp() - target.exp()).abs().max() < 1e-6
    assert (ends["log pi"].exp() - q.exp()).abs().max() < 1e-6
    low, high = q.max().item() + 1e-9, q.max().item() + 1e3
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (ref.exp() / (middle - q)).sum() > 1 else (low, middle)
    torch.testing.assert_close(ends["f-DPO"].exp(), ref.exp() / (low - q), rtol=0, atol=1e-4)
    for name in set(ends) - {"DPO"}:
        assert js_divergence(ends[name], target) > 1e-4, name


def test_log_pi_has_a_beta_for_the_reinforcing_target():
    """pi = q^(beta / beta') = ref^((tau - 1) beta / beta') is ref^tau for beta' = (tau - 1) / tau, which did_energy.md
    says of its second table.
    """
    ref, target = policies(1.5)
    end = optimum(did_energy.log_pi, ref, rejected_policy(target, ref, 1.0), 1 / 3)
    assert (end.exp() - target.exp()).abs().max() < 1e-6


@pytest.mark.parametrize("tau, lower", [(1.2, False), (1.5, False), (1.9, False), (2.1, True), (3.0, True)])
def test_claim_4_1_needs_a_tau_above_2(tau, lower):
    """A target ref^tau with tau above 1 has less entropy than ref; its DID only where it is sharper than ref itself."""
    ref, target = policies(tau)
    by_hand = [-sum(p * math.log(p) for p in logps.exp().tolist()) for logps in (ref, target, did(target, ref))]
    for logps, expected in zip((ref, target, did(target, ref)), by_hand):
        assert did_energy.entropy(logps).item() == pytest.approx(expected, rel=1e-12)
    assert by_hand[1] < by_hand[0] and (by_hand[2] < by_hand[0]) == lower


def verdicts(folder):
    return {verdict["paper"]: verdict for verdict in json.loads((folder / "did_energy.json").read_text())["verdicts"]}


def test_fast(tmp_path):
    main(Args(results=str(tmp_path), fast=True))
    got = verdicts(tmp_path)
    assert list(got) == [f"DID Thm 3.{end}" for end in ("3, Fig. 1", "4, Fig. 1, reinforcing", "4, Fig. 1, smoothing")]
    assert all(verdict["claim"] == 5 for verdict in got.values())
    # Too short for log pi and the rarest of the smoothing classes, so nothing of the first.
    assert got["DID Thm 3.4, Fig. 1, reinforcing"]["holds"] and got["DID Thm 3.4, Fig. 1, smoothing"]["holds"]
    page = (tmp_path / "did_energy.md").read_text()
    assert all(page.count(f"| {name} |") == 2 for name in did_energy.OBJECTIVES)
    assert (tmp_path / "did_energy.png").stat().st_size > 10_000


def test_wrong_alpha_does_not_hold(tmp_path, monkeypatch):
    """H-DPO with alpha 1.2 in DPO's place does not reach the target."""
    wrong = lambda a, b, a0, b0, beta: hdpo.hdpo_loss(a, b, a0, b0, 1.2, beta)  # noqa: E731
    wrong.__doc__ = "alpha 1.2"
    monkeypatch.setattr(did_energy, "OBJECTIVES", {"DPO": wrong, "log pi": did_energy.log_pi})
    main(Args(results=str(tmp_path), fast=True))
    got = verdicts(tmp_path)
    assert not got["DID Thm 3.4, Fig. 1, reinforcing"]["holds"]
    assert not got["DID Thm 3.4, Fig. 1, smoothing"]["holds"]
