"""Networks from torchvision, timm and the user's own modules."""

import importlib.util
import sys
import textwrap

import pytest
import torch

from ban_fast import models
from ban_fast.errors import UserError

needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """A module of the user's, importable as user_networks."""
    (tmp_path / "user_networks.py").write_text(
        textwrap.dedent(
            """
            import torch
            from torch import nn

            class Net(nn.Module):
                def __init__(self, num_classes, in_channels=3, image_size=8, hidden=4):
                    super().__init__()
                    self.arguments = (num_classes, in_channels, image_size, hidden)
                    self.fc = nn.Linear(in_channels * image_size**2, num_classes)
                def forward(self, x):
                    return self.fc(x.flatten(1))

            def plain(num_classes):
                return nn.Sequential(nn.Flatten(), nn.Linear(192, num_classes))

            def pair(num_classes):
                class Pair(nn.Module):
                    def forward(self, x):
                        return x, x
                return Pair()

            def words(num_classes, output=None):
                class Words(nn.LSTM):
                    def forward(self, tokens, state):
                        return super().forward(nn.functional.one_hot(tokens, num_classes).float(), state)
                return Words(num_classes, num_classes if output is None else output)

            def maps(num_classes):
                return nn.Conv2d(3, num_classes, 1)

            def number(num_classes):
                return 5

            def broken(num_classes):
                raise ZeroDivisionError("the factory's own mistake")

            constant = 3
            """
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("user_networks", None)


@pytest.mark.parametrize("name", ["resnet18", "googlenet"])  # googlenet: torchvision's own default has three outputs
def test_torchvision(name):
    network = models.create(f"torchvision:{name}", 7)
    assert isinstance(network(torch.randn(2, 3, 32, 32)), torch.Tensor)
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    with torch.device("meta"):
        assert next(models.create(f"torchvision:{name}", 7).parameters()).is_meta


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet19", {}, "no image classification network 'resnet19'; did you mean 'resnet1"),
        ("fcn_resnet50", {}, "no image classification network 'fcn_resnet50'"),
        ("resnet18", {"in_channels": 1}, "3 channels, got 1"),
        ("googlenet", {"aux_logits": True}, "several outputs"),
        ("resnet18", {"dropuot": 1}, "torchvision:resnet18 cannot be built: .*dropuot"),
        ("resnet18", {"weights": "NOPE"}, "torchvision:resnet18 cannot be built: "),
    ],
)
def test_torchvision_mistakes(name, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        models.create(f"torchvision:{name}", 7, **arguments)
    assert "\n" not in str(caught.value)


@needs_timm
def test_timm():
    network = models.create("timm:resnet10t", 7, in_channels=1, drop_rate=0.5)
    assert network(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    assert network.drop_rate == 0.5
    with torch.device("meta"):
        assert next(models.create("timm:resnet10t", 7).parameters()).is_meta


@needs_timm
@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet18x", {}, "timm has no network 'resnet18x'; did you mean 'resnet18"),
        ("resnet18", {"dropuot": 1}, "timm:resnet18 cannot be built: .*dropuot"),
    ],
)
def test_timm_mistakes(name, arguments, message):
    with pytest.raises(UserError, match=message):
        models.create(f"timm:{name}", 7, **arguments)


@needs_timm
def test_timm_feature_lists_are_refused_where_they_appear():
    network = models.create("timm:resnet10t", 7, features_only=True)
    with pytest.raises(UserError, match="timm:resnet10t must return one tensor of logits, got list"):
        network(torch.randn(2, 3, 32, 32))


def test_without_timm_the_remedy_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # what Python does for a module that cannot be found
    with pytest.raises(UserError, match="pip install timm"):
        models.create("timm:resnet18")


def test_factories_get_what_their_signature_takes(user_module):
    network = models.create("user_networks:Net", 5, in_channels=2, image_size=6, hidden=9)
    assert network.arguments == (5, 2, 6, 9)
    assert network(torch.randn(3, 2, 6, 6)).shape == (3, 5)
    assert models.needs_image_size("user_networks:Net")

    network = models.create("user_networks:plain", 5, in_channels=1)  # takes no in_channels: it knows its own
    assert network(torch.randn(3, 3, 8, 8)).shape == (3, 5)
    assert not models.needs_image_size("user_networks:plain")


def test_factories_of_packages():
    assert models.create("ban_fast.models:ConvNet", 5, in_channels=1, width=4)(torch.randn(2, 1, 8, 8)).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("user_networks:plan", {}, "user_networks has no function or class 'plan'; did you mean 'plain'"),
        ("user_networks:constant", {}, "user_networks has no function or class 'constant'"),
        ("user_networks:plain", {"depth": 3}, "cannot be called with num_classes, depth: .*unexpected.*'depth'"),
        ("user_networks:number", {}, "must return a torch.nn.Module, got int"),
        ("no_such_package.networks:make", {}, "no module named 'no_such_package'; install it or set PYTHONPATH"),
    ],
)
def test_factory_mistakes(user_module, name, arguments, message):
    with pytest.raises(UserError, match=message):
        models.create(name, 5, **arguments)


@pytest.mark.parametrize(
    ("name", "message"),
    [("pair", "one tensor of logits, got tuple"), ("maps", r"logits \[B, 5\], got \[2, 5, 8, 8\]")],
)
def test_outputs_that_are_not_logits(user_module, name, message):
    network = models.create(f"user_networks:{name}", 5)
    with pytest.raises(UserError, match=f"user_networks:{name} must return {message}"):
        network(torch.randn(2, 3, 8, 8))


def test_language_models_return_their_state_too(user_module):
    tokens = torch.zeros(3, 2, dtype=torch.int64)
    logits, state = models.create("user_networks:words", 5)(tokens, None)
    assert logits.shape == (3, 2, 5)
    assert len(state) == 2
    with pytest.raises(UserError, match=r"user_networks:words must return logits \[T, B, 5\], got \[3, 2, 4\]"):
        models.create("user_networks:words", 5, output=4)(tokens, None)


def test_a_factorys_own_error_is_its_own(user_module):
    with pytest.raises(ZeroDivisionError, match="the factory's own mistake"):
        models.create("user_networks:broken", 5)


def test_foreign_networks_compile_in_one_graph(user_module):
    network = models.create("user_networks:plain", 5)
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(torch.compile(network, backend="eager", fullgraph=True)(x), network(x))
