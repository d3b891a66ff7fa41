// KD's rows: loss and gradient from one visit to each row's logits, whose intermediate values stay in the cache.
#include "dkpp.h"
#include "sweeps.h"

namespace ban_fast::BAN_FAST_ISA {
namespace {

// One row's logits, and scratch for what is computed of its elements.
template <class T>
struct KDRow {
  const T* z;
  const T* t;
  std::int64_t classes, reference;  // reference: where the teacher is largest
  T *exp, *expm1, *difference, *label;
};

struct KDSums {
  double s, a;       // of e^x, x = (t - t_r) / T, and of e^x (e^d - 1)
  double h;          // of -x e^x, where the entropy is wanted
  double largest_d;  // a NaN may hide from it, but not from a
};

// Fills the row's exp, expm1 and difference. kMasked: elements where both logits are -inf count nothing.
template <bool kMasked, bool kEntropy, class T>
BAN_FAST_HD KDSums near_sums(const KDRow<T>& row, const Temperature<T>& temperature) {
  const T z_r = row.z[row.reference], t_r = row.t[row.reference];
  const Difference<T> at_r = exact_difference(z_r, t_r);
  const Difference<Vec<T>> reference{Vec<T>(at_r.s), Vec<T>(at_r.e)};
  LaneSum<T> s, a, h;
  Vec<T> largest_d(T(0));
  const auto body = [&](std::int64_t i, auto tail) BAN_FAST_LAMBDA {
    const std::int64_t left = row.classes - i;
    Vec<T> z = load_some<tail>(row.z + i, left, z_r), t = load_some<tail>(row.t + i, left, t_r);
    [[maybe_unused]] typename Vec<T>::Mask counted;
    if constexpr (tail) counted = first_lanes<T>(left);
    if constexpr (kMasked) {
      const Vec<T> lowest(-kInfinity<T>);
      const auto alive = ~((z == lowest) & (t == lowest));
      if constexpr (tail) {
        counted = counted & alive;
      } else {
        counted = alive;
      }
      z = select(counted, z, Vec<T>(z_r));
      t = select(counted, t, Vec<T>(t_r));
    }
    const Vec<T> d = relative_difference(exact_difference(z, t), reference, temperature);
    const Vec<T> shifted = t - Vec<T>(t_r), e = expm1(d);
    Vec<T> p = exp_quotient(shifted, temperature);
    if constexpr (kMasked || tail) p = select(counted, p, Vec<T>(T(0)));
    s.add(p);
    a.add_product(p, e);
    if constexpr (kEntropy) h.add_product(p, divide(larger(shifted, Vec<T>(temperature.floor)), temperature));
    largest_d = larger(largest_d, magnitude(d));
    store(row.exp + i, p);
    store(row.expm1 + i, e);
    store(row.difference + i, d);
  };
  for_vectors<T>(0, row.classes, body, [&]() BAN_FAST_LAMBDA {
    s.end_block();
    a.end_block();
    if constexpr (kEntropy) h.end_block();
  });
  return {s.value(), a.value(), kEntropy ? -h.value() : 0.0, double(largest_lane(largest_d))};
}

// Writes g, and what the label adds to it.
template <bool kTail, class T, class To>
BAN_FAST_HD void put(To* gradient, const KDRow<T>& row, std::int64_t i, Vec<T> g, bool with_label, Vec<T> label_scale) {
  if (with_label) g = madd(load(row.label + i), label_scale, g);
  write_some<kTail>(gradient + i, g, row.classes - i);
}

// KL by the difference form, and the gradient, unless To is NoGradient.
template <bool kLabel, class T, class To>
static double near_row(const KDRow<T>& row, const KDSums& sums, double kd_scale, double label_scale, To* gradient) {
  const NearRow<T> near(sums.s, sums.a);
  const Vec<T> log_mass(near.log_mass), exp_neg(near.exp_neg), expm1_neg(near.expm1_neg);
  const Vec<T> scale(T(kd_scale / sums.s)), label(static_cast<T>(label_scale));
  LaneSum<T> divergence;
  const auto body = [&](std::int64_t i, auto tail) BAN_FAST_LAMBDA {
    const Vec<T> p = load(row.exp + i);
    const auto ratio = near_ratio(load(row.difference + i), load(row.expm1 + i), log_mass, exp_neg, expm1_neg);
    divergence.add_product(p, divergence_term(ratio));
    if constexpr (!std::is_same_v<To, NoGradient>) {
      put<tail>(gradient, row, i, p * (ratio.minus_one * scale), kLabel, label);
    }
  };
  for_vectors<T>(0, row.classes, body, [&]() BAN_FAST_LAMBDA { divergence.end_block(); });
  return divergence.value() / sums.s;
}

// KL by log-sum-exp, and the gradient: where student and teacher are far apart, or one of them alone is -inf.
template <bool kLabel, class T, class To>
static double far_row(const KDRow<T>& row, const Temperature<T>& temperature, double kd_scale, double label_scale,
                      To* gradient) {
  const Vec<T> lowest(-kInfinity<T>), zero(T(0));
  const T z_max = row_maximum(row.z, row.classes), t_max = row.t[row.reference];
  LaneSum<T> q_sum, p_sum;
  const auto sum_body = [&](std::int64_t i, auto tail) BAN_FAST_LAMBDA {
    const std::int64_t left = row.classes - i;
    const Vec<T> z = load_some<tail>(row.z + i, left, -kInfinity<T>), t = load_some<tail>(row.t + i, left, -kInfinity<T>);
    const Vec<T> q = exp_quotient(z - Vec<T>(z_max), temperature), p = exp_quotient(t - Vec<T>(t_max), temperature);
    q_sum.add(q);
    p_sum.add(p);
    store(row.expm1 + i, q);
    store(row.exp + i, p);
  };
  for_vectors<T>(0, row.classes, sum_body, [&]() BAN_FAST_LAMBDA {
    q_sum.end_block();
    p_sum.end_block();
  });

  const double s_q = q_sum.value(), s_p = p_sum.value();
  const Vec<T> q_scale(T(1 / s_q)), p_scale(T(1 / s_p)), log_ratio(T(std::log(s_p) - std::log(s_q)));
  const Vec<T> scale(static_cast<T>(kd_scale)), label(static_cast<T>(label_scale));
  LaneSum<T> divergence;
  const auto body = [&](std::int64_t i, auto tail) BAN_FAST_LAMBDA {
    const std::int64_t left = row.classes - i;
    const Vec<T> z = load_some<tail>(row.z + i, left, -kInfinity<T>), t = load_some<tail>(row.t + i, left, -kInfinity<T>);
    const Vec<T> q = load(row.expm1 + i) * q_scale, p = load(row.exp + i) * p_scale, w = q - p;
    const Vec<T> apart = (z - Vec<T>(z_max)) - (t - Vec<T>(t_max));
    const Vec<T> u = select(z == lowest, lowest, divide(apart, temperature) + log_ratio);
    Vec<T> term = select(magnitude(u) < Vec<T>(T(kSeriesLimit)), p * expm1_minus_argument(u), w - p * u);
    term = select(term < zero, zero, term);
    divergence.add(select(p == zero, q, term));
    if constexpr (!std::is_same_v<To, NoGradient>) put<tail>(gradient, row, i, w * scale, kLabel, label);
  };
  for_vectors<T>(0, row.classes, body, [&]() BAN_FAST_LAMBDA { divergence.end_block(); });
  return divergence.value();
}

template <class T>
class KDRows {
 public:
  static constexpr int kScratchRows = 6;

  KDRows(const KDJob& job, const ScratchRows<T>& scratch)
      : job_(job), scratch_(scratch), temperature_(job.temperature), one_(1.0) {}

  // t: the teacher's row, permuted for DKPP.
  void visit(std::int64_t i, const T* t) const {
    const std::int64_t classes = job_.selection.classes;
    KDRow<T> row;
    row.z = fetch_row(job_.student, i, classes, scratch_.row(0));
    row.t = t;
    row.classes = classes;
    row.reference = first_index(t, classes, row_maximum(t, classes));
    row.exp = scratch_.row(2);
    row.expm1 = scratch_.row(3);
    row.difference = scratch_.row(4);
    row.label = scratch_.row(5);

    double label_scale = 0.0;
    if (job_.label_values != nullptr) {
      const LabelRow label = label_row(row.z, classes, job_.selection.labels[i], one_, row.label);
      job_.label_values[i] = label.loss;
      label_scale = job_.label_scale / label.total;
    }
    with_gradient_row<T>(job_.gradient, i, classes, [&](auto* gradient) BAN_FAST_LAMBDA {
      job_.kd_values[i] = distil(row, label_scale, gradient);
    });
  }

  const T* teacher(std::int64_t i) const {
    return fetch_row(job_.teacher, job_.selection.teacher_row(i), job_.selection.classes, scratch_.row(1));
  }

 private:
  template <class To>
  double distil(const KDRow<T>& row, double label_scale, To* gradient) const {
    const bool with_label = job_.label_values != nullptr && job_.label_scale != 0;
    if constexpr (!std::is_same_v<To, NoGradient>) {
      if (job_.kd_scale == 0) {
        // A term without weight is left out: 0 times its NaN would be NaN.
        write_row<T>(gradient, row.classes, [&](std::int64_t i) BAN_FAST_LAMBDA {
          return with_label ? load(row.label + i) * Vec<T>(T(label_scale)) : Vec<T>(T(0));
        });
        return value<false>(row, 0.0, static_cast<NoGradient*>(nullptr));
      }
    }
    return with_label ? value<true>(row, label_scale, gradient) : value<false>(row, 0.0, gradient);
  }

  template <bool kLabel, class To>
  double value(const KDRow<T>& row, double label_scale, To* gradient) const {
    KDSums sums = this->sums<false>(row);
    if (std::isnan(sums.a)) sums = this->sums<true>(row);
    const double divergence = is_near(sums.largest_d, sums.s, sums.a)
                                  ? near_row<kLabel>(row, sums, job_.kd_scale, label_scale, gradient)
                                  : far_row<kLabel>(row, temperature_, job_.kd_scale, label_scale, gradient);
    return job_.entropy ? divergence + sums.h / sums.s + std::log(sums.s) : divergence;
  }

  template <bool kMasked>
  KDSums sums(const KDRow<T>& row) const {
    return job_.entropy ? near_sums<kMasked, true>(row, temperature_) : near_sums<kMasked, false>(row, temperature_);
  }

  const KDJob& job_;
  const ScratchRows<T>& scratch_;
  Temperature<T> temperature_, one_;
};

template <class T>
void kd_rows_as(const KDJob& job, std::int64_t begin, std::int64_t end) {
  const Selection& selection = job.selection;
  const int permuted = job.key == nullptr ? 0 : TargetRows<T>::scratch_rows(selection.classes);
  const ScratchRows<T> scratch(selection.classes, KDRows<T>::kScratchRows + permuted);
  const KDRows<T> rows(job, scratch);
  const auto visit = [&](std::int64_t i, auto target) {
    if (selection.ignored(i)) {
      job.kd_values[i] = 0.0;
      if (job.label_values != nullptr) job.label_values[i] = 0.0;
      clear_row(job.gradient, i, selection.classes);
    } else {
      rows.visit(i, target());
    }
  };
  if (job.key == nullptr) {
    for (std::int64_t i = begin; i < end; ++i) visit(i, [&] { return rows.teacher(i); });
  } else {
    TargetRows<T>::visit(job.teacher, selection, *job.key, scratch.after(KDRows<T>::kScratchRows), begin, end,
                         [&](std::int64_t i, const T* target) { visit(i, [&] { return target; }); });
  }
}

}  // namespace

void kd_rows(const KDJob& job, std::int64_t begin, std::int64_t end) {
  if (is_double(job.student.dtype)) {
    kd_rows_as<double>(job, begin, end);
  } else {
    kd_rows_as<float>(job, begin, end);
  }
}

}  // namespace ban_fast::BAN_FAST_ISA
