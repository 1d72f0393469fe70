"""Answers of the model that step 1 began with, for a finished PPO run's page.

PPO itself never loads that model. Once the run has ended, it answers the held-out prompts that the
page shows, in the tokens and by the sampling of the run, and gets the run's rewards.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from dschat.data.batches import PromptBatch
from dschat.data.collators import PromptCollator
from dschat.errors import UserError, parse_json
from dschat.models.causal_lm import create_hf_model
from dschat.models.reward_model import create_critic_model, scores_at_end
from dschat.models.reward_statistics import read_statistics
from dschat.report.html import put_in_place
from dschat.report.page import shown_prompts
from dschat.report.records import BASE_ANSWERS, DESCRIPTION, read
from dschat.rlhf.experience import Experience
from dschat.rlhf.generation import generate
from dschat.rlhf.reward_functions import load_functions
from dschat.rlhf.rewards import Rewards, texts_of
from dschat.rlhf.role_checks import check_roles
from dschat.rlhf.rollout import Texts
from dschat.rlhf.run_settings import PPORunSettings
from dschat.settings import flags_of
from dschat.text.encoding import encode
from dschat.text.formats import set_format
from dschat.text.tokenizer import load_hf_tokenizer
from dschat.train.engine import resolve_dtype, torch_dtype
from dschat.utils.distributed import set_random_seed


@dataclass(frozen=True)
class BaseAnswer:
    """An answer of the base; `reward` is None where it takes columns of the rows."""

    model: str
    prompt: str
    answer: str
    reward: float | None
    length: int  # tokens
    ended: bool


def base_of(folder: Path) -> str:
    """Name the model that the actor of a PPO run was trained from, by what both runs wrote.

    Raises:
        UserError: nothing tells.
    """
    model = str(folder)
    for name in ("actor_model_name_or_path", "model_name_or_path"):
        file = Path(model) / DESCRIPTION
        try:
            model = parse_json(file.read_text(encoding="utf-8"))["settings"][name]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"base: {file} does not tell what was trained; name the model"
            ) from error
    return model


def write_base_answers(folder: Path, base: str) -> None:
    """Let the base answer the prompts of a run's page, into a file of the run's folder.

    Raises:
        UserError: the run has no held-out answers, or a model cannot be loaded.
    """
    records = read(folder)
    if not records.answers:
        raise UserError(f"{folder}: holds no held-out answers; give the output folder of step 3")
    prompts = list(shown_prompts(records.answers[min(records.answers)]).values())
    known = {flag.name for flag in flags_of(PPORunSettings)}
    flags = records.description.get("settings", {})
    settings = PPORunSettings.of(**{n: value for n, value in flags.items() if n in known})
    e, tokenizer = _answered(folder, base, prompts, settings)
    lines = []
    for row, prompt in enumerate(prompts):
        reward = None if e.rewards is None or not e.counted[row] else e.rewards[row].item()
        answer, length = texts_of(e, row, tokenizer)[1], int(e.answer_mask[row].sum())
        lines.append(BaseAnswer(base, prompt, answer, reward, length, bool(e.ended[row])))
    text = "".join(json.dumps(asdict(line), ensure_ascii=False) + "\n" for line in lines)
    put_in_place(folder / BASE_ANSWERS, text.encode())


@torch.no_grad()
def _answered(
    folder: Path, base: str, prompts: list[str], settings: PPORunSettings
) -> tuple[Experience, PreTrainedTokenizerBase]:
    """Sample and reward an answer to each prompt, as the run did; one model is loaded at a time.

    Returns:
        What was sampled, with `rewards` unless a function takes columns, and its tokenizer.
    """
    tokenizer, sampling = load_hf_tokenizer(str(folder / "actor")), settings.ppo.sampling
    set_format(tokenizer)
    names = settings.role_names()
    retokenise = check_roles(names, tokenizer, settings.run.answer_end)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch_dtype(resolve_dtype(settings.run.dtype))
    rows = [{"prompt_ids": ids} for ids in encode(tokenizer, prompts)]
    batch: PromptBatch = PromptCollator(tokenizer.pad_token_id)(rows).to(device)
    model: nn.Module = create_hf_model(base, tokenizer, dtype).eval()
    set_random_seed(settings.run.seed)
    sequences = generate(model.to(device), batch, sampling, tokenizer).sequences
    ids = sequences[:, batch.input_ids.shape[1] :]
    text = Texts.of(batch, ids, tokenizer, sampling.stop_strings)
    scores = None
    if names.reward is not None:
        read_as = text.sequences, text.attention_mask
        if retokenise is not None:
            read_as = retokenise(*read_as, text.answer_mask.shape[1])
        reader = tokenizer if retokenise is None else retokenise.reader
        model = create_critic_model(names.reward, reader, dtype).eval()
        scores = scores_at_end(model.to(device)(*read_as), read_as[1]).float()
    nothing = torch.zeros(text.answer_mask.shape, device=device)
    e = Experience(
        *(text.sequences, text.attention_mask, text.answer_mask, text.ended, batch.real),
        *(nothing, nothing, None, scores, torch.arange(len(prompts))),
    )
    functions = load_functions(settings.rewards)
    if any(function.columns.needed for function in functions):
        return e, tokenizer
    scaling = None
    if names.reward is not None and settings.rewards.reward_scaling != "none":
        scaling = read_statistics(names.reward)
    return Rewards(settings.rewards, functions, scaling).applied(e, tokenizer), tokenizer
