"""The character-aware language model of Kim et al. (2016): convolutions over a word's letters feed the LSTM."""

import torch
from torch import Tensor, nn

from ..errors import UserError
from . import checks
from .lstm import LanguageModel

CHARACTERS, WINDOW = 51, 21
"""Of Penn Treebank: 46 letters and signs, one each for <unk> and <eos>, padding, start and end of a word; and its
longest word, of 19, with start and end."""
KERNELS = range(1, 8)
LEAST_WINDOW = KERNELS[-1]
LARGE = 650
"""Width of the LSTM in the authors' large model, which the paper trains."""


class Highway(nn.Module):
    """t * relu(W x) + (1 - t) * x with t = sigmoid(V x), whose bias starts at -2: mostly x at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.transform = nn.Linear(width, width)
        self.gate = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # [N, C] -> [N, C]
        return torch.lerp(x, self.transform(x).relu(), self.gate(x).sigmoid())


class CharacterCNN(nn.Module):
    """Convolutions of 1 to 7 characters, tanh, their maximum over the word, then highway layers.

    [N, L] characters of words, 0 where a word has ended, -> [N, features].
    """

    def __init__(self, characters: int, dimensions: int, maps: list[int], highways: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, dimensions, padding_idx=0)
        self.convs = nn.ModuleList(nn.Conv1d(dimensions, m, k) for m, k in zip(maps, KERNELS, strict=True))
        self.features = sum(maps)
        self.highways = nn.Sequential(*(Highway(self.features) for _ in range(highways)))

    def forward(self, words: Tensor) -> Tensor:  # [N, L] -> [N, features]
        x = self.embedding(words).transpose(1, 2)
        # tanh rises, so it may follow the maximum, of which there are fewer
        features: Tensor = self.highways(torch.cat([conv(x).amax(2) for conv in self.convs], 1).tanh())
        return features


class CnnLSTM(LanguageModel):
    """Characters of words through `CharacterCNN`, then a two-layer LSTM, dropout 0.5 between and after its layers.

    "cnn-lstm" is the authors' large model, hidden 650: characters in 15 dimensions, 50, 100, 150 and four times 200
    maps for widths 1 to 7, two highway layers, an untied softmax layer: 19,373,165 parameters for 10,000 words, the
    paper's 19M. Other widths have maps in proportion. All parameters start from U(+-0.05), gates' biases 2 below that.

    Args:
        hidden: width of the LSTM.
        num_classes: words.
        characters: how many there are; 0 is padding.
        window: characters that the longest word has, start and end marks included; at least 7.
        table: [num_classes, window] characters of every word, from `ban_fast.data.Corpus.characters`. Without it the
            model reads characters, [T, B, window], in place of words.
        layers, dropout: of the LSTM.
    """

    table: Tensor | None

    def __init__(
        self,
        hidden: int = LARGE,
        *,
        num_classes: int = 10_000,
        characters: int = CHARACTERS,
        window: int = WINDOW,
        table: Tensor | None = None,
        layers: int = 2,
        dropout: float = 0.5,
    ) -> None:
        checks.whole("hidden", hidden)
        checks.whole("characters", characters)
        checks.whole("window", window, LEAST_WINDOW)
        maps = [max(1, round(min(200, 50 * kernel) * hidden / LARGE)) for kernel in KERNELS]
        super().__init__(sum(maps), hidden, num_classes, layers=layers, dropout=dropout, tied=False)
        self.window = window
        self.cnn = CharacterCNN(characters, 15, maps, highways=2)
        self.register_buffer("table", None if table is None else _checked(table, num_classes, window, characters))
        with torch.no_grad():
            for parameter in self.parameters():
                nn.init.uniform_(parameter, -0.05, 0.05)
            self.cnn.embedding.weight[0] = 0
            for module in self.modules():
                if isinstance(module, Highway):
                    module.gate.bias.sub_(2)

    def embed(self, tokens: Tensor) -> Tensor:  # [T, B] words or [T, B, window] characters -> [T, B, features]
        """Features of words."""
        if self.table is not None:
            checks.tokens(tokens)
            words = self.table[tokens]
        else:
            checks.characters(tokens, self.window)
            words = tokens
        features: Tensor = self.cnn(words.flatten(0, 1)).unflatten(0, tokens.shape[:2])
        return features


def _checked(table: Tensor, words: int, window: int, characters: int) -> Tensor:
    """The table as int32, which a model's file keeps."""
    if table.shape != (words, window):
        raise UserError(
            f"table must be [{words}, {window}], the characters of every word, got {list(table.shape)}; "
            "window= says how many a word has"
        )
    if table.is_floating_point() or (table.numel() and not 0 <= int(table.min()) <= int(table.max()) < characters):
        raise UserError(
            f"table must hold characters 0 to {characters - 1}, got {table.dtype}; characters= says how many"
        )
    return table.to(torch.int32)
