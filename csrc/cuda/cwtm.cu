// CWTM on a device: one launch with the confidences known; from the teacher's logits one before it.
#include "cross_entropy.cuh"

#include "losses.h"

namespace ban_fast::cuda {
namespace {

constexpr int kShortThreads = 128;
constexpr int kLongThreads = 256;
constexpr int kMostShort = 1024;

// ---- The batch's confidences -------------------------------------------------------------------------------------

struct TeacherTask {
  Matrix teacher;
  Selection selection;
  bool by_label;  // p of the label, not the largest
  double* logs;   // [rows] log c
};

// log c of the rows first, first + step, ...
template <class T, class Team>
BAN_FAST_DEVICE void teacher_rows(const TeacherTask& task, Team& team, std::int64_t first, std::int64_t step) {
  constexpr int V = sizeof(T) == sizeof(double) ? 2 : 4;
  const int classes = int(task.selection.classes);
  for (std::int64_t row = first; row < task.selection.rows; row += step) {
    const RowState state = row_state(task.selection, task.teacher.rows, row);
    if (!state.sound) continue;
    const LogitRow teacher(task.teacher, state.teacher_row);
    const GradientRow none(nullptr, DType::f32, 0, 0);
    const StreamedRows<T, V, false, Team> rows(teacher, teacher, none, classes, team);
    const Totals<T, 1> sum = exp_sum<T>(rows, team, UnitTemperature<T>{}, -1);
    const double above = task.by_label ? double(teacher.at<T>(state.label)) - double(sum.largest) : 0.0;
    if (team.is_leader()) task.logs[row] = above - log_of_sum(sum.sums[0]);
  }
}

template <class T>
BAN_FAST_KERNEL(kLongThreads, 2) teacher_by_warps(BAN_FAST_TASK(TeacherTask) task) {
  LaneTeam<kWarp> team;
  const int warps = device::threads() / kWarp;
  teacher_rows<T>(task, team, std::int64_t(device::block()) * warps + device::thread() / kWarp,
                  std::int64_t(device::blocks()) * warps);
}

template <class T>
BAN_FAST_KERNEL(kLongThreads, 2) teacher_by_blocks(BAN_FAST_TASK(TeacherTask) task) {
  BlockTeam<false> team(reinterpret_cast<Mailbox*>(device::shared_memory()));
  teacher_rows<T>(task, team, device::block(), device::blocks());
}

template <class T>
void launch_teacher(const TeacherTask& task, void* stream) {
  const std::int64_t rows = task.selection.rows;
  if (task.selection.classes <= kMostShort) {
    device::launch(teacher_by_warps<T>, {blocks_for(rows, kLongThreads / kWarp), kLongThreads}, stream, task);
  } else {
    device::launch(teacher_by_blocks<T>, {blocks_for(rows, 1), kLongThreads, int(sizeof(Mailbox))}, stream, task);
  }
}

struct TotalTask {
  ConfidenceSource confidence;
  Selection selection;
  double* totals;  // [2, blocks]
};

BAN_FAST_KERNEL(kLongThreads, 2) add_up_confidences(BAN_FAST_TASK(TotalTask) task) {
  Mailbox* const mail = reinterpret_cast<Mailbox*>(device::shared_memory());
  const Confidences all = sum_confidences(
      task.confidence, task.selection, std::int64_t(device::block()) * device::threads() + device::thread(),
      std::int64_t(device::blocks()) * device::threads(), mail);
  if (device::thread() == 0) {
    task.totals[device::block()] = all.top;
    task.totals[device::blocks() + device::block()] = all.sum;
  }
}

// ---- The loss ----------------------------------------------------------------------------------------------------

template <class T, int kLanes, int kEach>
BAN_FAST_KERNEL(kShortThreads, 4) cross_entropy_lanes(BAN_FAST_TASK(CrossEntropyTask<T>) task) {
  Mailbox* const mail = reinterpret_cast<Mailbox*>(device::shared_memory());
  LaneTeam<kLanes> team;
  constexpr int kTeams = kShortThreads / kLanes;
  cross_entropy_rows(task, team, mail, std::int64_t(device::block()) * kTeams + device::thread() / kLanes,
                     std::int64_t(device::blocks()) * kTeams,
                     [&](const LogitRow& student, const GradientRow& gradient) {
                       return RegisterRows<T, kEach, false, LaneTeam<kLanes>>(student, student, gradient,
                                                                              int(task.selection.classes), team);
                     });
}

template <class T, int kEach>
BAN_FAST_KERNEL(kShortThreads, 4) cross_entropy_block(BAN_FAST_TASK(CrossEntropyTask<T>) task) {
  Mailbox* const mail = reinterpret_cast<Mailbox*>(device::shared_memory());
  BlockTeam<false> team(mail);
  cross_entropy_rows(task, team, mail, device::block(), device::blocks(),
                     [&](const LogitRow& student, const GradientRow& gradient) {
                       return RegisterRows<T, kEach, false, BlockTeam<false>>(student, student, gradient,
                                                                              int(task.selection.classes), team);
                     });
}

template <class T, int V>
BAN_FAST_KERNEL(kLongThreads, 3) cross_entropy_shared(BAN_FAST_TASK(CrossEntropyTask<T>) task) {
  Mailbox* const mail = reinterpret_cast<Mailbox*>(device::shared_memory());
  BlockTeam<true> team(mail);
  const int blocks = team.blocks();
  cross_entropy_rows(task, team, mail, device::block() / blocks, device::blocks() / blocks,
                     [&](const LogitRow& student, const GradientRow& gradient) {
                       return SharedRows<T, V, false, BlockTeam<true>>(student, student, gradient,
                                                                       int(task.selection.classes), team, task.shared,
                                                                       reinterpret_cast<char*>(mail + 1));
                     });
}

template <class T, int V>
BAN_FAST_KERNEL(kLongThreads, 2) cross_entropy_streamed(BAN_FAST_TASK(CrossEntropyTask<T>) task) {
  Mailbox* const mail = reinterpret_cast<Mailbox*>(device::shared_memory());
  BlockTeam<false> team(mail);
  cross_entropy_rows(task, team, mail, device::block(), device::blocks(),
                     [&](const LogitRow& student, const GradientRow& gradient) {
                       return StreamedRows<T, V, false, BlockTeam<false>>(student, student, gradient,
                                                                          int(task.selection.classes), team);
                     });
}

template <class T, int kLanes, int kEach>
void launch_lanes(const CrossEntropyTask<T>& task, void* stream) {
  const int blocks = blocks_for(task.selection.rows, kShortThreads / kLanes);
  device::launch(cross_entropy_lanes<T, kLanes, kEach>, {blocks, kShortThreads, int(sizeof(Mailbox))}, stream, task);
}

template <class T, int V>
void launch_streamed(const CrossEntropyTask<T>& task, void* stream) {
  const int blocks = blocks_for(task.selection.rows, 1);
  device::launch(cross_entropy_streamed<T, V>, {blocks, kLongThreads, int(sizeof(Mailbox))}, stream, task);
}

template <int V>
bool try_shared(CrossEntropyTask<float>& task, const Launch& launch) {
  const RowBytes row{task.selection.classes, V, element_bytes(task.student.dtype), 0, false};
  const SharedGrid held = plan_shared(row, task.selection.rows, launch.device, cross_entropy_shared<float, V>);
  if (!held.fits) return false;
  task.shared = held.plan;
  device::launch(cross_entropy_shared<float, V>, held.grid, launch.stream, task);
  return true;
}

void launch_loss(CrossEntropyTask<float>& task, const Launch& launch) {
  const std::int64_t classes = task.selection.classes;
  if (classes <= 16) return launch_lanes<float, 4, 4>(task, launch.stream);
  if (classes <= 128) return launch_lanes<float, 32, 4>(task, launch.stream);
  if (classes <= kMostShort) {
    constexpr int kEach = kMostShort / kShortThreads;
    const int blocks = blocks_for(task.selection.rows, 1), threads = threads_for(classes, kEach);
    return device::launch(cross_entropy_block<float, kEach>, {blocks, threads, int(sizeof(Mailbox))}, launch.stream,
                          task);
  }
  const bool held = task.student.dtype == DType::f32 ? try_shared<4>(task, launch) : try_shared<8>(task, launch);
  if (!held) launch_streamed<float, 4>(task, launch.stream);
}

void launch_loss(CrossEntropyTask<double>& task, const Launch& launch) {
  if (task.selection.classes <= 128) return launch_lanes<double, 32, 4>(task, launch.stream);
  launch_streamed<double, 2>(task, launch.stream);
}

// Rows whose confidences every block adds up itself, from the cache, so that a launch is saved.
constexpr std::int64_t kAddedByAll = 4096;

template <class T>
void weigh_and_launch(const Matrix& student, const Matrix* teacher, const Matrix* confidence, const void* normalizer,
                      bool by_label, const Selection& selection, const LossResult& result, const Launch& launch) {
  double* const totals = launch.scratch + 2 * kMostBlocks;
  double* const logs = launch.scratch + kScratch;
  ConfidenceSource source{nullptr, 0, 0, logs};
  if (confidence != nullptr) {
    source = {static_cast<const float*>(confidence->data), confidence->row_stride, confidence->rows, nullptr};
  } else {
    source.rows = teacher->rows;
    launch_teacher<T>({*teacher, selection, by_label, logs}, launch.stream);
  }
  CrossEntropyTask<T> task{
      .student = student,
      .selection = selection,
      .confidence = source,
      .normalizer = static_cast<const T*>(normalizer),
      .totals = nullptr,
      .total_blocks = 0,
      .gradient = result.gradient,
      .grad_scale = result.gradient != nullptr && student.dtype == DType::f16 ? result.grad_scale : nullptr,
      .ending = {static_cast<T*>(result.loss), static_cast<T*>(result.kd), static_cast<T*>(result.label), false, true,
                 false, true, 0.0, 1.0, launch.scratch, launch.counter},
      .shared = {},
  };
  if (selection.rows > kAddedByAll && (normalizer == nullptr || task.grad_scale != nullptr)) {
    task.totals = totals;
    task.total_blocks = std::min(blocks_for(selection.rows, 4 * kLongThreads), kMostCounters);
    device::launch(add_up_confidences, {task.total_blocks, kLongThreads, int(sizeof(Mailbox))}, launch.stream,
                   TotalTask{source, selection, totals});
  }
  launch_loss(task, launch);
}

}  // namespace

void cwtm(const Matrix& student, const Matrix* teacher, const Matrix* confidence, const void* normalizer, bool by_label,
          const Selection& selection, const LossResult& result, const Launch& launch) {
  const device::Guard guard(launch.device);
  if (is_double(student.dtype)) {
    weigh_and_launch<double>(student, teacher, confidence, normalizer, by_label, selection, result, launch);
  } else {
    weigh_and_launch<float>(student, teacher, confidence, normalizer, by_label, selection, result, launch);
  }
}

}  // namespace ban_fast::cuda
