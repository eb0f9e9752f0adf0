"""benchmarks/: what needs neither a GPU nor, but for one test, TRL. Nothing here looks at how long something took."""

import dataclasses
import inspect
import itertools
import json
import sys
from pathlib import Path

import pytest
import tiny
import torch
from test_packing import slow_varlen
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(tiny.ROOT / "benchmarks"))

import gpu  # noqa: E402
import options  # noqa: E402
import speed  # noqa: E402
import steps  # noqa: E402
from sides import BETA, VOCABULARY, make_mistral, make_model, make_pairs, stored_dpo_losses  # noqa: E402

import common  # noqa: E402

SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


@pytest.fixture
def small(monkeypatch, tmp_path):
    """gpu.py on the CPU with a tiny model, its items one after the other in this process."""
    values = {"DEVICE": "cpu", "SHAPE": SHAPE, "LAYERS": 2, "layers_that_fit": lambda: 4, "matmul_rate": lambda: 1e12}
    values["launch"] = lambda item, args, _seconds: gpu.ITEMS[item](args)
    for name, value in values.items():
        monkeypatch.setattr(gpu, name, value)
    return gpu.Args(lengths="hh", pairs=2, steps=1, trl_batches=(1, 2), save=str(tmp_path / "found"))


class TrlSide:
    """In place of TRL: the first per-device batch runs, the second does not."""

    def __init__(self, _python, _script, device_batch, **spec):
        self.ready, self.steps = {"logps": [-1.0]}, spec["steps"]
        if device_batch == 2:
            raise speed.Failed("CUDA out of memory")

    def step(self):
        return {"seconds": 2.0, "peak": 10**9}

    def end(self):
        pass


@pytest.mark.slow
def test_whole_list_for_a_gpu(small, monkeypatch):
    """Each item has its rows in both files, the one that fails its error, and the rest go on."""
    monkeypatch.setitem(gpu.ITEMS, "tests", lambda _args: 1 / 0)
    monkeypatch.setitem(gpu.ITEMS, "resume", lambda _args: [("resume", {"text": "as below"})])
    monkeypatch.setattr(gpu, "Side", TrlSide)
    gpu.main(small)
    rows = [json.loads(line) for line in Path(f"{small.save}.jsonl").read_text().splitlines()]
    found, page = {row["title"]: row for row in rows}, Path(f"{small.save}.md").read_text()
    assert list(dict.fromkeys(row["item"] for row in rows)) == list(gpu.BUDGET)
    assert all(title in page for title in found)
    failed = {title: row["failed"] for title, row in found.items() if "failed" in row}
    assert failed.pop("tests") == "division by zero"
    assert {failed.pop(f"trl {tuning}") for tuning in ("lora", "full")} == {"CUDA out of memory"}
    assert not failed
    for model in ("lora, 2 layers", "full, 2 layers", "full, 4 layers"):
        noise = found[f"hh, {model}, log-probs"]
        assert noise["off"] < 1e-3 and noise["off_padded"] < 1e-3  # float32: rounding alone
        for objective in gpu.OBJECTIVES:
            row = found[f"hh, {model}, {objective}"]
            assert len(row["seconds"]) == 1 and row["flops"] > 0 and row["tokens_per_second"] > 0
    assert page.count("dgpo / dpo live: time") == 3 and page.count("on this line 2 layers take") == 4
    gpu.main(dataclasses.replace(small, minutes=0))
    rows = [json.loads(line) for line in Path(f"{small.save}.jsonl").read_text().splitlines()]
    assert {row["failed"] for row in rows} == {"not run: time"} and len(rows) == len(gpu.BUDGET)


def test_item_of_its_own_process():
    """Its rows come through; what ends it is its error, here that there is no GPU, or its time."""
    if torch.cuda.is_available():
        pytest.skip("there is one")
    ((title, found),) = gpu.launch("tests", gpu.Args(), 600)
    assert title == "tests" and " skipped" in found["text"]
    with pytest.raises(speed.Failed, match="CUDA"):
        list(gpu.launch("device", gpu.Args(), 600))
    with pytest.raises(speed.Failed, match="ended after 0 s"):
        list(gpu.launch("device", gpu.Args(), 0.01))


@pytest.mark.slow
def test_toy_is_killed_and_resumed(small, monkeypatch, tmp_path):
    """On a CPU a resumed run ends in the very weights of an undisturbed one."""
    model, pairs = tiny.write_model(tmp_path / "model"), tiny.write_pairs(tmp_path / "pairs.jsonl")
    flags = "--lr 1e-3 --batch-size 4 --steps 12 --save-every 2"
    monkeypatch.setattr(gpu, "TOY", ["--model", str(model), "--dataset", str(pairs), *flags.split()])
    monkeypatch.setattr(gpu, "KILLED", 3)
    ((_, found),) = gpu.resume(small)
    assert found["off"] == found["again"] == 0 < found["moved"]


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_trl_takes_the_same_steps(tuning, small):
    """Where TRL is installed: the same random weights and pairs, and so the same log-probs."""
    pytest.importorskip("trl")
    (_, one), (_, two) = gpu.trl(tuning, small)
    model, rows = gpu.make_model(tuning, one["layers"]), make_pairs("hh", 2)
    chosen, rejected = torch.tensor(gpu.noise(model, rows)["logps"]).chunk(2)
    for found in (one, two):
        assert found["logps"] == pytest.approx(torch.stack([chosen, rejected], 1).flatten().tolist(), abs=1e-3)


def test_padded_batches():
    """All pairs in their order, none with more tokens than it may have, none that could take the next one as well."""
    rows, most = make_pairs("hh", 40), 2000
    batches = gpu.split(rows, most, padded=True)
    assert [row for batch in batches for row in batch] == rows

    def tokens(batch):
        return sum(
            2 * max(len(row["prompt_ids"] + row[f"{p}_ids"]) for row in batch for p in ("chosen", "rejected"))
            for _ in batch
        )

    assert all(tokens(batch) <= most or len(batch) == 1 for batch in batches)
    assert all(tokens([*batch, after[0]]) > most for batch, after in itertools.pairwise(batches))


@pytest.mark.parametrize("lacks", [[], ["enable_gqa"], ["window_size", "enable_gqa"]])
def test_attention_under_an_older_torch(lacks, monkeypatch):
    """Without its flag for grouped heads the same call; without windows, or a scale, no FlashAttention."""
    takes = [name for name in ("scale", "window_size", "enable_gqa") if name not in lacks]

    def attend(q, k, v, *starts, **options):
        assert set(options) <= set(takes)
        return slow_varlen(q, k, v, *starts, **options | {"enable_gqa": True})

    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in takes]
    attend.__signature__ = inspect.Signature(parameters)
    batch = common.collate(tiny.pair_rows())
    torch.manual_seed(0)
    tokens = batch.input_ids.shape[1]
    inputs = [torch.randn(1, heads, tokens, 8) for heads in (4, 2, 2)]
    monkeypatch.setattr(common, "varlen_attn", attend)
    monkeypatch.setattr(common, "flash_takes", lambda *_: True)
    text = gpu.fit_attention()
    assert all(name in text for name in lacks) and ("lacks" in text) == bool(lacks)
    found, _ = common.packed_attention(torch.nn.Identity(), *inputs, None, packed=batch, sliding_window=7)
    monkeypatch.setattr(common, "flash_takes", lambda *_: False)
    expected, _ = common.packed_attention(torch.nn.Identity(), *inputs, None, packed=batch, sliding_window=7)
    torch.testing.assert_close(found, expected)


def test_operations_are_those_that_torch_counts():
    """Linear layers and the head of one unshared forward and backward; attention is left to the formula's last term."""
    model = make_mistral(SHAPE, False, "cpu")
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
