// The label term of one row.
#pragma once

#include "batch.cuh"
#include "row_sources.cuh"

namespace ban_fast::cuda {

// Below every logit but -inf: where a running maximum begins, so that exp(-inf - top) is 0.
template <class T>
BAN_FAST_DEVICE T below_all() {
  return sizeof(T) == sizeof(double) ? T(-1.7976931348623157e308) : T(-3.402823466e38);
}

// NaN where a row has no finite logit.
template <class T>
BAN_FAST_DEVICE double or_nan(double sum, T top) {
  return top > below_all<T>() ? sum : double(NAN);
}

// One thread's share of the sum of exp((z_i - top) / T). `top` grows where rows are streamed.
template <class T>
struct ExpSum {
  T top, sum;

  template <class Divisor>
  BAN_FAST_MEMBER void rescale(T to, const Divisor& temperature) {
    sum *= exp_quotient(top - to, temperature);
    top = to;
  }
  template <int V, class Divisor>
  BAN_FAST_MEMBER void raise(const T (&z)[V], const Divisor& temperature) {
    T highest = z[0];
    BAN_FAST_UNROLL
    for (int v = 1; v < V; ++v) highest = larger(highest, z[v]);
    if (top < highest) rescale(highest, temperature);
  }
  template <class Divisor>
  BAN_FAST_MEMBER void add(T z, bool counts, const Divisor& temperature) {
    const T e = exp_quotient(z - top, temperature);
    sum += counts ? e : T(0);
  }
};

// A row's largest logit and the sum of exp((z_i - largest) / T) over its classes but `without` (-1: over all), which is
// NaN where none is finite.
template <class T, class Rows, class Team, class Divisor>
BAN_FAST_DEVICE Totals<T, 1> exp_sum(const Rows& rows, Team& team, const Divisor& temperature, int without) {
  ExpSum<T> mine{below_all<T>(), T(0)};
  rows.each([&](const auto& e) {
    mine.raise(e.z, temperature);
    BAN_FAST_UNROLL
    for (int v = 0; v < int(sizeof(e.z) / sizeof(T)); ++v) mine.add(e.z[v], e.at[v] != without, temperature);
  });
  Totals<T, 1> found{{0.0}, mine.top};
  team.total(found);
  const T top = found.largest;
  mine.rescale(top, temperature);
  found.sums[0] = double(mine.sum);
  team.total(found);
  return {{or_nan(found.sums[0], top)}, top};
}

// Cross-entropy, and what its gradient takes: exp(z_i - top) * scale, but at the label -rest * scale.
template <class T>
struct LabelTerm {
  double loss = 0.0;
  T top = T(0), rest = T(0), scale = T(0);
  int label = -1;

  LabelTerm() = default;
  // others: the sum of exp(z_i - largest) over the other classes; slope: d loss / d term.
  BAN_FAST_MEMBER LabelTerm(double others, T largest, T z_label, int label_, double slope)
      : top(largest), rest(T(others)), label(label_) {
    const T gap = largest - z_label;
    const double exp_label = double(exp_quotient(-gap, UnitTemperature<T>{}));
    loss = label_loss(others, exp_label, double(gap));
    scale = T(slope / (others + exp_label));
  }

  BAN_FAST_MEMBER T gradient(T z, int i) const {
    return (i == label ? -rest : exp_quotient(z - top, UnitTemperature<T>{})) * scale;
  }
};

}  // namespace ban_fast::cuda
