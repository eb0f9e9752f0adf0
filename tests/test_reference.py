"""Stored reference log-probs: equal to live ones, made again when they are not this run's, of the initial model."""

import multiprocessing
import os
import shutil
import socket

import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import metrics
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import hdpo


def in_processes(function, *arguments, count: int = 2, **environment) -> None:
    """Run function(*arguments) in forked processes that accelerate sees as launched on CPUs."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        group = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": str(count)}

    def work(rank):
        torch.set_num_threads(1)
        os.environ.update(group, ACCELERATE_USE_CPU="true", RANK=str(rank), LOCAL_RANK=str(rank), **environment)
        AcceleratorState._reset_state(True)
        function(*arguments)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    forked = [multiprocessing.get_context("fork").Process(target=work, args=(rank,)) for rank in range(count)]
    for process in forked:
        process.start()
    for process in forked:
        process.join(100)
    codes = [process.exitcode for process in forked]
    for process in forked:
        process.kill()
    assert codes == [0] * count


class Killed(BaseException):
    """Ends main at once, and nothing in it can catch this."""


def until(step: int, main, args) -> None:
    """Run main until it has logged this step: what a kill there leaves behind."""

    def log(_accelerator, row, **_):  # to the trackers, behind the line of metrics.jsonl
        if row["step"] == step:
            raise Killed

    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr(Accelerator, "log", log)
        with pytest.raises(Killed):
            main(args)


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """They take longer than the runs."""
    for name in ("plot_curves", "write_samples"):  # both take longer than these runs
        monkeypatch.setattr(hdpo.look, name, lambda *_: None)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("model") / "wide", dtype=torch.float64)


def load(base, lora=False, seed=None):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    if lora:  # as get_peft_model leaves it: the second factor is zero
        model = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear"))
    if seed is not None:  # other weights
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


ROWS = tiny.pair_rows(40)
USED = [i for i in range(40) if i % 4 != 3]


def file_of(folder):
    return folder / "run" / "reference" / "train.safetensors"


def add(folder, model, rows=ROWS, used=USED, max_tokens=512):
    Accelerator(cpu=True)
    (folder / "run").mkdir(exist_ok=True)
    with tiny.packed(model):
        return common.reference_logps(model, Dataset.from_list(rows), used, file_of(folder), max_tokens)


def live(model, rows=ROWS):
    """One plain forward a sequence."""
    model.eval()
    sums = []
    with torch.no_grad():
        for row in rows:
            for name in ("chosen_ids", "rejected_ids"):
                logits = model(torch.tensor([row["prompt_ids"] + row[name]])).logits[0, len(row["prompt_ids"]) - 1 : -1]
                sums.append(logits.log_softmax(-1).gather(1, torch.tensor(row[name])[:, None]).sum())
    return torch.stack(sums).double().view(-1, 2)


def columns(dataset):
    return torch.tensor([dataset["ref_chosen_logps"], dataset["ref_rejected_logps"]], dtype=torch.float64).T


def check_live(model, folder):
    """In each process: the pairs of the run have live log-probs, the others nan, and a batch carries them."""
    model.train()
    dataset = add(folder, model)
    assert model.training
    stored, expected = columns(dataset), live(model)
    torch.testing.assert_close(stored[USED], expected[USED], rtol=1e-9, atol=1e-9)
    assert stored[3::4].isnan().all() and stored.isnan().sum() == 20
    batch = common.collate([dataset[i] for i in (4, 9)])
    assert torch.equal(batch.ref_chosen_logps, stored[[4, 9], 0])
    assert torch.equal(batch.ref_rejected_logps, stored[[4, 9], 1])


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "lora"])
@pytest.mark.parametrize("processes", [1, 2])
def test_stored_equal_live(lora, processes, wide_base, tmp_path, wide):
    """To 1e-9 in float64, under dropout of adapters too."""
    model = load(wide_base, lora)
    if processes == 1:
        check_live(model, tmp_path)
    else:
        in_processes(check_live, model, tmp_path)
        assert [path.name for path in (tmp_path / "run" / "reference").iterdir()] == ["train.safetensors"]


# ---------------------------------------------------------------------------------------------------------------------
# Reuse


def again(folder, capsys, model=None, rows=ROWS, used=USED, **options):
    """Ask for reference log-probs once more; True where the file was reused. They are right in any case."""
    model, path = model or load(folder / "base"), file_of(folder)
    capsys.readouterr()
    stored = columns(add(folder, model, rows, used, **options))
    printed = capsys.readouterr().out
    torch.testing.assert_close(stored[used], live(model, rows)[used], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(load_file(path)["logps"], stored, equal_nan=True, rtol=0, atol=0)
    assert printed.startswith(str(path)) and ("reused" in printed) != ("made again" in printed), printed
    return "reused" in printed


@pytest.fixture
def stored(base, tmp_path):
    """A run's folder with the reference of ROWS; the model is a copy that a test may change."""
    copy = shutil.copytree(base, tmp_path / "base")
    add(tmp_path, load(copy))
    return tmp_path


def test_reuse(stored, capsys):
    """The same model and pairs: the file is read, and says so; how rows are split does not matter."""
    assert again(stored, capsys)
    assert again(stored, capsys, max_tokens=4096)


def test_other_weights_under_the_same_name(stored, capsys):
    """Found though the files' names, sizes and times are the same."""
    weights = stored / "base" / "model.safetensors"
    times = weights.stat()
    changed = load(stored / "base", seed=1).float()
    changed.save_pretrained(stored / "base")
    assert weights.stat().st_size == times.st_size
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not again(stored, capsys)
    assert again(stored, capsys)


def shorter(row):
    return {**row, "chosen_ids": row["chosen_ids"][:6], "rejected_ids": row["rejected_ids"][:7]}


@pytest.mark.parametrize(
    "rows, used",
    [
        (tiny.pair_rows(40, seed=1), USED),
        ([shorter(row) for row in ROWS], USED),
        ([*ROWS[:21], {**ROWS[21], "rejected_ids": [*ROWS[21]["rejected_ids"][:-1], 9]}, *ROWS[22:]], USED),
        (ROWS + ROWS[:1], USED),
        (ROWS, USED[:-1]),
        (ROWS, list(range(40))),
    ],
    ids=["other data", "other truncation", "one token", "one more row", "fewer pairs", "more pairs"],
)
def test_other_pairs(rows, used, stored, capsys):
    assert not again(stored, capsys, rows=rows, used=used)


def test_half_written(stored, capsys):
    """Cut anywhere, emptied, overwritten with something else, or left half-written beside."""
    path = file_of(stored)
    whole = path.read_bytes()
    lengths = (0, 1, 7, 8, 20, len(whole) // 2, len(whole) - 1)
    contents = [whole[:length] for length in lengths] + [b"{}" * 200, b"\xff" * 100]
    model = load(stored / "base")
    for content in contents:
        path.write_bytes(content)
        assert not again(stored, capsys, model=model), content[:20]
        assert path.read_bytes() == whole
    path.with_suffix(".writing").write_bytes(whole[:100])
    assert again(stored, capsys, model=model)


def test_foreign_file(stored, capsys):
    """A whole safetensors file that this repo did not write has no fingerprint."""
    save_file({"logps": torch.zeros(40, 2)}, file_of(stored))
    assert not again(stored, capsys)


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tiny.write_pairs(folder / "train.jsonl", 30)
    tiny.write_pairs(folder / "test.jsonl", 6, seed=1)
    return folder


def run_args(out, base, data, **changes):
    options = {
        "model": str(base),
        "dataset": str(data / "train.jsonl"),
        "eval_dataset": str(data / "test.jsonl"),
        "output_dir": str(out),
        **{"lr": 1e-3, "batch_size": 4, "steps": 6, "save_every": 2, "beta": 0.1, "eval_every": 4},
        **changes,
    }
    return hdpo.Args(**options)


@pytest.fixture(scope="module")
def whole(base, data, tmp_path_factory):
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    hdpo.main(run_args(out, base, data))
    return out


@pytest.mark.parametrize("deleted", [False, True], ids=["kept", "deleted"])
def test_resume(deleted, base, data, whole, tmp_path, capsys):
    """Resumed behind step 5, the file is read again; without it, the reference is made of the initial model again, not
    of the trained one, and the run ends in the same bits.
    """
    out = tmp_path / "run"
    until(5, hdpo.main, run_args(out, base, data))
    if deleted:
        shutil.rmtree(out / "reference")
    capsys.readouterr()
    hdpo.main(run_args(out, base, data, resume=True))
    assert capsys.readouterr().out.count("reused") == (0 if deleted else 2)
    for name in ("train", "eval"):
        mine, theirs = (load_file(x / "reference" / f"{name}.safetensors")["logps"] for x in (out, whole))
        assert torch.equal(mine.nan_to_num(), theirs.nan_to_num()) and not mine.isnan().all()
    assert metrics(out) == metrics(whole)
    weights = [load_file(x / "model" / "model.safetensors") for x in (out, whole)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_stored_pairs_are_those_of_the_run(base, data, whole):
    """24 of 30 pairs in 6 steps of 4, each in its place; the evaluation pairs all."""
    logps = load_file(whole / "reference" / "train.safetensors")["logps"]
    used = sorted(i for step in range(6) for i in tiny.step_pairs(step, 30, 4))
    assert (~logps[:, 0].isnan()).nonzero()[:, 0].tolist() == used and len(used) == 24
    assert not load_file(whole / "reference" / "eval.safetensors")["logps"].isnan().any()


@pytest.mark.parametrize("lora_rank", [0, 4], ids=["all weights", "lora"])
def test_deltas_start_at_zero(lora_rank, wide_base, data, whole, tmp_path, wide):
    """Before the first update policy and reference are one, on the evaluation pairs and in the first step's batch."""
    hdpo.main(run_args(tmp_path / "run", wide_base, data, lora_rank=lora_rank, lora_dropout=0.0, steps=1))
    start, first = metrics(tmp_path / "run")
    for name in ("logps/chosen_delta", "logps/rejected_delta"):
        assert abs(start[f"eval/{name}"]) < 1e-12 and abs(first[name]) < 1e-12
    assert start["eval/loss"] == pytest.approx(hdpo_start(start), abs=1e-2)
    assert all(abs(row["logps/chosen_delta"]) > 1e-4 for row in metrics(whole)[3:])


def hdpo_start(row):
    """-log s(x) ~ log 2 - x / 2 for the mean margin x, which is small: alpha is 0.95."""
    return torch.tensor(2.0).log().item() - row["eval/rewards/margin"] / 2


def test_ref_model(base, data, tmp_path, capsys):
    """--ref-model's log-probs are stored, not the policy's, and the file belongs to that model."""
    other = shutil.copytree(base, tmp_path / "other")
    load(base, seed=5).float().save_pretrained(other)
    hdpo.main(run_args(tmp_path / "run", base, data, ref_model=str(other)))
    pairs = common.load_preferences(str(data / "train.jsonl"), AutoTokenizer.from_pretrained(base), "", 1024, 512)
    rows, stored = pairs.to_list(), load_file(file_of(tmp_path))["logps"]
    used = (~stored[:, 0].isnan()).nonzero()[:, 0].tolist()
    torch.testing.assert_close(stored[used], live(load(other), rows)[used], rtol=1e-4, atol=1e-4)
    assert (stored - live(load(base), rows))[used].abs().max() > 1
    assert again(tmp_path, capsys, load(other).float(), rows, used)
    assert not again(tmp_path, capsys, load(base), rows, used)


def test_no_such_ref_model(base, data, tmp_path):
    with pytest.raises(SystemExit, match="cannot load .*'/no/such'"):
        hdpo.main(run_args(tmp_path / "run", base, data, ref_model="/no/such"))
