"""What autocast asks of operators that see to their own precision."""

import torch


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast casts the operands of a product to; None where it is off, or unknown, as on the meta device."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None
