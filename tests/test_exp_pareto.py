"""experiments/pareto.py: it runs, it can fail, and its policies and numbers agree with sums over single sequences."""

import itertools
import json
import math

import pareto
import pytest
import torch
from pareto import Args, by_token, draw_problem, entropy, global_temperature, main, measure


def verdicts(folder):
    return json.loads((folder / "pareto.json").read_text())["verdicts"]


def test_fast(tmp_path):
    main(Args(results=str(tmp_path), fast=True))
    found = verdicts(tmp_path)
    assert [verdict["claim"] for verdict in found] == [10] * 3 and {verdict["where"] for verdict in found} == {"exact"}
    assert found[0]["holds"]
    assert (tmp_path / "pareto.png").stat().st_size > 10_000


def test_another_policy_is_not_the_best(tmp_path, monkeypatch):
    """Compared at an entropy that is not the same, DPL's objective is not the best at every setting."""
    right = pareto.global_temperature
    monkeypatch.setattr(pareto, "global_temperature", lambda *given: 1.2 * right(*given))
    main(Args(results=str(tmp_path), fast=True))
    assert not verdicts(tmp_path)[0]["holds"]


def top_p(p):
    """The likeliest tokens until 0.9 is reached."""
    order = p.argsort(descending=True)
    kept = torch.zeros_like(p, dtype=torch.bool)
    kept[order[p[order].cumsum(0) - p[order] < 0.9]] = True
    return kept


KEPT = {
    "temperature": torch.ones_like,
    "top-p 0.9": top_p,
    "top-k 4": lambda p: p >= p.sort().values[-4],
    "min-p 0.1": lambda p: p >= 0.1 * p.max(),
}


@pytest.mark.parametrize("name", pareto.SWEEPS)
def test_policies_and_measures_sequence_by_sequence(name, beta=0.5, temperature=1.3):
    """Each sequence's probability as a product over its tokens, from the sums over all that begin alike."""
    log_ref, reward = draw_problem(seed=1)
    dpo = (log_ref + reward / beta).softmax(0)
    every = list(itertools.product(range(pareto.VOCABULARY), repeat=pareto.LENGTH))
    begin = {prefix: 0.0 for t in range(pareto.LENGTH + 1) for prefix in itertools.product(range(6), repeat=t)}
    for sequence, p in zip(every, dpo.tolist()):
        for t in range(pareto.LENGTH + 1):
            begin[sequence[:t]] += p
    after = {}
    for prefix in begin:
        if len(prefix) < pareto.LENGTH:
            p = torch.tensor([begin[(*prefix, token)] for token in range(6)], dtype=torch.float64) ** (1 / temperature)
            p = p / p.sum()
            p = p * KEPT[name](p)
            after[prefix] = (p / p.sum()).tolist()
    expected = [math.prod(after[s[:t]][token] for t, token in enumerate(s)) for s in every]
    got = by_token(dpo.log(), temperature, pareto.SWEEPS[name][1])
    torch.testing.assert_close(got.exp(), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-15)
    cross = -sum(p * q for p, q in zip(expected, log_ref.tolist()))
    rewards = sum(p * r for p, r in zip(expected, reward.tolist()))
    assert measure(got, log_ref, reward, beta).tolist() == pytest.approx([rewards - beta * cross, cross, rewards])
    assert entropy(got).item() == pytest.approx(-sum(p * math.log(p) for p in expected if p))


def test_global_temperature():
    """Its inverse, and DPL's closed form: ref^(beta/alpha) exp(r / alpha)."""
    log_ref, reward = draw_problem(seed=2)
    beta, alphas = 0.5, torch.tensor([0.2, 0.5, 2.0]).double()
    dpl = (beta / alphas[:, None] * log_ref + reward / alphas[:, None]).log_softmax(-1)
    dpo = (log_ref + reward / beta).log_softmax(0)
    torch.testing.assert_close(global_temperature(dpo, entropy(dpl)), alphas / beta, rtol=1e-9, atol=0)


def test_judge():
    """Of two settings both above 0, one below, and one whose error is as large as its mean."""
    sure, against, unsure = (torch.tensor(values).double() for values in ((2.0, 1.0), (-2.0, -1.0), (2.0, 0.0)))
    for other, holds in ((sure, True), (against, False), (unsure, None)):
        assert pareto.judge(torch.stack([sure, other], 1)) is holds
