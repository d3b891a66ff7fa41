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
  T *exp, *excess, *difference, *label;
  double label_scale;
  bool streamed;
  Upcoming next_z, next_t;
};

struct KDSums {
  double s, a;      // of e^x, x = (t - t_r) / T, and of e^x (e^d - 1)
  double h;         // of -x e^x, where the entropy is wanted
  double largest_d;  // or kLeaping where all are smaller; a NaN may hide from it, but not from a
};

// Fills the row's exp, excess and difference. kCareful: elements where both logits are -inf count nothing, and leaping
// ones count what they are.
template <bool kCareful, bool kEntropy, class T, class Divisor>
static KDSums near_sums(const KDRow<T> row, const Divisor temperature) {
  const T z_r = row.z[row.reference], t_r = row.t[row.reference];
  const Difference<T> at_r = exact_difference(z_r, t_r);
  const Difference<Vec<T>> reference{Vec<T>(at_r.s), Vec<T>(at_r.e)};
  LaneSum<T> s, a, h;
  Vec<T> largest_d(-kInfinity<T>);
  const auto body = [&](std::int64_t i, auto tail) BAN_FAST_LAMBDA {
    const std::int64_t left = row.classes - i;
    Vec<T> z = load_some<tail>(row.z + i, left, z_r), t = load_some<tail>(row.t + i, left, t_r);
    row.next_z.prefetch(i);
    row.next_t.prefetch(i);
    [[maybe_unused]] typename Vec<T>::Mask counted;
    if constexpr (tail) counted = first_lanes<T>(left);
    if constexpr (kCareful) {
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
    const Vec<T> shifted = t - Vec<T>(t_r);
    Vec<T> p = exp_quotient(shifted, temperature);
    if constexpr (kCareful || tail) p = select(counted, p, Vec<T>(T(0)));
    Vec<T> more = excess(p, d);
    if constexpr (kCareful) {
      more = select(Vec<T>(T(kLeaping)) < d, leaping_excess(p, z - Vec<T>(z_r), temperature), more);
    }
    s.add(p);
    a.add(more);
    if constexpr (kEntropy) h.add_product(p, divide(larger(shifted, Vec<T>(temperature.floor)), temperature));
    largest_d = larger(largest_d, d);
    store(row.exp + i, p);
    store(row.excess + i, more);
    store(row.difference + i, d);
  };
  for_vectors<T>(0, row.classes, body, [&]() BAN_FAST_LAMBDA {
    s.end_block();
    a.end_block();
    if constexpr (kEntropy) h.end_block();
  });
  const Vec<T> leaping{T(kLeaping)};
  const double largest = any(leaping < largest_d) ? double(largest_lane(largest_d)) : kLeaping;
  return {s.value(), a.value(), kEntropy ? -h.value() : 0.0, largest};
}

// log S of the teacher's exponentials in the row's exp, of which S is the sum. Where the reference has most of it, S shows
// its own rounding, in fp32 that of 1, and the logarithm comes from what the other classes have.
template <class T>
static double log_exp_sum(const KDRow<T> row, double s) {
  if (!(s < 1.5)) return log_of_sum(s);
  const T peak = row.exp[row.reference];
  row.exp[row.reference] = T(0);
  LaneSum<T> others;
  for_vectors<T>(
      0, row.classes, [&](std::int64_t i, auto) BAN_FAST_LAMBDA { others.add(load(row.exp + i)); },
      [&]() BAN_FAST_LAMBDA { others.end_block(); });
  row.exp[row.reference] = peak;
  return log1p(others.value());
}

// What a vector of classes adds to the divergence, and to the gradient before its scale.
template <class T>
struct Share {
  Vec<T> divergence, gradient;
};

// The sum over the row of what share(i, tail) adds to the divergence, and the gradient, unless To is NoGradient. One
// that is streamed to where no vector begins is laid aside first, in the row's exp: sums keep the order of the row.
template <bool kLabel, class T, class To, class ShareOf>
BAN_FAST_HD double gather(const KDRow<T> row, double scale, To* gradient, ShareOf share) {
  const Vec<T> kd(static_cast<T>(scale)), label(static_cast<T>(row.label_scale));
  bool aside = false;
  if constexpr (!std::is_same_v<To, NoGradient>) aside = row.streamed && unaligned_head<T>(gradient) != 0;
  LaneSum<T> divergence;
  const auto body = [&](std::int64_t i, auto tail) BAN_FAST_LAMBDA {
    const Share<T> own = share(i, tail);
    divergence.add(own.divergence);
    if constexpr (!std::is_same_v<To, NoGradient>) {
      Vec<T> g = own.gradient * kd;
      if constexpr (kLabel) g = madd(load(row.label + i), label, g);
      if (aside) {
        store(row.exp + i, g);
      } else {
        put<tail>(gradient + i, g, row.classes - i, row.streamed);
      }
    }
  };
  for_vectors<T>(0, row.classes, body, [&]() BAN_FAST_LAMBDA { divergence.end_block(); });
  if constexpr (!std::is_same_v<To, NoGradient>) {
    const auto laid = [&](std::int64_t i) BAN_FAST_LAMBDA { return load(row.exp + i); };
    if (aside) write_row<T>(gradient, row.classes, true, laid);
  }
  return divergence.value();
}

// KL by the difference form, and the gradient.
template <bool kLabel, class T, class To>
static double near_gradient(const KDRow<T> row, double s, const NearRow<T> near, double kd_scale, To* gradient) {
  const double inverse = 1.0 / s;
  const Vec<T> log_mass(near.log_mass), exp_neg(near.exp_neg), expm1_neg(near.expm1_neg);
  const auto share = [&](std::int64_t i, auto) BAN_FAST_LAMBDA -> Share<T> {
    const Apart<Vec<T>> apart = near_apart(load(row.exp + i), load(row.excess + i), load(row.difference + i), log_mass,
                                           exp_neg, expm1_neg);
    return {divergence_term(apart), apart.minus_p};
  };
  return inverse * gather<kLabel>(row, kd_scale * inverse, gradient, share);
}

// KL by log-sum-exp, and the gradient: where student and teacher are far apart, or one of them alone is -inf. The
// teacher's exponentials, whose sum is s, are in the row's exp; the student's go where the excess was.
template <bool kLabel, class T, class To>
static double far_gradient(const KDRow<T> row, double s, const Temperature<T> temperature, double kd_scale,
                           To* gradient) {
  const Vec<T> lowest(-kInfinity<T>);
  const Vec<T> z_max(row_maximum(row.z, row.classes)), t_max(row.t[row.reference]);
  LaneSum<T> q_sum;
  const auto sum_body = [&](std::int64_t i, auto tail) BAN_FAST_LAMBDA {
    const Vec<T> z = load_some<tail>(row.z + i, row.classes - i, -kInfinity<T>);
    const Vec<T> q = exp_quotient(z - z_max, temperature);
    q_sum.add(q);
    store(row.excess + i, q);
  };
  for_vectors<T>(0, row.classes, sum_body, [&]() BAN_FAST_LAMBDA { q_sum.end_block(); });

  const double s_q = q_sum.value();
  const Vec<T> q_scale(T(1 / s_q)), p_scale(T(1 / s)), log_ratio(T(log_of_sum(s) - log_of_sum(s_q)));
  const auto share = [&](std::int64_t i, auto tail) BAN_FAST_LAMBDA -> Share<T> {
    const std::int64_t left = row.classes - i;
    const Vec<T> z = load_some<tail>(row.z + i, left, -kInfinity<T>);
    const Vec<T> t = load_some<tail>(row.t + i, left, -kInfinity<T>);
    const Vec<T> q = load(row.excess + i) * q_scale, p = load(row.exp + i) * p_scale;
    const Vec<T> log_exps = divide((z - z_max) - (t - t_max), temperature);
    const Apart<Vec<T>> apart{p, q - p, select(z == lowest, lowest, log_exps + log_ratio)};
    return {far_term(q, apart), apart.minus_p};
  };
  return gather<kLabel>(row, kd_scale, gradient, share);
}

// Takes rows through the stages of the loss, up to kMostRowsAtOnce together.
template <class T>
class KDRows {
 public:
  static int scratch_rows(std::int64_t classes) { return kBuffers * rows_at_once(classes); }

  KDRows(const KDJob& job, const ScratchRows<T>& scratch, std::int64_t end)
      : job_(job),
        scratch_(scratch),
        temperature_(job.temperature),
        most_(rows_at_once(job.selection.classes)),
        end_(end) {}

  // Row i, which counts, against `target`, or the teacher's row where that is null. Done at once or by flush().
  void add(std::int64_t i, const T* target) {
    const Selection& selection = job_.selection;
    const std::int64_t classes = selection.classes, next = next_row(selection, i, end_);
    const int buffers = kBuffers * count_;
    KDRow<T>& row = rows_[count_];
    numbers_[count_++] = i;
    row.z = fetch_row(job_.student, i, classes, scratch_.row(buffers));
    row.t = target != nullptr ? target
                              : fetch_row(job_.teacher, selection.teacher_row(i), classes, scratch_.row(buffers + 1));
    row.classes = classes;
    row.reference = row_peak(row.t, classes).index;
    row.exp = scratch_.row(buffers + 2);
    row.excess = scratch_.row(buffers + 3);
    row.difference = scratch_.row(buffers + 4);
    row.label = scratch_.row(buffers + 5);
    row.streamed = job_.gradient.streamed;
    row.next_z = Upcoming(job_.student, next);
    row.next_t = Upcoming(job_.teacher, selection.teacher_row(next));
    if (count_ == most_) flush();
  }

  void flush() {
    KDSums sums[kMostRowsAtOnce];
    double s[kMostRowsAtOnce] = {}, a[kMostRowsAtOnce] = {};
    if (job_.label_values != nullptr) {
      for (int k = 0; k < count_; ++k) take_label(k);
    }
    for (int k = 0; k < count_; ++k) {
      sums[k] = row_sums(rows_[k]);
      s[k] = sums[k].s;
      a[k] = sums[k].a;
    }
    const NearRow<Vec<double>> near = near_row(load(s), load(a));
    double log_mass[kMostRowsAtOnce], exp_neg[kMostRowsAtOnce], expm1_neg[kMostRowsAtOnce];
    store(log_mass, near.log_mass);
    store(exp_neg, near.exp_neg);
    store(expm1_neg, near.expm1_neg);
    for (int k = 0; k < count_; ++k) {
      const NearRow<T> scalars{T(log_mass[k]), T(exp_neg[k]), T(expm1_neg[k])};
      double divergence = 0.0, entropy = 0.0;
      if (job_.entropy) entropy = sums[k].h / sums[k].s + log_exp_sum(rows_[k], sums[k].s);
      with_gradient_row<T>(job_.gradient, numbers_[k], job_.selection.classes, [&](auto* gradient) BAN_FAST_LAMBDA {
        divergence = distil(rows_[k], sums[k], scalars, gradient);
      });
      divergence += entropy;
      job_.kd_values[numbers_[k]] = divergence;
    }
    count_ = 0;
  }

 private:
  static constexpr int kBuffers = 6;

  void take_label(int k) {
    KDRow<T>& row = rows_[k];
    const auto fetch_next = [&](std::int64_t i) BAN_FAST_LAMBDA { row.next_z.prefetch(i); };
    const LabelRow label = label_row(row.z, row.classes, job_.selection.labels[numbers_[k]], fetch_next, row.label);
    job_.label_values[numbers_[k]] = label.loss;
    row.label_scale = job_.label_scale / label.total;
  }

  KDSums row_sums(const KDRow<T>& row) const {
    constexpr UnitTemperature<T> unit;
    const bool is_unit = job_.temperature == 1.0;
    KDSums sums;
    if (job_.entropy) {
      sums = is_unit ? near_sums<false, true>(row, unit) : near_sums<false, true>(row, temperature_);
    } else {
      sums = is_unit ? near_sums<false, false>(row, unit) : near_sums<false, false>(row, temperature_);
    }
    return is_leaping(sums.largest_d, sums.s, sums.a) ? near_sums<true, true>(row, temperature_) : sums;
  }

  template <class To>
  double distil(const KDRow<T>& row, const KDSums& sums, const NearRow<T>& scalars, To* gradient) const {
    if constexpr (std::is_same_v<To, NoGradient>) {
      return distil_as<false>(row, sums, scalars, gradient);
    } else {
      const bool with_label = job_.label_values != nullptr && job_.label_scale != 0;
      // A term without weight is left out: 0 times its NaN would be NaN.
      if (job_.kd_scale != 0) {
        return with_label ? distil_as<true>(row, sums, scalars, gradient)
                          : distil_as<false>(row, sums, scalars, gradient);
      }
      const Vec<T> label_scale(static_cast<T>(row.label_scale));
      const double divergence = distil_as<false>(row, sums, scalars, static_cast<NoGradient*>(nullptr));
      write_row<T>(gradient, row.classes, row.streamed, [&](std::int64_t i) BAN_FAST_LAMBDA {
        return with_label ? load(row.label + i) * label_scale : Vec<T>(T(0));
      });
      return divergence;
    }
  }

  template <bool kLabel, class To>
  double distil_as(const KDRow<T>& row, const KDSums& sums, const NearRow<T>& scalars, To* gradient) const {
    return is_near(sums.largest_d, sums.s, sums.a)
               ? near_gradient<kLabel>(row, sums.s, scalars, job_.kd_scale, gradient)
               : far_gradient<kLabel>(row, sums.s, temperature_, job_.kd_scale, gradient);
  }

  const KDJob& job_;
  const ScratchRows<T>& scratch_;
  const Temperature<T> temperature_;
  const int most_;
  const std::int64_t end_;
  int count_ = 0;
  KDRow<T> rows_[kMostRowsAtOnce];
  std::int64_t numbers_[kMostRowsAtOnce];
};

template <class T>
void kd_rows_as(const KDJob& job, std::int64_t begin, std::int64_t end) {
  const Selection& selection = job.selection;
  const std::int64_t classes = selection.classes;
  const bool permuted = job.key != nullptr;
  const int own = KDRows<T>::scratch_rows(classes);
  const ScratchRows<T> scratch(classes, own + (permuted ? TargetRows<T>::scratch_rows(classes) : 0),
                               permuted ? TargetRows<T>::scratch_words(classes) : 0);
  KDRows<T> rows(job, scratch, end);
  for (std::int64_t i = begin; i < end; ++i) {
    if (!selection.ignored(i)) {
      if (!permuted) rows.add(i, nullptr);
      continue;
    }
    job.kd_values[i] = 0.0;
    if (job.label_values != nullptr) job.label_values[i] = 0.0;
    clear_row(job.gradient, i, classes);
  }
  if (permuted) {
    TargetRows<T> targets(job.teacher, selection, *job.key, scratch.after(own));
    targets.visit(begin, end, [&](std::int64_t i, const T* target) { rows.add(i, target); }, [&] { rows.flush(); });
  }
  rows.flush();
  end_streaming();
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
