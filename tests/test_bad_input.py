"""What users get wrong: one line that names the cause, exit code 1, and nothing of an earlier run is lost."""

import json
import os
import re
import shutil

import pytest
import tiny
import torch
import tyro
from accelerate import Accelerator
from datasets import Dataset

import dgpo
import hdpo

PAIR = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}
USER, GOOD, BAD = ({"role": role, "content": text} for role, text in zip(("user", "assistant", "assistant"), "abc"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model with and one without a chat template, and one of each kind that cannot be trained."""
    folder = tmp_path_factory.mktemp("made")
    tiny.write_model(folder / "model")
    tiny.write_model(folder / "chat", "llama3")

    def spoil(name, **files):
        shutil.copytree(folder / "model", folder / name)
        for file, content in files.items():
            (folder / name / file.replace("_", ".")).write_text(content)

    spoil("no weights")
    (folder / "no weights" / "model.safetensors").unlink()
    spoil("torn weights", model_safetensors="torn")
    spoil("torn config", config_json="{")
    spoil("no such type", config_json='{"model_type": "new"}')
    spoil("torn tokenizer", tokenizer_json='{"version": "1.0", "added_tokens": [')
    spoil("broken tokenizer", tokenizer_json='{"model": 1}')
    for name, family, changes in (
        ("bloom", "bloom", {}),
        ("mamba", "mamba", {}),
        ("falcon", "falcon", {}),
        ("stablelm", "stablelm", {}),
        ("lfm2", "lfm2", {}),
        ("short", "gpt2", {"n_positions": 20}),
        ("nan", "llama", {}),
        ("small vocabulary", "llama", {"vocab_size": 40}),
    ):
        spoil(name)
        model = tiny.model(family, dtype=torch.float32, **changes)
        if name == "nan":
            model.model.embed_tokens.weight.data.fill_(float("nan"))
        model.save_pretrained(folder / name)
    tiny.write_pairs(folder / "pairs.jsonl", 8)
    return folder


def snapshot(folder):
    return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.fixture
def earlier(tmp_path):
    """An output directory that holds a run."""
    for name in (
        "args.json",
        "metrics.jsonl",
        "curves.png",
        "model/config.json",
        "checkpoints/step-00000001/state.json",
    ):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text(json.dumps({"earlier": name}))
    return tmp_path / "out"


def refused(made, out, *flags) -> str:
    """Run in this process; the one line of the error."""
    defaults = {"model": made / "model", "dataset": made / "pairs.jsonl", "batch-size": 4, "output-dir": out}
    given = set(flags)
    flags = [str(x) for name, value in defaults.items() if f"--{name}" not in given for x in (f"--{name}", value)] + [
        str(flag) for flag in flags
    ]
    with pytest.raises(SystemExit) as caught:
        dgpo.main(tyro.cli(dgpo.Args, args=flags))
    message = caught.value.code
    assert isinstance(message, str) and message.startswith("error: ") and message.count("\n") == 0, message
    return message.removeprefix("error: ")


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


FILES = {
    "missing column": ("d.jsonl", lines(PAIR, {"prompt": "a", "chosen": "b"}), 'row 2: no column "rejected" .*chosen'),
    "columns of something else": ("d.json", '[{"question": "a"}]', 'row 1: no column "chosen" .found: question'),
    "number in row 7": ("d.jsonl", lines(*6 * [PAIR], {**PAIR, "chosen": 5}), 'row 7: "chosen" is a number'),
    "number as prompt": ("d.json", json.dumps([PAIR, {**PAIR, "prompt": 1.5}]), 'row 2: "prompt" is a number'),
    "list of texts": ("d.jsonl", lines({**PAIR, "chosen": ["a"]}), 'row 1: "chosen" is list, expected text'),
    "empty jsonl": ("d.jsonl", "", "d.jsonl: .*is empty"),
    "blank jsonl": ("d.jsonl", "\n \n", "d.jsonl: .*is empty"),
    "empty json": ("d.json", "", "d.json: it is empty"),
    "empty list": ("d.json", "[]", "d.json: it is empty"),
    "json without list": ("d.json", '{"chosen": "a"}', 'd.json row 1: no column "rejected" .found: chosen'),
    "not JSON": ("d.json", "chosen: a", "d.json row 1: not JSON"),
    "not JSON in row 3": ("d.jsonl", lines(PAIR, PAIR) + '{"prompt": ', "d.jsonl row 3: not JSON"),
    "not UTF-8": ("d.jsonl", b'{"prompt": "\xff"}', "d.jsonl: .*utf-8"),
    "not parquet": ("d.parquet", "no", "d.parquet: not a readable parquet file"),
    "parquet of something else": ("d.parquet", [{"text": "a"}], 'row 1: no column "chosen"'),
    "parquet of numbers": ("d.parquet", [{**PAIR, "chosen": 1}], '"chosen" is a number'),
    "row that is no object": ("d.jsonl", lines(PAIR, ["a", "b"]), "row 2: expected an object .*, found list"),
    "unsupported suffix": ("d.csv", "chosen,rejected\n", "d.csv: expected a .json, .jsonl or .parquet file"),
    "directory as file": ("d.jsonl/x", "", "d.jsonl: no such file"),
    "message without role": ("d.jsonl", lines({**PAIR, "chosen": [{"content": "a"}]}), 'row 1: "chosen" is list'),
    "text and messages": ("d.jsonl", lines({**PAIR, "rejected": [BAD]}), 'one of "chosen" and "rejected" is text'),
    "prompt of messages": ("d.jsonl", lines({**PAIR, "prompt": [USER]}), '"prompt" is a list .* "chosen" is text'),
    "no template": ("d.jsonl", lines({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}), "has no chat template"),
    "degenerate": ("d.jsonl", lines(*3 * [{**PAIR, "chosen": "3"}]), "none of its 3 rows .*chosen equals rejected"),
    "fewer pairs than a batch": ("d.jsonl", lines(PAIR, PAIR), "--batch-size 4 is more than the 2 pairs of .*d.jsonl"),
}  # fmt: skip


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    if isinstance(content, list):
        Dataset.from_list(content).to_parquet(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("case", FILES)
def test_files(case, made, tmp_path, earlier):
    """The error names file, row and column; --overwrite deletes nothing before the data is known to be good."""
    name, content, expected = FILES[case]
    write(tmp_path / name, content)
    before = snapshot(earlier)
    message = refused(made, earlier, "--overwrite", "--dataset", tmp_path / name.removesuffix("/x"))
    assert re.search(expected, message), message
    assert snapshot(earlier) == before
    assert str(tmp_path / name.removesuffix("/x")) in message


FLAGS = {
    "no such file": (["--dataset", "none.jsonl"], "none.jsonl: no such file"),
    "no such evaluation file": (["--eval-dataset", "none.parquet"], "none.parquet: no such file"),
    "no such model": (["--model", "{made}/none"], "cannot load '.*none'"),
    "file as model": (["--model", "{made}/pairs.jsonl"], "cannot load '.*pairs.jsonl'"),
    "no weights": (["--model", "{made}/no weights"], "cannot load '.*no weights'.*model.safetensors"),
    "torn weights": (["--model", "{made}/torn weights"], "cannot load '.*torn weights'"),
    "torn config": (["--model", "{made}/torn config"], "cannot load .*torn config"),
    "no such type": (["--model", "{made}/no such type"], "cannot load .*no such type"),
    "torn tokenizer": (["--model", "{made}/torn tokenizer"], "cannot load '.*torn tokenizer'"),
    "broken tokenizer": (["--model", "{made}/broken tokenizer"], "cannot load '.*broken tokenizer'"),
    "bloom": (["--model", "{made}/bloom"], "^BloomForCausalLM cannot run packed pairs .docs/models.md"),
    "mamba": (
        ["--model", "{made}/mamba"],
        "^MambaForCausalLM lets a response see what is packed before it.*docs/models.md",
    ),
    "falcon": (["--model", "{made}/falcon"], "^FalconForCausalLM cannot run packed pairs .docs/models.md"),
    "stablelm": (["--model", "{made}/stablelm"], "^StableLmForCausalLM cannot run packed pairs .docs/models.md"),
    "lfm2": (["--model", "{made}/lfm2"], "Lfm2ForCausalLM lets a response see what is packed before it"),
    "lfm2 under lora": (["--model", "{made}/lfm2", "--lora-rank", 2], "^Lfm2ForCausalLM lets a response see"),
    "more tokens than positions": (
        ["--model", "{made}/short"],
        "GPT2LMHeadModel takes 20 tokens .*set --max-length 20",
    ),
    "more tokens than embeddings": (
        ["--model", "{made}/small vocabulary"],
        "LlamaForCausalLM has 40 embeddings, but the tokenizer gives token",
    ),
    "nan weights": (["--model", "{made}/nan"], "log-probs that are no numbers .*weights are broken"),
    "prompts too long": (["--max-length", 5, "--max-prompt-length", 4], "none of its 8 rows .*nothing left.*length 5"),
    "no room": (["--max-length", 100], "--max-prompt-length 1800 leaves no room in --max-length 100"),
    "large batch": (["--batch-size", 9], "--batch-size 9 is more than the 8 pairs of .*pairs.jsonl"),
    "zero batch": (["--batch-size", 0], "--batch-size 0: expected a number above 0"),
    "negative batch": (["--batch-size", -4], "--batch-size -4: expected a number above 0"),
    "negative tokens": (["--tokens-per-device", -1], "--tokens-per-device -1: expected"),
    "zero length": (["--max-length", 0], "--max-length 0: expected"),
    "negative steps": (["--steps", -1], "--steps -1: expected 0 or more"),
    "zero epochs": (["--epochs", 0], "--epochs 0: expected"),
    "negative rank": (["--lora-rank", -8], "--lora-rank -8: expected 0 or more"),
    "dropout": (["--lora-rank", 4, "--lora-dropout", 1], "--lora-dropout 1.*expected 0 or more, less than 1"),
    "nan lr": (["--lr", "nan"], "--lr nan: expected a number above 0"),
    "negative lr": (["--lr", -1e-6], "--lr -1e-06: expected"),
    "infinite lr": (["--lr", "inf"], "--lr inf: expected"),
    "zero beta": (["--beta", 0], "--beta 0.*expected a number above 0"),
    "nan beta": (["--beta", "nan"], "--beta nan: expected a number above 0"),
    "nan dropout": (["--lora-dropout", "nan"], "--lora-dropout nan: expected"),
    "resume and overwrite": (["--resume"], "--resume .* --overwrite .*choose one"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags(case, made, earlier):
    """Flags that cannot be, and models that cannot be trained."""
    flags, expected = FLAGS[case]
    before = snapshot(earlier)
    message = refused(made, earlier, "--overwrite", *(str(flag).format(made=made) for flag in flags))
    assert re.search(expected, message), message
    assert snapshot(earlier) == before


@pytest.mark.parametrize("flags", [[], ["--track", "tensorboard"]], ids=["", "tracked"])
def test_output_directory_in_use(flags, made, earlier, monkeypatch):
    """A run is neither written over nor added to, unless it is asked for; not by a tracker either."""
    monkeypatch.setattr(Accelerator, "init_trackers", lambda *_, **__: (earlier / "events").write_text(""))
    before = snapshot(earlier)
    assert re.search("already holds a run: choose another --output-dir|tensorboard", refused(made, earlier, *flags))
    assert snapshot(earlier) == before


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_tracker_that_is_not_installed(tracker, made, earlier, monkeypatch):
    """Asked to track, a run must not train for hours without."""
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    assert tracker in refused(made, earlier, "--overwrite", "--track", tracker)


def test_output_directory_that_holds_a_model(made, tmp_path):
    """Without args.json it is no run of ours, and what lies there is not ours to delete."""
    shutil.copytree(made / "model", tmp_path / "base" / "model")
    before = snapshot(tmp_path)
    assert "model" in refused(made, tmp_path / "base", "--model", tmp_path / "base" / "model")
    assert snapshot(tmp_path) == before


def test_overwriting_the_run_that_made_the_model(made, earlier):
    """--overwrite would delete the very model that is to be trained."""
    shutil.rmtree(earlier / "model")
    shutil.copytree(made / "model", earlier / "model")
    before = snapshot(earlier)
    assert "model" in refused(made, earlier, "--overwrite", "--model", earlier / "model")
    assert snapshot(earlier) == before


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_file_in_the_way(name, made, tmp_path):
    """--output-dir is a file, or below one."""
    (tmp_path / "file").write_text("mine")
    assert f"cannot write to --output-dir {tmp_path}/{name}" in refused(made, tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"


def test_resume_with_other_arguments(made, tmp_path):
    """What would change the result is refused by name; what would not is allowed."""
    base = [f"--model={made / 'model'}", f"--dataset={made / 'pairs.jsonl'}", f"--output-dir={tmp_path / 'out'}"]
    base += ["--batch-size=4", "--max-prompt-length=100"]
    dgpo.main(tyro.cli(dgpo.Args, args=base))
    before = snapshot(tmp_path / "out")
    shutil.copy(made / "pairs.jsonl", tmp_path / "copy.jsonl")
    for flags in (["--lr", 1e-3], ["--steps", 3], ["--beta", 1], ["--seed", 1], ["--dataset", tmp_path / "copy.jsonl"]):
        message = refused(made, tmp_path / "out", "--max-prompt-length", 100, "--resume", *flags)
        assert f"--resume with {flags[0]} {flags[1]}" in message and "was started with" in message
    assert snapshot(tmp_path / "out") == before
    dgpo.main(tyro.cli(dgpo.Args, args=[*base, "--resume", "--tokens-per-device=64", "--save-every=1"]))


def test_resume_of_another_scripts_run(made, tmp_path):
    """Flags that the stored run has not are other flags."""
    base = [f"--model={made / 'model'}", f"--dataset={made / 'pairs.jsonl'}", f"--output-dir={tmp_path / 'out'}"]
    base += ["--batch-size=4", "--max-prompt-length=100", "--max-length=200"]
    dgpo.main(tyro.cli(dgpo.Args, args=base))
    before = snapshot(tmp_path / "out")
    with pytest.raises(SystemExit, match="--resume with --alpha 0.95, but .* was started with None"):
        hdpo.main(tyro.cli(hdpo.Args, args=[*base, "--beta=2.5", "--train-split=train_prefs", "--resume"]))
    assert snapshot(tmp_path / "out") == before


def test_resume_of_a_run_that_was_half_deleted(made, tmp_path):
    """Killed while --overwrite deleted it: metrics.jsonl goes first, so what is left is begun anew."""
    base = [f"--model={made / 'model'}", f"--dataset={made / 'pairs.jsonl'}", f"--output-dir={tmp_path / 'out'}"]
    base += ["--batch-size=4", "--max-prompt-length=100"]
    dgpo.main(tyro.cli(dgpo.Args, args=base))
    (tmp_path / "out/metrics.jsonl").unlink()
    (tmp_path / "out/checkpoints/step-00000002/state.json").unlink()
    dgpo.main(tyro.cli(dgpo.Args, args=[*base, "--resume"]))
    assert [json.loads(line)["step"] for line in (tmp_path / "out/metrics.jsonl").open()] == [0, 1, 2]


def test_loss_that_is_no_number(made, tmp_path):
    """Training stops before the broken update; the last checkpoint and the metrics up to it stay."""
    message = refused(made, tmp_path / "out", "--lr", 1e30, "--warmup", 0)
    assert re.match("step 2: loss.*nan; stopped before the update.*lower --lr", message)
    assert [json.loads(line)["step"] for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()] == [0, 1]
    assert [path.name for path in (tmp_path / "out/checkpoints").iterdir()] == ["step-00000001"]
    assert not (tmp_path / "out/model").exists()


def test_batch_that_processes_cannot_share(made, earlier, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", 3)
    assert "--batch-size 4 cannot be divided by 3 processes" in refused(made, earlier, "--overwrite")


@pytest.mark.parametrize("engine", ["DEEPSPEED", "MEGATRON_LM"])
def test_engines(engine, made, earlier, monkeypatch):
    """Engines that this was never run with are refused by name, with what to use instead."""
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    before = snapshot(earlier)
    assert f"{engine} is not supported: launch with configs/" in refused(made, earlier, "--overwrite")
    assert snapshot(earlier) == before


def test_fsdp_version_1(made, tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", "FSDP")
    monkeypatch.setattr(Accelerator, "is_fsdp2", False)
    assert "set fsdp_version: 2" in refused(made, tmp_path / "out")


def test_out_of_memory(made, tmp_path):
    """One line with the ways out, whatever the run was doing."""
    broken = "import torch, runpy; torch.nn.Linear.forward = lambda *_: exec('raise torch.OutOfMemoryError()'); "
    flags = ["dgpo.py", f"--model={made / 'model'}", f"--dataset={made / 'pairs.jsonl'}", f"--output-dir={tmp_path}"]
    run = f"import sys; sys.argv = {flags + ['--batch-size=4']}; runpy.run_path('dgpo.py', run_name='__main__')"
    done = tiny.run("-c", broken + run, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    last = done.stderr.strip().split("\n")[-1]
    assert done.returncode == 1 and last.startswith("error: out of memory: try a lower --tokens-per-device"), last
    assert "--lora-rank" in last and "Traceback" not in done.stderr


@pytest.mark.parametrize("flags", [["--batch-size", "many"], ["--optimizer", "sgd"], ["--beta"], ["data.jsonl"]])
def test_flags_that_do_not_parse(flags, capsys):
    """tyro's own box, which names the flag."""
    with pytest.raises(SystemExit) as caught:
        tyro.cli(dgpo.Args, args=flags)
    assert caught.value.code == 2 and flags[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model", "{made}/model", "--dataset", "{tmp}/row7.jsonl"], '^error: .*row7.jsonl row 7: "chosen" is a num'),
        (["--model", "nobody/no-such-model", "--dataset", "{made}/pairs.jsonl"], "^error: .*'nobody/no-such-model'"),
        (["--model", "{made}/model", "--dataset", "nobody/no-such-data"], "^error: .*data set 'nobody/no-such-data'"),
        (["--beta-max", "1"], "Unrecognized options: --beta-max"),
    ],
    ids=["row 7", "no such model", "no such data set", "unknown flag"],
)
def test_as_a_user(flags, expected, made, tmp_path, earlier):
    """The same from outside: exit code, last line of stderr, no traceback."""
    write(tmp_path / "row7.jsonl", lines(*6 * [PAIR], {**PAIR, "chosen": 5}))
    before = snapshot(earlier)
    flags = [flag.format(made=made, tmp=tmp_path) for flag in flags]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = tiny.run("dgpo.py", "--output-dir", earlier, "--overwrite", *flags, check=False, env=environment)
    assert done.returncode == (2 if "Unrecognized" in expected else 1)
    assert "Traceback" not in done.stderr + done.stdout
    last = done.stderr.strip() if "Unrecognized" in expected else done.stderr.strip().split("\n")[-1]
    assert re.search(expected, last), last
    assert snapshot(earlier) == before
