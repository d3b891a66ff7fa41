"""The demonstration: born-again generations on the bundled handwritten digits, offline, about a minute on two cores."""

from ..config import Config, DataConfig, ModelConfig, ObjectiveConfig, OptimizerConfig


def demo() -> Config:
    """A small convolutional teacher and three students of its own kind, each on the outputs of the one before."""
    return Config(
        recipe="demo",
        data=DataConfig(name="digits"),
        model=ModelConfig(name="convnet-24"),
        objective=ObjectiveConfig(name="ban"),
        optimizer=OptimizerConfig(lr=0.1, schedule="cosine"),
        generations=3,
        epochs=60,
        batch_size=64,
    )
