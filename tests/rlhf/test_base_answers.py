"""Base, SFT and PPO side by side: the base answers the prompts of a PPO run's page."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dschat.config import RLHFSettings, SFTSettings
from dschat.errors import UserError
from dschat.models.reward_model import create_critic_model, scores_at_end
from dschat.models.reward_statistics import RewardStatistics
from dschat.models.save import save_hf_format
from dschat.pipeline.closing import add_base
from dschat.report import __main__ as program
from dschat.rlhf.base_answers import base_of
from dschat.train.run_page import description
from tests.helpers.adapters import ALONE
from tests.helpers.rounding import LOGITS, ROUNDING
from tests.helpers.tiny import byte_tokenizer, reward_model, save_llama_folder

PROMPTS = ["\n\nHuman: Why?\n\nAssistant:", "\n\nHuman: And how is that?\n\nAssistant:"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What step 3 leaves, its answers to a prompt twice; step 1 says what it began with."""
    base, sft, reward = (str(tmp_path / name) for name in ("base", "sft", "reward"))
    save_llama_folder(Path(base), seed=1)
    save_llama_folder(Path(sft), seed=2)
    save_llama_folder(tmp_path / "ppo" / "actor", seed=3)
    statistics = RewardStatistics(2.0, 0.5, 8, "")
    save_hf_format(reward_model(), byte_tokenizer(), reward, ALONE, statistics=statistics)
    trained = SFTSettings.of(model_name_or_path=base, data_path=["rows"])
    settings = RLHFSettings.of(
        **{"actor_model_name_or_path": sft, "critic_model_name_or_path": reward},
        **{"max_answer_seq_len": 6, "top_k": 1, "dtype": "fp32", "reward_clip": 1e9},
        reward_function=("length",),
        reward_length=(0, 99),
        reward_function_weight=(100.0,),
    )
    for folder, of in (("sft", trained), ("ppo", settings)):
        text = json.dumps(description(of), default=str)
        (tmp_path / folder / "run.json").write_text(text)
    figures = {"reward": 1.0, "kl": 0.5, "length": 3, "ended": True}
    answers = [
        {"iteration": iteration, "prompt": prompt, "answer": "an answer", **figures}
        for iteration in (0, 4)
        for prompt in (*PROMPTS, PROMPTS[0])
    ]
    lines = "".join(json.dumps(answer) + "\n" for answer in answers)
    (tmp_path / "ppo" / "held_out_answers.jsonl").write_text(lines)
    (tmp_path / "ppo" / "metrics.jsonl").write_text('{"kind": "eval", "step": 0, "reward": 1}\n')
    return tmp_path / "ppo"


def test_the_base_answers_as_the_run_did(run: Path, capsys):
    program.main([str(run), "--base"])
    lines = (run / "base_answers.jsonl").read_text().splitlines()
    tokenizer = byte_tokenizer()
    base = AutoModelForCausalLM.from_pretrained(run.parent / "base")
    scorer = create_critic_model(str(run.parent / "reward"), tokenizer, torch.float32).eval()
    assert [json.loads(line)["prompt"] for line in lines] == PROMPTS
    for line, prompt in zip(map(json.loads, lines), PROMPTS, strict=True):
        ids = list(tokenizer(prompt).input_ids)
        start = len(ids)
        while len(ids) < start + 6 and ids[-1] != tokenizer.eos_token_id:  # the likeliest, in turn
            ids.append(int(base(torch.tensor([ids])).logits[0, -1].argmax()))
        assert line["answer"] == tokenizer.decode(ids[start:], skip_special_tokens=True)
        read = torch.tensor([ids])
        score = scores_at_end(scorer(read, torch.ones_like(read, dtype=torch.bool)), read > -1)
        # (score - 2) / 0.5 by the statistics, 100 for a length that fits, added and stored in fp32
        expected, apart = (score.item() - 2) / 0.5 + 100, LOGITS / 0.5 + 2 * 100 * ROUNDING
        assert line["reward"] == pytest.approx(expected, abs=apart)
        assert line["length"] == len(ids) - start and line["model"].endswith("/base")
    page = (run / "report.html").read_text()
    titles = ("base", "iteration 0: before PPO", "iteration 4")
    assert "".join(f"<th>{title}</th>" for title in titles) in page
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"


def test_a_pipeline_adds_it_or_says_why_not(run: Path, capsys):
    add_base(run)  # without a page: the run was told to make none
    assert not (run / "base_answers.jsonl").exists()
    (run / "report.html").touch()
    add_base(run)
    assert "<th>base</th>" in (run / "report.html").read_text()
    (run.parent / "sft" / "run.json").write_text("{}")
    with pytest.raises(UserError, match=r"sft/run\.json does not tell what was trained; name the"):
        base_of(run)
    add_base(run)
    (told,) = capsys.readouterr().out.splitlines()
    assert told.startswith("the report of step 3 is without the base: base: ")
