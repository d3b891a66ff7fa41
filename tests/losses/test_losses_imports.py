"""`import ban_fast.losses` needs torch alone."""

import subprocess
import sys


def test_the_losses_need_torch_and_nothing_else() -> None:
    code = """
import sys, torch, ban_fast.losses as losses
z = torch.randn(3, 4, requires_grad=True)
losses.KDLoss(4.0)(z, torch.randn(3, 4)).backward()
heavy = ["torchvision", "rich", "matplotlib", "typer", "click", "safetensors", "PIL", "timm", "triton"]
print([name for name in heavy if name in sys.modules])
floors = ["training", "models", "data", "evaluation", "report", "recipes", "cli", "config"]
print([name for name in floors if f"ban_fast.{name}" in sys.modules])
print(list(z.grad.shape))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["[]", "[]", "[3, 4]"]
