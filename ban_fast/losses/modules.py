"""The losses as modules: options checked and kept, tensors passed on."""

from torch import Tensor, nn

from ban_fast.backends import dispatch
from ban_fast.backends.interface import Divergence, Reduction, WeightBy
from ban_fast.ops import checks
from ban_fast.ops.cwtm import cwtm_loss
from ban_fast.ops.dkpp import dkpp_loss
from ban_fast.ops.kd import kd_loss


class KDLoss(nn.Module):
    """Knowledge distillation: kd_weight * T^2 * KL(p_T || q_T) + label_weight * CE(q, labels).

    p_T and q_T are the softmaxes of teacher and student logits over T, q the student's at T = 1. `KDLoss(T)(y_s, y_t)`
    is the mean over rows that is widely copied as DistillKL; T = 1 and no labels is the paper's BAN (eq 2, 5, 7),
    kd_weight 1 and label_weight 1 its BAN+L.

    Args:
        temperature: T, above 0.
        kd_weight: weight of the KD term, 0 or more.
        label_weight: weight of the label term, 0 or more; above 0 labels are needed.
        divergence: "kl", or "ce" to leave the teacher's entropy in; the gradient is the same.
        scale_t2: whether the KD term is multiplied by T^2, which keeps its gradient's size as T changes.
        ignore_index: rows with this label count nowhere: not in the KD term, not in the mean's denominator.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" (the labels' shape, 0 where ignored).
        backend: "auto", "reference", "native" or "triton".
    """

    def __init__(
        self,
        temperature: float = 1.0,
        *,
        kd_weight: float = 1.0,
        label_weight: float = 0.0,
        divergence: Divergence = "kl",
        scale_t2: bool = True,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        checks.check_kd_options(temperature, kd_weight, label_weight, divergence, scale_t2, ignore_index, reduction)
        dispatch.check_name(backend)
        self.temperature = temperature
        self.kd_weight = kd_weight
        self.label_weight = label_weight
        self.divergence: Divergence = divergence
        self.scale_t2 = scale_t2
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction
        self.backend = backend

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        *,
        teacher_rows: Tensor | None = None,
    ) -> Tensor:
        """The loss, fp32 (fp64 for fp64 students).

        Args:
            student_logits: [..., C], fp32, fp16, bf16 or fp64, any strides.
            teacher_logits: the same shape, or [M, C] with `teacher_rows`; any of those dtypes. No gradient flows to it.
            labels: [...] int64.
            teacher_rows: [...] int64: row i is taught by teacher_logits[teacher_rows[i]], read in place.

        Raises:
            ValueError: names the argument and the value received.
        """
        return kd_loss(
            student_logits,
            teacher_logits,
            labels,
            temperature=self.temperature,
            kd_weight=self.kd_weight,
            label_weight=self.label_weight,
            divergence=self.divergence,
            scale_t2=self.scale_t2,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            backend=self.backend,
            teacher_rows=teacher_rows,
        )

    def extra_repr(self) -> str:
        """The options."""
        return _options(
            self,
            "temperature kd_weight label_weight divergence scale_t2 ignore_index reduction backend",
        )


class CWTMLoss(nn.Module):
    """Confidence weighted by teacher max: sum_s w_s CE(q_s, label_s), w_s = c_s / sum_u c_u (eq 10).

    c is the teacher's largest output, or its output for the label (eq 9, computed by log-softmax over the batch). No
    gradient flows through the weights, and the sum is not divided by the number of rows again.

    Args:
        weight_by: "teacher_max" (eq 10) or "teacher_label" (eq 9).
        ignore_index: rows with this label count nowhere: not in the sum, not in the weights' normaliser.
        backend: "auto", "reference", "native" or "triton".
    """

    def __init__(self, *, weight_by: WeightBy = "teacher_max", ignore_index: int = -100, backend: str = "auto") -> None:
        super().__init__()
        checks.check_choice("weight_by", weight_by, checks.WEIGHTS_BY)
        checks.check_int("ignore_index", ignore_index)
        dispatch.check_name(backend)
        self.weight_by: WeightBy = weight_by
        self.ignore_index = ignore_index
        self.backend = backend

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor,
        *,
        confidence: Tensor | None = None,
        normalizer: Tensor | None = None,
        teacher_rows: Tensor | None = None,
    ) -> Tensor:
        """The loss, 0-d fp32 (fp64 for fp64 students).

        Args:
            student_logits: [..., C], fp32, fp16, bf16 or fp64, any strides.
            teacher_logits: the same shape, or [M, C] with `teacher_rows`; None where `confidence` is given.
            labels: [...] int64.
            confidence: fp32, c where it is known already: one value a row of logits, or [M] with `teacher_rows`.
                Whatever `weight_by` says, these are the c; the teacher is then not read.
            normalizer: 0-d, stands for sum_u c_u: the sum over the whole batch, where this call sees a part of it.
            teacher_rows: [...] int64: row i is taught by row teacher_rows[i] of `teacher_logits` or `confidence`.

        Raises:
            ValueError: names the argument and the value received.
        """
        return cwtm_loss(
            student_logits,
            teacher_logits,
            labels,
            weight_by=self.weight_by,
            ignore_index=self.ignore_index,
            backend=self.backend,
            confidence=confidence,
            normalizer=normalizer,
            teacher_rows=teacher_rows,
        )

    def extra_repr(self) -> str:
        """The options."""
        return _options(self, "weight_by ignore_index backend")


class DKPPLoss(nn.Module):
    """Dark knowledge with permuted predictions: KD with every teacher output but its argmax permuted (eq 11).

    The permutation of a row is uniform, and depends on (seed, step, sample id) alone: not on batch order,
    micro-batches, device or backend. With `step` held constant every sample keeps its permutation for good. The argmax
    is the lowest index on fp32 logits. With two classes this is KDLoss.

    Args:
        seed: any 64-bit integer.
        temperature, kd_weight, label_weight, divergence, scale_t2, ignore_index, reduction, backend: as in `KDLoss`.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        *,
        seed: int = 0,
        kd_weight: float = 1.0,
        label_weight: float = 0.0,
        divergence: Divergence = "kl",
        scale_t2: bool = True,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        checks.check_kd_options(temperature, kd_weight, label_weight, divergence, scale_t2, ignore_index, reduction)
        checks.check_int("seed", seed)
        dispatch.check_name(backend)
        self.temperature = temperature
        self.seed = seed
        self.kd_weight = kd_weight
        self.label_weight = label_weight
        self.divergence: Divergence = divergence
        self.scale_t2 = scale_t2
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction
        self.backend = backend

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        *,
        step: Tensor | int = 0,
        sample_ids: Tensor | None = None,
        teacher_rows: Tensor | None = None,
    ) -> Tensor:
        """The loss, as `KDLoss.forward` gives it, with its arguments and errors.

        Args:
            step: int, or a 0-d int64 tensor on the logits' device. Under torch.compile and in CUDA graphs give the
                tensor: an int is a constant there, compiled anew when it changes, and repeated by a graph.
            sample_ids: [...] int64, whose rows these are; None means 0..rows-1.
        """
        return dkpp_loss(
            student_logits,
            teacher_logits,
            labels,
            temperature=self.temperature,
            seed=self.seed,
            kd_weight=self.kd_weight,
            label_weight=self.label_weight,
            divergence=self.divergence,
            scale_t2=self.scale_t2,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            backend=self.backend,
            step=step,
            sample_ids=sample_ids,
            teacher_rows=teacher_rows,
        )

    def extra_repr(self) -> str:
        """The options."""
        return _options(
            self,
            "temperature seed kd_weight label_weight divergence scale_t2 ignore_index reduction backend",
        )


def _options(module: nn.Module, names: str) -> str:
    return ", ".join(f"{name}={getattr(module, name)!r}" for name in names.split())
