"""TRL's side of ppo_vs_trl.py: for each line read, makes one iteration of its PPOTrainer and prints the time."""

import argparse
import json
import os
import pathlib
import sys
from typing import Any

import datasets
import numpy as np
import tokenizers
import torch
import transformers
import trl
from trl.experimental.ppo import PPOConfig, PPOTrainer

sys.path.insert(0, os.fspath(pathlib.Path(__file__).parents[1]))
from sides import measured

OUT = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what the trainer prints is no answer
SHOWN = ("objective/scores", "objective/kl", "policy/approxkl_avg", "val/num_eos_tokens")


class WhenAsked(transformers.TrainerCallback):
    """Lets each iteration begin when a line comes, and prints what it took when it ends."""

    def __init__(self) -> None:
        self.logged: dict[str, float] = {}
        self._stretch: Any = None

    def _wait(self) -> None:
        if not sys.stdin.readline():
            os._exit(0)
        self._stretch = measured()
        self._took = self._stretch.__enter__()

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._wait()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any) -> None:
        self.logged = {name: logs[name] for name in SHOWN}

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._stretch.__exit__(None, None, None)
        print(json.dumps({**self._took.figures(), "metrics": self.logged}), file=OUT, flush=True)
        self._wait()


def tokenizer_of(settings: dict[str, Any]) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer that knows how to pad, and what ends a text; it never encodes one."""
    words = {f"<{at}>": at for at in range(settings["vocab"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<0>"))
    marks = {f"{name}_token": f"<{settings[name]}>" for name in ("pad", "eos")}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, padding_side="left", **marks)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = json.loads((args.folder / "settings.json").read_text(encoding="utf-8"))
    policy, judge = args.folder / "policy", args.folder / "judge"
    given = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    writer = transformers.AutoModelForCausalLM
    scorer = transformers.AutoModelForSequenceClassification
    reward, value = (scorer.from_pretrained(folder, num_labels=1, **given) for folder in (judge, policy))
    head = torch.from_numpy(np.load(args.folder / "head.npy"))
    with torch.no_grad():
        reward.score.weight.copy_(head.T)
        value.score.weight.zero_()
    with np.load(args.folder / "prompts.npz") as file:
        rows = [tokens[:length].tolist() for tokens, length in zip(file["tokens"], file["length"], strict=True)]
    asked = WhenAsked()
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=os.fspath(args.folder / "trl"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            eval_strategy="no",
            disable_tqdm=True,
            num_sample_generations=0,
            total_episodes=1_000_000,
            lr_scheduler_type="constant",
            learning_rate=settings["lr"],
            per_device_train_batch_size=settings["prompts"],
            local_rollout_forward_batch_size=settings["prompts"],
            gradient_accumulation_steps=1,
            num_mini_batches=settings["minibatches"],
            num_ppo_epochs=settings["epochs"],
            response_length=settings["new"],
            stop_token="eos",
            temperature=1.0,
            kl_coef=settings["kl"],
            kl_estimator="k1",
            cliprange=settings["clip"],
            cliprange_value=settings["value_clip"],
            vf_coef=settings["value_weight"],
            gamma=1.0,
            lam=0.95,
            whiten_rewards=False,
            missing_eos_penalty=None,
        ),
        processing_class=tokenizer_of(settings),
        model=writer.from_pretrained(policy, **given),
        ref_model=writer.from_pretrained(policy, **given),
        reward_model=reward,
        value_model=value,
        train_dataset=datasets.Dataset.from_dict({"input_ids": rows}),
        callbacks=[asked],
    )
    versions = f"trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    print(json.dumps({"peer": versions}), file=OUT, flush=True)
    trainer.train()


main()
