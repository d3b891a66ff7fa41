// KD's and DKPP's kernels, one launch for loss, terms and gradient, and which of them takes a row of how many classes.
#pragma once

#include "distill.cuh"
#include "losses.h"
#include "plan.cuh"

namespace ban_fast::cuda {

inline constexpr int kShortThreads = 128;
inline constexpr int kLongThreads = 256;
// Blocks that a multiprocessor's registers must have room for: 128 of them a thread, 255 in fp64.
template <class T>
inline constexpr int kShortBlocks = sizeof(T) == sizeof(float) ? 4 : 2;
template <class T>
inline constexpr int kLongBlocks = sizeof(T) == sizeof(float) ? 2 : 1;

// Takes the rows first, first + step, ... with what `distil` makes of a sound one.
template <class T, class Team, class Distil>
BAN_FAST_DEVICE void distill_rows(const DistillTask<T>& task, Team& team, Mailbox* mail, std::int64_t first,
                                  std::int64_t step, std::uint32_t* keys, int lane, int lanes, Distil distil) {
  const Slopes slopes(task, mail);
  const int classes = int(task.selection.classes);
  RowLoss sums{0.0, 0.0};
  for (std::int64_t row = first; row < task.selection.rows; row += step) {
    const RowState state = row_state(task.selection, task.teacher.rows, row);
    const GradientRow gradient(task.gradient, task.student.dtype, row, classes);
    RowLoss terms{0.0, 0.0};
    if (state.sound) {
      const LogitRow student(task.student, row), teacher(task.teacher, state.teacher_row);
      auto rows = distil(student, teacher, gradient);
      if (task.permuting.wanted) {
        const Permuter permuter(task.permuting, row, keys, lane, lanes, team);
        terms = distill_row(task, rows, team, &permuter, student, teacher, slopes, state);
      } else {
        terms = distill_row(task, rows, team, nullptr, student, teacher, slopes, state);
      }
    } else {
      clear_row<T>(gradient, classes, team);
    }
    if (team.is_leader()) end_row(task.ending, state, row, terms, sums);
  }
  team.sync_all();  // of a cluster, no block ends while another may read from it
  end_batch(task.ending, sums, slopes.each, mail);
}

// Rows in registers: several to a warp, or one to each,
template <class T, int kLanes, int kEach>
BAN_FAST_KERNEL(kShortThreads, kShortBlocks<T>) distill_lanes(BAN_FAST_TASK(DistillTask<T>) task) {
  Mailbox* const mail = reinterpret_cast<Mailbox*>(device::shared_memory());
  LaneTeam<kLanes> team;
  constexpr int kTeams = kShortThreads / kLanes;
  const int number = device::thread() / kLanes;
  std::uint32_t* const keys = reinterpret_cast<std::uint32_t*>(mail + 1) + number * Permuter::kKeys;
  distill_rows(task, team, mail, std::int64_t(device::block()) * kTeams + number,
               std::int64_t(device::blocks()) * kTeams, keys, team.rank(), kLanes,
               [&](const LogitRow& student, const LogitRow& teacher, const GradientRow& gradient) {
                 return RegisterRows<T, kEach, true, LaneTeam<kLanes>>(student, teacher, gradient,
                                                                       int(task.selection.classes), team);
               });
}

// or one to a block.
template <class T, int kEach>
BAN_FAST_KERNEL(kShortThreads, kShortBlocks<T>) distill_block(BAN_FAST_TASK(DistillTask<T>) task) {
  Mailbox* const mail = reinterpret_cast<Mailbox*>(device::shared_memory());
  BlockTeam<false> team(mail);
  distill_rows(task, team, mail, device::block(), device::blocks(), mail->keys, device::thread(), device::threads(),
               [&](const LogitRow& student, const LogitRow& teacher, const GradientRow& gradient) {
                 return RegisterRows<T, kEach, true, BlockTeam<false>>(student, teacher, gradient,
                                                                       int(task.selection.classes), team);
               });
}

// Rows in the shared memory of a cluster's blocks.
template <class T, int V>
BAN_FAST_KERNEL(kLongThreads, kLongBlocks<T>) distill_shared(BAN_FAST_TASK(DistillTask<T>) task) {
  Mailbox* const mail = reinterpret_cast<Mailbox*>(device::shared_memory());
  BlockTeam<true> team(mail);
  const int blocks = team.blocks();
  distill_rows(task, team, mail, device::block() / blocks, device::blocks() / blocks, mail->keys, device::thread(),
               device::threads(), [&](const LogitRow& student, const LogitRow& teacher, const GradientRow& gradient) {
                 return SharedRows<T, V, true, BlockTeam<true>>(student, teacher, gradient,
                                                                int(task.selection.classes), team, task.shared,
                                                                reinterpret_cast<char*>(mail + 1));
               });
}

// Rows that are read twice.
template <class T, int V>
BAN_FAST_KERNEL(kLongThreads, kLongBlocks<T>) distill_streamed(BAN_FAST_TASK(DistillTask<T>) task) {
  Mailbox* const mail = reinterpret_cast<Mailbox*>(device::shared_memory());
  BlockTeam<false> team(mail);
  distill_rows(task, team, mail, device::block(), device::blocks(), mail->keys, device::thread(), device::threads(),
               [&](const LogitRow& student, const LogitRow& teacher, const GradientRow& gradient) {
                 return StreamedRows<T, V, true, BlockTeam<false>>(student, teacher, gradient,
                                                                   int(task.selection.classes), team);
               });
}

template <class T, int kLanes, int kEach>
void launch_lanes(const DistillTask<T>& task, const Launch& launch) {
  constexpr int kTeams = kShortThreads / kLanes;
  const int blocks = blocks_for(task.selection.rows, kTeams);
  const int bytes = int(sizeof(Mailbox)) + kTeams * Permuter::kKeys * int(sizeof(std::uint32_t));
  device::launch(distill_lanes<T, kLanes, kEach>, {blocks, kShortThreads, bytes}, launch.stream, task);
}

template <class T, int kEach>
void launch_block(const DistillTask<T>& task, const Launch& launch) {
  const int blocks = blocks_for(task.selection.rows, 1), threads = threads_for(task.selection.classes, kEach);
  device::launch(distill_block<T, kEach>, {blocks, threads, int(sizeof(Mailbox))}, launch.stream, task);
}

// False where no cluster of this device can hold the row.
template <class T, int V>
bool try_shared(DistillTask<T>& task, const Launch& launch) {
  const RowBytes row{task.selection.classes, V, element_bytes(task.student.dtype), element_bytes(task.teacher.dtype),
                     task.permuting.wanted};
  const SharedGrid held = plan_shared(row, task.selection.rows, launch.device, distill_shared<T, V>);
  if (!held.fits) return false;
  task.shared = held.plan;
  device::launch(distill_shared<T, V>, held.grid, launch.stream, task);
  return true;
}

template <class T, int V>
void launch_streamed(const DistillTask<T>& task, const Launch& launch) {
  const int blocks = blocks_for(task.selection.rows, 1);
  device::launch(distill_streamed<T, V>, {blocks, kLongThreads, int(sizeof(Mailbox))}, launch.stream, task);
}

// By what they are compiled for, a file each.
void launch_short(const DistillTask<float>& task, const Launch& launch);       // classes <= kMostShort
bool try_shared_single(DistillTask<float>& task, const Launch& launch);        // fp32 students
bool try_shared_half(DistillTask<float>& task, const Launch& launch);          // fp16 and bf16 students
void launch_streamed_single(const DistillTask<float>& task, const Launch& launch);
void launch_double(const DistillTask<double>& task, const Launch& launch);

inline constexpr int kMostShort = 1024;

}  // namespace ban_fast::cuda
