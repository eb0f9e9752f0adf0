"""dpo_pg.py: the projection under every kind of gradient, sharded or not, and what its steps do to the likelihoods."""

import copy
import itertools

import pytest
import tiny
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from test_reference import in_processes, until
from tiny import metrics
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import common
import dpo_pg
import hdpo
from dpo_pg import project


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """They take longer than the runs."""
    for script in (dpo_pg, hdpo):
        for name in ("plot_curves", "write_samples"):  # both take longer than these runs
            monkeypatch.setattr(script.look, name, lambda *_: None)


# ---------------------------------------------------------------------------------------------------------------------
# Definition H.1

SHAPES = ((7,), (3, 5), (2, 2, 2), (1,))


def gradients(kind, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    if kind == "zero":
        made = [torch.zeros_like(g) for g in made]
    if kind == "sparse":
        made = [g * (torch.rand(g.shape, generator=generator) < 0.1) for g in made]
        made[0][0] = 1.0
    if isinstance(kind, float):
        made = [g * kind for g in made]
    return [g.to(dtype) for g in made]


def flat(tensors):
    """All of them as one float64 vector in units of its largest entry, and that unit."""
    vector = torch.cat([g.double().flatten() for g in tensors])
    unit = vector.abs().max().item() or 1.0
    return vector / unit, unit


def check(chosen, rejected, tolerance):
    """<g, g_w> >= 0, <g, g_l> <= 0, and 0 when active, all relative to norms; g is g_w without its part along g_l."""
    kept = [g.clone() for g in (*chosen, *rejected)]
    got = project(chosen, rejected)
    assert all(torch.equal(a, b) for a, b in zip((*chosen, *rejected), kept)), "arguments were changed"
    assert all(
        torch.isfinite(g).all() and g.dtype == torch.promote_types(c.dtype, torch.float32) for g, c in zip(got, chosen)
    )
    (g_w, unit), (g_l, _) = flat(chosen), flat(rejected)
    g = torch.cat([g.double().flatten() for g in got]) / unit
    product, norm = (g_w @ g_l).item(), (g_l @ g_l).item()
    expected = g_w - max(0, product) / norm * g_l if norm else g_w
    assert (g - expected).norm() <= tolerance * g_w.norm()
    assert (g @ g_w).item() >= -tolerance * (g_w @ g_w)
    bound = tolerance * (g_w.norm() * g_l.norm()).item()
    assert (g @ g_l).item() <= bound
    if product > bound:
        assert abs((g @ g_l).item()) <= bound and (g @ g_w).item() <= (g_w @ g_w).item() + bound
    elif product < 0:
        assert torch.equal(g, g_w)
    overwritten = project([g.clone() for g in chosen], rejected, inplace=True)
    assert all(torch.equal(a, b) for a, b in zip(overwritten, got))


KINDS = [1.0, 1e-200, 1e150, 1e-310, 1e300, "zero", "sparse"]


@pytest.mark.parametrize("kinds", itertools.product(KINDS, KINDS), ids=str)
def test_float64(kinds):
    """Random directions of every pair of sizes; the four signs make the projection active and not."""
    if kinds == (1e300, 1e300):
        pytest.skip("their inner product is more than float64 can hold")
    for seed in range(4):
        chosen, rejected = gradients(kinds[0], seed), gradients(kinds[1], seed + 10)
        tolerance = 1e-6 if 1e-310 in kinds else 1e-13  # subnormal numbers have few digits
        check(chosen, rejected, tolerance)
        check(chosen, [-g for g in rejected], tolerance)


@pytest.mark.parametrize("scale", [1.0, -1.0, 3.0, 1e-150, 1e120, -1e120])
def test_parallel(scale):
    """g_l = c g_w: nothing is left of g_w where c > 0, all of it where c < 0."""
    chosen = gradients(1.0)
    rejected = [scale * g for g in chosen]
    check(chosen, rejected, 1e-14)
    left = torch.cat([g.flatten() for g in project(chosen, rejected)])
    assert left.norm() < 1e-14 if scale > 0 else torch.equal(left, torch.cat([g.flatten() for g in chosen]))


def test_nearly_parallel():
    """What is left may be 1e-8 of g_w and still does not point along g_l."""
    chosen = gradients(1.0)
    check(chosen, [g + 1e-8 * e for g, e in zip(chosen, gradients(1.0, seed=1))], 1e-14)


@pytest.mark.parametrize("kind", [1.0, 1e-30, 1e-42, 1e30, 1e37, "zero", "sparse"])
@pytest.mark.parametrize("other", [1.0, 1e-30, 1e30, "sparse"])
def test_float32(kind, other):
    """Products of such numbers leave float32's range; the projection does not."""
    for sign in (1, -1):
        chosen, rejected = gradients(other, 0, torch.float32), [sign * g for g in gradients(kind, 1, torch.float32)]
        check(chosen, rejected, 1e-2 if kind == 1e-42 else 1e-6)


def test_bf16():
    """bf16 gradients are projected in float32."""
    for seed in range(8):
        check(gradients(1.0, seed, torch.bfloat16), gradients(1.0, seed + 10, torch.bfloat16), 1e-6)


def test_zero_rejected():
    """No division by zero: g is g_w."""
    chosen = gradients(1.0)
    assert all(torch.equal(a, b) for a, b in zip(project(chosen, gradients("zero")), chosen))


def test_one_inner_product():
    """g_w = ((1), (-10)), g_l = ((1), (10)): <g_w, g_l> = 1 - 100 < 0, so nothing is projected, though the first
    layer's own product is 1. g_w = ((1), (10)), g_l = ((1), (-1), ...): 1 - 10 < 0 the same; with g_l = ((-1), (1))
    it is 9 of norm 2, and g = g_w - 4.5 g_l = ((5.5), (5.5)), where a layer alone would give ((1), (0)).
    """

    def layers(*values):
        return [torch.tensor([value], dtype=torch.float64) for value in values]

    assert project(layers(1, -10), layers(1, 10)) == layers(1, -10)
    assert project(layers(1, 10), layers(1, -1)) == layers(1, 10)
    assert project(layers(1, 10), layers(-1, 1)) == layers(5.5, 5.5)


def test_inplace():
    """With inplace the result is the storage of g_w, so that no second copy of the gradients is made."""
    chosen, rejected = gradients(1.0), [g + r for g, r in zip(gradients(1.0), gradients(0.1, 1))]
    before = [g.data_ptr() for g in chosen]
    expected = project(chosen, rejected)
    got = project(chosen, rejected, inplace=True)
    assert [g.data_ptr() for g in got] == before and all(torch.equal(a, b) for a, b in zip(got, expected))
    assert not torch.equal(torch.cat([g.flatten() for g in got]), torch.cat([g.flatten() for g in gradients(1.0)]))


# ---------------------------------------------------------------------------------------------------------------------
# Gradients of a model


def half_gradients(model, rows):
    """g_w and g_l of a global batch in one micro-batch, as the script takes them."""
    weights, both = list(model.parameters()), []
    for number, part in enumerate(("chosen", "rejected")):
        with tiny.packed(model):
            logps = common.response_logps(model, common.collate(rows, (part,)))[number]
        (-logps.mean()).backward()
        both.append([p.grad for p in weights])
        model.zero_grad()
    return both


def plain(model, rows, name):
    """Mean -log-prob of one of the responses, one plain forward a sequence."""
    losses = []
    for row in rows:
        logits = model(torch.tensor([row["prompt_ids"] + row[f"{name}_ids"]])).logits[
            0, len(row["prompt_ids"]) - 1 : -1
        ]
        losses.append(-logits.log_softmax(-1).gather(1, torch.tensor(row[f"{name}_ids"])[:, None]).sum())
    return torch.stack(losses).mean()


def test_half_batches(wide):
    """The chosen-only and the rejected-only pass have the gradients of plain forwards, to 1e-9."""
    model, rows = tiny.model(), tiny.pair_rows()
    for name, ours in zip(("chosen", "rejected"), half_gradients(model, rows)):
        theirs = torch.autograd.grad(plain(model, rows, name), list(model.parameters()))
        assert all((a - b).abs().max() < 1e-9 * max(1.0, b.abs().max()) for a, b in zip(ours, theirs))


def near_duplicates():
    """One token differs: what makes one response likelier makes the other likelier too."""
    rows = tiny.pair_rows()
    for row in rows:
        row["rejected_ids"] = [*row["chosen_ids"], 20, 2]
        row["chosen_ids"] = [*row["chosen_ids"], 30, 2]
    return rows


def opposites():
    """One token after the same prompt, this or that: what makes one likelier makes the other less so."""
    return [{"prompt_ids": [9, 10, 11], "chosen_ids": [12], "rejected_ids": [13]}]


@pytest.mark.parametrize("active", [True, False])
def test_theorems_h4_and_h5(active, wide):
    """One SGD step of lr e moves L_w by -e <g, g_w> and L_l by -e <g, g_l> up to e^2: the first falls, the second does
    not fall, and to first order stands still where the projection is active.
    """
    model, rows = tiny.model(), near_duplicates() if active else opposites()
    if not active:
        rows[0]["rejected_ids"] = [model(torch.tensor([rows[0]["prompt_ids"]])).logits[0, -1].argmax().item()]
    g_w, g_l = half_gradients(model, rows)
    assert (dpo_pg.inner(g_w, g_l) > 0) == active
    g = project(g_w, g_l)
    along_w, along_l = dpo_pg.inner(g, g_w).item(), dpo_pg.inner(g, g_l).item()
    assert along_w > 0 and (abs(along_l) < 1e-9 if active else along_l < 0)
    size = dpo_pg.inner(g, g).item() ** 0.5
    moves = []
    for e in (1e-4 / size, 1e-5 / size):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for parameter, step in zip(moved.parameters(), g):
                parameter -= e * step
            moves.append([(plain(moved, rows, n) - plain(model, rows, n)).item() / e for n in ("chosen", "rejected")])
    for (chosen, rejected), relative in zip(moves, (1e-2, 1e-3)):
        assert chosen < 0 and chosen == pytest.approx(-along_w, rel=relative)
        assert rejected == pytest.approx(-along_l, abs=relative * size * dpo_pg.inner(g_l, g_l).item() ** 0.5)
        assert active or rejected > 0
    if active:  # what is left is of second order: ten times less at a tenth of the step
        assert moves[1][1] == pytest.approx(moves[0][1] / 10, rel=0.05)


@pytest.mark.parametrize("shared", [0.0, 2.0], ids=["idle", "active"])
@pytest.mark.parametrize("margin", [0.0, 2.0])
def test_dpo_loss_may_rise(shared, margin):
    """What Corollary H.5.1 overlooks. Two prompts with outcomes w, l and o, uniform at (u, v) = 0; u lifts w of the
    first by 3 and lowers w of the second by 1, v lifts all w and l by `shared`. Both means move as H.4 and H.5 say. At
    the reference (margin 0) DPO's loss falls too; where the first pair has a margin of 2 already, DPO weighs it with
    s(-2) = 0.12 and the second, which the step hurts, with 0.5, and 3 * 0.12 < 0.5: its loss rises.
    """
    ref = torch.tensor([[-margin, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64).log_softmax(1)

    def losses(u, v):
        zero = torch.zeros_like(u)
        logits = torch.stack([3 * u + shared * v, shared * v, zero, shared * v - u, shared * v, zero]).view(2, 3)
        a, b, _ = logits.log_softmax(1).unbind(1)
        return -a.mean(), -b.mean(), hdpo.hdpo_loss(a, b, ref[:, 0], ref[:, 1], alpha=1.0, beta=1.0).mean()

    start = [torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2)]
    before = losses(*start)
    g_w, g_l, g_dpo = (torch.autograd.grad(loss, start, retain_graph=True) for loss in before)
    assert (dpo_pg.inner(g_w, g_l) > 0) == (shared > 0)
    g = project(list(g_w), list(g_l))
    assert dpo_pg.inner(g, g_w) > 0 and dpo_pg.inner(g, g_l) < 1e-15
    assert (dpo_pg.inner(g, g_dpo) < 0) == (margin > 0)
    moved = [(new - old).item() for new, old in zip(losses(*(x - 1e-4 * d for x, d in zip(start, g))), before)]
    assert moved[0] < 0 and moved[1] > -1e-8  # what is left of the second is of second order
    assert (moved[2] > 0) == (margin > 0) and abs(moved[2]) > 1e-6


def sharded_update(folder, model, rows):
    """In one of several processes: one SGD step with the model sharded and each process running its share of pairs."""
    accelerator = Accelerator(cpu=True)
    rank, world = accelerator.process_index, accelerator.num_processes
    for layer in (*model.model.layers, model):
        fully_shard(layer)
    grads = half_gradients(model, rows[rank::world])
    assert all(isinstance(g, DTensor) for g in grads[0])
    expected = project(*grads)
    for parameter, gradient, other in zip(model.parameters(), project(*grads, inplace=True), expected):
        assert torch.equal(gradient.full_tensor(), other.full_tensor())
        parameter.grad = gradient
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    weights = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}
    if rank == 0:
        torch.save(weights, folder / "weights.pt")


@pytest.mark.parametrize("rows", [near_duplicates(), tiny.pair_rows()], ids=["near-duplicates", "random"])
def test_fsdp(rows, tmp_path):
    """FSDP2 over two CPU processes: gradients are DTensors, the update is the single process's."""
    model = tiny.model(dtype=torch.float32, tie_word_embeddings=False)
    in_processes(sharded_update, tmp_path, model, rows)
    got = torch.load(tmp_path / "weights.pt")
    for (name, parameter), gradient in zip(model.named_parameters(), project(*half_gradients(model, rows))):
        torch.testing.assert_close(got[name], parameter.detach() - 0.01 * gradient, rtol=0, atol=1e-6)
        assert gradient.any()


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
    options |= {"lr": 1e-4, "batch_size": 6, "steps": 6, "save_every": 2, "warmup": 0}
    return dpo_pg.Args(**{**options, **changes})


def weights(out):
    return load_file(out / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    dpo_pg.main(run_args(out, made))
    return out


def test_metrics(whole):
    """Inner product, cosine, norms and activity agree with each other, and the first step is of the untouched model."""
    for row in metrics(whole)[1:]:
        norms = row["gradients/chosen_norm"] * row["gradients/rejected_norm"]
        assert row["gradients/cosine"] == pytest.approx(row["gradients/inner"] / norms)
        assert -1 <= row["gradients/cosine"] <= 1 and row["gradients/active"] == (row["gradients/inner"] > 0)
        left = row["gradients/chosen_norm"] * (1 - max(0, row["gradients/cosine"]) ** 2) ** 0.5
        assert row["grad_norm"] == pytest.approx(left, rel=1e-3)


@pytest.mark.parametrize("step", [3, 4])
def test_resume(step, made, whole, tmp_path):
    """Ended behind a step and resumed: the same bits."""
    out = tmp_path / "run"
    until(step, dpo_pg.main, run_args(out, made))
    dpo_pg.main(run_args(out, made, resume=True))
    assert metrics(out) == metrics(whole)
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(out).items())


def test_ddp_and_micro_batches(made, tmp_path):
    """Two processes, and micro-batches of a pair or two: the update of one process and one micro-batch, to 1e-6.

    The gradient's norm is 1e-6, for the reason that test_run.py gives beside SPLIT.
    """
    changes = {"optimizer": "adamw", "max_grad_norm": 1e-6}
    dpo_pg.main(run_args(tmp_path / "one", made, **changes))
    dpo_pg.main(run_args(tmp_path / "many", made, **changes, tokens_per_device=64))
    in_processes(dpo_pg.main, run_args(tmp_path / "two", made, **changes, tokens_per_device=96))
    base = load_file(made / "base" / "model.safetensors")
    for name, expected in weights(tmp_path / "one").items():
        for other in ("many", "two"):
            assert (weights(tmp_path / other)[name] - expected).abs().max() < 1e-6
        assert (expected - base[name]).abs().max() > 1e-5
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-4)


def test_log_dpo_loss(made, tmp_path, wide):
    """log 2 before the first update, stored log-probs of the initial model, and the same training."""
    dpo_pg.main(run_args(tmp_path / "run", made, model=str(made / "wide"), log_dpo_loss=True))
    rows = metrics(tmp_path / "run")[1:]
    assert rows[0]["dpo_loss"] == pytest.approx(0.693147, abs=1e-5) and abs(rows[0]["logps/chosen_delta"]) < 1e-12
    assert rows[-1]["dpo_loss"] != pytest.approx(0.693147, abs=1e-4)


TOY = tiny.ROOT / "toy"


def toy_run(out, script, seed, **changes):
    """The metrics on 64 held-out pairs before and after a few steps."""
    pairs = out.parent / "held_out.jsonl"
    pairs.write_text("".join((TOY / "near_test.jsonl").read_text().splitlines(True)[:64]))
    options = {"model": str(TOY / "model"), "dataset": str(TOY / "near_train.jsonl"), "eval_dataset": str(pairs)}
    options |= {"batch_size": 32, "warmup": 0, "max_length": 512, "max_prompt_length": 256, "seed": seed}
    script.main(script.Args(**options, output_dir=str(out), **changes))
    return metrics(out)[0], metrics(out)[-1]


@pytest.mark.skipif(not (TOY / "model").exists(), reason="toy/make_toy.py has not been run")
@pytest.mark.parametrize("seed", range(3))
def test_near_duplicates_of_the_toy(seed, tmp_path):
    """DPO lowers both log-probs; DPO-PG raises the chosen one, not the rejected one, and DPO's loss falls with it."""
    start, end = toy_run(tmp_path / "dpo", hdpo, seed, alpha=1.0, beta=0.1, lr=3e-4, steps=12)
    assert end["eval/loss"] < start["eval/loss"]
    assert end["eval/logps/chosen"] < start["eval/logps/chosen"]
    assert end["eval/logps/rejected"] < start["eval/logps/rejected"]
    start, end = toy_run(tmp_path / "pg", dpo_pg, seed, lr=1e-5, steps=8, log_dpo_loss=True)
    assert end["eval/logps/chosen"] > start["eval/logps/chosen"]
    assert end["eval/logps/rejected"] <= start["eval/logps/rejected"]
    assert end["eval/dpo_loss"] < start["eval/dpo_loss"]
    assert any(row["gradients/active"] for row in metrics(tmp_path / "pg")[1:])
