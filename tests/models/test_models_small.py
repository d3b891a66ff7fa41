"""The demo's network on the handwritten digits."""

import torch
import torch.nn.functional as F

from ban_fast import data, models


def test_convnet_learns_the_digits():
    """convnet-24, 8 epochs of plain SGD: at most 4 % of the 360 test images wrong (1 to 2 % are usual)."""
    digits = data.load("digits")
    x, y = digits.train.images.permute(0, 3, 1, 2) / 127.5 - 1, digits.train.labels
    torch.manual_seed(0)
    network = models.create("convnet-24", 10, in_channels=1)
    assert sum(p.numel() for p in network.parameters()) == 53_362
    steps = 8 * (len(y) // 64)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = torch.randint(len(y), (64,))
        optimizer.zero_grad()
        F.cross_entropy(network(x[batch]), y[batch]).backward()
        optimizer.step()
        schedule.step()
    network.eval()
    with torch.no_grad():
        logits = network(digits.test.images.permute(0, 3, 1, 2) / 127.5 - 1)
    error = (logits.argmax(1) != digits.test.labels).float().mean().item()
    assert error <= 0.04
