"""experiments/did_exact.py: what it enumerates, computed text by text, and its fast version."""

import json
import math

import did_exact
import pytest
import torch


@pytest.fixture
def model():
    torch.manual_seed(0)
    return did_exact.make_model()


def test_log_probs_are_those_of_one_letter_after_the_other(model):
    logps = did_exact.enumerate_texts(model)
    assert logps.exp().sum().item() == pytest.approx(1)
    for number in (0, 1, 1234, 4095):
        letters = [number // 8**place % 8 for place in (3, 2, 1, 0)]
        assert did_exact.all_texts()[number].tolist() == [0, *letters]
        total = 0.0
        for i, letter in enumerate(letters):
            total += model(torch.tensor([[0, *letters[:i]]])).logits[0, -1].log_softmax(0)[letter].item()
        assert logps[number].item() == pytest.approx(total)


def test_did_of_a_power_of_the_reference():
    """pi ~ ref^2 has the DID ref, and pi = ref has the uniform one."""
    ref = torch.randn(4096, dtype=torch.float64).log_softmax(0)
    assert torch.allclose(did_exact.did((2 * ref).log_softmax(0), ref), ref)
    assert did_exact.entropy(did_exact.did(ref, ref)) == pytest.approx(4 * math.log(8))


def test_slope_is_that_of_many_samples():
    """Least squares over draws from the policy, as K.1 does it; where pi' = q the slope is 1."""
    ratio = torch.randn(50, dtype=torch.float64)
    assert did_exact.slope(ratio, ratio.log_softmax(0)) == pytest.approx(1)
    logps = (0.5 * ratio + torch.randn(50, dtype=torch.float64)).log_softmax(0)
    drawn = torch.multinomial(logps.exp(), 100_000, True, generator=torch.Generator().manual_seed(0))
    columns = torch.stack([ratio[drawn], torch.ones(len(drawn), dtype=torch.float64)], 1)
    found = torch.linalg.lstsq(columns, logps[drawn][:, None]).solution[0].item()
    assert did_exact.slope(ratio, logps) == pytest.approx(found, abs=0.02)


def test_app_k_has_the_did_as_its_optimum():
    """The expected gradient of its loss with respect to log pi' is zero at q and nowhere near it at ref."""
    pi, ref = (torch.randn(30, dtype=torch.float64).log_softmax(0) for _ in range(2))

    def gradient(logps):
        logps = logps.clone().requires_grad_()
        w, rejected = torch.cartesian_prod(torch.arange(30), torch.arange(30)).T
        zero = torch.zeros(900, dtype=torch.float64)
        losses = did_exact.hdpo.hdpo_loss(logps[w], logps[rejected], zero, zero, alpha=1, beta=1)
        ((pi[w] + ref[rejected]).exp() * losses).sum().backward()
        return logps.grad.abs().max().item()

    assert gradient(did_exact.did(pi, ref)) < 1e-12 < 1e-3 < gradient(ref)


def test_did_exact(tmp_path):
    did_exact.main(did_exact.Args(seeds=1, results=str(tmp_path), fast=True))
    data = json.loads((tmp_path / "did_exact.json").read_text())
    assert [(verdict["claim"], verdict["where"]) for verdict in data["verdicts"]] == [(13, "exact")] * 2
    assert (tmp_path / "did_exact.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("policy", "more", "holds"),  # by how much DPO's policy and DID have more entropy
    [(0.2, 0.3, [True, True]), (0.2, -0.3, [False, False]), (-0.2, -0.3, [None, True]), (-0.2, 0.3, [None, False])],
)
def test_did_exact_judges_by_the_numbers(policy, more, holds, tmp_path, monkeypatch):
    def run(seed, losses, steps):
        found = {"H(ref)": 6.0}
        for method in did_exact.METHODS:
            found[method] = [(6.0, 7.0) for _ in losses]
            if method == "DPO":
                found[method] = [(6.0 + policy, 7.0 + 0.01 * seed + more) for _ in losses]
            found[method, "App. K"] = [(6.5, 1.0) for _ in steps]
        return found

    monkeypatch.setattr(did_exact, "run", run)
    did_exact.main(did_exact.Args(results=str(tmp_path)))
    verdicts = json.loads((tmp_path / "did_exact.json").read_text())["verdicts"]
    assert [verdict["holds"] for verdict in verdicts] == holds
