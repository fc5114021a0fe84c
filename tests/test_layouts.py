"""PPO's four networks over one base: adapters of every stage, and where each starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from instruct_llama import checkpoint
from instruct_llama.config import UserError
from instruct_llama.stages import ppo, reward, sft


@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_p16_adapters_of_all_stages_lie_over_one_base(pipeline, tmp_path, kind):
    """SFT trains an adapter, the reward model goes on from it, PPO from both: nothing is merged or quantised again."""
    settings = pipeline.replace(
        out=str(tmp_path), init=str(Path(pipeline.out) / "pretrain"), sft__lora__rank=4, sft__quant__kind=kind,
        sft__optim__lr=0.02, reward__lora__rank=4, reward__quant__kind=kind, reward__sample_share=0.0,
        ppo__layout="shared_base", ppo__quant__kind=kind, ppo__iterations=1,
    )  # fmt: skip
    start = sft.run(settings.replace(sft__name="sft")).folder
    judged = reward.run(settings.replace(init=str(start))).folder
    assert judged.name == "reward-lora" and checkpoint.base_of(judged)[0].resolve() == Path(settings.init).resolve()
    player, _ = ppo.build(settings.replace(init=str(start)))
    tokens = torch.randint(player.models.base.config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    taught, untaught = checkpoint.load(start)[0](tokens), checkpoint.load(settings.init)[0](tokens)
    for role in ("policy", "reference"):  # both start as the SFT model
        with player.models.role(role) as model:
            assert torch.allclose(model(tokens), taught, atol=1e-5)
    assert not torch.allclose(taught, untaught, atol=1e-2)
    with player.models.role("reward") as model, torch.no_grad():
        assert torch.allclose(model(tokens), checkpoint.load(judged)[0](tokens), atol=1e-5)
    result = ppo.run(settings.replace(init=str(start)))
    first = result.history[0]
    assert abs(first["ppo/kl"]) < 1e-4 and first["ppo/sampling_gap"] < 1e-4
    moved = checkpoint.load(result.folder)[0](tokens)
    assert 0 < float((moved - taught).abs().max()) < float((taught - untaught).abs().max())


def test_p16_a_base_of_another_kind_is_refused(pipeline, tmp_path):
    settings = pipeline.replace(
        out=str(tmp_path), init=str(Path(pipeline.out) / "sft"), reward__lora__rank=4, reward__sample_share=0.0,
        ppo__layout="shared_base", ppo__quant__kind="nf4",
    )  # fmt: skip
    reward.run(settings)
    with pytest.raises(UserError, match="ppo.quant is nf4, but the adapters were trained over .* .none."):
        ppo.build(settings)
