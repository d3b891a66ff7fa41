// The threads that work on one row together: some lanes of a warp, a block, or a cluster of blocks.
//
// A team has rank() and size() of its threads, sync(), and total(item), which combines what its threads have: every
// thread gets the same bits, since that is done in one order, whatever the scheduling.
#pragma once

#include "device.cuh"
#include "../row_math.h"

namespace ban_fast::cuda {

using namespace ban_fast::BAN_FAST_ISA;

inline constexpr int kWarp = 32;

template <class T>
BAN_FAST_DEVICE T negative_infinity() {
  return -T(HUGE_VAL);
}

// A largest value and its lowest class.
template <class T>
struct Peak {
  T value;
  int index;

  BAN_FAST_MEMBER void take(T other, int other_index) {
    if (value < other || (value == other && other_index < index)) {
      value = other;
      index = other_index;
    }
  }
};

// What a team finds out about its row in one go: sums, and a largest value of each kind.
template <class T, int N>
struct Totals {
  double sums[N];
  T largest;
};

template <class T, int N>
BAN_FAST_DEVICE void combine(Totals<T, N>& mine, const Totals<T, N>& other) {
  BAN_FAST_UNROLL
  for (int i = 0; i < N; ++i) mine.sums[i] += other.sums[i];
  mine.largest = larger(mine.largest, other.largest);
}

template <class T, int N>
BAN_FAST_DEVICE Totals<T, N> exchange(std::uint32_t lanes, const Totals<T, N>& mine, int bits) {
  Totals<T, N> other;
  BAN_FAST_UNROLL
  for (int i = 0; i < N; ++i) other.sums[i] = device::exchange(lanes, mine.sums[i], bits);
  other.largest = device::exchange(lanes, mine.largest, bits);
  return other;
}

// The teacher's peak, and the student's largest logit.
template <class T>
struct Heights {
  Peak<T> teacher;
  T student;
};

template <class T>
BAN_FAST_DEVICE void combine(Heights<T>& mine, const Heights<T>& other) {
  mine.teacher.take(other.teacher.value, other.teacher.index);
  mine.student = larger(mine.student, other.student);
}

template <class T>
BAN_FAST_DEVICE Heights<T> exchange(std::uint32_t lanes, const Heights<T>& mine, int bits) {
  return {{device::exchange(lanes, mine.teacher.value, bits), device::exchange(lanes, mine.teacher.index, bits)},
          device::exchange(lanes, mine.student, bits)};
}

template <int kLanes, class Item>
BAN_FAST_DEVICE void combine_lanes(std::uint32_t lanes, Item& item) {
  BAN_FAST_UNROLL
  for (int bits = kLanes / 2; bits > 0; bits /= 2) combine(item, exchange(lanes, item, bits));
}

// kLanes neighbouring lanes of a warp.
template <int kLanes>
class LaneTeam {
 public:
  static constexpr bool kWarps = kLanes == kWarp;  // whether it is whole warps

  BAN_FAST_MEMBER LaneTeam()
      : rank_(device::thread() % kLanes),
        lanes_((kLanes == kWarp ? ~0u : (1u << (kLanes % kWarp)) - 1) << (device::thread() % kWarp - rank_)) {}

  BAN_FAST_MEMBER int rank() const { return rank_; }
  BAN_FAST_MEMBER int size() const { return kLanes; }
  BAN_FAST_MEMBER bool is_leader() const { return rank_ == 0; }
  BAN_FAST_MEMBER void sync() const { device::sync_lanes(lanes_); }
  BAN_FAST_MEMBER void sync_all() const { sync(); }

  template <class Item>
  BAN_FAST_MEMBER void total(Item& item) {
    combine_lanes<kLanes>(lanes_, item);
  }

 private:
  int rank_;
  std::uint32_t lanes_;
};

inline constexpr int kMostWarps = 8;
inline constexpr int kSlotBytes = 64;  // of the largest item that is combined

// What a block needs of its shared memory to combine items: two sets in turn, so that none is overwritten while it is
// read.
struct alignas(16) Mailbox {
  char slots[2][kMostWarps][kSlotBytes];
  char block[2][kSlotBytes];  // the block's total, for the other blocks of a cluster
  std::uint32_t keys[2 * kSwapRounds];
  std::uint32_t is_last;
};

// A block's threads, or with kCluster those of a cluster.
template <bool kCluster>
class BlockTeam {
 public:
  static constexpr bool kWarps = true;

  BAN_FAST_MEMBER explicit BlockTeam(Mailbox* mail)
      : mail_(mail),
        blocks_(kCluster ? device::cluster_blocks() : 1),
        block_(kCluster ? device::cluster_rank() : 0) {}

  BAN_FAST_MEMBER int rank() const { return block_ * device::threads() + device::thread(); }
  BAN_FAST_MEMBER int size() const { return blocks_ * device::threads(); }
  BAN_FAST_MEMBER int blocks() const { return blocks_; }
  BAN_FAST_MEMBER int block() const { return block_; }
  BAN_FAST_MEMBER bool is_leader() const { return rank() == 0; }
  BAN_FAST_MEMBER void sync() const { device::sync_block(); }
  BAN_FAST_MEMBER void sync_all() const {
    if (kCluster && blocks_ > 1) {
      device::sync_cluster();
    } else {
      device::sync_block();
    }
  }

  template <class Item>
  BAN_FAST_MEMBER void total(Item& item) {
    static_assert(sizeof(Item) <= kSlotBytes);
    const int warp = device::thread() / kWarp, warps = device::threads() / kWarp, set = turn_;
    turn_ ^= 1;
    combine_lanes<kWarp>(~0u, item);
    if (device::thread() % kWarp == 0) *reinterpret_cast<Item*>(mail_->slots[set][warp]) = item;
    device::sync_block();
    item = *reinterpret_cast<const Item*>(mail_->slots[set][0]);
    for (int i = 1; i < warps; ++i) combine(item, *reinterpret_cast<const Item*>(mail_->slots[set][i]));
    if (!kCluster || blocks_ == 1) return;
    if (device::thread() == 0) *reinterpret_cast<Item*>(mail_->block[set]) = item;
    device::sync_cluster();
    item = *reinterpret_cast<const Item*>(device::in_block(mail_->block[set], 0));
    for (int i = 1; i < blocks_; ++i) {
      combine(item, *reinterpret_cast<const Item*>(device::in_block(mail_->block[set], i)));
    }
  }

 private:
  Mailbox* mail_;
  int blocks_, block_;
  int turn_ = 0;
};

// Which tiles of a row a warp of a team takes: first, first + step, ...
template <class Team>
struct WarpsOf {
  int first, step;

  BAN_FAST_MEMBER explicit WarpsOf(const Team& team) : first(team.rank() / kWarp), step(team.size() / kWarp) {
    static_assert(Team::kWarps);
  }
};

}  // namespace ban_fast::cuda
