// DKPP's targets and its permutation on their own; its loss is KD's (kd.cu).
#include "label_row.cuh"
#include "losses.h"
#include "plan.cuh"

namespace ban_fast::cuda {
namespace {

constexpr int kThreads = 256;

Permuting permuting(const Key& key, std::int64_t classes) {
  return {true, key.seed, key.step, key.step_at, key.sample_ids, FeistelShape(std::uint32_t(classes - 1))};
}

template <class T>
struct TargetsTask {
  Matrix teacher;
  Selection selection;
  Permuting permuting;
  Temperature<T> temperature;
  T* targets;
};

template <class T>
BAN_FAST_KERNEL(kThreads, 2) target_rows(BAN_FAST_TASK(TargetsTask<T>) task) {
  constexpr int V = 16 / sizeof(T);
  Mailbox* const mail = reinterpret_cast<Mailbox*>(device::shared_memory());
  BlockTeam<false> team(mail);
  const int classes = int(task.selection.classes);
  const DType dtype = sizeof(T) == sizeof(double) ? DType::f64 : DType::f32;
  for (std::int64_t row = device::block(); row < task.selection.rows; row += device::blocks()) {
    const RowState state = row_state(task.selection, task.teacher.rows, row);
    const LogitRow teacher(task.teacher, state.sound ? state.teacher_row : 0);
    const GradientRow targets(task.targets, dtype, row, classes);
    if (!state.sound) {
      for (int i = device::thread(); i < classes; i += device::threads()) task.targets[row * classes + i] = T(NAN);
      continue;
    }
    const StreamedRows<T, V, false, BlockTeam<false>> rows(teacher, teacher, targets, classes, team);
    Heights<T> heights = no_heights<T>();  // the class kept is the largest in fp32
    rows.each([&](const auto& e) {
      BAN_FAST_UNROLL
      for (int v = 0; v < V; ++v) {
        const T t = T(float(e.z[v]));
        if (heights.teacher.value < t) heights.teacher = {t, e.at[v]};
      }
    });
    team.total(heights);
    const Totals<T, 1> sum = exp_sum<T>(rows, team, task.temperature, -1);
    const T scale = T(1.0 / sum.sums[0]);
    const Permuter permuter(task.permuting, row, mail->keys, device::thread(), device::threads(), team);
    rows.each_place([&](const Positions& at) {
      T x[V];
      read_permuted(teacher, at, permuter, heights.teacher.index, x);
      BAN_FAST_UNROLL
      for (int v = 0; v < V; ++v) x[v] = exp_quotient(x[v] - sum.largest, task.temperature) * scale;
      targets.write(at, x);
    });
  }
}

template <class T>
void launch_targets(const Matrix& teacher, const Selection& selection, const Key& key, double temperature,
                    void* targets, void* stream) {
  device::launch(target_rows<T>, {blocks_for(selection.rows, 1), kThreads, int(sizeof(Mailbox))}, stream,
                 TargetsTask<T>{teacher, selection, permuting(key, selection.classes), Temperature<T>(temperature),
                                static_cast<T*>(targets)});
}

struct PermutationTask {
  const std::int64_t* argmax;
  std::int64_t rows, classes;
  Permuting permuting;
  std::int64_t* sources;
};

BAN_FAST_KERNEL(kThreads, 2) permutation_rows(BAN_FAST_TASK(PermutationTask) task) {
  constexpr int V = 4;
  Mailbox* const mail = reinterpret_cast<Mailbox*>(device::shared_memory());
  const BlockTeam<false> team(mail);
  const int classes = int(task.classes);
  for (std::int64_t row = device::block(); row < task.rows; row += device::blocks()) {
    const Permuter permuter(task.permuting, row, mail->keys, device::thread(), device::threads(), team);
    const int kept = int(task.argmax[row]);
    for (int first = device::thread(); first < classes; first += V * device::threads()) {
      const Positions at{first, device::threads(), classes};
      const Words<V> sources = permuter.sources<V>(at, kept);
      BAN_FAST_UNROLL
      for (int v = 0; v < V; ++v) {
        if (at.has(v)) task.sources[row * task.classes + at[v]] = std::int64_t(sources.at[v]);
      }
    }
  }
}

}  // namespace

void dkpp_targets(const Matrix& teacher, const Selection& selection, const Key& key, double temperature, void* targets,
                  const Launch& launch) {
  const device::Guard guard(launch.device);
  if (is_double(teacher.dtype)) {
    launch_targets<double>(teacher, selection, key, temperature, targets, launch.stream);
  } else {
    launch_targets<float>(teacher, selection, key, temperature, targets, launch.stream);
  }
}

void dkpp_permutation(const std::int64_t* argmax, std::int64_t rows, std::int64_t classes, const Key& key,
                      std::int64_t* sources, const Launch& launch) {
  const device::Guard guard(launch.device);
  device::launch(permutation_rows, {blocks_for(rows, 1), kThreads, int(sizeof(Mailbox))}, launch.stream,
                 PermutationTask{argmax, rows, classes, permuting(key, classes), sources});
}

}  // namespace ban_fast::cuda
