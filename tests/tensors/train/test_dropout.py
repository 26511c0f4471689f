"""Nothing in a training is random but the order of its pairs."""

import pytest
import torch
from torch import nn

from evolve_ray.errors import UserError
from evolve_ray.train.dropout import load_without_dropout, switch_off


class Config:
    def __init__(self, **values):
        vars(self).update(values)

    def to_dict(self):
        return vars(self)


class Module(nn.Module):
    """Three kinds of dropout: a layer, a number that a module keeps, a number that a forward reads from the configuration."""

    def __init__(self, hidden_rate=0.0):
        super().__init__()
        self.config = Config(hidden_dropout=0.1, text_config=Config(router_jitter_noise=0.1, layers=2, dropout_is_on=True))
        self.layer, self.attention_dropout, self.hidden_rate = nn.Dropout(0.1), 0.1, hidden_rate

    def forward(self, values):
        values = nn.functional.dropout(self.layer(values), self.attention_dropout, self.training)
        values = nn.functional.dropout(values, self.config.hidden_dropout, self.training)
        values = nn.functional.dropout(values, self.hidden_rate, self.training)
        noise = self.config.text_config.router_jitter_noise
        return values + noise * torch.randn(values.shape) if self.training else values


def test_every_kind_of_dropout_is_off_and_the_model_stays_in_training_mode():
    model, values = Module(), torch.arange(64.0)
    model.train()
    assert not model(values).equal(values)
    load_without_dropout(model, lambda: model(values), "model.path")
    assert model.training
    assert model(values).equal(values)
    text = model.config.text_config
    assert (model.config.hidden_dropout, text.router_jitter_noise, text.layers, text.dropout_is_on) == (0, 0, 2, True)


def test_dropout_that_no_option_switches_off_is_refused():
    model = Module(hidden_rate=0.1)
    with pytest.raises(UserError, match=r"^model\.path: Module computes other values in training mode than in evaluation mode"):
        load_without_dropout(model, lambda: model(torch.arange(64.0)), "model.path")


def test_a_model_that_differs_between_the_modes_is_refused():
    model = nn.BatchNorm1d(4)
    model.config = Config()
    values = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match="computes other values"):
        load_without_dropout(model, lambda: model(values), "model.path")


def test_the_random_state_is_that_of_before():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    model = Module()
    load_without_dropout(model, lambda: model(torch.arange(8.0)), "model.path")
    assert torch.rand(3).equal(expected)


def test_values_that_are_no_numbers_stay():
    config = Config(drop_policy="probs", dropout=0, layerdrop=None)
    switch_off(nn.Linear(2, 2), config)
    assert vars(config) == {"drop_policy": "probs", "dropout": 0, "layerdrop": None}
