"""Every model type of transformers is exact in packed rows or refused by name, and docs/models.md says which."""

import re

import pytest
import tiny
import zoo
from transformers import AttentionInterface

import common

pytestmark = pytest.mark.slow
PAGE = (tiny.ROOT / "docs" / "models.md").read_text().splitlines()
SAID = dict(line.removeprefix("| ").split(" | ", 1) for line in PAGE if line.startswith("| ") and "---" not in line)


@pytest.mark.parametrize("case", zoo.CASES)
def test_exact_or_refused(case):
    """In float32 and under bf16 autocast, with all noise on in the config; the page's row is the one found here."""
    name, float32, bf16, why = zoo.verdict(case)
    assert SAID[case].startswith(f"{name} | {float32} | {bf16} | ")
    assert "neither" not in (float32, bf16), why


def test_the_page_has_these_rows():
    assert [*SAID] == ["type", *zoo.CASES]


@pytest.fixture
def unchecked(monkeypatch):
    monkeypatch.setattr(common, "check_packing", lambda model, *_: model.set_attn_implementation(common.ATTENTION))


@pytest.mark.parametrize("case", ["bamba", "lfm2", "bart", "bert", "llama4_text"])
def test_states_positions_and_masks_would_show(case, unchecked):
    """Where check_packing lets everything pass, the sweep by itself finds what it refuses."""
    assert zoo.verdict(case)[1] == "neither"


@pytest.mark.parametrize(
    "case, lost", [("mistral", "sliding_window"), ("granite", "scaling"), ("gemma2", "softcap"), ("gpt_oss", "s_aux")]
)
def test_lost_keywords_would_show(case, lost, unchecked):
    real = common.packed_attention
    AttentionInterface.register(common.ATTENTION, lambda *args, **layer: real(*args, **{**layer, lost: None}))
    try:
        _, float32, _, why = zoo.verdict(case)
    finally:
        AttentionInterface.register(common.ATTENTION, real)
    assert float32 == "neither" and why.startswith("log-probs: off by")


@pytest.mark.parametrize("case, noise", [("mixtral", "jitter"), ("opt", "layerdrop"), ("dbrx", "resid_pdrop")])
def test_noise_would_show(case, noise, unchecked, monkeypatch):
    monkeypatch.setattr(zoo, "NOISE", re.compile(noise))
    monkeypatch.setattr(zoo, "still", lambda model: model.train())
    _, float32, _, why = zoo.verdict(case)
    assert float32 == "neither" and "two forwards" in why
