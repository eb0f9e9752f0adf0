"""TRL's side of speed.py and gpu.py: DPOTrainer with stored reference log-probs, without logging or saving."""

import json
import sys
import tempfile
from importlib.metadata import version

import torch
from datasets import Dataset
from peft import LoraConfig
from sides import BETA, LEARNING_RATE, LORA, MAX_GRAD_NORM, Line, make_mistral, make_model, make_pairs, peak_bytes
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer


class OnTokenIds(DPOTrainer):
    def _prepare_dataset(self, dataset, *_):
        return dataset  # it would turn text into the columns that are already there


class Steps(TrainerCallback):
    """A step is timed from its first micro-batch to the optimizer's end; collating and logging are not in it."""

    def __init__(self, line: Line):
        self.line = line

    def on_step_begin(self, *_, **__):
        self.line.wait()

    def on_step_end(self, *_, **__):
        self.line.done()


def main(
    name: str,
    batch_size: int,
    steps: int,
    device_batch: int,
    tuning: str = "",
    config: dict | None = None,
    device: str = "cpu",
) -> None:
    """speed.py's small Llama on the CPU; with a tuning ("lora" or "full"), gpu.py's Mistral on the device."""
    assert batch_size % device_batch == 0, f"{device_batch} pairs a device do not divide a step of {batch_size}"
    line = Line()
    dataset = Dataset.from_list(make_pairs(name, batch_size * steps))
    model = make_mistral(config, tuning == "lora", device) if tuning else make_model()
    before = peak_bytes()
    core = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, "<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            folder,
            per_device_train_batch_size=device_batch,
            gradient_accumulation_steps=batch_size // device_batch,
            train_sampling_strategy="sequential",  # both sides take the same pairs in the same step
            num_train_epochs=1,
            precompute_ref_log_probs=True,
            beta=BETA,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=MAX_GRAD_NORM,
            max_length=None,
            bf16=device == "cuda",
            gradient_checkpointing=tuning == "full",
            dataloader_pin_memory=device == "cuda",
            use_cpu=device == "cpu",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        lora = LoraConfig(**LORA) if tuning == "lora" else None
        trainer = OnTokenIds(
            model,
            args=args,
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=[Steps(line)],
            peft_config=lora,
        )
        versions = {name: version(name) for name in ("torch", "transformers", "accelerate", "trl")}
        stored = trainer.train_dataset[:batch_size]
        logps = [sums for pair in zip(stored["ref_chosen_logps"], stored["ref_rejected_logps"]) for sums in pair]
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        line.say(before=before, logps=logps, versions=versions)
        trainer.train()
        line.wait()  # keeps its memory until it is sent away


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
