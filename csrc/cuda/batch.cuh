// What every loss kernel does around its rows: which of them count, what a mean is divided by, and the batch's sums,
// which the last block to finish adds up.
#pragma once

#include "logits.cuh"

namespace ban_fast::cuda {

// Where a loss and its terms go (one value each, or one a row), and what adding them up takes.
template <class T>
struct Ending {
  T *loss, *kd, *label;
  bool by_row;  // nothing is added up
  bool has_labels;
  bool with_kd, with_label;  // a term without weight is left out of the loss: it may be infinite
  double kd_weight, label_weight;
  double* partials;        // [2, blocks]
  std::uint32_t* counter;  // 0 between launches
};

struct RowState {
  bool kept;   // not ignored
  bool sound;  // kept, and with no index out of range
  int label;
  std::int64_t teacher_row;
};

// Nothing of an ignored row is looked at.
BAN_FAST_DEVICE RowState row_state(const Selection& selection, std::int64_t teacher_rows, std::int64_t row) {
  RowState state{true, true, 0, row};
  if (selection.labels != nullptr) {
    const std::int64_t label = selection.labels[row];
    state.kept = label != selection.ignore_index;
    state.sound = state.kept && label >= 0 && label < selection.classes;
    if (state.sound) state.label = int(label);
  }
  if (state.sound && selection.teacher_rows != nullptr) {
    state.teacher_row = selection.teacher_rows[row];
    state.sound = state.teacher_row >= 0 && state.teacher_row < teacher_rows;
  }
  return state;
}

// The number of rows kept among first, first + step, ..., added up over a block.
BAN_FAST_DEVICE double count_kept(const Selection& selection, std::int64_t first, std::int64_t step, Mailbox* mail) {
  Totals<float, 1> kept{{0.0}, 0.0f};
  for (std::int64_t row = first; row < selection.rows; row += step) {
    kept.sums[0] += selection.labels[row] != selection.ignore_index ? 1.0 : 0.0;
  }
  BlockTeam<false>(mail).total(kept);
  device::sync_block();  // the mailbox is free again
  return kept.sums[0];
}

// The sum of what each of so many blocks has left, added up by a block in one order.
template <int N>
BAN_FAST_DEVICE Totals<float, N> sum_of_blocks(const double* partials, int blocks, Mailbox* mail) {
  Totals<float, N> all{};
  for (int i = device::thread(); i < blocks; i += device::threads()) {
    BAN_FAST_UNROLL
    for (int n = 0; n < N; ++n) all.sums[n] += device::load_shared_by_blocks(partials + n * blocks + i);
  }
  BlockTeam<false>(mail).total(all);
  device::sync_block();
  return all;
}

// What a mean is divided by: the rows kept, at least 1. Counted here, or before by `count_blocks` blocks.
BAN_FAST_DEVICE double kept_rows(const Selection& selection, const double* counts, int count_blocks, Mailbox* mail) {
  if (selection.labels == nullptr) return selection.rows < 1 ? 1.0 : double(selection.rows);
  const double kept = counts != nullptr ? sum_of_blocks<1>(counts, count_blocks, mail).sums[0]
                                        : count_kept(selection, device::thread(), device::threads(), mail);
  return kept < 1.0 ? 1.0 : kept;
}

// The power of two that an f16 gradient below `bound` is stored times, and its inverse: with bound < 2^(e - 126), e its
// biased exponent, bound * 2^(141 - e) stays below 2^15, and fp16 ends at 65504.
struct HalfScale {
  float up, down;

  BAN_FAST_MEMBER explicit HalfScale(double bound) {
    std::uint32_t exponent = (bits_of(float(bound)) >> 23) & 0xffu;
    exponent = lesser(greater(exponent, 15u), 253u);
    up = from_bits((268u - exponent) << 23);
    down = from_bits((exponent - 14u) << 23);
  }
};

// Nothing comes from a row that is not sound.
template <class T, class Team>
BAN_FAST_DEVICE void clear_row(const GradientRow& gradient, int classes, const Team& team) {
  if (gradient.data == nullptr) return;
  if constexpr (Team::kWarps) {
    constexpr int V = 16 / sizeof(T);
    const Tiling<V> tiling(classes, gradient);
    const T nothing[V] = {};
    const WarpsOf<Team> warps(team);
    for (int i = warps.first; i < tiling.count; i += warps.step) gradient.write(tiling.tile(i), nothing);
  } else {
    const T nothing[1] = {};
    for (int i = team.rank(); i < classes; i += team.size()) gradient.write(Positions{i, 1, classes}, nothing);
  }
}

struct RowLoss {
  double kd, label;
};

template <class T>
BAN_FAST_DEVICE double loss_of(const Ending<T>& ending, const RowLoss& terms) {
  return (ending.with_kd ? ending.kd_weight * terms.kd : 0.0) +
         (ending.with_label ? ending.label_weight * terms.label : 0.0);
}

// A row's terms: 0 where it is ignored, NaN where an index is out of range.
template <class T>
BAN_FAST_DEVICE void end_row(const Ending<T>& ending, const RowState& state, std::int64_t row, RowLoss terms,
                             RowLoss& sums) {
  if (!state.sound) terms.kd = terms.label = state.kept ? double(NAN) : 0.0;
  if (!ending.has_labels) terms.label = 0.0;
  if (ending.by_row) {
    ending.loss[row] = T(loss_of(ending, terms));
    ending.kd[row] = T(terms.kd);
    ending.label[row] = T(terms.label);
  } else {
    sums.kd += terms.kd;
    sums.label += terms.label;
  }
}

// The batch's terms are `each` times the sums over all blocks' threads.
template <class T>
BAN_FAST_DEVICE void end_batch(const Ending<T>& ending, const RowLoss& mine, double each, Mailbox* mail) {
  if (ending.by_row) return;
  const int blocks = device::blocks();
  device::sync_block();
  Totals<float, 2> sums{{mine.kd, mine.label}, 0.0f};
  BlockTeam<false>(mail).total(sums);
  if (blocks > 1) {
    if (device::thread() == 0) {
      ending.partials[device::block()] = sums.sums[0];
      ending.partials[blocks + device::block()] = sums.sums[1];
      device::fence();
      mail->is_last = device::count_up(ending.counter) == std::uint32_t(blocks - 1) ? 1u : 0u;
      device::fence();
    }
    device::sync_block();
    if (mail->is_last == 0) return;
    sums = sum_of_blocks<2>(ending.partials, blocks, mail);
    if (device::thread() == 0) *ending.counter = 0;
  }
  if (device::thread() != 0) return;
  const RowLoss terms{sums.sums[0] * each, sums.sums[1] * each};
  *ending.loss = T(loss_of(ending, terms));
  *ending.kd = T(terms.kd);
  *ending.label = T(terms.label);
}

}  // namespace ban_fast::cuda
