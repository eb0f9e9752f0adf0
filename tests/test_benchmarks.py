"""benchmarks/: the parts that need neither a GPU nor TRL. Nothing here looks at how long something took."""

import sys

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(tiny.ROOT / "benchmarks"))

import gpu  # noqa: E402
import options  # noqa: E402
import speed  # noqa: E402
import steps  # noqa: E402
from sides import BETA, VOCABULARY, make_model, make_pairs, stored_dpo_losses  # noqa: E402

import common  # noqa: E402

SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


@pytest.mark.parametrize("objective", gpu.OBJECTIVES)
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_every_variant_takes_its_steps(tuning, objective):
    found = gpu.side(SHAPE, tuning, objective, "hh", "cpu", gpu.Args(pairs=2, steps=1))
    assert len(found["seconds"]) == 1 and found["flops"] > 0 and found["tokens_per_second"] > 0
    assert found["off"] < 1e-3 and found["off_padded"] < 1e-3  # float32: rounding alone
    shown = gpu.table({"one": found, "two": {"failed": "out of memory"}}, rate=1e12, peak=None)
    assert "out of memory" in shown and shown.count("\n") == 3


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_trl_takes_the_same_steps(tuning):
    """Where TRL is installed: the same random weights and pairs, and so the same log-probs."""
    pytest.importorskip("trl")
    args = gpu.Args(pairs=2, steps=1, trl_batches=(1, 2))
    ours = gpu.side(SHAPE, tuning, "dpo stored", "hh", "cpu", args)
    found = gpu.trl(sys.executable, SHAPE, tuning, "hh", "cpu", args, ours)
    assert found["off"] < 1e-3 and found["device_batch"] in (1, 2) and len(found["seconds"]) == 1
    assert "| TRL |" in gpu.table({"TRL": found}, rate=1e12, peak=1e13)


def test_trl_that_fails_is_a_line_of_the_table():
    args = gpu.Args(pairs=4, steps=1, trl_batches=(3, 4))  # 3 does not divide 4
    found = gpu.trl(sys.executable, SHAPE, "lora", "hh", "cpu", args, {})
    assert "3 pairs a device do not divide a step of 4" in found["failed"] or "No module named 'trl'" in found["failed"]
    assert found["failed"] in gpu.table({"TRL": found}, rate=1e12, peak=None)


def test_operations_are_those_that_torch_counts():
    """Linear layers and the head of one unshared forward and backward; attention is left to the formula's last term."""
    model = gpu.make_model(SHAPE, "full", "cpu")
    model.activation_checkpointing_disable()
    config, row = model.config, make_pairs("hh", 1)[0]
    prompt, response = len(row["prompt_ids"]), len(row["chosen_ids"])
    ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"][:-1]])
    with FlopCounterMode(display=False) as counter:
        model(
            ids, logits_to_keep=torch.arange(prompt - 1, prompt - 1 + response), use_cache=False
        ).logits.sum().backward()
    counted = sum(
        value for name, value in counter.get_flop_counts()["Global"].items() if str(name) in ("aten.mm", "aten.addmm")
    )
    pairs = prompt * (prompt + 1) / 2 + (response - 1) * prompt + (response - 1) * response / 2
    one = {"prompt_ids": row["prompt_ids"], "chosen_ids": row["chosen_ids"], "rejected_ids": [0]}  # a response of one
    extra = 6 * config.vocab_size * config.hidden_size  # token runs the head once more
    linear = gpu.step_flops(model, "full", [one]) - 12 * config.num_hidden_layers * config.hidden_size * pairs - extra
    norms = (
        6 * ids.numel() * config.hidden_size * (2 * config.num_hidden_layers + 1)
    )  # counted as weights by the formula
    assert counted == pytest.approx(linear - norms, rel=1e-6)


def test_steps_takes_as_many_turns_as_asked_for():
    found = steps.measure(("dgpo",), turns=steps.TURNS + 2)
    assert len(found["dgpo"][0]) == steps.TURNS + 2 and found["dgpo"][1] > 1e8


def test_the_old_ways_find_the_same():
    """What options.py compares is the same computation: a dense mask, a padded batch, attention by segments."""
    model, rows = tiny.model("llama", "sdpa", torch.float32), tiny.pair_rows()
    batch = common.collate(rows)
    logits = options.dense_logits(model, batch)
    dense, padded = (
        common.sum_responses(common.token_logps(logits, batch.targets), batch),
        options.padded_logps(model, rows),
    )
    model.set_attn_implementation(common.ATTENTION)
    for own in (dense, padded):
        torch.testing.assert_close(own, common.response_logps(model, batch), rtol=1e-4, atol=1e-4)


def test_our_side_of_the_table():
    """It has the log-probs of plain forwards stored before its first step, and takes as many steps as it is told."""
    side = speed.Side(sys.executable, "our_side.py", name="hh", batch_size=2, steps=2, tokens_per_device=8192)
    assert all(side.step()["seconds"] > 0 for _ in range(2))
    plain = speed.plain_logps(make_model().eval(), make_pairs("hh", 2))
    assert side.ready["logps"] == pytest.approx(plain, abs=1e-2)
    side.end()


def test_stored_reference_is_the_policy_itself():
    """However long a response is, the loss is that of a first step: no gradient fades to a denormal number."""
    chosen, rejected = torch.tensor([-10.0, -3000.0], requires_grad=True), torch.tensor([-2000.0, -5.0])
    losses = stored_dpo_losses(chosen, rejected)
    torch.testing.assert_close(losses.detach(), torch.full((2,), 2.0).log())
    (slope,) = torch.autograd.grad(losses.sum(), chosen)
    torch.testing.assert_close(slope, torch.full((2,), -BETA / 2))


@pytest.mark.parametrize(
    ("seconds", "chosen", "tried"),
    [
        ({1: 2.0, 2: 2.2, 4: 3.0, 8: 1.0}, 1, [1, 2, 4]),  # 4 is so slow that 8 is not tried
        ({1: 2.0, 2: 1.5, 4: 1.6, 8: 1.7}, 2, [1, 2, 4, 8]),
        ({1: 2.0, 2: None}, 1, [1, 2]),  # out of memory
    ],
)
def test_trl_at_its_fastest_batch(monkeypatch, seconds, chosen, tried):
    """The side that is handed on is of the fastest batch, has all its pairs, and is as many steps in as the other."""

    class Fake:
        def __init__(self, _python, _script, device_batch, steps):
            self.device_batch, self.steps, self.taken, self.open = device_batch, steps, 0, True

        def step(self):
            if seconds[self.device_batch] is None:
                raise speed.Failed("DefaultCPUAllocator: can't allocate memory")
            self.taken += 1
            return {"seconds": seconds[self.device_batch] + 9 * (self.taken == 1)}  # the first step warms up

        def end(self):
            self.open = False

    monkeypatch.setattr(speed, "Side", Fake)
    side, batch, found = speed.fastest_trl("python", speed.Args(), {"steps": 6})
    assert (batch, list(found)) == (chosen, tried)
    assert (side.device_batch, side.steps, side.taken, side.open) == (chosen, 6, speed.CHOOSING, True)
    assert {one: found[one] for one in tried} == {one: seconds[one] for one in tried}


def test_no_gpu_is_said():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert tiny.run("benchmarks/gpu.py").stdout.strip().endswith("no GPU here: nothing was measured")
