"""Names, options, defaults and mistakes of `models.create`."""

import subprocess
import sys

import pytest
import torch

from ban_fast import models
from ban_fast.errors import UserError

# One concrete name of every family of ours.
EVERY = (
    "wrn-10-1",
    "densenet-bc-10-4",
    "densenet-112-33",
    "densenet-90-60",
    "densenet-80-80",
    "densenet-80-120",
    "convnet-8",
    "mlp-16",
)
LANGUAGE_MODELS = ("lstm-{hidden}", "cnn-lstm", "cnn-lstm-{hidden}")
SMALL = ("wrn-10-1", "densenet-bc-10-4", "convnet-8", "mlp-16")


def test_names_list_every_family():
    listed = models.names()
    assert {"wrn-{depth}-{width}", "densenet-bc-{depth}-{growth}", "convnet-{width}", "mlp-{hidden}"} <= set(listed)
    assert {"densenet-112-33", "densenet-90-60", "densenet-80-80", "densenet-80-120"} <= set(listed)
    assert {"torchvision:{name}", "timm:{name}", "{package.module}:{factory}"} <= set(listed)
    assert set(LANGUAGE_MODELS) <= set(listed)
    assert len(set(listed)) == len(EVERY) + 3 + len(LANGUAGE_MODELS)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(("classes", "in_channels"), [(None, 3), (10, 1)])
def test_logits_on_the_meta_device(name, classes, in_channels):
    with torch.device("meta"):
        network = models.create(name, classes, in_channels=in_channels)
        logits = network(torch.empty(2, in_channels, 8, 8))
    assert logits.shape == (2, 100 if classes is None else classes)
    assert all(p.is_meta for p in network.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_backward_reaches_every_parameter(name):
    network = models.create(name, 5, in_channels=1)
    network(torch.randn(4, 1, 8, 8)).square().sum().backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", SMALL)
def test_initialisation_is_the_generators(name):
    def weights(seed):
        torch.manual_seed(seed)
        return models.create(name, 10).state_dict()

    first, again, other = weights(3), weights(3), weights(4)
    assert list(first) == list(again)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", SMALL)
def test_channels_last_gives_the_same(name):
    """In fp64, where another order of summation moves 1e-16 of each sum, and a wrong layout everything."""
    torch.manual_seed(0)
    network = models.create(name, 10).double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    results = []
    for form in (torch.contiguous_format, torch.channels_last):
        network.to(memory_format=form)
        network.zero_grad()
        logits = network(x.to(memory_format=form))
        logits.square().sum().backward()
        results.append([logits.detach(), *(p.grad.clone() for p in network.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrn_28_10", "did you mean 'wrn-28-10'"),
        ("wrn-28", "did you mean 'wrn-28-{width}'"),
        ("densenet-100-12", "did you mean 'densenet-bc-100-12'"),
        ("densnet-90-60", "did you mean 'densenet-90-60'"),
        ("convnet24", "did you mean 'convnet-24'"),
        ("resnet18", "did you mean 'torchvision:resnet18'"),
        ("wrn-28-10x", "did you mean 'wrn-28-10'"),
        ("zzz", "choose one of: wrn-{depth}-{width}, "),
        ("", "choose one of: "),
        (":", "choose one of: "),
    ],
)
@pytest.mark.parametrize("call", [models.create, models.needs_image_size])
def test_unknown_names_get_the_nearest(name, message, call):
    with pytest.raises(UserError) as caught:
        call(name)
    assert repr(name) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("wrn-27-10", "22 and 28"),
        ("wrn-29-10", "28 and 34"),
        ("wrn-4-1", "10"),
        ("wrn-0-1", "10"),
        ("densenet-bc-90-60", "88 and 94"),
        ("densenet-bc-12-4", "10 and 16"),
    ],
)
def test_depths_that_cannot_be(name, nearest):
    with pytest.raises(UserError, match=rf"6n\+4; nearest: {nearest}$"):
        models.create(name)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("wrn-10-1", {"dropuot": 0.3}, "no option 'dropuot'; did you mean 'dropout'"),
        ("wrn-10-1", {"memory": "plain"}, "no option 'memory'; choose one of: dropout"),
        ("convnet-8", {"dropout": 0.3}, "no option 'dropout'; it has none"),
        ("wrn-10-1", {"dropout": 2}, r"dropout must be a number in \[0, 1\), got 2"),
        ("wrn-10-1", {"dropout": float("nan")}, "got nan"),
        ("wrn-10-1", {"dropout": True}, "got True"),
        ("wrn-10-1", {"dropout": "high"}, "got 'high'"),
        ("densenet-bc-10-4", {"memory": "foo"}, "unknown memory 'foo'; choose one of: plain, checkpoint"),
        ("densenet-90-60", {"memory": "chekpoint"}, "did you mean 'checkpoint'"),
        ("densenet-90-60", {"memory": 1}, "unknown memory 1"),
        ("densenet-90-60", {"units": 3}, "no option 'units'; choose one of: memory"),
        ("mlp-8", {"image_size": 0}, "image_size must be a whole number of at least 1, got 0"),
        ("mlp-8", {"image_size": 8.0}, r"got 8\.0"),
        ("mlp-8", {"image_size": 10**30}, "image_size must be at most 16,777,216, got 1000"),
        ("mlp-99999999999999999999999", {}, "hidden must be at most 16,777,216, got 9999"),
        ("wrn-10-9999999999999999", {}, "width must be at most 16,777,216, got 9999"),
        ("mlp-0", {}, "hidden must be a whole number of at least 1, got 0"),
        ("wrn-10-0", {}, "width must be a whole number of at least 1, got 0"),
        ("densenet-bc-10-0", {}, "growth must be a whole number of at least 1, got 0"),
        ("convnet-8", {"num_classes": 0}, "num_classes must be a whole number of at least 1, got 0"),
        ("convnet-8", {"num_classes": True}, "num_classes .* got True"),
        ("convnet-8", {"in_channels": 0}, "in_channels must be a whole number of at least 1, got 0"),
    ],
)
def test_wrong_options_name_the_right_ones(name, arguments, message):
    with pytest.raises(UserError, match=message):
        models.create(name, **arguments)


def test_densenets_that_cannot_be():
    for arguments, message in (
        (dict(units=[], growth=[], init_width=8), "same blocks"),
        (dict(units=[2, 2], growth=[4], init_width=8), "same blocks"),
        (dict(units=[2, 2], growth=[4, 4], init_width=8, transition_widths=[8, 8]), "2 blocks have 1 transitions"),
        (dict(units=[2, 0], growth=[4, 4], init_width=8), "units must be a whole number"),
        (dict(units=[2], growth=[4], init_width=0), "init_width must be a whole number"),
    ):
        with pytest.raises(UserError, match=message):
            models.DenseNet(**arguments)


@pytest.mark.parametrize(("name", "least"), [("convnet-8", 4), ("densenet-bc-10-4", 4), ("wrn-10-1", 1)])
def test_too_small_images_are_named(name, least):
    network = models.create(name, 10)
    assert network(torch.randn(2, 3, least, least)).shape == (2, 10)
    with pytest.raises(ValueError, match=rf"H and W at least {least}, got \[2, 3, {least}, {least - 1}\]"):
        network(torch.randn(2, 3, least, least - 1))
    with pytest.raises(ValueError, match=r"got \[3, 8, 8\]"):
        network(torch.randn(3, 8, 8))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("convnet-8", {}),
        ("wrn-10-1", {}),
        *(("densenet-bc-10-4", {"memory": memory}) for memory in ("plain", "checkpoint", "shared")),
    ],
)
def test_other_channels_and_dtypes_are_named(name, options):
    network = models.create(name, 10, **options)
    with pytest.raises(ValueError, match=r"images must be \[B, 3, H, W\] .* got \[2, 1, 8, 8\]"):
        network(torch.randn(2, 1, 8, 8))
    for dtype in (torch.uint8, torch.float64, torch.bfloat16):
        with pytest.raises(
            ValueError, match=f"images must be torch.float32, as the network's weights are, got {dtype}"
        ):
            network(torch.zeros(2, 3, 8, 8, dtype=dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert network(torch.zeros(2, 3, 8, 8, dtype=torch.bfloat16)).shape == (2, 10)
        for dtype in (torch.uint8, torch.float64):  # which autocast leaves as they are
            with pytest.raises(ValueError, match=f"got {dtype}"):
                network(torch.zeros(2, 3, 8, 8, dtype=dtype))


def test_which_networks_need_the_image_size():
    assert [name for name in (*EVERY, "torchvision:resnet18", "timm:resnet18") if models.needs_image_size(name)] == [
        "mlp-16"
    ]
    with pytest.raises(ValueError, match=r"\[B, 3, 8, 8\], got \[2, 3, 16, 16\]"):
        models.create("mlp-16", 10)(torch.randn(2, 3, 16, 16))
    assert models.create("mlp-16", 10, image_size=16)(torch.randn(2, 3, 16, 16)).shape == (2, 10)


def test_importing_brings_in_neither_torchvision_nor_timm():
    code = "import sys, ban_fast.models; print([m for m in ('torchvision', 'timm') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
