"""benchmarks/operations.py: each of torch's operations counts once, in the kind that its name says."""

import sys

import pytest
import tiny
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(tiny.ROOT / "benchmarks"))

import operations  # noqa: E402
from sides import VOCABULARY  # noqa: E402


@pytest.mark.parametrize(
    "name, expected",
    [
        ("aten::mm", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::_log_softmax", "softmax over the vocabulary"),
        ("aten::_fused_adamw_", "optimizer and clipping"),
        ("aten::copy_", "copies, gathers, new tensors"),
        ("aten::silu_backward", "norms, activations, rotations"),
        ("aten::mul", "norms, activations, rotations"),
        ("autograd::engine::evaluate_function: MmBackward0", "Python"),
        ("step", "Python"),
    ],
)
def test_kinds(name, expected):
    assert operations.kind(name) == expected


def test_a_table(monkeypatch, capsys):
    """Of a tiny model: all kinds are there, and their shares are of one whole."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes))
    monkeypatch.setattr(operations, "make_model", lambda: model)
    operations.main(operations.Args(pairs=2, steps=1))
    lines = capsys.readouterr().out.splitlines()[1:]
    assert {line[:36].strip() for line in lines} == {*operations.KINDS, "Python"}
    assert sum(float(line[36:].strip(" %")) for line in lines) == pytest.approx(100, abs=0.5)
