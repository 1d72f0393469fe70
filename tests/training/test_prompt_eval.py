"""What step 1's prompt evaluation refuses before it loads a model."""

import pytest

from dschat.errors import UserError
from tests.helpers.shell import TRAINING, load
from tests.helpers.tiny import save_llama_folder


@pytest.mark.parametrize("raw", [[], ["--raw"]])
def test_prompts_longer_than_the_model_reads(tmp_path, monkeypatch, raw):
    """Positions for 64 tokens, one a byte; `Human: ` and `Assistant:` take 21 of them."""
    script = load(TRAINING / "step1_supervised_finetuning" / "prompt_eval.py", "prompt_eval_here")
    monkeypatch.setattr(script, "create_hf_model", lambda *args: pytest.fail("loaded"))
    save_llama_folder(tmp_path / "m")
    models = [f"--model_name_or_path_{n}={tmp_path / 'm'}" for n in ("baseline", "finetune")]
    argv = ["prompt_eval.py", *models, *raw, "--max_new_tokens", "21", "--prompts", "x", "y" * 23]
    monkeypatch.setattr("sys.argv", argv)
    if raw:
        with pytest.raises(pytest.fail.Exception, match="loaded"):
            script.main()
        return
    said = "prompts and max_new_tokens: sequences of 65 tokens, but model .* has 64 positions"
    with pytest.raises(UserError, match=said):
        script.main()
