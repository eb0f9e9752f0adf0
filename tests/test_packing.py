"""Packed log-probs and gradients against one plain forward per sequence, and the plan of micro-batches."""

import pytest
import tiny
import torch
from datasets import Dataset

import common


def plain_logps(model, rows):
    """One unpadded, uncached, unmasked forward per sequence: the definition."""
    sums = {"chosen": [], "rejected": []}
    for row in rows:
        for name, values in sums.items():
            prompt, response = row["prompt_ids"], row[f"{name}_ids"]
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            logps = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])
            values.append(logps.sum())
    return torch.stack(sums["chosen"]), torch.stack(sums["rejected"])


def gradients(model, chosen, rejected):
    model.zero_grad()
    weights = torch.linspace(1, 2, len(chosen), dtype=chosen.dtype)  # so that swapped pairs or responses show
    (weights * (chosen - 0.7 * rejected)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


PACKABLE = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "phi3", "gpt2"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", PACKABLE)
def test_packed_equals_plain(family, attention, monkeypatch):
    """Sums and every gradient; sequences up to 42 tokens under windows of 7, responses that begin alike included.

    Models compute their norms (and eager its softmax) in float32 whatever their type, and rounding there would hide
    errors up to 1e-6; while they run here, float32 means float64.
    """
    if family == "gemma2" and attention == "sdpa":
        pytest.skip("Gemma-2 has no sdpa in transformers")
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    model, rows = tiny.model(family, attention), tiny.pair_rows()
    expected = plain_logps(model, rows)
    expected_gradients = gradients(model, *expected)
    packed = common.response_logps(model, common.collate(rows))
    for ours, plain in zip(packed, expected):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, plain.detach(), rtol=1e-9, atol=1e-9)
    for name, gradient in gradients(model, *packed).items():
        scale = max(1.0, expected_gradients[name].abs().max().item())
        assert (gradient - expected_gradients[name]).abs().max() < 1e-9 * scale, name


def test_windows_matter():
    """The test above would not notice windows if every sequence fitted into one."""
    rows = tiny.pair_rows()
    near = common.response_logps(tiny.model("mistral"), common.collate(rows))
    far = common.response_logps(tiny.model("mistral", sliding_window=None), common.collate(rows))
    assert (near[0] - far[0]).abs().max() > 1e-3


@pytest.mark.parametrize("part", ["chosen", "rejected"])
def test_half_batch(part):
    """With one part only that response is run, to the same sums; the other's are zero."""
    model, rows = tiny.model(), tiny.pair_rows()
    both, half = common.collate(rows), common.collate(rows, (part,))
    chosen, rejected = common.response_logps(model, half)
    mine, other = (chosen, rejected) if part == "chosen" else (rejected, chosen)
    torch.testing.assert_close(mine, dict(zip(("chosen", "rejected"), common.response_logps(model, both)))[part])
    assert not other.any() and half.input_ids.numel() < both.input_ids.numel()


def test_shared_tokens_run_once():
    """A near-duplicate pair costs little more than one sequence."""
    row = {"prompt_ids": [9] * 10, "chosen_ids": [*range(20, 40), 2], "rejected_ids": [*range(20, 39), 50, 2]}
    assert common.collate([row]).input_ids.numel() == 10 + 19 + 1 + 1


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_chunks(chunk):
    """Values and gradients of log_softmax, whatever the chunk; in bf16 as exact as bf16 can hold them."""
    scores = (3 * torch.randn(30, 11, dtype=torch.float64)).requires_grad_()
    targets, weights = torch.randint(0, 11, (30,)), torch.randn(30, dtype=torch.float64)
    expected = scores.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    slope = torch.autograd.grad((weights * expected).sum(), scores)[0]
    logps = common.token_logps(scores * 1, targets, chunk)
    torch.testing.assert_close(logps, expected)
    torch.testing.assert_close(torch.autograd.grad((weights * logps).sum(), scores)[0], slope)
    half = common.token_logps(scores.bfloat16(), targets, chunk)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), expected, atol=0.1, rtol=0.02)
    (half_slope,) = torch.autograd.grad((weights * half).sum(), scores)
    torch.testing.assert_close(half_slope, slope, atol=0.03, rtol=0.02)


def test_the_gradient_takes_the_place_of_the_logits():
    """No second tensor of their size, all the way to the head; who would use the logits again gets an error."""
    model, seen = tiny.model(), {}
    model.lm_head.register_forward_hook(lambda _module, _inputs, logits: seen.update(logits=logits))
    model.lm_head.register_full_backward_hook(lambda _module, _inputs, slopes: seen.update(slope=slopes[0]))
    chosen, rejected = common.response_logps(model, common.collate(tiny.pair_rows()))
    (chosen - rejected).sum().backward()
    assert seen["slope"].data_ptr() == seen["logits"].data_ptr()

    scores = torch.randn(30, 11, requires_grad=True)
    for also in (
        lambda logits: logits.square().sum(),
        lambda logits: 0,
    ):  # needs the logits in its backward pass, or not
        logits = scores * 1
        total = common.token_logps(logits, torch.randint(0, 11, (30,))).sum() + also(logits)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(total, logits, retain_graph=True)
            torch.autograd.grad(total, logits)


@pytest.mark.parametrize("family", [*PACKABLE, "bloom", "mamba"])
def test_start_up_check(family):
    """What can be packed passes; Bloom (ALiBi) and Mamba (recurrent state) are refused by name."""
    model = tiny.model(family, dtype=torch.float32)
    dataset = Dataset.from_list(tiny.pair_rows())
    if family in PACKABLE:
        common.check_packing(model, dataset, torch.device("cpu"))
    else:
        with pytest.raises(SystemExit, match="ForCausalLM.*use a plain decoder"):
            common.check_packing(model, dataset, torch.device("cpu"))


def test_start_up_check_finds_a_mask_that_is_ignored(monkeypatch):
    monkeypatch.setattr(common, "attention_mask", lambda *_: None)
    with pytest.raises(SystemExit, match="LlamaForCausalLM gives other log-probs"):
        common.check_packing(tiny.model(dtype=torch.float32), Dataset.from_list(tiny.pair_rows()), torch.device("cpu"))


def test_steps_take_every_pair_once():
    steps = [common.step_pairs(step, 10, 3, seed=5) for step in range(6)]
    for epoch in (steps[:3], steps[3:]):
        assert len({pair for step in epoch for pair in step}) == 9
    assert steps[:3] != steps[3:]
    assert steps[4] == common.step_pairs(4, 10, 3, seed=5)


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 60, 10_000])
def test_micro_batches(processes, tokens):
    lengths = [50, 10, 40, 20, 70, 30, 5, 45, 12, 8, 33, 21]
    pairs = list(range(12))
    plans = common.micro_batches(pairs, lengths, tokens, processes)
    assert sorted(pair for plan in plans for indices in plan for pair in indices) == pairs
    assert len(plans) == processes and len({len(plan) for plan in plans}) == 1
    assert all(sum(bool(i) * len(i) for i in plan) == 12 // processes for plan in plans)
    for indices in (indices for plan in plans for indices in plan):
        assert sum(lengths[i] for i in indices) <= tokens or len(indices) == 1


def test_flex_attention_forward():
    """Gemma-2's other attention, and CUDA's fast one; its backward pass has no CPU kernel."""
    rows = tiny.pair_rows()
    for family in ("llama", "gemma2"):
        model = tiny.model(family, "flex_attention", torch.float32, num_attention_heads=2, head_dim=16)
        with torch.no_grad():
            packed = common.response_logps(model, common.collate(rows))
            model.set_attn_implementation("eager")
            expected = common.response_logps(model, common.collate(rows))
        torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-4)
