"""The losses of born-again training, as modules and as functions. Importing this needs torch alone.

    KDLoss, kd_loss        distillation from the teacher's distribution, with or without labels (eq 2, 5, 7)
    CWTMLoss, cwtm_loss    cross-entropy weighted by the teacher's confidence (eq 10; eq 9 by weight_by)
    DKPPLoss, dkpp_loss    distillation with every output but the teacher's argmax permuted (eq 11)
    dkpp_targets           the distributions that DKPP distils from
    fused_linear_kd        kd_loss from a language model's hidden states, its logits never all there at once

Equations are those of Furlanello et al., Born-Again Neural Networks, ICML 2018. Loss and gradient come from one pass
over the logits; arithmetic is fp32 (fp64 for fp64 students), exact also where student and teacher nearly agree.
"""

from ban_fast.losses.modules import CWTMLoss, DKPPLoss, KDLoss
from ban_fast.ops.cwtm import cwtm_loss
from ban_fast.ops.dkpp import dkpp_loss, dkpp_targets
from ban_fast.ops.kd import kd_loss
from ban_fast.ops.linear_kd import fused_linear_kd

__all__ = ["CWTMLoss", "DKPPLoss", "KDLoss", "cwtm_loss", "dkpp_loss", "dkpp_targets", "fused_linear_kd", "kd_loss"]
