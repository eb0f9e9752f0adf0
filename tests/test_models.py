"""Models as people have them: towers for images, adapters, routers with noise, tokenizers and positions that end."""

import json
import re
import shutil

import pytest
import tiny
import torch
import tyro
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.utils import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import common
import dgpo

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}


def write(folder, family, template=None, **changes):
    """A model of the family and a tokenizer, in a folder."""
    tokenizer = tiny.tokenizer(template)
    config = AutoConfig.for_model(family, **{**tiny.FAMILIES.get(family, {}), "vocab_size": len(tokenizer), **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """Gemma-3 with a tiny tower for images."""
    text = {**tiny.PACKABLE["gemma3_text"], "vocab_size": len(tiny.tokenizer())}
    tokens = {"mm_tokens_per_image": 4, "image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7}
    return write(tmp_path_factory.mktemp("gemma") / "base", "gemma3", text_config=text, vision_config=VISION, **tokens)


def flags(model, folder, **changes):
    options = {"batch_size": 4, "lr": 1e-3, "warmup": 0, "steps": 3, "max_grad_norm": 1e-6, "tokens_per_device": 100}
    options |= {"model": model, "dataset": tiny.write_pairs(folder / "pairs.jsonl", 16), **changes}
    pairs = ((f"--{name.replace('_', '-')}", value) for name, value in options.items())
    return [str(x) for flag, value in pairs for x in ([flag] if value is True else [flag, value])]


def train(model, folder, out, **changes):
    """dgpo.py in this process; the folder of its run."""
    out = changes.pop("output_dir", folder / out)
    dgpo.main(tyro.cli(dgpo.Args, args=flags(model, folder, output_dir=out, **changes)))
    return out


def refused(model, folder, **changes):
    with pytest.raises(SystemExit) as caught:
        train(model, folder, "refused", **changes)
    assert caught.value.code.startswith("error: ") and "\n" not in caught.value.code
    return caught.value.code


def weights(run, part="model"):
    return load_file(run / part / ("adapter_model.safetensors" if part == "adapter" else "model.safetensors"))


@pytest.mark.parametrize("launch, lora", [("ddp", {}), ("fsdp2", {}), ("fsdp2", {"lora_rank": 2})])
def test_text_part_of_a_vision_model(gemma, launch, lora, tmp_path):
    """The text part is trained, the tower stays; two processes as one; what is left loads as what it was."""
    one, start = train(gemma, tmp_path, "one", **lora), load_file(gemma / "model.safetensors")
    script = {"ddp": ["dgpo.py"], "fsdp2": ["tests/fsdp2_on_cpu.py", "dgpo"]}[launch]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, *script]
    tiny.run(*command, *flags(gemma, tmp_path, output_dir=tmp_path / "two", **lora), timeout=200)
    found, other = weights(one), weights(tmp_path / "two")
    assert found.keys() == other.keys() == start.keys()
    assert max((found[name] - other[name]).abs().max().item() for name in found) < 1e-5
    for name, value in start.items():
        frozen = "vision" in name or "projector" in name
        assert torch.equal(found[name], value) == (frozen or bool(lora) and (value.ndim < 2 or "embed" in name)), name
    AutoModelForImageTextToText.from_pretrained(one / "model")
    if lora:
        assert not any("vision" in name or "projector" in name for name in weights(one, "adapter"))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "mistral3", "t5", "clip"])
def test_what_is_no_causal_language_model(family, tmp_path):
    """Refused by its type before any weights are loaded; there are none here."""
    AutoConfig.for_model(family).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    message = refused(tmp_path / "base", tmp_path)
    assert f"cannot load '{tmp_path}/base': {family} is no causal language model" in message


def test_adapter_as_the_model(tmp_path):
    """Its base with the adapter merged is where training starts."""
    base = tiny.write_model(tmp_path / "base")
    torch.manual_seed(0)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules="all-linear", r=2))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0, 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    tiny.tokenizer().save_pretrained(tmp_path / "adapter")
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    merged.merge_and_unload().save_pretrained(tmp_path / "merged")
    tiny.tokenizer().save_pretrained(tmp_path / "merged")
    (tmp_path / "adapter/tokenizer_config.json").unlink()  # its base has one
    (tmp_path / "adapter/tokenizer.json").unlink()
    runs = [train(tmp_path / name, tmp_path, f"run-{name}") for name in ("adapter", "merged", "base")]
    assert tiny.metrics(runs[0]) == tiny.metrics(runs[1]) != tiny.metrics(runs[2])
    assert all(torch.equal(value, weights(runs[1])[name]) for name, value in weights(runs[0]).items())
    again = train(tmp_path / "adapter", tmp_path, "again", lora_rank=2)
    base = json.loads((again / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == f"{tmp_path}/adapter, merged"  # and not the base without it


@pytest.mark.parametrize(
    "family, noise",
    [
        ("mixtral", {"router_jitter_noise": 0.5, "num_local_experts": 4, "attention_dropout": 0.5}),
        (
            "phimoe",
            {"router_jitter_noise": 0.5, "input_jitter_noise": 0.5, "num_local_experts": 4, "lm_head_bias": False},
        ),
        ("gpt2", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}),
        ("opt", {"layerdrop": 0.5, "dropout": 0.5, "attention_dropout": 0.5}),
    ],
)
def test_noise_is_off(family, noise, tmp_path):
    """Whatever a config calls it: the first step is that of the model without noise."""
    changes = {**tiny.ROPE, **tiny.FAMILIES.get(family, {}), "vocab_size": len(tiny.tokenizer()), **noise}
    base = write(tmp_path / "base", family, **changes)
    pairs = common.load_preferences(str(tiny.write_pairs(tmp_path / "pairs.jsonl", 16)), tiny.tokenizer(), "", 512, 256)
    step = tiny.metrics(train(base, tmp_path, "run", steps=1))[1]
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    model.set_attn_implementation(common.ATTENTION)
    batch = common.collate([pairs[i] for i in tiny.step_pairs(0, 16, 4)])
    chosen = common.response_logps(model, batch)[0] / batch.chosen_lengths
    assert step["logps/chosen"] == pytest.approx(chosen.mean().item(), abs=1e-5)


def test_noise_is_seen():
    """What is random all the same, a sampler or a training mode left on, is refused: two forwards differ."""
    model = tiny.model("qwen3_moe", dtype=torch.float32)
    model.model.embed_tokens.register_forward_hook(lambda _module, _inputs, out: out + 0.1 * torch.randn_like(out))
    with pytest.raises(SystemExit, match="Qwen3MoeForCausalLM gives other log-probs when asked again"):
        common.check_packing(model, Dataset.from_list(tiny.pair_rows()), "cpu")


def test_gradient_checkpointing_computes_again(tmp_path, monkeypatch):
    """In evaluation mode too; with the same weights at the end."""
    base, layers = tiny.write_model(tmp_path / "base"), []
    one = train(base, tmp_path, "one")
    real = checkpoint.checkpoint
    monkeypatch.setattr("transformers.modeling_utils.checkpoint", lambda *a, **k: layers.append(1) or real(*a, **k))
    two = train(base, tmp_path, "two", gradient_checkpointing=True)
    assert len(layers) > 3 * 2  # three steps of two layers
    assert all((value - weights(two)[name]).abs().max() < 1e-6 for name, value in weights(one).items())


def test_auxiliary_loss_is_left_out(tmp_path, capsys):
    changes = {**tiny.ROPE, "vocab_size": len(tiny.tokenizer()), "num_local_experts": 4}
    runs = [
        train(write(tmp_path / str(asked), "mixtral", **changes, output_router_logits=asked), tmp_path, f"run-{asked}")
        for asked in (False, True)
    ]
    assert tiny.metrics(runs[0]) == tiny.metrics(runs[1])
    assert capsys.readouterr().out.count("MixtralForCausalLM: its routers' auxiliary loss") == 1
    assert json.loads((runs[1] / "model/config.json").read_text())["output_router_logits"]


LONG = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 30}
LONG |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}


@pytest.mark.parametrize(
    "family, changes, limit",
    [
        ("llama", {"max_position_embeddings": 35}, 35),
        ("gpt2", {"n_positions": 35}, 35),
        ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 30}, 30),
    ],
)
def test_pairs_that_are_too_long(family, changes, limit, tmp_path):
    """Longer than the model's positions, or than those up to which its angles stay: named with the flag that helps."""
    base = write(tmp_path / "base", family, **changes)
    message = refused(base, tmp_path)
    assert re.match(r"error: (\w+ForCausalLM|GPT2LMHeadModel) ", message)
    assert f"takes {limit} tokens in packed rows" in message and message.endswith(f"set --max-length {limit}")
    train(base, tmp_path, "short", max_length=limit, max_prompt_length=10)


def test_long_pair_among_the_evaluation_pairs(tmp_path):
    base = write(tmp_path / "base", "llama", max_position_embeddings=60)
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "1" * 60, "chosen": "2", "rejected": "3"}) + "\n")
    assert "takes 60 tokens" in refused(base, tmp_path, eval_dataset=tmp_path / "long.jsonl")


def test_token_without_an_embedding(tmp_path):
    """It may be anywhere in the data: one token in one pair."""
    base = write(tmp_path / "base", "llama", vocab_size=len(tiny.tokenizer()) - 1)
    rows = tmp_path / "good.jsonl"
    rows.write_text(4 * (json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n"))
    train(base, tmp_path, "good", dataset=rows)
    last = tiny.tokenizer().convert_ids_to_tokens(len(tiny.tokenizer()) - 1)
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": last, "chosen": last, "rejected": "3"}) + "\n")
    message = refused(base, tmp_path, dataset=rows, eval_dataset=tmp_path / "one.jsonl")
    assert "LlamaForCausalLM has" in message and "but the tokenizer gives token" in message


def test_errors_name_the_model(tmp_path):
    """And not what adapters wrap it in; a Llama is not told to use a Llama."""
    base = write(tmp_path / "base", "llama", vocab_size=40)
    for lora in ({}, {"lora_rank": 2}):
        message = refused(base, tmp_path, **lora)
        assert message.startswith("error: LlamaForCausalLM ") and "Peft" not in message and "such as" not in message


def test_a_run_keeps_its_day(tmp_path, monkeypatch):
    """A template that writes the date: resumed on another day, the pairs are those of the first."""
    template = "{{ strftime_now('%d %b') }} {% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    base, rows = write(tmp_path / "base", "llama", template), tmp_path / "rows.jsonl"
    turns = [
        [{"role": role, "content": text}] for role, text in (("user", "2+2?"), ("assistant", "4"), ("assistant", "5"))
    ]
    row = dict(zip(("prompt", "chosen", "rejected"), turns))
    rows.write_text("".join(json.dumps(row) + "\n" for _ in range(4)))

    class Day(dgpo.date):
        @classmethod
        def today(cls):
            return cls.fromisoformat(day)

    monkeypatch.setattr(dgpo, "date", Day)
    day = "2024-02-29"
    whole = train(base, tmp_path, "whole", dataset=rows)
    train(base, tmp_path, "cut", dataset=rows, save_every=1)
    shutil.rmtree(tmp_path / "cut/checkpoints/step-00000003")
    day = "2024-03-01"
    resumed = train(base, tmp_path, "cut", dataset=rows, resume=True)
    assert tiny.metrics(resumed) == tiny.metrics(whole)
    assert json.loads((resumed / "args.json").read_text())["began"] == "2024-02-29"
    other = train(base, tmp_path, "other", dataset=rows)
    assert tiny.metrics(other) != tiny.metrics(whole)


def test_saved_data_is_not_evaluated_on_unasked(tmp_path, capsys):
    """A single data set of save_to_disk is one split, as a file is: its rows are no evaluation pairs."""
    rows = [json.loads(line) for line in tiny.write_pairs(tmp_path / "rows.jsonl", 16).open()]
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    train(tiny.write_model(tmp_path / "base"), tmp_path, "run", dataset=tmp_path / "saved", steps=1)
    assert capsys.readouterr().out.count("pairs kept") == 1


@pytest.mark.parametrize(
    "changes, evaluated",
    [({}, 0), ({"eval_split": "test[75%:]"}, 4), ({"train_split": "train[:75%]", "eval_split": ""}, 0)],
)
def test_parts_of_one_file(changes, evaluated, tmp_path, capsys):
    """Without --eval-dataset a file is evaluated on where --eval-split names a part of it."""
    train(tiny.write_model(tmp_path / "base"), tmp_path, "run", **changes)
    lines = [line for line in capsys.readouterr().out.splitlines() if "pairs kept" in line]
    assert f": {12 if 'train_split' in changes else 16} of" in lines[0]
    assert [line.split(": ")[1].split(" ")[0] for line in lines[1:]] == [str(evaluated)] * bool(evaluated)
