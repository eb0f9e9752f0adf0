"""The experiments that train with the scripts: fast versions of each, and the arithmetic of their verdicts.

All but one run the scripts inside this process (conftest.py); tests/test_run.py launches them.
"""

import itertools
import json
from pathlib import Path

import all as run_all
import alpha_sweep
import closed_form
import did_entropy
import displacement
import eps_control
import hard_problems
import markov
import pytest
import reference_cost
import report
import sides
import tiny
import torch
from transformers import AutoTokenizer, LlamaForCausalLM


def verdicts(results: Path, name: str) -> list[dict]:
    """What the experiment left, after a look at all of it."""
    data = json.loads((results / f"{name}.json").read_text())
    page = (results / f"{name}.md").read_text()
    assert (results / f"{name}.png").stat().st_size > 5000
    assert data["commit"] and data["seconds"] >= 0
    for verdict in data["verdicts"]:
        assert verdict["threshold"] in page and verdict["numbers"] in page
        assert "nan" not in verdict["numbers"] and verdict["numbers"]
    return data["verdicts"]


def test_displacement_launches_the_scripts(tmp_path):
    args = displacement.Args(seeds=1, steps=2, runs=str(tmp_path / "runs"), results=str(tmp_path), fast=True)
    displacement.main(args)
    assert [verdict["claim"] for verdict in verdicts(tmp_path, "displacement")] == [6, 7]
    run = json.loads((tmp_path / "runs/dpo-0.0001-0/args.json").read_text())
    assert run["alpha"] == 1 and run["beta"] == 0.1 and run["dataset"].endswith("near_train.jsonl")


@pytest.mark.parametrize(
    ("dpo", "dgpo", "holds"),
    [
        ({1: [-0.2, -0.3, -0.2], 2: [0.1, 0.2, 0.1]}, [0.1, 0.2, 0.1], True),
        ({1: [-0.2, -0.3, -0.2], 2: [-0.1, -0.1, -0.2]}, [-0.1, -0.2, -0.1], False),
        ({1: [-0.2, -0.3, -0.2], 2: None}, [-0.1, 0.3, -0.1], None),
        ({1: [-0.2, -0.3, -0.2], 2: None}, [-0.1, -0.2, -0.1], None),
        ({1: [-0.2, -0.3, -0.2], 2: None}, [0.1, 0.2, 0.1], True),
        ({1: None, 2: None}, [0.1, 0.2, 0.1], None),
    ],
)
def test_claim_6_asks_for_a_fall_and_a_rise_at_one_rate(dpo, dgpo, holds):
    verdict = displacement.claim_6(lambda method, rate: dpo[rate] if method == "DPO" else dgpo, (1, 2), "at the end")
    assert verdict.holds is holds


def test_standard_error_over_seeds():
    assert report.error([1.0, 2.0, 4.0]) == pytest.approx(((16 + 1 + 25) / 9 / 2 / 3) ** 0.5)
    assert report.above_zero([0.1]) is None


def test_markov(tmp_path, inside):
    args = markov.Args(seeds=1, steps=2, runs=str(tmp_path / "runs"), results=str(tmp_path), fast=True)
    markov.main(args)
    assert [verdict["claim"] for verdict in verdicts(tmp_path, "markov")] == [6, 6, 7, 15, 15, 15, 15]
    run = json.loads((tmp_path / "runs/dpo-unrelated-0.0003-0/args.json").read_text())
    assert run["model"].endswith("language-0/model") and run["dataset"].endswith("language-0/unrelated_train.jsonl")


def test_letters_are_drawn_anew_given_their_neighbours():
    """Given its neighbours, a letter's distribution is counted over many walks, and the shares of two that are drawn
    without replacement follow from it."""
    generator = torch.Generator().manual_seed(0)
    chain = markov.language(2, 3, generator)
    assert torch.allclose(chain.sum(1), torch.ones(6)) and (chain[:3, 3:] == 0).all() and (chain[3:, :3] == 0).all()
    texts = markov.walk(chain, torch.zeros(40_000, dtype=torch.long), 5, generator)
    places = torch.full((len(texts), 1), 2)
    chosen, rejected = markov.near_duplicates(chain, texts, places, generator)
    assert ((chosen == texts) | (torch.arange(5) == 2)).all() and (chosen[:, 2] > rejected[:, 2]).all()
    two = torch.cat([chosen, rejected])
    for before, after in itertools.product(range(3), range(3)):
        here = texts[(texts[:, 1] == before) & (texts[:, 3] == after)]
        odds = chain[before, :3] * chain[:3, after]
        odds /= odds.sum()
        counts = torch.bincount(here[:, 2], minlength=3)[:3] / len(here)
        assert counts == pytest.approx(odds, abs=0.03)
        # The share of a letter among two that are drawn without replacement: first, or second behind another one.
        second = torch.stack([sum(odds[j] * odds[i] / (1 - odds[j]) for j in range(3) if j != i) for i in range(3)])
        drawn = two[(two[:, 1] == before) & (two[:, 3] == after)][:, 2]
        assert torch.bincount(drawn, minlength=3)[:3] / len(drawn) == pytest.approx((odds + second) / 2, abs=0.03)


def test_pairs_differ_in_two_letters_of_the_response(tmp_path):
    generator = torch.Generator().manual_seed(0)
    markov.write_pairs(tmp_path / "pairs.jsonl", markov.language(8, 6, generator), 50, generator)
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    texts = [[row[name][0]["content"] for name in ("chosen", "rejected")] for row in rows]
    assert len(rows) == 50 and {len(text) for pair in texts for text in pair} == {16}
    for chosen, rejected in texts:
        assert [a > b for a, b in zip(chosen, rejected) if a != b] == [True, True]
    assert {len(row["prompt"][0]["content"]) for row in rows} == {4}


def test_change_at_a_margin_lies_on_the_line():
    assert markov.at_margin([0.0, 2.0, 4.0, 2.0], [0.0, -1.0, -2.0, -9.0], 3.0) == pytest.approx(-1.5)
    assert markov.at_margin([0.0, 2.0], [0.0, -1.0], 2.0) == pytest.approx(-1.0)
    assert markov.at_margin([0.0, 2.0], [0.0, -1.0], 3.0) is None


@pytest.mark.parametrize("kind", ["unrelated", "meaningless"])
def test_exchanged_rejected_responses(kind, tmp_path):
    source = report.TOY / "near_test.jsonl"
    target = markov.exchange(kind, source, tmp_path / "exchanged.jsonl")
    before, after = ([json.loads(line) for line in path.read_text().splitlines()] for path in (source, target))
    texts = [[row["rejected"][0]["content"] for row in rows] for rows in (before, after)]
    assert [(row["prompt"], row["chosen"]) for row in before] == [(row["prompt"], row["chosen"]) for row in after]
    if kind == "unrelated":
        assert sorted(texts[0]) == sorted(texts[1])
        assert not any(one == other for one, other in zip(*texts))
    else:
        assert [sorted(text) for text in texts[0]] == [sorted(text) for text in texts[1]]
        assert sum(one == other for one, other in zip(*texts)) == 0


def test_alpha_sweep(tmp_path, inside):
    args = alpha_sweep.Args(
        seeds=1, problems=4, n=4, harder=4, runs=str(tmp_path / "runs"), results=str(tmp_path), fast=True
    )
    alpha_sweep.main(args)
    assert [verdict["claim"] for verdict in verdicts(tmp_path, "alpha_sweep")] == [8, 8, 9, 9, 9, 9]


def made_up(alpha, beta, seed, args, slope=1.0):
    """Diversity that rises with alpha where slope is 1, pass@k that falls with it."""
    rise = slope * alpha + 0.01 * seed
    diversity = {"entropy": rise, "distinct_1": rise, "distinct_2": rise, "self_bleu": 2 - rise}
    passk = {str(k): {"mean": k / 64 - 0.1 * slope * alpha} for k in (1, 32)}
    right = [max(0, i % 5 + (2 * slope if alpha < 1 else 0)) for i in range(40)]
    return {"diversity": diversity, "pass@k": passk, "problems": [{"n": 32, "c": int(c)} for c in right]}


@pytest.mark.parametrize("slope", [1.0, -1.0])
def test_alpha_sweep_judges_by_the_numbers(slope, tmp_path, monkeypatch, inside):
    def exact(alphas, args):
        """A lower temperature does as a smaller alpha does, so Sec. 5.4's rule holds either way."""
        chance = torch.linspace(1e-3, 1e-2, 30, dtype=torch.float64)
        cells = [(alpha, 1.0) for alpha in alphas] + [(1.0, heat) for heat in alpha_sweep.TEMPERATURES]
        cells += [(alpha, heat) for alpha in alphas for heat in alpha_sweep.TEMPERATURES]
        gain = {cell: 1 + slope * (2 - sum(cell)) / 10 for cell in cells}
        return {cell: closed_form.pass_at(chance * gain[cell], closed_form.KS).expand(3, -1, -1) for cell in cells}

    monkeypatch.setattr(alpha_sweep, "train_and_sample", lambda *key: made_up(*key, slope=slope))
    monkeypatch.setattr(alpha_sweep, "exact_passk", exact)
    alpha_sweep.main(alpha_sweep.Args(results=str(tmp_path)))
    holds = [verdict["holds"] for verdict in verdicts(tmp_path, "alpha_sweep")]
    assert holds == [slope > 0] * 5 + [True]


def test_hard_problems(tmp_path, inside):
    hard_problems.main(hard_problems.Args(seeds=1, runs=str(tmp_path / "runs"), results=str(tmp_path), fast=True))
    assert [verdict["claim"] for verdict in verdicts(tmp_path, "hard_problems")] == [10, 10]
    assert json.loads((tmp_path / "runs/ratio-1.1-0/args.json").read_text())["alpha"] == 1.1


@pytest.mark.parametrize("first", [-0.1, 0.1, 0.0])
@pytest.mark.parametrize("last", [-0.1, 0.1, 0.0])
def test_hard_problems_asks_for_a_crossing(first, last):
    random = torch.Generator().manual_seed(0)
    dpo = torch.rand(3, 50, len(hard_problems.NS), generator=random, dtype=torch.float64)
    ahead = torch.linspace(first, last, len(hard_problems.NS))
    noise = 0.02 * torch.randn(dpo.shape, generator=random, dtype=torch.float64)
    above, below = hard_problems.judge({1.0: dpo, 1.2: dpo + ahead + noise}, dict.fromkeys(hard_problems.NS, 0.5))
    words = {0.1: True, 0.0: None, -0.1: False}
    assert above.holds is words[last] and below.holds is words[-first]


def test_chance_of_a_right_working():
    """Token by token without padding, both orders of the products; and as often as it is sampled."""
    tokenizer = AutoTokenizer.from_pretrained(report.TOY / "model")
    model = LlamaForCausalLM.from_pretrained(report.TOY / "model").eval()
    problems = hard_problems.new_problems(3) + [hard_problems.make_toy.Problem("20+30*2", 2)]
    assert [problem.difficulty for problem in problems] == [4, 4, 4, 2]
    found = hard_problems.chances(report.TOY / "model", problems, (1.0, 0.7))

    def stepwise(question, text, temperature):
        ids = tokenizer(f"<bos>Q: {question}\nA: {text}<eos>", add_special_tokens=False).input_ids
        start, chance = len(tokenizer(f"<bos>Q: {question}\nA: ", add_special_tokens=False).input_ids), 1.0
        for place in range(start, len(ids)):
            with torch.no_grad():
                logits = model(torch.tensor([ids[:place]])).logits[0, -1]
            chance *= (logits / temperature).softmax(-1)[ids[place]].item()
        return chance

    for problem, row in zip(problems, found.tolist()):
        lines = problem.solution().split("\n")
        texts = ["\n".join(lines)]
        if problem.difficulty == 4:
            texts.append("\n".join([lines[1], lines[0], *lines[2:]]))
        for temperature, chance in zip((1.0, 0.7), row):
            assert chance == pytest.approx(sum(stepwise(problem.question, t, temperature) for t in texts), rel=1e-4)

    torch.manual_seed(0)
    samples = hard_problems.make_toy.sample(model, tokenizer, problems, 100)
    for problem, texts, (chance, _) in zip(problems, samples, found.tolist()):
        first, second, *rest = problem.solution().split("\n")
        right = {"\n".join([first, second, *rest])} | {"\n".join([second, first, *rest])}
        error = (chance * (1 - chance) / 100) ** 0.5
        assert abs(sum(text in right for text in texts) / 100 - chance) < 4 * error + 0.01


def test_eps_control(tmp_path, inside):
    args = eps_control.Args(seeds=1, problems=2, n=2, runs=str(tmp_path / "runs"), results=str(tmp_path), fast=True)
    eps_control.main(args)
    assert [verdict["claim"] for verdict in verdicts(tmp_path, "eps_control")] == [12] * 6


def test_confused_pairs_have_their_labels_exchanged(tmp_path):
    path = eps_control.confuse(tmp_path / "runs/pairs.jsonl")
    before, after = ([json.loads(line) for line in one.read_text().splitlines()]
                     for one in (report.TOY / "train.jsonl", path))  # fmt: skip
    exchanged = [{"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]} for row in before]
    assert all(row in pair for row, *pair in zip(after, before, exchanged))
    assert sum(row != own for row, own in zip(after, before)) == 512


def test_paired_error_is_that_of_drawing_seeds_and_problems_again():
    """Against the scatter of means with every seed and every problem new."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    tables = [0.1 * draw(3, 1) + draw(1, 100) + 0.5 * draw(3, 100) for _ in range(2000)]
    scatter = torch.stack([one.mean() for one in tables]).std().item()
    errors = torch.tensor([eps_control.paired_error(one) for one in tables])
    assert scatter == pytest.approx((0.1**2 / 3 + 1 / 100 + 0.5**2 / 300) ** 0.5, rel=0.05)
    assert errors.square().mean().sqrt().item() == pytest.approx(scatter, rel=0.1)
    assert eps_control.paired_error(torch.tensor([[1.0, 3.0]])) == pytest.approx(1.0)  # one seed


@pytest.mark.parametrize(
    ("last", "at_least", "found"),
    [(0.5, 0.01, True), (0.305, 0.01, False), (0.2, 0.0, False), (0.305, 0.0, None)],
)
def test_the_smaller_step_decides(last, at_least, found):
    noise = (-0.001, 0.0, 0.001)
    values = {0.005: [0.1, 0.1, 0.1], 0.01: [0.3, 0.3, 0.3], 0.02: [last + d for d in noise]}
    if found is None:
        values[0.02] = [last + 10 * d for d in noise]
    assert eps_control.rises(values, at_least) is found


def test_neighbours_on_the_frontier():
    frontier = [(4.0, "c"), (1.0, "a"), (2.0, "b")]
    assert eps_control.around(1.5, frontier) == ["a", "b"] and eps_control.around(4.0, frontier) == ["b", "c"]
    assert eps_control.around(0.9, frontier) == eps_control.around(4.1, frontier) == []


@pytest.mark.parametrize(
    ("low", "high", "holds"), [(1.0, 2.0, True), (-1.0, -2.0, False), (1.0, -1.0, None), (1.0, 0.0, None)]
)
def test_above_both_neighbours(low, high, holds):
    noise = 0.1 * torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    noise -= noise.mean()
    assert eps_control.above_both([low + noise, high + noise]) is holds


@pytest.mark.slow
def test_did_entropy(tmp_path, inside):
    did_entropy.main(did_entropy.Args(seeds=1, runs=str(tmp_path / "runs"), results=str(tmp_path), fast=True))
    assert [verdict["claim"] for verdict in verdicts(tmp_path, "did_entropy")] == [13]


@pytest.mark.parametrize(("more", "holds"), [(0.5, True), (-0.5, False), (0.01, None)])
def test_did_entropy_is_undecided_within_the_error(more, holds, tmp_path, monkeypatch, inside):
    def found(method, rate, seed, args):
        entropy = 5 + (more + 0.1 * (seed - 1)) * (method == "DPO")
        return dict.fromkeys(("H(pi)", "H(ref)", "H(DID)", "H(DID) per token", "same samples"), entropy)

    monkeypatch.setattr(did_entropy, "train_and_measure", found)
    did_entropy.main(did_entropy.Args(results=str(tmp_path)))
    assert [verdict["holds"] for verdict in verdicts(tmp_path, "did_entropy")] == [holds]


def test_did_entropy_wants_both_models():
    with pytest.raises(SystemExit, match="--model and --reference go together"):
        did_entropy.main(did_entropy.Args(model="somewhere"))


def test_entropy_of_one_token_is_the_exact_one():
    """With one token per sample the entropy is that of the softmax after the prompt."""
    model = LlamaForCausalLM.from_pretrained(report.TOY / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(report.TOY / "model")
    args = did_entropy.Args(max_new_tokens=1, samples=400)
    prompts = did_entropy.read_prompts(str(report.TOY / "near_test.jsonl"), tokenizer, args)[:12]
    assert len({len(prompt) for prompt in prompts}) > 1  # so that the shorter ones are padded
    with torch.no_grad():
        exact = []
        for prompt in prompts:
            logps = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
            exact.append(-(logps.exp() * logps).sum())
    exact, found = torch.stack(exact).mean().item(), did_entropy.entropy(model, [tokenizer.eos_token_id], prompts, args)
    assert exact > 0.1
    assert found[0] == pytest.approx(exact, rel=0.05)  # 4,800 samples
    assert found[1] == found[0]


@pytest.mark.slow
def test_reference_cost(tmp_path):
    reference_cost.main(reference_cost.Args(results=str(tmp_path), fast=True))
    found = verdicts(tmp_path, "reference_cost")
    assert [(verdict["claim"], verdict["where"]) for verdict in found] == [(14, "toy"), (14, "toy"), (14, "exact")]
    # Mistral-7B by hand: embeddings and head, 32 layers, norms. 4 + 4 + 8 bytes each, 2 of linear layers for autocast.
    linear = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 32_000 * 4096
    rest = 32_000 * 4096 + 65 * 4096
    one, whole, sharded, half = reference_cost.count(lambda: sides.make_mistral({}, False, "meta")).values()
    assert one == (18 * linear + 16 * rest, 2 * linear + 4 * rest)
    assert whole == (2 * (linear + rest), 2 * (linear + rest))
    assert sharded == (whole[0], whole[1] / 8) and half == (whole[0] / 2, whole[1] / 8)


def test_bytes_of_a_step_are_those_of_a_real_one():
    model = tiny.model("llama", vocab_size=64).float()
    with torch.device("meta"):
        expected = reference_cost.trained(type(model)(model.config))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.arange(8)[None]).logits.sum().backward()
    optimizer.step()
    state = [value for own in optimizer.state.values() for value in own.values() if value.dim()]
    held = [*model.parameters(), *(parameter.grad for parameter in model.parameters()), *state]
    assert sum(tensor.untyped_storage().nbytes() for tensor in held) == expected == 16 * model.num_parameters()


def verdict(claim, holds):
    line = {"claim": claim, "paper": "P", "statement": "S", "threshold": "T", "holds": holds, "numbers": "1"}
    return line | {"where": "exact"}


def test_all_joins_the_verdicts_in_order(tmp_path):
    for name, claims in (("tabular", (3, 3, 4)), ("gaussians", (1, 2))):
        data = {"commit": "c", "machine": "m", "seconds": 1, "fast": False}
        data["verdicts"] = [verdict(claim, {4: False, 2: None}.get(claim, True)) for claim in claims]
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    page = run_all.join(tmp_path)
    tables = [[line.split(" | ") for line in part.splitlines() if line.startswith("| ")] for part in page.split("## E")]
    first, every = tables[0][2:], tables[1][2:]
    assert [row[0] for row in first] == [f"| {number}" for number in range(1, 16)]
    cells = ["holds ([gaussians](#gaussians))", "undecided ([gaussians](#gaussians))"]
    cells += ["2 x holds ([tabular](#tabular))", "does not hold ([tabular](#tabular))"]
    assert [row[3] for row in first[:4]] == cells
    assert [row[0] for row in every] == ["| 1", "| 2", "| 3", "| 3", "| 4"]
    said = ["**holds**", "**undecided**", "**holds**", "**holds**", "**does not hold**"]
    assert [row[4] for row in every] == said
    assert "5 tests: holds 3, undecided 1, does not hold 1" in page
    assert "gaussians.png" in page and "tabular.png" in page and "on m." in page


def test_an_effect_within_its_error_is_undecided():
    assert report.decide(0.1, 0.04) is True and report.decide(-0.1, 0.04) is False
    assert report.decide(0.1, 0.06) is None and report.decide(0.1, 0.04, at_least=0.05) is None


def test_all_runs_what_it_is_told_to(tmp_path):
    run_all.main(run_all.Args(only=("tabular",), results=str(tmp_path), fast=True))
    assert "From fast versions" in (tmp_path / "README.md").read_text()
    with pytest.raises(SystemExit, match="no experiment is called none"):
        run_all.main(run_all.Args(only=("none",), results=str(tmp_path)))


def test_every_experiment_is_run_by_all():
    files = {path.stem for path in (report.ROOT / "experiments").glob("*.py")} - {"all", "report"}
    assert files == {*run_all.EXPERIMENTS, *(name for name in run_all.APART if name in files)}


def test_fast_versions_never_replace_the_results():
    fast = alpha_sweep.Args(fast=True)
    assert report.folder(fast) == report.ROOT / "runs/fast"
    assert report.folder(alpha_sweep.Args()) == report.RESULTS
