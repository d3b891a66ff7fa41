#include "rows.h"

#define BAN_FAST_QUOTE_(name) #name
#define BAN_FAST_QUOTE(name) BAN_FAST_QUOTE_(name)

namespace ban_fast::BAN_FAST_ISA {

const RowKernels row_kernels = {
    BAN_FAST_QUOTE(BAN_FAST_ISA),
    kd_rows,
    confidence_rows,
    weighted_label_rows,
    target_rows,
    permutation_rows,
    scale_rows,
    {dense_activate_rows, dense_moments_rows, dense_deposit_rows, dense_correct_rows, pointwise_rows,
     pointwise_backward_rows},
};

}  // namespace ban_fast::BAN_FAST_ISA
