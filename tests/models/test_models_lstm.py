"""Language models: the paper's parameter counts, state carried by hand, dropout's places, what they start from."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ban_fast import models
from ban_fast.errors import UserError
from ban_fast.losses import fused_linear_kd, kd_loss

WORDS, T, B = 30, 5, 3
TABLE = torch.randint(3, 12, (WORDS, 8), generator=torch.Generator().manual_seed(0))
NAMES: dict[str, dict[str, Any]] = {
    "lstm-8": {},
    "cnn-lstm-8": {"characters": 12, "window": 8, "table": TABLE},
}


def create(name: str, **options: Any) -> models.LanguageModel:
    torch.manual_seed(0)
    model = models.create(name, WORDS, **{**NAMES[name], **options})
    assert isinstance(model, models.LanguageModel)
    return model


def tokens(length: int = T) -> Tensor:
    return torch.randint(WORDS, (length, B), generator=torch.Generator().manual_seed(1))


def count(name: str, **options: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in models.create(name, **options).parameters())


def test_the_papers_counts() -> None:
    """Table 6: "52M" is two tied layers of 1500 within 2 %, one layer is far from it; "19M" is Kim's large model."""
    assert count("lstm-1500") == 51_034_000
    assert count("lstm-1500") == pytest.approx(52e6, rel=0.02)
    assert count("lstm-1500", layers=1) == 33_022_000
    assert count("lstm-1500", tied=False) == 66_034_000
    assert count("lstm-1500", layers=1, tied=False) == 48_022_000
    assert count("cnn-lstm") == count("cnn-lstm-650") == 19_373_165
    assert math.floor(count("cnn-lstm") / 1e6) == 19


def test_the_large_models_on_the_meta_device() -> None:
    with torch.device("meta"):
        for name, words in (("lstm-1500", torch.zeros(35, 32)), ("cnn-lstm", torch.zeros(35, 20, 21))):
            model = models.create(name)
            logits, state = model(words.long(), model.zero_state(words.shape[1]))
            assert logits.shape == (*words.shape[:2], 10_000)
            assert [tensor.shape for tensor in state] == [(2, words.shape[1], model.hidden)] * 2


def test_the_papers_dropout() -> None:
    """Section 4.2: 0.65 on embeddings, between layers and on the output; Kim et al.'s 0.5 between layers and on it."""
    with torch.device("meta"):
        for name, share in (("lstm-1500", 0.65), ("cnn-lstm", 0.5)):
            model = models.create(name)
            assert isinstance(model, models.LanguageModel)
            assert (model.dropout.p, model.lstm.dropout) == (share, share)


@pytest.mark.parametrize("name", NAMES)
def test_on_a_cpu_the_lstm_is_one_dnns(name: str) -> None:
    model = create(name)
    with profile(activities=[ProfilerActivity.CPU]) as record:
        model(tokens())[0].sum().backward()
    names = {event.name for event in record.events()}
    assert names >= {"aten::mkldnn_rnn_layer", "aten::mkldnn_rnn_layer_backward"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layers", [1, 2])
def test_a_text_in_windows_is_the_text(name: str, layers: int) -> None:
    """State goes in and comes out as tensors; None is the start of a text."""
    model = create(name, layers=layers).double().eval()
    words = tokens(12)
    whole, end = model(words)
    state, parts = model.zero_state(B), []
    for window in words.split(5):
        logits, state = model(window, state)
        parts.append(logits)
    # fp64: windows of other lengths sum in another order
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state, end, rtol=1e-10, atol=1e-12)
    assert [tensor.shape for tensor in state] == [(layers, B, 8)] * 2
    assert not torch.equal(model(words[5:10])[0], parts[1])


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_output_layer_of_hidden_states(name: str) -> None:
    model = create(name).eval()
    logits, _ = model(tokens())
    hidden, _ = model(tokens(), project=False)
    assert hidden.shape == (T, B, 8)
    assert torch.equal(F.linear(hidden, *model.output_layer()), logits)


@pytest.mark.parametrize("name", NAMES)
def test_both_losses_give_the_same_gradients(name: str) -> None:
    """From logits, and from hidden states by `fused_linear_kd`; a tied weight gets both its parts."""
    gradients = []
    for fused in (False, True):
        model = create(name, dropout=0.0)
        teacher, labels = torch.randn(T, B, WORDS, generator=torch.Generator().manual_seed(2)), tokens()
        options: dict[str, Any] = {"label_weight": 1.0}
        if fused:
            hidden, _ = model(tokens(), project=False)
            weight, bias = model.output_layer()
            loss = fused_linear_kd(hidden, weight, labels, student_bias=bias, teacher_logits=teacher, **options)
        else:
            loss = kd_loss(model(tokens())[0], teacher, labels, **options)
        loss.backward()
        gradients.append({key: p.grad for key, p in model.named_parameters()})
    assert all(grad is not None and grad.any() for grad in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0])


def test_tied_means_one_parameter() -> None:
    tied, free = create("lstm-8"), create("lstm-8", tied=False)
    assert tied.output_layer()[0] is tied.embedding.weight
    assert free.output_layer()[0] is free.weight
    for model in (tied, free):  # safetensors refuses one memory under two names
        storages = [tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()]
        assert len(set(storages)) == len(storages)


def test_dropout_is_everywhere_but_in_time() -> None:
    """On embeddings, between layers, on the output: with nearly all dropped, each place alone silences what follows."""
    torch.manual_seed(0)
    model = create("lstm-8", dropout=0.5)
    assert model.lstm.dropout == 0.5
    assert create("lstm-8", dropout=0.5, layers=1).lstm.dropout == 0.0
    places: list[float] = []
    model.dropout.register_forward_hook(lambda _m, _i, output: places.append(float((output == 0).float().mean())))
    model(tokens(200))
    assert len(places) == 2  # embeddings and output; the LSTM's own is between its layers
    assert all(0.4 < share < 0.6 for share in places)
    cnn = create("cnn-lstm-8")
    cnn.dropout.register_forward_hook(lambda _m, _i, output: places.append(0.0))
    cnn(tokens())
    assert len(places) == 3  # on the output alone: Kim's features reach the LSTM whole
    model.eval()
    assert torch.equal(model(tokens())[0], model(tokens())[0])


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns_and_starts_from_the_generator(name: str) -> None:
    model, again = create(name), create(name)
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    model(tokens())[0].log_softmax(-1)[..., 3].sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


def test_what_they_start_from() -> None:
    """Xavier over each gate's [H, I], as MXNet's FusedRNN has it: over all four at once the bound is 0.63 of that."""
    word = create("lstm-8", tied=False)
    assert 0.09 < word.embedding.weight.abs().max() <= 0.1
    bound = math.sqrt(6 / (8 + 8))
    for key in ("weight_ih_l0", "weight_hh_l1"):
        for gate in getattr(word.lstm, key).view(4, 8, 8):
            assert 0.9 * bound < gate.abs().max() <= bound
    assert not word.lstm.bias_ih_l0.any()
    assert not word.bias.any()
    cnn = create("cnn-lstm-8")
    for key, parameter in cnn.named_parameters():
        value = parameter.detach() + 2 if "gate.bias" in key else parameter.detach()
        assert 0 < value.abs().max() <= 0.05 + 1e-6, key
    assert not cnn.cnn.embedding.weight[0].any()


def test_characters_are_convolved_as_kim_has_them() -> None:
    """Each word by itself, tanh before the maximum, highway layers by their formula, padding as zeros."""
    model = create("cnn-lstm-8").double().eval()
    words = TABLE[tokens()[0]]  # [B, 8]
    words[0, 4:] = 0
    cnn = model.cnn
    for word, features in zip(words, cnn(words), strict=True):
        x = torch.stack([torch.zeros(15).double() if c == 0 else cnn.embedding.weight[c] for c in word])  # [8, 15]
        parts = []
        for conv in cnn.convs:
            k = conv.kernel_size[0]
            places = [(conv.weight * x[i : i + k].t()).sum((1, 2)) + conv.bias for i in range(8 - k + 1)]
            parts.append(torch.stack(places).tanh().amax(0))
        y = torch.cat(parts)
        for layer in cnn.highways:
            t = torch.sigmoid(layer.gate.weight @ y + layer.gate.bias)
            y = t * (layer.transform.weight @ y + layer.transform.bias).relu() + (1 - t) * y
        torch.testing.assert_close(features, y)
    assert [conv.out_channels for conv in models.CnnLSTM().cnn.convs] == [50, 100, 150, 200, 200, 200, 200]


def test_words_by_table_or_characters_by_hand() -> None:
    model = create("cnn-lstm-8").eval()
    bare = create("cnn-lstm-8", table=None).eval()
    bare.load_state_dict({key: value for key, value in model.state_dict().items() if key != "table"})
    assert torch.equal(model(tokens())[0], bare(TABLE[tokens()])[0])
    assert model.state_dict()["table"].dtype == torch.int32  # a saved model knows its words' letters
    assert torch.equal(copy.deepcopy(model)(tokens())[0], model(tokens())[0])


def test_padding_never_learns() -> None:
    model = create("cnn-lstm-8", table=TABLE * (torch.arange(8) < 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(tokens())[0].square().sum().backward()
    optimizer.step()
    assert not model.cnn.embedding.weight[0].any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast(name: str, dtype: torch.dtype) -> None:
    model = create(name, dropout=0.0)
    expected, _ = model(tokens())
    with torch.autocast("cpu", dtype=dtype):
        logits, _state = model(tokens())
        logits, _state = model(tokens(), tuple(tensor.float() * 0 for tensor in _state))
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.02)  # logits near 0.1, 2^-9 a rounding


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lstm-99999999999999999999999", {}, "hidden must be at most 16,777,216, got 9999"),
        ("lstm-0", {}, "hidden must be a whole number of at least 1, got 0"),
        ("lstm-8", {"layers": 0}, "layers must be a whole number of at least 1, got 0"),
        ("lstm-8", {"dropout": 1.0}, r"dropout must be a number in \[0, 1\), got 1.0"),
        ("lstm-8", {"tied": "yes"}, "tied must be True or False, got 'yes'"),
        ("lstm-8", {"teid": True}, "lstm-8 has no option 'teid'; did you mean 'tied'"),
        (
            "lstm-8",
            {"in_channels": 3},
            "lstm-8 is a language model: it reads words, and images of 3 channels were given",
        ),
        ("lstm-8", {"num_classes": 0}, "num_classes must be a whole number of at least 1, got 0"),
        ("cnn-lstm-8", {"window": 6}, "window must be a whole number of at least 7, got 6"),
        ("cnn-lstm-8", {"characters": 0}, "characters must be a whole number of at least 1"),
        ("cnn-lstm-8", {"tied": True}, "no option 'tied'"),
        ("cnn-lstm-8", {"num_classes": 7, "table": TABLE}, r"table must be \[7, 21\], .* got \[30, 8\]"),
        ("cnn-lstm-8", {"num_classes": WORDS, "window": 8, "characters": 5, "table": TABLE}, "characters 0 to 4"),
        ("cnn-lstm-8", {"num_classes": WORDS, "window": 8, "table": TABLE.float()}, "got torch.float32"),
        ("lstm1500", {}, "did you mean 'lstm-1500'"),
        ("cnnlstm", {}, "did you mean 'cnn-lstm'"),
    ],
)
def test_what_cannot_be(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        models.create(name, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "wrong", [torch.zeros(4), torch.zeros(2, 3), torch.zeros(0, 3).long(), torch.zeros(3, 8, 8, 1)]
)
def test_what_is_no_window_of_tokens(name: str, wrong: Tensor) -> None:
    for options in ({}, {"table": None}) if "cnn" in name else ({},):
        with pytest.raises(ValueError, match=r"int64 \[T, B"):
            create(name, **options)(wrong)
    with pytest.raises(UserError, match="batch must be a whole number of at least 1, got 0"):
        create(name).zero_state(0)


@pytest.mark.slow
def test_a_small_language_is_learnt() -> None:
    """Next word = this word + 1: a recurrent model that mixed up places or streams could not."""
    torch.manual_seed(0)
    words = (torch.arange(400)[:, None] + torch.tensor([0, 7, 11])) % 12
    for model in (
        models.WordLSTM(16, num_classes=12, dropout=0.0),
        models.CnnLSTM(16, num_classes=12, characters=12, window=8, table=TABLE[:12], dropout=0.0),
    ):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        state = model.zero_state(3)
        for i in range(0, 385, 8):
            logits, state = model(words[i : i + 8], state)
            state = (state[0].detach(), state[1].detach())
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), words[i + 1 : i + 9].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss < 0.5 * math.log(12)


@pytest.mark.parametrize(("dtype", "is_left"), [(torch.float16, True), (torch.bfloat16, False), (None, True)])
def test_under_bf16_a_gpu_s_lstm_is_not_left_to_autocast(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | None, is_left: bool
) -> None:
    """Which would take it to fp16, where nobody scales the loss. Without a GPU: what the layer is given."""
    model = create("lstm-8")
    given: list[Tensor] = []

    class OnDevice(Tensor):
        @property
        def device(self) -> torch.device:  # type: ignore[override]
            return torch.device("cuda")

    def layer(x: Tensor, state: models.lstm.State) -> tuple[Tensor, models.lstm.State]:
        given.extend((x, *state))
        return x, state

    monkeypatch.setattr("ban_fast.models.lstm.autocast_dtype", lambda kind: dtype if kind == "cuda" else None)
    monkeypatch.setattr(model.lstm, "forward", layer)
    x, state = torch.zeros(T, B, 8, dtype=torch.float16), torch.zeros(2, B, 8, dtype=torch.float16)
    model._recur(x.as_subclass(OnDevice), (state, state))
    assert [each.dtype for each in given] == [torch.float16 if is_left else torch.float32] * 3
    given.clear()
    model._recur(x, (state, state))
    assert [each.dtype for each in given] == [torch.float16] * 3
