"""What only a GPU computes: FlashAttention and bf16 autocast. Each test runs on the CPU too, where slow stand-ins take
their place, so that the test itself is known to be right; `pytest -m gpu` runs those on the GPU alone.
"""

import contextlib
import sys

import pytest
import tiny
import torch
from test_packing import gradients, slow_varlen

sys.path.insert(0, str(tiny.ROOT / "benchmarks"))

import gpu  # noqa: E402, which makes attention fit the torch that is here

import common  # noqa: E402

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
def device(request, monkeypatch):
    """FlashAttention's documented arithmetic stands in for it on the CPU."""
    if request.param == "cpu":
        monkeypatch.setattr(common, "flash_takes", lambda query, value: value.dtype == torch.bfloat16)
        monkeypatch.setattr(common, "varlen_attn", slow_varlen)
    monkeypatch.setattr(gpu, "DEVICE", request.param)
    return request.param


@contextlib.contextmanager
def computed_in(dtype, device, monkeypatch):
    """Autocast to bf16, or none at all, where response_logits would have its own."""
    with monkeypatch.context() as patch:
        if dtype == torch.bfloat16:
            with torch.autocast(device, dtype):
                yield
        else:
            patch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
            yield


def found(model, sums):
    """Log-probs of the responses and the gradient of a sum that tells them apart, on the CPU."""
    chosen, rejected = sums
    slopes = gradients(model, chosen.cpu(), rejected.cpu())
    return torch.cat([chosen, rejected]).detach().cpu(), torch.cat([slopes[n].flatten().cpu() for n in sorted(slopes)])


def packed(model, rows, device):
    with tiny.packed(model):
        return found(model, common.response_logps(model, common.collate(rows).to(device)))


def padded(model, rows):
    return found(model, gpu.plain_logps(model, gpu.sequences(rows)).chunk(2))


def alone(model, rows):
    return found(model, torch.stack([gpu.plain_logps(model, [one])[0] for one in gpu.sequences(rows)]).chunk(2))


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_packed_equals_plain(family, device, monkeypatch):
    """In float32: grouped heads, capped scores, a window. Gradients in units of the largest entry."""
    model, rows = tiny.model(family, dtype=torch.float32).to(device), tiny.pair_rows()
    with computed_in(torch.float32, device, monkeypatch):
        for ours, plain in zip(packed(model, rows, device), alone(model, rows)):
            assert (ours - plain).abs().max() < 1e-4 * plain.abs().max()


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_noise_of_bf16(family, device, monkeypatch):
    """Under autocast packed rows are about as far from float32 as padded batches of whole sequences."""
    model, rows = tiny.model(family, dtype=torch.float32).to(device), tiny.pair_rows(12)
    with computed_in(torch.float32, device, monkeypatch):
        exact = alone(model, rows)
    with computed_in(torch.bfloat16, device, monkeypatch):
        for ours, plain, truth in zip(packed(model, rows, device), padded(model, rows), exact):
            off, off_plain = ((one - truth).square().mean().sqrt() for one in (ours, plain))
            assert 0 < off < 2 * off_plain, (off, off_plain)


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("window", [None, 7])
def test_flash_attention(window, heads, device, monkeypatch):
    """Output and gradients in bf16 beside attention segment by segment in float32, by their norms."""
    batch = common.collate(tiny.pair_rows(12)).to(device)
    torch.manual_seed(0)
    tokens, size = batch.input_ids.shape[1], 64
    inputs = [torch.randn(1, number, tokens, size).bfloat16().to(device) for number in (4, heads, heads)]
    weights = torch.randn(1, tokens, 4, size).to(device)

    def attend(dtype):
        own = [one.to(dtype).requires_grad_() for one in inputs]
        options = {"packed": batch, "scaling": 0.2, "sliding_window": window}
        out, _ = common.packed_attention(torch.nn.Identity(), *own, None, **options)
        return [out.detach(), *torch.autograd.grad((out.float() * weights).sum(), own)]

    exact = attend(torch.float32)
    monkeypatch.setattr(common, "scaled_dot_product_attention", None)
    for truth, flash in zip(exact, attend(torch.bfloat16)):
        assert (flash.float() - truth).norm() < 0.02 * truth.norm()
