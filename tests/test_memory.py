"""benchmarks/memory.py: the simulated bytes against sums by hand, and against a real step."""

import json
import sys
from dataclasses import replace

import pytest
import tiny

sys.path.insert(0, str(tiny.ROOT / "benchmarks"))

import memory  # noqa: E402

VOCABULARY, HIDDEN, INTERMEDIATE, LAYERS = 1024, 128, 256, 2  # SHAPES["tiny"]: as many key heads as heads, no tied head
LAYER = 4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE + 2 * HIDDEN
TOTAL = 2 * VOCABULARY * HIDDEN + LAYERS * LAYER + HIDDEN
ARGS = memory.Args(pairs=2, prompt=4, response=2)


def simulate(devices=1, gpu=True, **flags):
    return memory.simulate(memory.make_config("tiny"), replace(ARGS, **flags), devices, gpu)


@pytest.mark.parametrize(("optimizer", "moments", "roots"), [("adamw", 2, 0), ("rmsprop", 1, VOCABULARY + HIDDEN)])
def test_weights_gradients_and_moments(optimizer, moments, roots):
    """Of a row too short for activations to matter, 4 bytes each are the peak, and a few for norms and the row. Fused
    AdamW takes no more; RMSprop the square roots of the embeddings, which live until those of the next matrix do.
    """
    found = simulate(gpu=False, optimizer=optimizer)
    assert found["weights"] == found["gradients"] == 4 * TOTAL and found["sent"] == 0
    assert 0 <= found["moments"] - 4 * moments * TOTAL < 200  # the number of the step, for each tensor
    least = 4 * ((2 + moments) * TOTAL + roots * HIDDEN)
    assert least <= found["peaks"]["update"] < least + 5000


def test_lora():
    """Frozen weights of 2 bytes, adapters of 4: rank x (inputs + outputs) of each linear layer but the head."""
    adapters = 3 * LAYERS * (4 * 2 * HIDDEN + 3 * (HIDDEN + INTERMEDIATE))
    found = simulate(lora_rank=3)
    assert found["weights"] == 2 * TOTAL + 4 * adapters
    assert found["gradients"] == 4 * adapters


def test_two_devices():
    """Half of everything on each; what is exchanged: all gradients in float32, and in bf16 the layers' weights twice,
    as they are given back behind the forward pass, and the embeddings'; the head's once.
    """
    one, two = simulate(), simulate(2)
    for part in ("weights", "gradients"):
        assert 2 * two[part] == one[part]
    twice = LAYERS * LAYER + VOCABULARY * HIDDEN
    assert two["sent"] == pytest.approx((4 * TOTAL + 2 * (TOTAL + twice)) / 2, rel=1e-3)


def test_what_the_other_scripts_add():
    """eps_dpo.py a second model, dpo_pg.py a second gradient; under LoRA eps_dpo.py's reference is the model."""
    plain, live, projected = (simulate(gpu=False, script=script) for script in ("dgpo", "eps_dpo", "dpo_pg"))
    assert live["weights"] == 2 * plain["weights"]
    assert projected["peaks"]["update"] - plain["peaks"]["update"] >= 4 * TOTAL
    assert simulate(lora_rank=3, script="eps_dpo")["weights"] == simulate(lora_rank=3)["weights"]


def test_memory_grows_with_tokens():
    """Under FlashAttention, of rows of 8,192 and 16,384 tokens with checkpointing."""
    sizes = {"pairs": 1, "response": 256, "gradient_checkpointing": True}
    peaks = [memory.peak(simulate(prompt=tokens - 512, **sizes)) for tokens in (8192, 16_384)]
    assert 1.3 < peaks[1] / peaks[0] < 2.1


@pytest.mark.parametrize(
    ("devices", "flags"),
    [
        (1, {}),
        (2, {}),
        (2, {"lora_rank": 2}),
        (1, {"lora_rank": 2, "gradient_checkpointing": False}),
        (2, {"script": "eps_dpo"}),
        (2, {"script": "dpo_pg"}),
    ],
)
def test_a_line_through_two_depths(devices, flags, monkeypatch):
    """It ends where all layers do, although the highest phase is another one there."""
    kind, numbers = memory.SHAPES["tiny"]
    monkeypatch.setitem(memory.SHAPES, "deep", (kind, numbers | {"num_hidden_layers": 12}))
    args = replace(ARGS, **{"gradient_checkpointing": True, "response": 100} | flags)
    drawn, whole = memory.at_depth("deep", args, devices), memory.simulate(memory.make_config("deep"), args, devices)
    assert memory.peak(drawn) == pytest.approx(memory.peak(whole), rel=1e-3)
    assert drawn["sent"] == pytest.approx(whole["sent"], rel=1e-3)


def test_one_model_from_a_directory(tmp_path, capsys):
    memory.make_config("tiny").save_pretrained(tmp_path)
    memory.main(replace(ARGS, model=str(tmp_path), devices=(1, 2)))
    assert capsys.readouterr().out.count("| dgpo |") == 2


def test_a_real_step():
    """What its process takes at its peak, where it gives back what the step frees, within a tenth."""
    args = replace(ARGS, pairs=1, prompt=3584, response=256, gradient_checkpointing=True)
    simulated = memory.peak(memory.simulate(memory.make_config("tiny"), args, gpu=False)) * memory.GIB
    assert memory.real("tiny", args, memory.GIVE_BACK) == pytest.approx(simulated, rel=0.1)


@pytest.mark.slow
def test_page(tmp_path, monkeypatch):
    """All sections: a card that holds half a step but no whole one, and memory that triples where tokens double."""
    peaks = [memory.peak(memory.at_depth("tiny", memory.PAGE, count)) for count in (1, 2)]
    own = {"LARGE": ("tiny",), "DEVICES": (1, 2), "REAL": (("tiny", 1),), "REAL_TOKENS": (1024, 2048)}
    own["CARDS"] = sum(peaks) / 2 / memory.FILLED, 24
    for name, value in own.items():
        monkeypatch.setattr(memory, name, value)
    monkeypatch.setattr(memory, "real", lambda _name, args, _environment: 1e6 * args.prompt)
    memory.main(memory.Args(save=str(tmp_path / "memory")))
    page, numbers = (tmp_path / "memory.md").read_text(), json.loads((tmp_path / "memory.json").read_text())["bytes"]
    assert "| tiny | full | simulated | 2 | 1 | 0.1 | 0.1 (0) |\n" in page
    assert "| dpo_pg | full | 8 |" in page and "**does not hold**, at most 3.00" in page
    assert memory.peak(numbers["tiny, 2 devices, gradient_checkpointing True"]) == peaks[1]


def test_flags_of_the_page():
    with pytest.raises(SystemExit, match="name a --model"):
        memory.main(memory.Args(lora_rank=8))
