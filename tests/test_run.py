"""What a run leaves behind, that it does not depend on how it was split, and that a kill at any instant is mended."""

import builtins
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
import tyro
from accelerate import Accelerator
from datasets import Dataset
from matplotlib.figure import Figure
from peft import PeftModel
from safetensors.torch import load_file
from tiny import metrics
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import common
import dgpo

GOLDEN = [0.6918190, 0.6938451, 0.6934345, 0.6933639, 0.6936750]


@pytest.fixture(scope="session")
def forks():
    """A process that has imported everything once; every run is a fork of it, so that hundreds are cheap."""
    patch = pytest.MonkeyPatch()
    patch.setenv("OMP_NUM_THREADS", "1")
    patch.setenv("PYTHONPATH", f"{tiny.ROOT}:{tiny.ROOT / 'tests'}")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_run", "transformers.models.llama.modeling_llama"])
    yield context
    patch.undo()


def work(flags, log, environment, fault, plot):
    """One run of dgpo.py in a fork."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    if not plot:  # figure and answers take longer than these runs
        dgpo.look.plot_curves, dgpo.look.write_samples = lambda *_: None, lambda *_: None
    if fault:
        FAULTS[fault[0]](*fault[1:])
    dgpo.main(tyro.cli(dgpo.Args, args=flags))


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    tiny.write_model(folder / "base", "zephyr")
    tiny.write_pairs(folder / "train.jsonl", 40)
    tiny.write_pairs(folder / "test.jsonl", 6, seed=1)
    return folder


BASE = {"batch_size": 4, "lr": 1e-3, "steps": 12, "save_every": 2, "max_grad_norm": 0.02}
EVALUATED = {"eval_dataset": "test.jsonl", "eval_every": 5}


def flags_of(made, out, **changes):
    options = {"model": "base", "dataset": "train.jsonl", "output_dir": out, **BASE, **changes}
    for name in ("model", "dataset", "eval_dataset"):
        if name in options:
            options[name] = made / options[name]
    pairs = ((f"--{name.replace('_', '-')}", value) for name, value in options.items())
    return [str(x) for flag, value in pairs for x in ([flag] if value is True else [flag, value])]


@pytest.fixture(scope="session")
def train(forks, made):
    def train(out, fault=None, ends=0, plot=False, processes=1, **changes) -> Path:
        log, flags = out.with_suffix(".log"), flags_of(made, out, **changes)
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            group = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(probe.getsockname()[1])}
        group |= {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": str(processes)}
        ranks = [group | {"RANK": str(r), "LOCAL_RANK": str(r)} if processes > 1 else {} for r in range(processes)]
        forked = [forks.Process(target=work, args=(flags, log, rank, fault, plot)) for rank in ranks]
        for process in forked:
            process.start()
        for process in forked:
            process.join(120)
            assert process.exitcode == ends, f"{fault} {log.read_text()[-3000:]}"
        return out

    return train


def weights(run, part="model"):
    return load_file(run / part / ("adapter_model.safetensors" if part == "adapter" else "model.safetensors"))


def furthest(one, other, part="model"):
    """The largest difference between two runs' weights."""
    one, other = weights(one, part), weights(other, part)
    assert one.keys() == other.keys()
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


def same_run(one, other):
    """Bit for bit: the model and every metric of every step; the last checkpoint is of the same step."""
    for path in (other / "model").iterdir():
        assert (one / "model" / path.name).read_bytes() == path.read_bytes(), path.name
    names = [sorted(path.name for path in (run / "checkpoints").glob("step-*")) for run in (one, other)]
    assert names[0][-1] == names[1][-1]
    assert metrics(one) == metrics(other)
    saved = [json.loads((run / "args.json").read_text()) for run in (one, other)]
    assert all(saved[0][name] == saved[1][name] for name in saved[0].keys() - dgpo.MAY_DIFFER)


@pytest.fixture(scope="session")
def whole(train, tmp_path_factory):
    """A run that nothing disturbed."""
    return train(tmp_path_factory.mktemp("whole") / "run", plot=True, **EVALUATED)


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves


def test_files(whole):
    """args.json, every step once, a figure, the last two checkpoints, a model, and nothing half-written."""
    assert sorted(path.name for path in whole.iterdir()) == [
        "args.json", "checkpoints", "curves.png", "metrics.jsonl", "model", "samples.md",
    ]  # fmt: skip
    assert json.loads((whole / "args.json").read_text())["beta"] == 2.5
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["step-00000010", "step-00000012"]
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    rows = metrics(whole)
    assert [row["step"] for row in rows] == list(range(13))
    assert [row["step"] for row in rows if "eval/loss" in row] == [0, 5, 10, 12]
    names = "loss logps/chosen logps/rejected rewards/accuracy rewards/margin".split()
    assert all(row.keys() >= {*names, "grad_norm", "lr"} for row in rows[1:])
    assert rows[12].keys() >= {f"eval/{name}" for name in (*names, "logps/chosen_delta", "logps/rejected_delta")}
    delta = rows[12]["eval/logps/chosen"] - rows[0]["eval/logps/chosen"]
    assert rows[12]["eval/logps/chosen_delta"] == pytest.approx(delta) and abs(delta) > 1e-3
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert all(row[name] > 0 for row in lines[1:] for name in ("seconds", "tokens_per_second", "memory_gb"))


def test_samples(whole, made):
    """Greedy answers to the first prompts of the evaluation pairs, one at a time as anyone would ask for them."""
    text = (whole / "samples.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(made / "base")
    prompts = dict.fromkeys(json.loads(line)["prompt"] for line in (made / "test.jsonl").read_text().splitlines())
    for part, folder in zip(("Before training", "After training"), (made / "base", whole / "model")):
        model = AutoModelForCausalLM.from_pretrained(folder)
        answers = re.findall(rf"# {part}\n\n~+\n(.*?)\n~+\n", text, re.DOTALL)
        assert len(answers) == 3
        for prompt, answer in zip(prompts, answers):
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            expected = model.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=tokenizer.eos_token_id)
            assert tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True) == answer


def test_a_model_that_cannot_generate_loses_no_run(made):
    model = AutoModelForCausalLM.from_pretrained(made / "base")
    model.generate = None
    found = dgpo.look.answers(
        model, AutoTokenizer.from_pretrained(made / "base"), Dataset.from_list([{"prompt_ids": [5]}])
    )
    assert list(found.values()) == ["(TypeError: 'NoneType' object is not callable)"]


def test_card(whole, made):
    """What the hub would show: paper, numbers, flags; no path where it expects names."""
    head, text = (whole / "model" / "README.md").read_text().removeprefix("---\n").split("\n---\n")
    assert head == "library_name: transformers\npipeline_tag: text-generation"
    assert f"# {made}/base trained by dgpo.py on {made}/train.jsonl" in text
    assert "https://openreview.net/forum?id=wmi6satsIu" in text and "| logps/chosen_delta |" in text
    flags = json.loads(text.split("```json")[1].split("```")[0])
    assert flags.keys() == vars(dgpo.Args()).keys() - dgpo.MAY_DIFFER and flags["lr"] == 1e-3


def test_what_a_run_prints(whole):
    """What was read, what is done, what changed."""
    printed = whole.with_suffix(".log").read_text()
    for text in (
        "40 of 40 pairs kept",
        "12 steps of 4 pairs",
        "first pair",
        "logps/chosen",
        "pairs/s",
        "memory ",
        f"in {whole}: model/",
    ):
        assert text in printed


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_trackers(tracker, made, tmp_path, monkeypatch):
    """All rows, the evaluation before training too; one project of W&B's, a run named after its folder, or as W&B's own
    variables say; everything inside the folder, where --overwrite finds it."""
    rows, started = [], []
    monkeypatch.setattr("accelerate.accelerator.filter_trackers", lambda name, *_: [name])
    monkeypatch.setattr(Accelerator, "init_trackers", lambda _, *project, **more: started.append((*project, more)))
    monkeypatch.setattr(Accelerator, "log", lambda _, row, step: rows.append((step, row)))
    for name in ("plot_curves", "write_samples"):
        monkeypatch.setattr(dgpo.look, name, lambda *_: None)
    for variables in ({}, {"WANDB_PROJECT": "P", "WANDB_NAME": "N"}):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        flags = flags_of(made, tmp_path / "run", **EVALUATED, steps=2, track=tracker, overwrite=True)
        dgpo.main(tyro.cli(dgpo.Args, args=flags))
    assert [step for step, _ in rows] == 2 * [0, 1, 2] and "eval/loss" in rows[0][1]
    projects, more = zip(*started)
    assert projects == (("tensorboard",) * 2 if tracker == "tensorboard" else ("preference-optimisation", "P"))
    names, folder = [one["init_kwargs"]["wandb"] for one in more], str(tmp_path / "run")
    assert names == [{"name": "run", "dir": folder}, {"name": "N", "dir": folder}]
    assert {"tensorboard", "wandb"} < {*dgpo.RUN}


def test_model_loads_and_generates(whole, made):
    """As anyone would load it; its chat template came along."""
    model, tokenizer = (kind.from_pretrained(whole / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    answer = model.generate(**tokenizer("1+1=", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert answer.shape[1] > tokenizer("1+1=", return_tensors="pt")["input_ids"].shape[1]
    assert tokenizer.chat_template == tiny.TEMPLATES["zephyr"]
    base = load_file(made / "base" / "model.safetensors")
    assert max((value - base[name]).abs().max().item() for name, value in weights(whole).items()) > 1e-3


def test_evaluation_is_of_the_model(whole, made):
    """eval/logps of the last step are those of the model that the run left."""
    model, tokenizer = (kind.from_pretrained(whole / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    rows = common.load_preferences(str(made / "test.jsonl"), tokenizer, "", 2048, 1800).to_list()
    batch = common.collate(rows)
    with torch.no_grad(), tiny.packed(model):
        chosen, rejected = common.response_logps(model, batch)
    expected = metrics(whole)[-1]
    chosen, rejected = chosen / batch.chosen_lengths, rejected / batch.rejected_lengths
    assert chosen.mean().item() == pytest.approx(expected["eval/logps/chosen"], abs=1e-5)
    assert (chosen > rejected).float().mean().item() == pytest.approx(expected["eval/rewards/accuracy"])
    assert dgpo.dgpo_loss(chosen, rejected, 2.5).mean().item() == pytest.approx(expected["eval/loss"], abs=1e-5)


def test_type_of_the_weights(train, made, tmp_path):
    """A bf16 checkpoint is trained in float32 and left in bf16."""
    model = AutoModelForCausalLM.from_pretrained(made / "base", dtype=torch.bfloat16)
    shutil.copytree(made / "base", tmp_path / "half")
    model.save_pretrained(tmp_path / "half")
    run = train(tmp_path / "run", model=tmp_path / "half", steps=2)
    assert {value.dtype for value in weights(run).values()} == {torch.bfloat16}
    reader = torch.distributed.checkpoint.FileSystemReader(run / "checkpoints" / "step-00000002")
    saved = reader.read_metadata().state_dict_metadata
    types = {value.properties.dtype for name, value in saved.items() if name.startswith("model_state_dict.")}
    assert types == {torch.float32}


LORA = {"lora_rank": 4, "lora_dropout": 0.2, "lr": 1e-2}


def test_lora(train, made, tmp_path):
    """model/ is the adapter merged into the base; a checkpoint holds the adapter only."""
    run = train(tmp_path / "run", **LORA)
    ids = torch.arange(10, 40)[None]
    base = AutoModelForCausalLM.from_pretrained(made / "base")
    with torch.no_grad():
        before = base(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(run / "model")(ids).logits
        adapted = PeftModel.from_pretrained(base, run / "adapter").eval()(ids).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    assert (merged - before).abs().max() > 1e-2
    reader = torch.distributed.checkpoint.FileSystemReader(run / "checkpoints" / "step-00000012")
    saved = [name for name in reader.read_metadata().state_dict_metadata if name.startswith("model_state_dict.")]
    assert saved and all("lora_" in name for name in saved)


def test_metrics_of_the_first_step(made, train, tmp_path):
    """Of the untouched model and of exactly the pairs of step 0."""
    row = metrics(train(tmp_path / "run", steps=1))[1]
    model, tokenizer = (kind.from_pretrained(made / "base") for kind in (AutoModelForCausalLM, AutoTokenizer))
    pairs = common.load_preferences(str(made / "train.jsonl"), tokenizer, "", 2048, 1800)
    batch = common.collate([pairs[i] for i in tiny.step_pairs(0, 40, 4)])
    with tiny.packed(model):
        chosen, rejected = common.response_logps(model, batch)
    losses = dgpo.dgpo_loss(chosen / batch.chosen_lengths, rejected / batch.rejected_lengths, 2.5)
    losses.mean().backward()
    norm = sum(p.grad.square().sum() for p in model.parameters()).sqrt().item()
    assert row["loss"] == pytest.approx(losses.mean().item(), abs=1e-5)
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# The result does not depend on how a batch is split

# AdamW moves a weight by lr g / (|g| + 1e-8), and float32 gives g to about 1e-7 of the gradient's norm. At a norm of 1
# that may move an entry which all but cancels by lr; at 1e-6 it moves none by more than lr 1e-13 / 1e-8 = 1e-8 a step.
# The weights, below 1, are rounded by 3e-8 a step; so ten steps of two runs are less than 2 * 10 * 4e-8 < 1e-6 apart.
SPLIT = {"batch_size": 16, "steps": 10, "save_every": 4, "warmup": 0, "max_grad_norm": 1e-6}


@pytest.fixture(scope="session")
def unsplit(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("unsplit") / "run", **SPLIT)


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens_per_device": 512},
        {"tokens_per_device": 8192},
        {"tokens_per_device": 64},
        {"tokens_per_device": 1},
        {"gradient_checkpointing": True},
    ],
    ids=["512", "8192", "64", "1", "gradient checkpointing"],
)
def test_same_weights(changes, train, unsplit, made, tmp_path):
    """Ten steps end in the same weights, to 1e-6 in float32, that are far from the initial ones."""
    run = train(tmp_path / "run", **SPLIT, **changes)
    assert furthest(run, unsplit) < 1e-6
    shutil.copytree(made / "base", tmp_path / "initial" / "model")
    assert furthest(run, tmp_path / "initial") > 1e-3


def test_two_processes(train, unsplit, made, tmp_path):
    """The same weights and metrics from two processes, launched as a user does; one may go on where two stopped."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    flags = flags_of(made, tmp_path / "run", **SPLIT, **EVALUATED)
    done = tiny.run(*launcher, "dgpo.py", *flags, env=environment, timeout=300)
    assert done.stdout.count("first pair") == 1 and "2 x cpu" in done.stdout
    assert furthest(tmp_path / "run", unsplit) < 1e-6
    for ours, theirs in zip(metrics(tmp_path / "run"), metrics(unsplit), strict=True):
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, abs=1e-5)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000010")
    shutil.rmtree(tmp_path / "run" / "model")
    train(tmp_path / "run", **SPLIT, **EVALUATED, resume=True)
    assert furthest(tmp_path / "run", unsplit) < 1e-6
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(11))


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 4}], ids=["all weights", "lora"])
def test_two_processes_resume(changes, train, made, tmp_path):
    """Two processes, killed and resumed, end bit for bit where they would have ended."""
    changes = {**SPLIT, **changes, "tokens_per_device": 200}
    whole = train(tmp_path / "whole", processes=2, **changes)
    fault = ("at", "Accelerator.log", "'step': 6,", "before")  # both processes call it, behind the line of metrics
    train(tmp_path / "run", fault, ends=-signal.SIGKILL, processes=2, **changes)
    same_run(train(tmp_path / "run", processes=2, resume=True, **changes), whole)


def test_golden_losses(train, made, tmp_path):
    """The first losses of a seeded run are pinned, and so is the tail of that run when it is resumed."""
    run = train(tmp_path / "run", steps=5, warmup=0)
    losses = [row["loss"] for row in metrics(run)[1:]]
    assert losses == pytest.approx(GOLDEN, abs=1e-5)
    shutil.rmtree(run / "checkpoints" / "step-00000005")
    resumed = train(run, steps=5, warmup=0, resume=True)
    assert [row["loss"] for row in metrics(resumed)[1:]] == losses


# ---------------------------------------------------------------------------------------------------------------------
# SIGKILL and --resume


OWNERS = {"dgpo": dgpo, "os": os, "shutil": shutil, "dcp": dgpo.dcp, "dcp_state": dgpo.dcp_state}
OWNERS |= {kind.__name__: kind for kind in (Accelerator, Figure, Path, PreTrainedModel)}


def kill_at(function: str, text: str, when: str) -> None:
    """Let this process die at the first call of a function whose arguments contain text."""
    owner, name = OWNERS[function.split(".")[0]], function.split(".")[1]
    real = getattr(owner, name, None) or getattr(builtins, name)  # a global of dgpo stands before the builtin

    def deadly(*args, **options):
        if text not in f"{args}{options}":
            return real(*args, **options)
        if when != "before" and function != "shutil.rmtree":
            real(*args, **options)
        if when == "half":  # what the call was to write or to delete is there in part
            paths = (value for value in (*args, *options.values()) if isinstance(value, Path))
            path = Path(options["file"].name) if "file" in options else next(paths)
            path = min(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else path
            os.truncate(path, path.stat().st_size - 40) if function != "shutil.rmtree" else path.unlink()
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, deadly)


def kill_after(events: int) -> None:
    """Let this process die after so many calls of any function, Python's or C's, since it began to write the run."""
    real, left = common.fingerprint, [events]

    def count(*_):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    def fingerprint(*args):  # the last thing before
        found = real(*args)
        sys.setprofile(count)
        return found

    common.fingerprint = fingerprint


def count_calls(file: Path) -> None:
    fingerprint, show, seen = common.fingerprint, Accelerator.print, [0]

    def count(*_):
        seen[0] += 1

    def begin(*args):
        found = fingerprint(*args)
        sys.setprofile(count)
        return found

    def end(accelerator, text):
        if "start -> end" in text:
            sys.setprofile(None)
            file.write_text(str(seen[0]))
        show(accelerator, text)

    common.fingerprint, Accelerator.print = begin, end


FAULTS = {"at": kill_at, "after": kill_after, "count": count_calls}

CHAIN = [  # each in the run that goes on from the one before; steps 1, 2, 4, ... 12 are saved
    ("os.replace", "args.json", "before"),
    ("dgpo.print", '"step": 0', "before"),
    ("dgpo.print", '"step": 0', "half"),
    ("Path.unlink", "metrics.jsonl", "before"),  # nothing was saved, so the run begins anew
    ("Path.write_text", "args.json", "half"),
    ("dgpo.print", '"step": 1,', "after"),
    ("dcp.save", "writing", "half"),
    ("Path.write_text", "state.json", "before"),
    ("Path.write_text", "state.json", "half"),
    ("os.replace", "step-00000001", "before"),
    ("os.replace", "step-00000001", "after"),
    ("dgpo.print", '"step": 4,', "half"),
    ("os.replace", "step-00000001", "after"),
    ("shutil.rmtree", "checkpoints/writing", "half"),
    ("Path.open", "metrics.jsonl'), 'a'", "after"),  # what was written behind the last checkpoint is not cut yet
    ("dcp.load", "step-", "before"),  # it is cut, and nothing is loaded yet
    ("Figure.savefig", "curves.png", "before"),
    ("Figure.savefig", "curves.png", "half"),
    ("dgpo.print", '"step": 9,', "after"),
    ("dcp.save", "writing", "after"),
    ("os.replace", "step-00000012", "after"),
    ("dcp_state.get_model_state_dict", "", "before"),
    ("PreTrainedModel.save_pretrained", "model.writing", "half"),
    ("os.replace", "model.writing", "before"),
    ("shutil.rmtree", "model')", "before"),
    ("Accelerator.print", "start -> end", "before"),
]


def test_kills_while_writing(train, whole, tmp_path):
    """Killed once in each thing that a run writes, renames or deletes, resumed each time."""
    for fault in CHAIN:
        options = {"resume": True, "plot": "curves.png" in fault, **EVALUATED}
        train(tmp_path / "run", ("at", *fault), ends=-signal.SIGKILL, **options)
    same_run(train(tmp_path / "run", resume=True, **EVALUATED), whole)


@pytest.fixture(scope="session")
def calls(train, tmp_path_factory):
    """How many calls an undisturbed run makes."""
    folder = tmp_path_factory.mktemp("calls")
    train(folder / "run", ("count", folder / "calls"), save_every=1, **EVALUATED)
    return int((folder / "calls").read_text())


@pytest.mark.parametrize("seed", range(5))
def test_kills_at_random_moments(seed, calls, train, whole, tmp_path):
    """Two kills each, somewhere in all the calls that a run makes, most of which write a checkpoint at every step."""
    rng = random.Random(seed)
    for moment in (rng.randint(1, calls // 2), rng.randint(1, calls // 3)):
        train(tmp_path / "run", ("after", moment), ends=-signal.SIGKILL, resume=True, save_every=1, **EVALUATED)
    same_run(train(tmp_path / "run", resume=True, **EVALUATED), whole)


@pytest.mark.parametrize(
    "fault",
    [
        ("os.replace", "args.json", "after"),
        ("os.replace", "step-00000010", "after"),
        ("os.replace", "step-00000012", "after"),
        ("os.replace", "step-00000008", "after"),
        ("os.replace", "step-00000008'), ", "after"),
        ("Figure.savefig", "curves.png", "half"),
        ("PreTrainedModel.save_pretrained", "model.writing", "half"),
    ],
    ids=["args.json", "step 10", "step 12", "step 8", "removal of step 8", "curves.png", "model.writing"],
)
def test_nothing_is_left_of_a_kill(fault, train, whole, tmp_path):
    """After a kill at a rename or in a file and a resume, all files are those of an undisturbed run, all curves too."""
    train(tmp_path / "run", ("at", *fault), ends=-signal.SIGKILL, plot=True, **EVALUATED)
    train(tmp_path / "run", resume=True, plot=True, **EVALUATED)
    files = [{path.relative_to(run).as_posix() for path in run.rglob("*")} for run in (tmp_path / "run", whole)]
    assert files[0] == files[1]
    assert (tmp_path / "run" / "curves.png").read_bytes() == (whole / "curves.png").read_bytes()


def test_kill_lora(train, tmp_path):
    """Adapters, their optimizer state and their dropout go on as if nothing had been."""
    whole = train(tmp_path / "whole", **LORA)
    fault = ("at", "dgpo.print", '"step": 6,', "after")
    train(tmp_path / "run", fault, ends=-signal.SIGKILL, save_every=5, **LORA)
    run = train(tmp_path / "run", resume=True, **LORA)
    assert furthest(run, whole, "adapter") == 0
    same_run(run, whole)


def test_kill_rmsprop(train, tmp_path):
    """The other optimizer and schedule."""
    changes = {"optimizer": "rmsprop", "schedule": "linear", "lr": 1e-4}
    whole = train(tmp_path / "whole", **changes)
    train(tmp_path / "run", ("at", "dgpo.print", '"step": 5,', "after"), ends=-signal.SIGKILL, **changes)
    same_run(train(tmp_path / "run", resume=True, **changes), whole)


def test_resume_of_a_finished_run(train, whole, tmp_path):
    """It changes nothing; --overwrite begins anew and ends the same."""
    run = shutil.copytree(whole, tmp_path / "run")
    same_run(train(run, resume=True, **EVALUATED), whole)
    for name in ("model", "tensorboard", "wandb"):
        (run / name).mkdir(exist_ok=True)
        (run / name / "old").write_text("of the run before")
    same_run(train(run, overwrite=True, **EVALUATED), whole)
    assert not list(run.rglob("old"))


def test_a_finished_run_goes_on(train, tmp_path):
    """With more steps, where these would have had the same learning rates from the start."""
    constant = {"schedule": "constant_with_warmup", "warmup": 3}
    whole = train(tmp_path / "whole", **constant)
    run = train(tmp_path / "run", **constant | {"steps": 7})
    same_run(train(run, resume=True, **constant, eval_every=3), whole)
    assert "resumed behind step 7 of 12" in run.with_suffix(".log").read_text()
    for changes, message in (
        ({"steps": 9}, "has done 12 steps already, more than 9"),
        ({"warmup": 2}, "--warmup 2.0, but it was started with 3.0"),
    ):
        train(run, ends=1, resume=True, **constant | changes)
        assert message in run.with_suffix(".log").read_text()


@pytest.mark.parametrize("changes", [{}, {"schedule": "constant_with_warmup", "warmup": 0.5}], ids=["cosine", "share"])
def test_a_run_that_cannot_go_on(changes, train, tmp_path):
    """Its learning rates would have been others from the start."""
    run = train(tmp_path / "run", **changes)
    train(run, ends=1, resume=True, **{"steps": 15} | changes)
    said = "--steps 15, but it was started with 12; a longer run takes a constant schedule and --warmup in steps"
    assert said in run.with_suffix(".log").read_text()


def test_kill_while_overwriting(train, whole, tmp_path):
    """Of a run whose deletion was killed nothing is taken over: --resume begins anew."""
    run = shutil.copytree(whole, tmp_path / "run")
    fault = ("at", "shutil.rmtree", "checkpoints')", "half")
    train(run, fault, ends=-signal.SIGKILL, overwrite=True, **EVALUATED)
    assert (run / "checkpoints" / "step-00000012").exists()
    same_run(train(run, resume=True, **EVALUATED), whole)


def test_kill_a_real_process(whole, made, tmp_path):
    """`python dgpo.py`, killed from outside as soon as its metrics show some steps, and resumed."""
    changes = {**EVALUATED, "save_every": 1}
    run = tmp_path / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "dgpo.py", *flags_of(made, run, **changes)]
    process = subprocess.Popen(command, cwd=tiny.ROOT, env=environment, stdout=-3, stderr=-3)
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("\n") < 4:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (run / "model").exists()
    tiny.run("dgpo.py", *flags_of(made, run, **EVALUATED, resume=True), env=environment)
    same_run(run, whole)
