// The C++ API of a dense block's passes on the CPU (ban_fast/backends/dense_passes.py says what each is for).
//
// "acc" is double for f64 features and float for all others; vectors over channels are acc and contiguous.
#pragma once

#include <cstdint>

#include "losses.h"

namespace ban_fast::dense {

// [rows, channels] with unit stride over channels; the pitch from row to row is in elements.
template <class Data>
struct Pixels {
  Data* data;
  std::int64_t pitch;
};
using Read = Pixels<const void>;
using Written = Pixels<void>;

struct Size {
  DType dtype;  // the features'
  std::int64_t rows, channels;
};

// out = relu(x * scale + shift), both in the features' dtype.
struct Activate {
  Size size;
  Read x;
  const void *scale, *shift;
  Written out;
};

// mean over rows, and sum of squared distances from it: [channels] each. Of no rows: NaN, and 0.
struct Moments {
  Size size;
  Read x;
  void *mean, *distances;
};

// dz = grad where activation > 0 or NaN, else 0; into = dz * scale, or with `add` += it; dz_sum += sum dz, and
// distance_sum += sum dz * (x - mean), [channels] each. `into` is acc, the other pixels are in the features' dtype.
struct Deposit {
  Size size;
  Read grad, activation, x;
  const void *scale, *mean;
  Written into;
  void *dz_sum, *distance_sum;
  bool add;
};

// out = grad - p - (x - mean) * q. grad is acc, x and out are in the features' dtype.
struct Correct {
  Size size;
  Read grad, x;
  const void *mean, *p, *q;
  Written out;
};

// out = relu(x * scale + shift) weight^T, [rows, outputs]: batch norm, ReLU and a 1x1 convolution, of f32 or f64.
// weight is [outputs, channels], contiguous.
struct Pointwise {
  Size size;
  Read x;
  const void *scale, *shift, *weight;
  std::int64_t outputs;
  Written out;
};

// Back from grad = d loss / d out: what Deposit does with grad weight for its `grad`; and weight_grad, laid out as
// weight, += grad^T relu(x * scale + shift), unless it is null.
struct PointwiseBackward {
  Size size;
  Read grad, x;
  const void *scale, *shift, *mean, *weight;
  std::int64_t outputs;
  Written into;
  void *dz_sum, *distance_sum, *weight_grad;
  bool add;
};

// On up to `threads` threads, with the same bits on any number of them. No output may overlap an input.
void activate(const Activate& job, int threads);
void moments(const Moments& job, int threads);
void deposit(const Deposit& job, int threads);
void correct(const Correct& job, int threads);
void pointwise(const Pointwise& job, int threads);
void pointwise_backward(const PointwiseBackward& job, int threads);

}  // namespace ban_fast::dense
