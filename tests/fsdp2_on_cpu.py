"""Run a script under FSDP2 on CPU processes: torchrun --nproc_per_node 2 tests/fsdp2_on_cpu.py SCRIPT FLAGS...

accelerate prepares FSDP2 on accelerators only; here its state is told so after the start, and everything behind that
(sharding, the scripts, checkpoints, saving) is what runs on GPUs. Float32 throughout, to be compared with one process:
of the policy that a script asks for only the type of the exchange is left.
"""

import importlib
import os
import sys
from pathlib import Path

os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_VERSION": "2"}
sys.path.insert(0, str(Path(__file__).parents[1]))

import tyro
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy


def on_cpu(**options):
    """The script's Accelerator."""
    accelerator = Accelerator(**options)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=True,
    )
    accelerator.state._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    assert accelerator.is_fsdp2
    return accelerator


if __name__ == "__main__":
    script = importlib.import_module(sys.argv[1])
    script.Accelerator = on_cpu
    script.MixedPrecisionPolicy = lambda _compute, reduce: MixedPrecisionPolicy(reduce_dtype=reduce)
    script.main(tyro.cli(script.Args, args=sys.argv[2:]))
