"""experiments/methods.py: it runs, its tables agree with other computations, and no verdict is no trouble."""

import itertools
import json
import math
import random

import all as run_all
import methods
import pytest
import report
import torch


def test_fast(tmp_path, inside):
    args = methods.Args(problems=4, n=4, trees=2, runs=str(tmp_path / "runs"), results=str(tmp_path), fast=True)
    methods.main(args)
    page = (tmp_path / "methods.md").read_text()
    assert all(f"\n| {name} | " in page for name in ("base", "DPO", *methods.WAYS))
    assert "nan" not in page and (tmp_path / "methods.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "methods.json").read_text())["verdicts"] == []
    run = json.loads((tmp_path / "runs/dpo-pg/args.json").read_text())
    assert run["dataset"] == str(report.TOY / "train.jsonl") and run["batch_size"] == 16
    joined = run_all.join(tmp_path)
    assert "No claim is judged; [table" in joined and "0 tests: " in joined


def test_the_readmes_commands():
    """What the scripts are given is in the README, but for DPO, H-DPO's with alpha 1, and DPO-PG's steps."""
    readme = (report.ROOT / "README.md").read_text()
    for method, (script, *arguments) in methods.SCRIPTS.items():
        given = dict(zip(arguments[::2], arguments[1::2]))
        (command,) = (line for line in readme.splitlines() if line.startswith(f"python {script} --model toy/model"))
        shown = command.split(" && ")[0].split()[2:]
        shown = {flag: value for flag, value in zip(shown[::2], shown[1::2]) if not flag.endswith(("model", "dataset"))}
        more = {"DPO": {"--alpha": 1}, "DPO-PG": {"--batch-size": 16, "--epochs": 1}}.get(method, {})
        assert given == {flag: float(value) for flag, value in shown.items()} | more


def test_log_probs_of_a_walk():
    """The chain rule along one outcome, prefix by prefix, and all outcomes together."""
    reference, right = methods.draw_table(3)
    assert len(reference) == sum(methods.VOCAB**depth for depth in range(methods.LENGTH))
    outcomes = list(itertools.product(range(methods.VOCAB), repeat=methods.LENGTH))
    prefixes = [p for depth in range(methods.LENGTH) for p in itertools.product(range(methods.VOCAB), repeat=depth)]
    for temperature in (0.5, 1.0, 2.0):
        log_pi = methods.log_probs(reference, temperature)
        assert log_pi.exp().sum().item() == pytest.approx(1)
        for i in (0, 37, 124):
            rows = [reference[prefixes.index(outcomes[i][:depth])] / temperature for depth in range(methods.LENGTH)]
            by_hand = sum((row[token] - row.logsumexp(0)).item() for row, token in zip(rows, outcomes[i]))
            assert log_pi[i].item() == pytest.approx(by_hand)
    assert right.sum() == len(outcomes) // 4


def test_coverage_drawn():
    """Samples that are drawn and counted."""
    reference, right = methods.draw_table(1)
    log_pi = methods.log_probs(reference, 2.0)
    rng, weights, rounds = random.Random(0), log_pi.exp().tolist(), 4000
    ways = set(right.nonzero()[:, 0].tolist())
    drawn = (len(ways & set(rng.choices(range(len(weights)), weights, k=methods.SAMPLES))) for _ in range(rounds))
    assert methods.coverage(log_pi, right) == pytest.approx(sum(drawn) / rounds / len(ways), abs=0.005)


@pytest.mark.parametrize("method, ratio", [("DPO", 1.0), ("H-DPO, alpha 0.8", 0.8), ("DPL, alpha/beta 2", 2.0)])
def test_trained_to_the_closed_form(method, ratio):
    """pi ~ ref^(1/ratio) (sure / (1 - sure))^(1 / (ratio beta)) of the right ones (H-DPO's Eq. 11)."""
    reference, right = methods.draw_table(0)
    log_ref, reward = methods.log_probs(reference), math.log(methods.SURE / (1 - methods.SURE))
    expected = (log_ref / ratio + right * reward / (ratio * methods.BETA)).log_softmax(0)
    got = methods.log_probs(methods.train(method, reference, right, 500))
    assert (got.exp() - expected.exp()).abs().max() < 0.01
    assert methods.coverage(got, right) == pytest.approx(methods.coverage(expected, right), abs=0.005)


def test_eps_dpo_without_eps_is_dpo(monkeypatch):
    monkeypatch.setattr(methods, "EPSILON", 0.0)
    reference, right = methods.draw_table(2)
    found = [methods.train(method, reference, right, 20) for method in ("eps-DPO", "DPO")]
    torch.testing.assert_close(*found, rtol=0, atol=1e-9)
    assert (found[0] - reference).abs().max() > 0.5


def test_pairs():
    reference, right = methods.draw_table(0)
    log_ref = methods.log_probs(reference)
    chosen, rejected, share = methods.all_pairs(log_ref, right)
    assert share.sum().item() == pytest.approx(1) and (right[chosen] ^ right[rejected]).all()
    assert share[right[chosen]].sum().item() == pytest.approx(methods.SURE)
    i, j = chosen[7], rejected[7]
    p_good, p_bad = log_ref[right].exp().sum(), log_ref[~right].exp().sum()
    own = methods.SURE * (log_ref[i] + log_ref[j]).exp() / (p_good * p_bad)
    assert share[7].item() == pytest.approx(own.item())
