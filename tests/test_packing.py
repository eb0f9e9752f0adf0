"""Packed log-probs and gradients against one plain forward per sequence, the start-up check, the micro-batches."""

import dataclasses
import itertools
import json

import pytest
import tiny
import torch
from datasets import Dataset

import common
import dgpo


def plain_logps(model, rows):
    """One unpadded, uncached, unmasked forward per sequence through the model's own attention: the definition."""
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


def packed_logps(model, rows):
    model.set_attn_implementation(common.ATTENTION)
    return common.response_logps(model, common.collate(rows))


def assert_packed_equals_plain(model, rows, tolerance=1e-9):
    """Sums, to the tolerance, and every gradient, in units of its largest entry where that is above 1."""
    expected = plain_logps(model, rows)
    expected_gradients = gradients(model, *expected)
    packed = packed_logps(model, rows)
    for ours, plain in zip(packed, expected):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, plain.detach(), rtol=tolerance, atol=tolerance)
    found = gradients(model, *packed)
    assert found.keys() == expected_gradients.keys()
    for name, gradient in found.items():
        scale = max(1.0, expected_gradients[name].abs().max().item())
        assert (gradient - expected_gradients[name]).abs().max() < tolerance * scale, name


@pytest.fixture
def wide(monkeypatch):
    """Models compute norms, rotations and softmax in float32 whatever their type, and rounding there would hide errors
    up to 1e-6; while this is on, float32 means float64.
    """
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.mark.parametrize("family", tiny.PACKABLE)
def test_packed_equals_plain(family, wide):
    """Sequences up to 42 tokens under windows of 7, scores capped, sinks, experts; responses that begin alike too."""
    model = tiny.model(family)
    assert_packed_equals_plain(model, tiny.pair_rows())


def test_windows_matter():
    """The test above would not notice windows if every sequence fitted into one."""
    rows = tiny.pair_rows()
    near = packed_logps(tiny.model("mistral"), rows)
    far = packed_logps(tiny.model("mistral", sliding_window=None), rows)
    assert (near[0] - far[0]).abs().max() > 1e-3


def slow_varlen(q, k, v, starts_q, starts_k, most_q, most_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    """torch.nn.attention.varlen.varlen_attn as documented, one query at a time: sequences end to end, queries and keys
    aligned at their ends, window_size keys before and behind a query's own, groups of heads that share keys.
    """
    assert starts_q.dtype == starts_k.dtype == torch.int32 and enable_gqa and q.shape[0] == starts_q[-1]
    assert (
        most_q == starts_q.diff().max() and most_k == starts_k.diff().max() and k.shape[0] == v.shape[0] == starts_k[-1]
    )
    left, right = (10**9 if side == -1 else side for side in window_size)
    scale, rows, groups = scale or q.shape[-1] ** -0.5, [], q.shape[1] // k.shape[1]
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(starts_q.tolist()), itertools.pairwise(starts_k.tolist())):
        for i in range(q1 - q0):
            own = i + (k1 - k0) - (q1 - q0)
            seen = slice(k0 + max(0, own - left), k0 + min(own + right, k1 - k0 - 1) + 1)
            for head in range(q.shape[1]):
                weights = (scale * k[seen, head // groups] @ q[q0 + i, head]).softmax(0)
                rows.append(weights @ v[seen, head // groups])
    return torch.stack(rows).view(*q.shape[:2], v.shape[-1])


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt2", "granite"])
def test_branch_for_cuda(family, wide, monkeypatch):
    """FlashAttention's call with a slow stand-in in its place: grouped heads, windows, a scale of the model's own."""
    monkeypatch.setattr(common, "flash_takes", lambda *_: True)
    monkeypatch.setattr(common, "varlen_attn", slow_varlen)
    monkeypatch.setattr(common, "scaled_dot_product_attention", None)
    assert_packed_equals_plain(tiny.model(family), tiny.pair_rows())


@pytest.mark.parametrize(
    "size, value_size, dtype, takes",
    [(128, 128, torch.bfloat16, True), (256, 256, torch.float16, True), (64, 64, torch.float32, False),
     (288, 288, torch.bfloat16, False), (192, 128, torch.bfloat16, False), (100, 100, torch.bfloat16, False)],
)  # fmt: skip
def test_what_flash_attention_takes(size, value_size, dtype, takes, monkeypatch):
    """Half precision, heads of one size, a multiple of 8 up to 256, and a card of compute capability 8 at least."""
    query = torch.empty(1, 4, 3, size, dtype=dtype)
    value = torch.empty(1, 4, 3, value_size, dtype=dtype)
    assert not common.flash_takes(query, value)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    for capability in ((7, 5), (8, 0), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert common.flash_takes(query, value) == (takes and capability >= (8, 0))


def attend(**options):
    """packed_attention as a layer calls it, on a row of one pair."""
    batch = common.collate(tiny.pair_rows(1))
    query, key, value = torch.randn(3, 1, 2, batch.input_ids.shape[1], 8)
    options = {"attention_mask": None, "packed": batch, **options}
    return common.packed_attention(torch.nn.Identity(), query, key, value, **options)[0]


def test_keywords_of_layers():
    """What changes nothing is taken, what the function does not know is refused by name."""
    for known in (
        {"position_ids": 1},
        {"output_attentions": True},
        {"is_causal": True},
        {"s_aux": None},
        {"alibi": None},
    ):
        torch.manual_seed(0)
        expected = attend()
        torch.manual_seed(0)
        assert torch.equal(attend(**known), expected)
    for name, value in {"position_bias": 1, "is_causal": False, "alibi": 1, "cu_seq_lens_q": 1}.items():
        with pytest.raises(ValueError, match=f"Identity asks for {name}"):
            attend(**{name: value})
    for name, unable in {"a mask": {"attention_mask": torch.zeros(1)}, "dropout": {"dropout": 0.1}}.items():
        with pytest.raises(ValueError, match=f"Identity asks for {name}, which"):
            attend(**unable)
    with pytest.raises(ValueError, match="Identity got no packed batch"):
        attend(packed=None)


def test_model_whose_attention_was_not_set():
    """Whoever loads a model for a loop of their own is told in one sentence what is missing."""
    with pytest.raises(ValueError, match="attention is sdpa: call model.set_attn_implementation.common.ATTENTION."):
        common.response_logps(tiny.model(), common.collate(tiny.pair_rows()))


@pytest.mark.parametrize("part", ["chosen", "rejected"])
def test_half_batch(part):
    """With one part only that response is run, to the same sums; the other's are zero."""
    model, rows = tiny.model(), tiny.pair_rows()
    expected = dict(zip(("chosen", "rejected"), packed_logps(model, rows)))[part]
    both, half = common.collate(rows), common.collate(rows, (part,))
    chosen, rejected = common.response_logps(model, half)
    mine, other = (chosen, rejected) if part == "chosen" else (rejected, chosen)
    torch.testing.assert_close(mine, expected)
    assert not other.any() and half.input_ids.numel() < both.input_ids.numel()


def test_shared_tokens_run_once():
    """A near-duplicate pair costs little more than one sequence."""
    row = {"prompt_ids": [9] * 10, "chosen_ids": [*range(20, 40), 2], "rejected_ids": [*range(20, 39), 50, 2]}
    assert common.collate([row]).input_ids.numel() == 10 + 19 + 1 + 1


def test_moved_batch():
    """.to() moves every tensor and keeps the rest; masks are made anew where the batch then is."""
    batch = common.collate(tiny.pair_rows())
    batch.masks["of a layer"] = 1
    moved = batch.to("meta")
    for field in dataclasses.fields(batch):
        if isinstance(value := getattr(moved, field.name), torch.Tensor):
            assert value.is_meta and value.shape == getattr(batch, field.name).shape
    assert moved.segments == batch.segments and not moved.masks


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
    chosen, rejected = packed_logps(model, tiny.pair_rows())
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


# ---------------------------------------------------------------------------------------------------------------------
# The start-up check

PRECISIONS = pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])


def autocast(bf16):
    return torch.autocast("cpu", torch.bfloat16, enabled=bf16)


def check(model, rows=None):
    dataset = Dataset.from_list(rows or tiny.pair_rows())
    common.check_packing(model, dataset, torch.device("cpu"))


@PRECISIONS
@pytest.mark.parametrize("family", tiny.PACKABLE)
def test_what_can_be_packed(family, bf16):
    """Passes in the precision of the run."""
    model = tiny.model(family, dtype=torch.float32)
    with autocast(bf16):
        check(model)
    assert model.config._attn_implementation == common.ATTENTION


@PRECISIONS
@pytest.mark.parametrize("family", tiny.REFUSED)
def test_what_cannot_be_packed(family, bf16):
    """Refused by name: ALiBi, recurrent states, short convolutions, attention of its own, keywords not handed down."""
    model = tiny.model(family, dtype=torch.float32)
    with pytest.raises(SystemExit, match=f"error: {type(model).__name__} .*docs/models.md"), autocast(bf16):
        check(model)


@PRECISIONS
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe", "gpt_oss"])
def test_other_tokens_move_nothing(family, bf16):
    """Other tokens in one response, or in all of a pair, leave what is packed behind them as it is, to the last bit."""
    model, rows = tiny.model(family, dtype=torch.float32), tiny.pair_rows(4)[:2]
    model.set_attn_implementation(common.ATTENTION)

    def sums(*rows):
        with torch.no_grad(), autocast(bf16):
            return torch.stack(common.response_logps(model, common.collate(list(rows))), 1).flatten()

    first, second = ({name: ids + [20, 30, 40] for name, ids in row.items()} for row in rows)
    first["rejected_ids"][0] = (first["chosen_ids"][0] + 1) % 100
    other = {name: [*ids[:1], *((token + 1) % 100 for token in ids[1:])] for name, ids in first.items()}
    found = sums(first, second)
    assert torch.equal(sums({**first, "chosen_ids": other["chosen_ids"]}, second)[1:], found[1:])
    assert torch.equal(sums(other, second)[2:], found[2:])
    assert (sums(other, second)[:2] != found[:2]).all()


@PRECISIONS
@pytest.mark.parametrize("lost", ["sliding_window", "scaling"])
def test_a_keyword_that_is_lost(lost, bf16, monkeypatch):
    """Attention that ignored the layer's window or scale would leak nothing; the plain forwards tell."""
    real = common.packed_attention
    common.AttentionInterface.register(common.ATTENTION, lambda *args, **layer: real(*args, **{**layer, lost: None}))
    try:
        model = tiny.model("granite" if lost == "scaling" else "mistral", dtype=torch.float32)
        with pytest.raises(SystemExit, match="ForCausalLM gives other log-probs packed than plain"), autocast(bf16):
            check(model)
    finally:
        common.AttentionInterface.register(common.ATTENTION, real)


def test_positions_that_are_lost(monkeypatch):
    """A model that counts positions by itself, as under ALiBi."""
    model = tiny.model(dtype=torch.float32)
    real = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *args, position_ids=None, **inputs: real(*args, **inputs))
    with pytest.raises(SystemExit, match="LlamaForCausalLM gives other log-probs packed than plain"):
        check(model)


@pytest.mark.parametrize("length", [1, 2, 9])
def test_pairs_of_any_length(length):
    """One-letter answers do as well as long ones."""
    rows = [{"prompt_ids": [9, 8], "chosen_ids": [20] * length, "rejected_ids": [21] * length}]
    check(tiny.model(dtype=torch.float32), rows)
    with pytest.raises(SystemExit, match="Lfm2ForCausalLM lets a response see what is packed before it"):
        check(tiny.model("lfm2", dtype=torch.float32), rows)


@pytest.mark.parametrize("lora_rank", [0, 4], ids=["all weights", "lora"])
def test_steps_under_autocast(lora_rank, tmp_path):
    """Whole runs as on a GPU: bf16 products, float32 weights and log-softmax; losses near those of float32."""
    options = {"model": str(tiny.write_model(tmp_path / "base")), "lora_rank": lora_rank, "warmup": 0, "lr": 1e-3}
    options |= {"dataset": str(tiny.write_pairs(tmp_path / "pairs.jsonl")), "batch_size": 8, "steps": 4}
    losses, kinds = [], set()
    real = common.token_logps
    for bf16 in (False, True):
        out = tmp_path / f"run {bf16}"
        with pytest.MonkeyPatch.context() as patch, autocast(bf16):
            patch.setattr(common, "token_logps", lambda logits, *_: kinds.add(logits.dtype) or real(logits, *_))
            dgpo.main(dgpo.Args(**options, output_dir=str(out)))
        losses.append([json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()[1:]])
    assert kinds == {torch.float32, torch.bfloat16}
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], abs=2e-2)


# ---------------------------------------------------------------------------------------------------------------------
# The plan of micro-batches


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 60, 10_000])
def test_micro_batches(processes, tokens):
    lengths = [50, 10, 40, 20, 70, 30, 5, 45, 12, 8, 33, 21]
    pairs = list(range(12))
    plans = common.micro_batches(pairs, lengths, tokens, processes)
    assert sorted(pair for plan in plans for indices in plan for pair in indices) == pairs
    assert len(plans) == processes and len({len(plan) for plan in plans}) == 1
    assert all(sum(bool(i) * len(i) for i in plan) == 12 // processes for plan in plans)
    loads = [sum(lengths[i] for indices in plan for i in indices) for plan in plans]
    assert max(loads) - min(loads) <= 24  # dealt back and forth; round and round it would be 50 for four processes
    for indices in (indices for plan in plans for indices in plan):
        assert sum(lengths[i] for i in indices) <= tokens or len(indices) == 1
