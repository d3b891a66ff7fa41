// KD of one row by a team: loss terms and gradient, in the difference form of row_math.h.
#pragma once

#include "distill_sums.cuh"

namespace ban_fast::cuda {

// d loss / d (a term's q - p) as the gradient is stored, and what a mean multiplies with.
struct Slopes {
  double kd, label, each;

  template <class T>
  BAN_FAST_MEMBER Slopes(const DistillTask<T>& task, Mailbox* mail) : each(1.0) {
    if (task.is_mean) each = 1.0 / kept_rows(task.selection, task.counts, task.count_blocks, mail);
    kd = task.kd_slope * each;
    label = task.label_slope * each;
    if (task.grad_scale == nullptr) return;
    const HalfScale scale(magnitude(kd) + magnitude(label));
    kd *= double(scale.up);
    label *= double(scale.up);
    if (device::block() == 0 && device::thread() == 0) *task.grad_scale = scale.down;
  }
};

// KL's terms and q - p of one row, from its sums: by the difference form.
template <class T>
struct NearForm {
  const Reference<T>& reference;
  const Temperature<T>& temperature;
  NearRow<T> row;
  T scale;  // of the gradient; 1 / S is in it

  struct Terms {
    T kl, gradient;
  };
  BAN_FAST_MEMBER Terms of(T z, T t) const {
    const Element<T> e(z, t, reference.t, reference, temperature);
    const Apart<T> apart = near_apart(e.p, e.more, e.d, row.log_mass, row.exp_neg, row.expm1_neg);
    return {divergence_term(apart), apart.minus_p * scale};
  }
};

// The same by log-sum-exp: where student and teacher are far apart, or one of them alone is -inf.
template <class T>
struct FarForm {
  T z_top, t_top, q_scale, p_scale, log_ratio;
  const Temperature<T>& temperature;
  T scale;

  BAN_FAST_MEMBER typename NearForm<T>::Terms of(T z, T t) const {
    const T q = exp_quotient(z - z_top, temperature) * q_scale, p = exp_quotient(t - t_top, temperature) * p_scale;
    const T log_exps = divide((z - z_top) - (t - t_top), temperature);
    const Apart<T> apart{p, q - p, z == negative_infinity<T>() ? z : log_exps + log_ratio};
    return {far_term(q, apart), apart.minus_p * scale};
  }
};

// Writes the gradient, and returns the team's sum of KL's terms.
template <class T, class Rows, class Team, class Form>
BAN_FAST_DEVICE double finish_row(const Rows& rows, Team& team, const Form& form, const LabelTerm<T>& label,
                                  bool with_kd) {
  T kl = T(0);
  const bool with_label = label.scale != T(0);
  rows.each([&](const auto& e) {
    constexpr int kCount = int(sizeof(e.z) / sizeof(T));
    T gradient[kCount];
    BAN_FAST_UNROLL
    for (int v = 0; v < kCount; ++v) {
      const auto terms = form.of(e.z[v], e.t[v]);
      kl += terms.kl;
      gradient[v] = with_kd ? terms.gradient : T(0);
      if (with_label) gradient[v] += label.gradient(e.z[v], e.at[v]);
    }
    if (rows.gradient().data != nullptr) rows.gradient().write(e.at, gradient);
  });
  Totals<T, 1> total{{double(kl)}, T(0)};
  team.total(total);
  return total.sums[0];
}

// A sound row: its terms, as they go into the batch's.
template <class T, class Rows, class Team>
BAN_FAST_DEVICE RowLoss distill_row(const DistillTask<T>& task, Rows& rows, Team& team, const Permuter* permuter,
                                    const LogitRow& student, const LogitRow& teacher, const Slopes& slopes,
                                    const RowState& state) {
  const bool has_label = task.selection.labels != nullptr;
  const int y = has_label ? state.label : -1;
  RowSums<T> sums = [&] {
    if constexpr (Rows::kHeld) {
      return held_sums(task, rows, team, permuter, student, y);
    } else {
      return streamed_sums(task, rows, team, permuter, student, teacher, y);
    }
  }();
  const double s = sums.totals.sums[kS], a = sums.totals.sums[kA];
  LabelTerm<T> label;
  if (has_label) label = {sums.totals.sums[kRest], sums.label_top, student.at<T>(y), y, slopes.label};
  const bool with_kd = task.kd_slope != 0.0;
  double kd;
  if (is_near(double(sums.totals.largest), s, a)) {
    const NearRow<double> near = near_row(s, a);
    const NearForm<T> form{sums.reference,
                           task.temperature,
                           {T(near.log_mass), T(near.exp_neg), T(near.expm1_neg)},
                           T(slopes.kd / s)};
    kd = finish_row(rows, team, form, label, with_kd) / s;
  } else {
    const Totals<T, 1> other = exp_sum<T>(rows, team, task.temperature, -1);
    const double log_ratio = log_of_sum(s) - log_of_sum(other.sums[0]);
    const FarForm<T> form{other.largest,         sums.reference.t, T(1.0 / other.sums[0]), T(1.0 / s), T(log_ratio),
                          task.temperature, T(slopes.kd)};
    kd = finish_row(rows, team, form, label, with_kd);
  }
  if (task.entropy) kd += sums.totals.sums[kH] / s + log_of_sum(s);
  return {kd * task.kd_factor, label.loss};
}

}  // namespace ban_fast::cuda
