"""The paper's language models ("Born-Again Neural Networks", Furlanello et al. 2018, sections 4.2 and 5.3, Table 6).

Plain SGD without weight decay over windows of 35 places. A step's gradient is that of the losses summed over the places
and averaged over the streams (`text.over_time`), which is the scale that the paper's learning rates and its sources'
gradient norms are on: learning rate 1 here is 35 on a mean over all tokens. Students learn from their teacher's outputs
and labels: the paper found that language models need both. One student, as in Table 6; `generations` for more.

The students' loss is the sum of its two terms, as the paper writes it, at twice the scale of the teacher's: a step that
is clipped is as long as the teacher's, another up to twice that. So students start more slowly, and pass their teacher
once the learning rate has fallen. Test perplexities of one layer of 64 on the first 4,000 lines of Penn Treebank's
training text, 20 epochs, one seed (`benchmarks/results/language_models`, ptb4000):

    teacher                      182.9
    student of labels alone      183.1
    student of the sum           171.1

A run that ends before the rate falls shows the slow start alone: after two epochs on the whole text with batches of 32
(`benchmarks/results/language_models`), validation perplexity is 184 for the teacher, 199 with halves, 239 with the sum.
"""

from ..config import Config, DataConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, TextConfig


def ptb_lstm() -> Config:
    """Two tied layers of 1500, dropout 0.65 (the paper's "52M"; test perplexity 71.87 -> 68.56).

    Learning rate 1, a quarter of it after each epoch without a better validation perplexity, batches of 32. Gradients
    are clipped at norm 0.2 x 35, as in MXNet's word_lm, whose defaults the paper's numbers are.
    """
    return Config(
        recipe="ptb-lstm",
        data=DataConfig(name="ptb"),
        text=TextConfig(level="word", window=35, over_time="sum"),
        model=ModelConfig(name="lstm-1500"),
        objective=ObjectiveConfig(name="ban+l"),
        optimizer=OptimizerConfig(
            lr=1.0,
            momentum=0.0,
            nesterov=False,
            weight_decay=0.0,
            schedule="plateau",
            lr_decay=0.25,
            plateau_threshold=0.0,
            clip_norm=7.0,
        ),
        generations=1,
        epochs=40,
        batch_size=32,
    )


def ptb_cnn_lstm() -> Config:
    """Kim et al.'s large model (the paper's "19M"; test perplexity 80.05 -> 76.97).

    Learning rate 2, half of it after each epoch whose validation perplexity is not 0.5 below that of the epoch before
    (Kim et al.'s rule, with 1 for 0.5), batches of 20; gradients are clipped at norm 5, as theirs are.
    """
    config = ptb_lstm()
    config.recipe = "ptb-cnn-lstm"
    config.model = ModelConfig(name="cnn-lstm")
    config.optimizer.lr, config.optimizer.lr_decay = 2.0, 0.5
    config.optimizer.plateau_threshold, config.optimizer.plateau_against = 0.5, "previous"
    config.optimizer.clip_norm = 5.0
    config.batch_size = 20
    return config


def ptb_small() -> Config:
    """The LSTM recipe scaled down for a CPU: one tied layer of 200, dropout 0.2, six epochs.

    No row of the paper's.
    """
    config = ptb_lstm()
    config.recipe = "ptb-small"
    config.model = ModelConfig(name="lstm-200", options={"layers": 1, "dropout": 0.2})
    config.epochs = 6
    return config
