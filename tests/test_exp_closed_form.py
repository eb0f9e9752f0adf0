"""experiments/closed_form.py: its policies, errors and verdicts agree with other computations."""

import itertools
import json
import math

import closed_form
import pytest
import tabular
import torch


def test_fast(tmp_path):
    closed_form.main(closed_form.Args(results=str(tmp_path), fast=True))
    verdicts = json.loads((tmp_path / "closed_form.json").read_text())["verdicts"]
    assert [verdict["claim"] for verdict in verdicts] == [9] * 8 + [10] * 3
    assert {verdict["where"] for verdict in verdicts} == {"exact"}
    assert "nan" not in (tmp_path / "closed_form.md").read_text()
    assert (tmp_path / "closed_form.png").stat().st_size > 10_000


def test_reference_is_a_chain():
    """Its first step's marginal and every later conditional do not depend on the steps before; it sums to 1."""
    log_ref, reward = closed_form.chains(3, base=1.0)
    assert log_ref.shape == reward.shape == (3, *[closed_form.RESULTS] * closed_form.STEPS)
    torch.testing.assert_close(log_ref.flatten(1).exp().sum(1), torch.ones(3).double())
    colder = closed_form.token_temperature(log_ref, 0.7)
    whole = closed_form.optimum(log_ref, torch.zeros_like(reward), alpha=0.7)
    torch.testing.assert_close(colder, whole)  # without a reward, alpha and the token temperature are one


def test_token_temperature_by_hand():
    """Two steps of two results: each conditional to the power 2, from probabilities that depend on the first step."""
    pi = torch.tensor([[[0.1, 0.3], [0.12, 0.48]]], dtype=torch.float64)
    found = closed_form.token_temperature(pi.log(), 0.5)[0].exp()
    for first, second in itertools.product(range(2), range(2)):
        rows = pi[0].sum(1)
        chance = rows[first] ** 2 / (rows**2).sum() * pi[0, first, second] ** 2 / (pi[0, first] ** 2).sum()
        assert found[first, second].item() == pytest.approx(chance.item())
    torch.testing.assert_close(closed_form.token_temperature(pi.log(), 1.0), pi.log())


def test_optimum_is_where_the_loss_of_hdpo_ends():
    log_ref, reward = (values[:, :, :, 0, 0, 0] for values in closed_form.chains(1, base=1.0))
    log_ref = log_ref.flatten(1).log_softmax(1).view_as(log_ref)
    expected = closed_form.optimum(log_ref, reward, 0.8, 0.9).flatten()
    trained = tabular.train_hdpo(tabular.bradley_terry(reward.flatten()), log_ref.flatten(), 0.8, 0.9)
    assert tabular.error(trained, expected) < 1e-5


def test_effect_counts_problems_and_seeds():
    differences = torch.tensor([[[1.0], [3.0]], [[5.0], [7.0]]], dtype=torch.float64)  # (seeds, problems, ks)
    means, errors = closed_form.effect(differences)
    assert means == [400] and errors[0] == pytest.approx(100 * math.sqrt(2 / 2 + 8 / 2))
    assert closed_form.effect(differences[0]) == ([200], [pytest.approx(100)])


@pytest.mark.parametrize(("colder", "smaller", "holds"), [(1, 1, True), (-1, -1, True), (1, -1, False), (0, 1, None)])
def test_rule_of_one_sign(colder, smaller, holds):
    base = torch.rand(50, len(closed_form.KS), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = 0.1 * torch.randn(base.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    noise -= noise.mean(0)
    found = {("alpha", 1.0): base, ("alpha", 0.9): base + smaller + noise, ("alpha", 1.1): base - smaller + noise}
    found |= {("T", 0.9): base + colder + noise, ("T", 1.1): base - colder + noise}
    few, many, rule = closed_form.judge(found, "made up")
    assert few.holds is many.holds is (smaller > 0)
    assert rule.holds is holds


def test_turn():
    rows = torch.tensor([[1.0, 2, 1, -1, -2, -3]]).double()
    assert closed_form.turn(torch.cat([rows, rows])) == "ahead up to k = 10"
    assert closed_form.turn(torch.cat([-rows, -rows])) == "never ahead"
