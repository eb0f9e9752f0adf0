"""experiments/real_model.py on the toy: its numbers beside those of the scripts, its files, its verdicts."""

import json
from statistics import fmean

import pytest
import real_model
import report
from real_model import Args

import common


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("real_model")


def fast(folder, **flags):
    return Args(**{"seeds": 2, "runs": str(folder / "runs"), "results": str(folder), "fast": True} | flags)


@pytest.fixture
def done(folder, inside):
    """The fast version, run once for all tests here."""
    if not (folder / "real_model.json").exists():
        real_model.main(fast(folder))
    return folder


def test_verdicts_and_files(done):
    data = json.loads((done / "real_model.json").read_text())
    assert [verdict["claim"] for verdict in data["verdicts"]] == [6, 6, 7, 6, 6, 7, 8, 12, 12]
    assert {verdict["where"] for verdict in data["verdicts"]} == {"real model"}
    page = (done / "real_model.md").read_text()
    assert all(verdict["numbers"] in page and "nan" not in verdict["numbers"] for verdict in data["verdicts"])
    rows = {method: page.count(f"\n| {method} | ") for method in real_model.METHODS}
    assert rows == {method: 2 * (1 + (method in real_model.WITH_SEEDS)) for method in rows}
    assert (done / "real_model.png").stat().st_size > 5000
    assert not list((done / "runs").glob("*/model")) and not list((done / "runs").glob("*/checkpoints"))


@pytest.mark.parametrize("name", ["dpo-1", "h-dpo-0.8-0", "dpl-2-0", "eps-dpo-0", "dgpo-0", "dpo-pg-0"])
def test_pairs_agree_with_the_script(name, done):
    """Means of what is scored pair by pair are the evaluation that the script logged."""
    run = done / "runs" / name
    pairs = json.loads((run / "found.json").read_text())["pairs"]["held-out"]
    last = report.metrics(run, "step")[-1][1]
    for part in ("chosen", "rejected"):
        values = dict(report.metrics(run, f"eval/logps/{part}"))
        assert fmean(pairs[part]) == pytest.approx(values[last] - values[0], abs=1e-5)
    if name == "eps-dpo-0":
        logged = {part: report.metrics(run, f"eval/{part}")[-1][1] for part in ("kl", "loss")}
        logged |= {way: report.metrics(run, f"eval/share/beta_{way}")[-1][1] for way in ("minus", "plus")}
        assert fmean(pairs["kl"]) == pytest.approx(logged["kl"], rel=1e-2)
        assert fmean(way < 0 for way in pairs["exact 0.01"]) == pytest.approx(logged["minus"])
        assert fmean(way > 0 for way in pairs["exact 0.01"]) == pytest.approx(logged["plus"])
    if name == "dpo-1":
        values = [value for _, value in report.metrics(run, "eval/loss")]
        assert fmean(real_model.dpo_losses([pairs["margin"]])[0]) == pytest.approx(values[-1] - values[0], abs=1e-5)


def test_diversity_agrees_with_eval_passk(done):
    for name in ("dpo-0", "h-dpo-0.8-0", "h-dpo-1.2-0"):
        samples = json.loads((done / "runs" / name / "found.json").read_text())["samples"]
        results = json.loads((done / "runs" / name / "eval/results.json").read_text())["temperatures"]["1"]
        for measure in real_model.MEASURES:
            assert fmean(samples[measure]) == pytest.approx(results["diversity"][measure])


def test_pairs_are_those_of_the_data(done):
    """As token ids the written pairs are the short ones of the data set, and no prompt is trained on and held out."""
    tokenizer = common.load_tokenizer(str(report.TOY / "model"))

    def pairs(path):
        dataset = common.load_preferences(str(path), tokenizer, "", 512, 256)
        return {json.dumps(row): size for row, size in zip(dataset, common.pair_lengths(dataset))}

    train, test = (pairs(done / "runs" / f"{name}.jsonl") for name in ("train", "held-out"))
    every = {row for row, size in pairs(report.TOY / "test.jsonl").items() if size <= 200}
    prompts = [{json.dumps(json.loads(row)["prompt_ids"]) for row in part} for part in (train, test)]
    assert train.keys() | test.keys() <= every and not prompts[0] & prompts[1]
    assert len(test) == len(prompts[1]) == 6
    left = {row for row in every if json.dumps(json.loads(row)["prompt_ids"]) not in prompts[1]}
    assert train.keys() == left
    trained = pairs(done / "runs/trained.jsonl")
    assert len(trained) == 6 and trained.keys() <= left


def test_resume_runs_only_what_is_missing(done, monkeypatch):
    gone, ran, launch = done / "runs/dgpo-1/found.json", [], report.launch
    before = gone.read_text()
    gone.unlink()
    monkeypatch.setattr(report, "launch", lambda *a, **k: ran.append(a[0]) or launch(*a, **k))
    real_model.main(fast(done, resume=True))
    assert ran == ["dgpo.py"]
    assert json.loads(gone.read_text())["pairs"] == json.loads(before)["pairs"]
    with pytest.raises(SystemExit, match="started with other flags"):
        real_model.main(fast(done, resume=True, lr=1e-4))


def made_up(sign):
    """Every pair moved as the papers say, or the other way, or about as often the one as the other way, by one seed."""
    moved = {1: [0.9, 1.0, 1.1, 1.0], -1: [-0.9, -1.0, -1.1, -1.0], 0: [1.0, -1.0, 1.1, -0.9]}[sign]
    against = [-value for value in moved]
    up = {"chosen": [moved], "rejected": [against], "margin": [moved]}
    ways = {1: ([0, 0, 0, 0], [0, 1, -1, 0], [1, -1, 1, 1]), -1: ([1, -1, 1, 1], [1] * 4, [0] * 4)}
    ways[0] = [1, 0, 0, -1], [0, 1, -1, 0], [-1, 0, 0, 1]
    decisions = {
        f"{kind} {e:g}": [own] for kind in ("exact", "bf16") for e, own in zip(real_model.EPSILONS, ways[sign])
    }
    pairs = dict.fromkeys(real_model.METHODS, up | decisions)
    pairs["DPO"] = up | {"chosen": [against], "margin": [[1.0, 1.1, 0.9, 1.0]]}
    measures = {1.2: (moved, moved, against), 0.8: ([0.0] * 4,) * 3}
    samples = {alpha: dict(zip(real_model.MEASURES, values)) for alpha, values in measures.items()}
    return {part: dict(pairs) for part in real_model.PARTS}, samples


@pytest.mark.parametrize("sign, holds", [(1, True), (-1, False), (0, None)])
def test_verdicts_follow_the_numbers(sign, holds):
    found = [verdict.holds for verdict in real_model.judge(*made_up(sign))]
    if sign == 1:  # shares of 0, 1/2 and 1 of four pairs: each rise is 1.7 standard errors
        assert found[7:] == [None, None]
        found, holds = found[:7], True
    assert found == [holds] * len(found)


def test_claim_7_fails_where_the_rejected_rise():
    pairs, samples = made_up(1)
    pairs["held-out"]["DPO-PG"] = pairs["held-out"]["DPO-PG"] | {"rejected": pairs["held-out"]["DPO-PG"]["chosen"]}
    assert [real_model.judge(pairs, samples)[i].holds for i in (2, 5)] == [True, False]


def test_nothing_is_decided_where_nothing_was_learnt():
    pairs, samples = made_up(1)
    pairs["trained"]["DPO"] = pairs["trained"]["DPO"] | {"margin": [[1.0, -1.0, 1.1, -0.9]]}
    found = [verdict.holds for verdict in real_model.judge(pairs, samples)]
    assert found[:7] == [None, None, True, None, None, True, None]


def test_error_counts_pairs_and_seeds():
    mean, error = real_model.mean_error([[1.0, 3.0], [5.0, 7.0]])
    assert mean == 4 and error == pytest.approx((2 / 2 + 8 / 2) ** 0.5)
    assert real_model.mean_error([[1.0, 3.0]]) == (2, pytest.approx(1))


def test_three_values():
    assert report.all_hold(True, True) is True and report.all_hold(True, None) is None
    assert report.all_hold(None, False) is False


def test_a_sentence_names_the_methods():
    up, down, none = ({"chosen": [values]} for values in ([1, 1.1], [-1, -1.1], [1, -1]))
    text = real_model.moves({"A": up, "B": none, "C": down, "D": up}, "chosen")
    assert text == "the chosen log-prob is raised by A, D, lowered by C, undecided for B"
