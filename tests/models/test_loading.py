"""Model folders read: strictly, the predecessor's as well; and the reward model's score."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaForSequenceClassification,
)

from dschat.errors import UserError
from dschat.models.causal_lm import create_hf_model
from dschat.models.reward_model import RewardModel, create_critic_model, scores_at_end
from dschat.models.save import save_hf_format
from dschat.utils.distributed import Distributed
from tests.helpers import tiny
from tests.helpers.rounding import LOGITS

ALONE = Distributed(0, 1, 0, torch.device("cpu"))
ROWS = tiny.token_rows(3, seed=8)
IDS, MASK = tiny.padded(ROWS)


@torch.no_grad()
def logits_of(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, attention_mask=MASK.long()).logits


@torch.no_grad()
def scores_of(model: RewardModel) -> torch.Tensor:
    return scores_at_end(model(IDS, MASK), MASK)


@pytest.mark.parametrize(("rows", "expected"), [(250, 264), (259, 259), (261, 261), (320, 320)])
def test_vocabulary_grows_for_the_tokenizer_and_never_shrinks(
    tmp_path: Path, tiny_tokenizer, rows: int, expected: int
):
    """The tokenizer knows 259 tokens; added rows go up to the next multiple of 8."""
    assert len(tiny_tokenizer) == 259
    folder = str(tiny.save_llama_folder(tmp_path / "m", vocab_size=rows))
    model = create_hf_model(folder, tiny_tokenizer, torch.float32)
    critic = create_critic_model(folder, tiny_tokenizer, torch.float32, init_head=True)
    assert model.get_input_embeddings().weight.shape[0] == expected
    assert model.get_output_embeddings().weight.shape[0] == expected
    assert model.config.vocab_size == critic.config.vocab_size == expected
    old = tiny.tiny_llama(vocab_size=rows)
    assert torch.equal(model.lm_head.weight[:rows], old.lm_head.weight)
    save_hf_format(model, tiny_tokenizer, tmp_path / "out", ALONE)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config.vocab_size == expected


def test_rows_are_added_alike_whatever_was_drawn_before(tmp_path: Path, tiny_tokenizer):
    """Else a policy and the frozen copy of it, loaded in turn, would differ from the start."""
    folder = str(tiny.save_llama_folder(tmp_path / "m", vocab_size=250))
    one = create_hf_model(folder, tiny_tokenizer, torch.float32)
    torch.rand(1)
    other = create_hf_model(folder, tiny_tokenizer, torch.float32)
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name
    assert one.lm_head.weight[250:].std() > 0.1


def test_new_rows_lie_around_the_mean_and_apart(tmp_path: Path, tiny_tokenizer):
    """0.6 of the others' spread: unlikely at the start, and distinct enough to be learnt."""
    model = tiny.tiny_llama(vocab_size=250)
    with torch.no_grad():
        for table in (model.model.embed_tokens.weight, model.lm_head.weight):
            table.mul_(torch.linspace(0.5, 2, 32)).add_(torch.linspace(-3, 3, 32))
    model.save_pretrained(tmp_path)
    loaded = create_hf_model(str(tmp_path), tiny_tokenizer, torch.float32)
    for table in (loaded.model.embed_tokens.weight, loaded.lm_head.weight):
        old, new = table[:250], table[250:]
        units = (new - old.mean(dim=0)) / old.std(dim=0)
        assert units.mean().abs() < 0.1 and abs(units.std() - 0.6) < 0.06
        assert torch.cosine_similarity(units[0], units[1], dim=0) < 0.6


def write_bin(folder: Path, state: dict[str, torch.Tensor], config, tokenizer) -> str:
    """A folder as DeepSpeed-Chat writes it."""
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "pytorch_model.bin")
    config.to_json_file(folder / "config.json")
    tokenizer.save_pretrained(folder)
    return str(folder)


def old_reward_state(model: RewardModel) -> dict[str, torch.Tensor]:
    trunk = model.rwtransformer.state_dict()
    return {
        **{f"rwtransformer.{key}": tensor for key, tensor in trunk.items()},
        "v_head.weight": model.v_head.weight.detach(),
    }


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_predecessors_folders_load(tmp_path: Path, tiny_tokenizer, name: str):
    model, reward = tiny.ARCHITECTURES[name](), tiny.reward_model(name)
    actor = write_bin(tmp_path / "actor", model.state_dict(), model.config, tiny_tokenizer)
    loaded = create_hf_model(actor, tiny_tokenizer, torch.float32).eval()
    assert torch.equal(logits_of(loaded), logits_of(model))
    state = old_reward_state(reward)
    critic = write_bin(tmp_path / "critic", state, reward.config, tiny_tokenizer)
    ours = create_critic_model(critic, tiny_tokenizer, torch.float32).eval()
    assert torch.equal(scores_of(ours), scores_of(reward))


def test_head_in_transformers_own_bin_file_is_found(tmp_path: Path, tiny_tokenizer):
    reward = tiny.reward_model()
    state = {f"model.{k}": t for k, t in reward.rwtransformer.state_dict().items()}
    state["score.weight"] = reward.v_head.weight.detach()
    folder = write_bin(tmp_path / "m", state, reward.config, tiny_tokenizer)
    for init_head in (False, True):
        ours = create_critic_model(folder, tiny_tokenizer, torch.float32, init_head=init_head)
        assert torch.equal(scores_of(ours.eval()), scores_of(reward))


def test_missing_head_is_an_error_unless_one_is_to_start(tmp_path: Path, tiny_tokenizer):
    folder = str(tiny.save_llama_folder(tmp_path / "m"))
    with pytest.raises(UserError, match=r"no score.weight or v_head.weight in it"):
        create_critic_model(folder, tiny_tokenizer, torch.float32)
    fresh = create_critic_model(folder, tiny_tokenizer, torch.float32, init_head=True)
    assert torch.equal(fresh.rwtransformer.norm.weight, tiny.tiny_llama().model.norm.weight)
    state = old_reward_state(tiny.reward_model())
    del state["v_head.weight"]
    folder = write_bin(tmp_path / "old", state, fresh.config, tiny_tokenizer)
    with pytest.raises(UserError, match=r"no score.weight or v_head.weight in it"):
        create_critic_model(folder, tiny_tokenizer, torch.float32)


@pytest.mark.parametrize("kind", ["causal", "reward", "old reward"])
@pytest.mark.parametrize("fault", ["missing", "unexpected", "mismatched"])
def test_keys_that_do_not_fit_are_named(tmp_path: Path, tiny_tokenizer, kind: str, fault: str):
    reward = tiny.reward_model()
    if kind == "causal":
        state, config = tiny.tiny_llama().state_dict(), tiny.tiny_llama().config
    elif kind == "old reward":
        state, config = old_reward_state(reward), reward.config
    else:
        config = copy.deepcopy(reward.config)
        config.num_labels = 1
        state = LlamaForSequenceClassification(config).state_dict()
    name = next(key for key in state if key.endswith("layers.1.mlp.up_proj.weight"))
    if fault == "missing":
        del state[name]
    elif fault == "unexpected":
        state[name.replace("up_proj", "odd_proj")] = state[name]
    else:
        state[name] = torch.zeros(3, 3)
    folder = write_bin(tmp_path / "m", state, config, tiny_tokenizer)
    create = create_hf_model if kind == "causal" else create_critic_model
    leaf = "layers.1.mlp.odd_proj" if fault == "unexpected" else "layers.1.mlp.up_proj"
    with pytest.raises(UserError, match=f"{fault} .*{leaf}") as caught:
        create(folder, tiny_tokenizer, torch.float32)
    assert "\n" not in str(caught.value) and "1 keys" in str(caught.value)


def test_head_of_another_shape_is_named(tmp_path: Path, tiny_tokenizer):
    state = {**old_reward_state(tiny.reward_model()), "v_head.weight": torch.zeros(3, 32)}
    folder = write_bin(tmp_path / "m", state, tiny.tiny_llama().config, tiny_tokenizer)
    with pytest.raises(UserError, match=r"head of shape \(3, 32\) does not fit \(1, 32\)"):
        create_critic_model(folder, tiny_tokenizer, torch.float32)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "config only"])
def test_no_model_is_a_line(tmp_path: Path, tiny_tokenizer, name: str):
    if name == "config only":
        name = str(tmp_path)
        tiny.tiny_llama().config.to_json_file(tmp_path / "config.json")
    for create in (create_hf_model, create_critic_model):
        options = {"init_head": True} if create is create_critic_model else {}
        with pytest.raises(UserError, match="model ") as caught:
            create(name, tiny_tokenizer, torch.float32, **options)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pad", [tiny.PAD, tiny.EOS])
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
@torch.no_grad()
def test_score_is_the_value_at_the_last_real_token(name: str, pad: int):
    """On either side, in any amount; rows end in eos, which may be the padding as well."""
    model = tiny.reward_model(name)
    alone = []
    for row in ROWS:
        values = model(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool))
        assert values.shape == (1, len(row)) and values.dtype == torch.float32
        alone.append(values[0, -1])
    for width in (15, 21):
        for side in ("left", "right"):
            gaps = [[pad] * (width - len(row)) for row in ROWS]
            pairs = list(zip(ROWS, gaps, strict=True))
            rows = [[*gap, *row] if side == "left" else [*row, *gap] for row, gap in pairs]
            spans = [len(row) for row in ROWS]
            places = torch.arange(width)
            mask = torch.stack(
                [places >= width - n if side == "left" else places < n for n in spans]
            )
            scores = scores_at_end(model(torch.tensor(rows), mask), mask)
            torch.testing.assert_close(scores, torch.stack(alone), rtol=0, atol=LOGITS)


def test_score_of_a_hand_made_row():
    """Masks with the last True at 1, at 3 and at 3: values 11, 23 and 33."""
    values = torch.arange(40.0).view(4, 10)[:, :4]
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]], dtype=torch.bool)
    assert scores_at_end(values, mask).tolist() == [1.0, 13.0, 23.0, 30.0]
