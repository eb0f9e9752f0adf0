"""Whole runs under FSDP2, over two processes, against one process."""

import json
import shutil

import pytest
import tiny
from safetensors.torch import load_file

SCRIPTS = {
    "dgpo": [],
    "hdpo": ["--lora-rank", "1", "--gradient-checkpointing"],
    "eps_dpo": ["--lora-rank", "2"],
    "dpo_pg": ["--lora-rank", "1", "--log-dpo-loss"],  # rank 1: one process has no part of an adapter's first matrix
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_fsdp2(script, tmp_path):
    """Losses, gradient norms and weights of the single process; DGPO takes its last two steps after a --resume."""
    model = tiny.write_model(tmp_path / "base")
    pairs = tiny.write_pairs(tmp_path / "pairs.jsonl", 16)
    flags = ["--model", model, "--dataset", pairs, "--eval-dataset", pairs, "--batch-size", 4, "--save-every", 2]
    flags += ["--lr", 1e-3, "--warmup", 0, "--steps", 4, "--tokens-per-device", 100, *SCRIPTS[script]]
    flags += ["--max-grad-norm", 1e-6]  # for the reason that test_run.py gives beside SPLIT
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, tiny.ROOT / "tests/fsdp2_on_cpu.py"]
    tiny.run(f"{script}.py", *flags, "--output-dir", tmp_path / "one", timeout=200)
    tiny.run(*launch, script, *flags, "--output-dir", tmp_path / "two", timeout=200)
    if script == "dgpo":
        shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-00000004")
        tiny.run(*launch, script, *flags, "--output-dir", tmp_path / "two", "--resume", timeout=200)
    rows = [[json.loads(line) for line in (tmp_path / run / "metrics.jsonl").open()] for run in ("one", "two")]
    for one, two in zip(*rows, strict=True):
        for name in {"loss", "grad_norm", "eval/loss", "beta", "gradients/inner"} & set(one):
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), (one["step"], name)
    one, two = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("one", "two"))
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5
