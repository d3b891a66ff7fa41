"""The paper's image recipe ("Born-Again Neural Networks", Furlanello et al. 2018, section 4.1).

The numbers are those of the Wide-ResNet authors' code, which the paper points to for its CIFAR experiments: SGD with
Nesterov momentum 0.9, weight decay 5e-4 on every parameter, learning rate 0.1 times 0.2 at 30, 60 and 80 % of 200
epochs, batches of 128, a horizontal flip and a random crop out of 4 pixels of reflection. They are also the defaults of
`OptimizerConfig` and `Config`, and are spelled out here so that a change of a default can't change a published recipe.
"""

from ..config import Config, DataConfig, ModelConfig, ObjectiveConfig, OptimizerConfig


def paper() -> Config:
    """The general form, for a folder of images: wrn-28-1 at the paper's settings. Set `data.name` to the folder."""
    return Config(
        recipe="paper",
        data=DataConfig(augmentation="crop+flip", padding="reflect"),
        model=ModelConfig(name="wrn-28-1"),
        objective=ObjectiveConfig(name="ban"),
        optimizer=OptimizerConfig(
            lr=0.1,
            momentum=0.9,
            nesterov=True,
            weight_decay=5e-4,
            schedule="step",
            milestones=(0.3, 0.6, 0.8),
            lr_decay=0.2,
        ),
        generations=3,
        epochs=200,
        batch_size=128,
    )


def cifar10() -> Config:
    """CIFAR-10 with wrn-28-1, the smallest row of the paper's Table 1 (error 6.69 % -> 6.64 %).

    The paper trained one student there; three are trained here, so that there is an ensemble (`generations`).
    """
    config = paper()
    config.recipe = config.data.name = "cifar10"
    return config


def cifar100() -> Config:
    """CIFAR-100 with wrn-28-1, the smallest row of the paper's Table 3 (error 30.05 % -> 29.43 %).

    The paper's sequences of three students and their ensembles are DenseNets: `model.name="densenet-112-33"` and
    its larger sisters.
    """
    config = paper()
    config.recipe = config.data.name = "cifar100"
    return config
