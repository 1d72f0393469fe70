"""Wrong casts of step 3 and what their messages must say."""

from __future__ import annotations

from pathlib import Path

import torch

from dschat.models.causal_lm import create_hf_model
from dschat.models.reward_model import RewardModel, create_critic_model
from dschat.models.save import save_hf_format
from dschat.utils.module.lora_config import LoraConfig
from tests.helpers.adapters import ALONE, plan, with_adapter
from tests.helpers.tiny import byte_tokenizer, tiny_llama

ONE = "--share_trunk all --actor_lora_dim 4 --critic_lora_dim 4 "
HEADLESS = "--critic_model_name_or_path model --init_head_randomly "
# name: flags behind a sound actor `model` and a sound critic `reward`, what is said
WRONG_ROLES = {
    "reward model as actor": (
        "--actor_model_name_or_path reward",
        r"model reward: is a reward model \(it holds a head\), which cannot be the actor; give",
    ),
    "reward adapter as actor": (
        "--actor_model_name_or_path reward-adapter",
        r"adapter reward-adapter: is a reward model's, which cannot be the actor; give step 1's",
    ),
    "language model's adapter as reward model": (
        "--reward_model_name_or_path sft-adapter",
        r"reward model sft-adapter: no score\.weight or v_head\.weight in it; train one",
    ),
    "no reward folder": (
        "--reward_model_name_or_path ./nowhere",
        r"\./nowhere",
    ),
    "fresh head on a reward model": (
        "--init_head_randomly --reward_model_name_or_path reward",
        r"init_head_randomly: critic reward has a head; drop the flag, or give a language model",
    ),
    "fresh head without rewards": (
        HEADLESS,
        r"init_head_randomly: nothing gives rewards; add reward_model_name_or_path REWARD_MODEL "
        r"or reward_function MODULE:NAME",
    ),
    "fresh head without a critic": (
        "--init_head_randomly --advantage_estimator rloo --answers_per_prompt 2",
        r"init_head_randomly: advantage_estimator rloo trains no critic; drop init_head_randomly",
    ),
    "reward model behind a chat template of its own": (
        "--actor_model_name_or_path chat --reward_model_name_or_path other-template "
        + HEADLESS
        + "--critic_model_name_or_path chat",
        r"other-template: its chat template is not that of .*chat, and a prompt cannot be read",
    ),
    "positions of a reward model": (
        "--reward_model_name_or_path short-reward",
        r"sequences of 56 tokens, but model short-reward has 32 positions; give at most 32",
    ),
    "one trunk without adapters": (
        "--share_trunk all --actor_lora_dim 4",
        r"share_trunk all: critic_lora_dim 0: the base would change under the other roles; train",
    ),
    "one trunk in shards": (
        ONE + "--actor_zero_stage 3",
        r"share_trunk all: actor_zero_stage 3: two engines cannot shard the same weights; use",
    ),
    "one trunk and a frozen reward model in shards": (
        "--share_trunk all --actor_lora_dim 4 --advantage_estimator rloo --answers_per_prompt 2 "
        "--critic_zero_stage 3",
        r"share_trunk all: critic_zero_stage 3: two engines cannot shard the same weights; use",
    ),
    "one trunk and DoRA": (
        ONE + "--critic_use_dora",
        r"share_trunk all: critic_use_dora: it measures weights .*; drop it",
    ),
    "one trunk and whole modules": (
        ONE + "--actor_modules_to_save norm",
        r"share_trunk all: actor_modules_to_save: the base would change under the other roles",
    ),
    "one trunk that trains": (
        ONE + "--train_base_model",
        r"share_trunk all: train_base_model: the base would change under the other roles; train",
    ),
    "one trunk of two bases": (
        ONE + "--actor_model_name_or_path sft-adapter",
        r"share_trunk all: reward is on the base reward, sft-adapter on .*model; train both as "
        r"adapters on one base \(lora_save adapter\), or use share_trunk auto",
    ),
    "one trunk under a DoRA adapter": (
        ONE + "--critic_model_name_or_path dora-adapter",
        r"share_trunk all: adapter dora-adapter holds more than low-rank updates of layers "
        r"\(.*DoRA\); leave share_trunk all out",
    ),
}


def write_wrong_roles(folder: Path) -> None:
    """Adapters on `model`, reward models of few positions and of another template."""
    tokenizer, base = byte_tokenizer(), str(folder / "model")
    for name, dora in (("reward-adapter", False), ("dora-adapter", True), ("sft-adapter", False)):
        lora = LoraConfig(lora_dim=2, use_dora=dora)
        if name == "sft-adapter":
            model = create_hf_model(base, tokenizer, torch.float32)
        else:
            model = create_critic_model(base, tokenizer, torch.float32, init_head=True)
        out = folder / name
        save_hf_format(
            with_adapter(model, lora), tokenizer, out, ALONE, plan("adapter", base, lora, out)
        )
    short = RewardModel(tiny_llama(max_position_embeddings=32).base_model)
    save_hf_format(short, tokenizer, folder / "short-reward", ALONE)
    template = (
        "{% for m in messages %}{{ m['role'] + m['content'] }}"
        "{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}"
    )
    tokenizer.init_kwargs["prompt_format"] = "chat"
    tokenizer.chat_template = template
    tiny_llama(max_position_embeddings=128).save_pretrained(folder / "chat")
    tokenizer.save_pretrained(folder / "chat")
    tokenizer.chat_template = template.replace("m['role'] +", "m['role'] + ':' +")
    tokenizer.chat_template = tokenizer.chat_template.replace("%}assistant{%", "%}assistant:{%")
    save_hf_format(short, tokenizer, folder / "other-template", ALONE)
