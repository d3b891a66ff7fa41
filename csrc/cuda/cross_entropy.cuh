// CWTM on a device: the batch's confidences, and cross-entropy weighted by them.
#pragma once

#include "label_row.cuh"
#include "plan.cuh"

namespace ban_fast::cuda {

// A batch's confidences: their sum, or from logarithms the sum of exp(log c - top); top is the largest.
struct Confidences {
  double top, sum;
  bool log;
};

BAN_FAST_DEVICE void combine(Confidences& mine, const Confidences& other) {
  const double top = larger(mine.top, other.top);
  if (mine.log) {
    constexpr UnitTemperature<double> one;
    mine.sum = mine.sum * exp_quotient(mine.top - top, one) + other.sum * exp_quotient(other.top - top, one);
  } else {
    mine.sum += other.sum;
  }
  mine.top = top;
}

BAN_FAST_DEVICE Confidences exchange(std::uint32_t lanes, const Confidences& mine, int bits) {
  return {device::exchange(lanes, mine.top, bits), device::exchange(lanes, mine.sum, bits), mine.log};
}

BAN_FAST_DEVICE Confidences no_confidences(bool log) { return {log ? below_all<double>() : 0.0, 0.0, log}; }

// Where a row's confidence is.
struct ConfidenceSource {
  const float* given;         // c by the teacher's row, this far apart; or null
  std::int64_t stride, rows;  // of the teacher
  const double* logs;         // else log c by the student's row

  BAN_FAST_MEMBER double of(const RowState& state, std::int64_t row) const {
    return given != nullptr ? double(given[state.teacher_row * stride]) : logs[row];
  }
};

// Of the rows first, first + step, ... of a block's threads.
BAN_FAST_DEVICE Confidences sum_confidences(const ConfidenceSource& source, const Selection& selection,
                                            std::int64_t first, std::int64_t step, Mailbox* mail) {
  Confidences all = no_confidences(source.given == nullptr);
  for (std::int64_t row = first; row < selection.rows; row += step) {
    const RowState state = row_state(selection, source.rows, row);
    if (!state.sound) continue;
    const double c = source.of(state, row);
    combine(all, {c, source.given == nullptr ? 1.0 : c, source.given == nullptr});
  }
  BlockTeam<false>(mail).total(all);
  device::sync_block();
  return all;
}

template <class T>
struct CrossEntropyTask {
  Matrix student;
  Selection selection;
  ConfidenceSource confidence;
  const T* normalizer;   // stands for the sum; or null
  const double* totals;  // [2, total_blocks] tops and sums, added up before; or null
  int total_blocks;
  void* gradient;
  float* grad_scale;
  Ending<T> ending;
  SharedPlan shared;
};

// A row's weight is w = c / sum, or from its logarithm exp(log c - top) / sum.
struct Weights {
  double top = 0.0, inverse = 1.0, up = 1.0;
  bool log;

  template <class T>
  BAN_FAST_MEMBER Weights(const CrossEntropyTask<T>& task, Mailbox* mail) : log(task.confidence.given == nullptr) {
    Confidences all = no_confidences(log);
    if (task.normalizer == nullptr || task.grad_scale != nullptr) {
      if (task.totals != nullptr) {
        for (int i = device::thread(); i < task.total_blocks; i += device::threads()) {
          combine(all, {device::load_shared_by_blocks(task.totals + i),
                        device::load_shared_by_blocks(task.totals + task.total_blocks + i), log});
        }
        BlockTeam<false>(mail).total(all);
        device::sync_block();
      } else {
        all = sum_confidences(task.confidence, task.selection, device::thread(), device::threads(), mail);
      }
    }
    if (task.normalizer == nullptr) {
      top = log ? all.top : 0.0;
      inverse = 1.0 / all.sum;
    } else {
      inverse = 1.0 / double(*task.normalizer);
    }
    if (task.grad_scale == nullptr) return;
    const HalfScale scale(magnitude(of(all.top)));
    up = double(scale.up);
    if (device::block() == 0 && device::thread() == 0) *task.grad_scale = scale.down;
  }

  BAN_FAST_MEMBER double of(double confidence) const {
    return (log ? exp_quotient(confidence - top, UnitTemperature<double>{}) : confidence) * inverse;
  }
};

template <class T, class Rows, class Team>
BAN_FAST_DEVICE double cross_entropy_row(const Rows& rows, Team& team, const LogitRow& student, int y, double slope) {
  const Totals<T, 1> others = exp_sum<T>(rows, team, UnitTemperature<T>{}, y);
  const LabelTerm<T> label(others.sums[0], others.largest, student.at<T>(y), y, slope);
  if (rows.gradient().data == nullptr) return label.loss;
  rows.each([&](const auto& e) {
    constexpr int kCount = int(sizeof(e.z) / sizeof(T));
    T gradient[kCount];
    BAN_FAST_UNROLL
    for (int v = 0; v < kCount; ++v) gradient[v] = label.gradient(e.z[v], e.at[v]);
    rows.gradient().write(e.at, gradient);
  });
  return label.loss;
}

// Takes the rows first, first + step, ...; source(student, gradient) is a row where the team reads it.
template <class T, class Team, class Source>
BAN_FAST_DEVICE void cross_entropy_rows(const CrossEntropyTask<T>& task, Team& team, Mailbox* mail, std::int64_t first,
                                        std::int64_t step, Source source) {
  const Weights weights(task, mail);
  const int classes = int(task.selection.classes);
  RowLoss sums{0.0, 0.0};
  for (std::int64_t row = first; row < task.selection.rows; row += step) {
    const RowState state = row_state(task.selection, task.confidence.rows, row);
    const GradientRow gradient(task.gradient, task.student.dtype, row, classes);
    RowLoss terms{0.0, 0.0};
    if (state.sound) {
      const LogitRow student(task.student, row);
      const double weight = weights.of(task.confidence.of(state, row));
      const auto rows = source(student, gradient);
      const double loss = cross_entropy_row<T>(rows, team, student, state.label, weight * weights.up);
      terms.label = weight == 0.0 ? 0.0 : weight * loss;
    } else {
      clear_row<T>(gradient, classes, team);
    }
    if (team.is_leader()) end_row(task.ending, state, row, terms, sums);
  }
  team.sync_all();
  sums.kd = 0.0;
  end_batch(task.ending, sums, 1.0, mail);
}

}  // namespace ban_fast::cuda
