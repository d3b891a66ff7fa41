// The sums of one row that KD's loss and gradient are made of, by a team.
#pragma once

#include "label_row.cuh"

namespace ban_fast::cuda {

template <class T>
struct DistillTask {
  Matrix student, teacher;
  Selection selection;
  Permuting permuting;
  Temperature<T> temperature;
  bool entropy;        // the teacher's entropy stays in
  bool is_mean;
  double kd_factor;    // of the KL divergence in the KD term: T^2 or 1
  double kd_slope;     // d loss / d (q - p) of one row, before the mean
  double label_slope;
  void* gradient;      // or null
  float* grad_scale;   // of f16 gradients, else null
  const double* counts;  // rows kept, counted before by so many blocks; or null
  int count_blocks;
  Ending<T> ending;
  SharedPlan shared;
};

// The class that differences are measured from.
template <class T>
struct Reference {
  T z, t;
  Difference<T> apart;

  BAN_FAST_MEMBER Reference(T z_, T t_) : z(z_), t(t_), apart(exact_difference(z_, t_)) {}
};

// An element's e^x, x = (t_i - top) / T, its d and its excess. One where both logits are -inf counts nothing.
template <class T>
struct Element {
  T p, d, more;

  BAN_FAST_MEMBER Element(T z, T t, T top, const Reference<T>& reference, const Temperature<T>& temperature) {
    const bool is_dead = z == t && t == negative_infinity<T>();
    d = relative_difference(exact_difference(z, t), reference.apart, temperature);
    d = is_dead ? T(0) : d;
    p = exp_quotient(t - top, temperature);
    more = excess(p, d);
    if (d > T(kLeaping)) more = leaping_excess(p, z - reference.z, temperature);
  }
};

// One thread's share of a row's sums; see row_math.h. `top` grows where rows are streamed.
template <class T>
struct DistillSums {
  T top;
  T s = T(0), a = T(0), h = T(0);
  double s_exact = 0.0;  // with the entropy, whose logarithm of S wants what a peaked teacher's other classes have
  T largest_d = negative_infinity<T>();
  Heights<T> heights = no_heights<T>();
  ExpSum<T> label;

  BAN_FAST_MEMBER void rescale(T to, const Temperature<T>& temperature) {
    const T change = exp_quotient(top - to, temperature);
    h = change > T(0) ? change * madd(divide(to - top, temperature), s, h) : T(0);
    s *= change;
    a *= change;
    s_exact *= double(change);
    top = to;
  }

};

inline constexpr int kS = 0, kA = 1, kH = 2, kRest = 3;

template <bool kRunning, class T, class Rows>
BAN_FAST_DEVICE DistillSums<T> add_up(const DistillTask<T>& task, const Rows& rows, const Reference<T>& reference,
                                      T top, T label_top, int label) {
  const Temperature<T>& temperature = task.temperature;
  DistillSums<T> sums{.top = top, .label = {label_top, T(0)}};
  rows.each([&](const auto& e) {
    constexpr int kCount = int(sizeof(e.z) / sizeof(T));
    if constexpr (kRunning) {
      find_heights(e, false, sums.heights);
      if (sums.top < sums.heights.teacher.value) sums.rescale(sums.heights.teacher.value, temperature);
      if (label >= 0) sums.label.raise(e.z, UnitTemperature<T>{});
    }
    BAN_FAST_UNROLL
    for (int v = 0; v < kCount; ++v) {
      const Element<T> element(e.z[v], e.t[v], sums.top, reference, temperature);
      sums.s += element.p;
      sums.a += element.more;
      sums.largest_d = larger(sums.largest_d, element.d);
      if (task.entropy) {
        sums.s_exact += double(element.p);
        sums.h = madd(-element.p, divide(larger(e.t[v] - sums.top, temperature.floor), temperature), sums.h);
      }
      if (label >= 0) sums.label.add(e.z[v], e.at[v] != label, UnitTemperature<T>{});
    }
  });
  return sums;
}

template <class T>
BAN_FAST_DEVICE Totals<T, 4> as_totals(const DistillTask<T>& task, const DistillSums<T>& sums) {
  return {{task.entropy ? sums.s_exact : double(sums.s), double(sums.a), double(sums.h), double(sums.label.sum)},
          sums.largest_d};
}

// What is known of a row after it was read for its sums.
template <class T>
struct RowSums {
  Reference<T> reference;
  T label_top;
  Totals<T, 4> totals;
};

template <class T, class Rows, class Team>
BAN_FAST_DEVICE RowSums<T> held_sums(const DistillTask<T>& task, Rows& rows, Team& team, const Permuter* permuter,
                                     const LogitRow& student, int label) {
  Heights<T> heights = rows.heights(permuter != nullptr);
  team.total(heights);
  int peak = heights.teacher.index;
  if (permuter != nullptr) {
    rows.permute(*permuter, peak);
    if constexpr (sizeof(T) == sizeof(double)) {  // the class kept is the largest in fp32
      heights = rows.heights(false);
      team.total(heights);
      peak = heights.teacher.index;
    }
  }
  const Reference<T> reference(student.at<T>(peak), heights.teacher.value);
  const DistillSums<T> sums = add_up<false>(task, rows, reference, reference.t, heights.student, label);
  RowSums<T> found{reference, heights.student, as_totals(task, sums)};
  team.total(found.totals);
  return found;
}

// Rows that are read anew each time are measured from a class that is large in the first tiles, and rebased to the
// peak: with delta = d_guess - d_peak, A = e^delta A_guess + expm1(delta) S. Where that cancels, or a d is large, they
// are read once more.
//
// A large d asks for that even where the guess was right: a leaping class is weighed from the guess, as if each thread's
// top were there already, and shrinks with the rest by e^(top - t_r) when it gets there. That can only lower A, so a row
// that is far without what was lost is so with it, and is not read again.
template <class T, class Rows, class Team>
BAN_FAST_DEVICE RowSums<T> streamed_sums(const DistillTask<T>& task, Rows& rows, Team& team, const Permuter* permuter,
                                         const LogitRow& student, const LogitRow& teacher, int label) {
  Heights<T> heights = rows.heights(permuter != nullptr, permuter != nullptr);
  team.total(heights);
  const int guess = heights.teacher.index;
  if (permuter != nullptr) rows.permute(*permuter, guess);
  const Reference<T> guessed(student.at<T>(guess), teacher.at<T>(guess));

  DistillSums<T> sums = add_up<true>(task, rows, guessed, below_all<T>(), below_all<T>(), label);
  heights = sums.heights;
  team.total(heights);
  const int peak = heights.teacher.index;
  const Reference<T> reference(student.at<T>(peak), heights.teacher.value);
  sums.rescale(reference.t, task.temperature);
  sums.label.rescale(heights.student, UnitTemperature<T>{});
  RowSums<T> found{reference, heights.student, as_totals(task, sums)};
  team.total(found.totals);
  found.totals.sums[kRest] = or_nan(found.totals.sums[kRest], heights.student);
  const bool leaps = found.totals.largest > T(kLeaping);
  if (peak == guess && !(leaps && found.totals.sums[kA] <= kLeapingMass * found.totals.sums[kS])) return found;

  const T delta = relative_difference(guessed.apart, reference.apart, task.temperature);
  const double change = expm1(double(delta)), scaled = (change + 1.0) * found.totals.sums[kA];
  const double added = change * found.totals.sums[kS], a = scaled + added;
  constexpr double kCancelled = 1.0 / 16.0;
  const bool cancels = !(magnitude(a) >= kCancelled * (magnitude(scaled) + magnitude(added)));
  if (!leaps && magnitude(delta) <= T(kLeaping) && !cancels) {
    found.totals.sums[kA] = a;
    found.totals.largest += delta;
    return found;
  }
  const double rest = found.totals.sums[kRest];
  sums = add_up<false>(task, rows, reference, reference.t, T(0), -1);
  found.totals = as_totals(task, sums);
  team.total(found.totals);
  found.totals.sums[kRest] = rest;
  return found;
}

}  // namespace ban_fast::cuda
