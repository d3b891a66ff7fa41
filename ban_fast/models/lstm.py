"""Recurrent language models: a stack of LSTM layers between words and the distribution of the next one.

    logits, state = model(tokens, state)                      # [T, B, V]
    hidden, state = model(tokens, state, project=False)       # [T, B, H], for losses that project by themselves:
    weight, bias = model.output_layer()                       # ban_fast.losses.fused_linear_kd(hidden, weight, ...)

State is a pair of tensors, carried from one window of the text to the next by whoever calls; detach it there.
"""

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..ops.autocast import autocast_dtype
from ..ops.wide_linear import wide_linear
from . import checks

State = tuple[Tensor, Tensor]
"""Outputs and cells of every layer, [layers, B, H] each."""


class LanguageModel(nn.Module):
    """What recurrent language models share: the LSTM, dropout of its output, the softmax layer. Subclasses embed.

    `lstm` applies dropout between its layers, and to nothing recurrent.
    """

    def __init__(self, inputs: int, hidden: int, words: int, *, layers: int, dropout: float, tied: bool) -> None:
        super().__init__()
        for name, value in (("hidden", hidden), ("num_classes", words), ("layers", layers)):
            checks.whole(name, value)
        dropout = checks.share("dropout", dropout)
        self.hidden = hidden
        self.lstm = nn.LSTM(inputs, hidden, layers, dropout=dropout if layers > 1 else 0.0)
        self.dropout = nn.Dropout(dropout)
        self.weight = None if tied else nn.Parameter(torch.empty(words, hidden))
        self.bias = nn.Parameter(torch.empty(words))

    def embed(self, tokens: Tensor) -> Tensor:  # [T, B] -> [T, B, inputs]
        """What the first layer reads."""
        raise NotImplementedError

    def output_layer(self) -> tuple[Tensor, Tensor]:
        """Weight [V, H] and bias [V] of the softmax layer: logits are F.linear(hidden, weight, bias)."""
        assert self.weight is not None
        return self.weight, self.bias

    def zero_state(self, batch: int) -> State:
        """The state at the start of a text, for `batch` streams."""
        zeros = self.bias.new_zeros(self.lstm.num_layers, checks.whole("batch", batch), self.hidden)
        return zeros, zeros.clone()

    def forward(
        self, tokens: Tensor, state: State | None = None, *, project: bool = True
    ) -> tuple[Tensor, State]:  # [T, B] int64 -> [T, B, V] or [T, B, H]
        """Logits of the next word at every place (or hidden states, dropout applied) and the state after the last.

        Under autocast logits are fp32: `ops.wide_linear`.
        `state` None is the start of a text.
        """
        x = self.embed(tokens)
        output, after = self._recur(x, self.zero_state(x.shape[1]) if state is None else state)
        output = self.dropout(output)
        return (wide_linear(output, *self.output_layer()) if project else output), after

    def _recur(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Through the LSTM. torch's autocast has cuDNN's compute in fp16 whichever dtype it was asked for: under bf16,
        whose users scale no loss, gradients would vanish there, so that it is fp32's LSTM (TF32 where that is on)."""
        kind = x.device.type
        if kind != "cuda" or autocast_dtype(kind) is not torch.bfloat16:
            return self.lstm(x, state)  # type: ignore[no-any-return]
        with torch.autocast(kind, enabled=False):
            return self.lstm(x.float(), tuple(each.float() for each in state))  # type: ignore[no-any-return]


class WordLSTM(LanguageModel):
    """Words embedded in `hidden` dimensions, and `layers` LSTM layers of that width.

    "lstm-1500" in the paper (section 4.2) is two layers, dropout 0.65 on embeddings, between layers and on the output,
    and one matrix for embedding and softmax (`tied`, Press and Wolf): 51,034,000 parameters of the paper's 52M for
    10,000 words. Initialised as the recipe that the paper's numbers are those of: embedding U(+-0.1), each gate's
    weights [H, I] Xavier-uniform (MXNet's FusedRNN takes the gates apart first: U(+-sqrt(6 / (H + I))), for all four
    together it would be sqrt(6 / (4H + I))), biases 0; an untied softmax layer is Xavier-uniform too.

    Args:
        hidden: width of the embedding and of every layer.
        num_classes: words.
        layers: 2, or 1 as the paper's text has it (33,022,000 parameters).
        dropout: probability in [0, 1).
        tied: whether the softmax layer's weight is the embedding.
    """

    def __init__(
        self, hidden: int, *, num_classes: int = 10_000, layers: int = 2, dropout: float = 0.65, tied: bool = True
    ) -> None:
        if not isinstance(tied, bool):
            raise UserError(f"tied must be True or False, got {tied!r}")
        super().__init__(hidden, hidden, num_classes, layers=layers, dropout=dropout, tied=tied)
        self.embedding = nn.Embedding(num_classes, hidden)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        for name, parameter in self.lstm.named_parameters():
            if name.startswith("weight"):
                for gate in parameter.detach().chunk(4):
                    nn.init.xavier_uniform_(gate)
            else:
                nn.init.zeros_(parameter)
        if self.weight is not None:
            nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)

    def embed(self, tokens: Tensor) -> Tensor:  # [T, B] -> [T, B, H]
        """Embeddings of words, dropout applied."""
        checks.tokens(tokens)
        embedded: Tensor = self.dropout(self.embedding(tokens))
        return embedded

    def output_layer(self) -> tuple[Tensor, Tensor]:
        """Weight [V, H] and bias [V] of the softmax layer; the weight is the embedding's where they are tied."""
        return (self.embedding.weight if self.weight is None else self.weight), self.bias
