"""The loss in chunks equals the loss of the model's own logits, softcap included."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import lowrank
from lowrank.training.losses import summed_loss

MODELS = Path(__file__).parents[1] / "fixtures" / "models"


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_loss_is_that_of_the_models_logits(name) -> None:
    model, _ = lowrank.load(str(MODELS / name), dtype=torch.float32)
    torch.manual_seed(0)
    ids, labels = torch.randint(5, 60, (2, 9)), torch.full((2, 9), -100)
    labels[0, 3:6], labels[1, 8] = ids[0, 3:6], ids[1, 8]
    if name == "gemma2":
        assert model.config.final_softcap
        model.config.__dict__["final_softcap"] = 0.05  # so low that leaving it out could not go unnoticed
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    logits = model(ids)[:, :-1].flatten(0, 1)
    wanted = F.cross_entropy(logits.double(), labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(summed_loss(model, batch).double(), wanted, rtol=1e-5, atol=1e-5)
