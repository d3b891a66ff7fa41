// Where a row's logits are while a team works on it: in registers, in shared memory, or where they came from.
//
// A source gives its threads their Elements, each(use), as often as they are wanted; kHeld ones have read each logit
// once, and know the heights after that. kTeacher: there is a teacher's row beside the student's.
#pragma once

#include "logits.cuh"
#include "permute.cuh"

namespace ban_fast::cuda {

// -inf where there is no class.
template <class T, int V>
struct Elements {
  T z[V], t[V];
  Positions at;
};

template <class T, int V>
BAN_FAST_DEVICE void find_heights(const Elements<T, V>& e, bool in_float, Heights<T>& heights) {
  BAN_FAST_UNROLL
  for (int v = 0; v < V; ++v) {
    const T t = in_float ? T(float(e.t[v])) : e.t[v];
    if (heights.teacher.value < t) heights.teacher = {t, e.at[v]};
    heights.student = larger(heights.student, e.z[v]);
  }
}

template <class T>
BAN_FAST_DEVICE Heights<T> no_heights() {
  return {{negative_infinity<T>(), 0}, negative_infinity<T>()};
}

// V classes of the teacher's row, permuted.
template <class T, int V>
BAN_FAST_DEVICE void read_permuted(const LogitRow& teacher, const Positions& at, const Permuter& permuter, int kept,
                                   T (&to)[V]) {
  const Words<V> sources = permuter.sources<V>(at, kept);
  with_teacher_type(teacher.dtype, [&](auto type) {
    BAN_FAST_UNROLL
    for (int v = 0; v < V; ++v) {
      to[v] = at.has(v) ? T(widen(teacher.typed(type)[sources.at[v] * teacher.stride])) : negative_infinity<T>();
    }
  });
}

// Short rows: kEach classes a thread.
template <class T, int kEach, bool kTeacher, class Team>
class RegisterRows {
 public:
  static constexpr bool kHeld = true;

  BAN_FAST_MEMBER RegisterRows(const LogitRow& student, const LogitRow& teacher, const GradientRow& gradient,
                               int classes, const Team& team)
      : teacher_(teacher), gradient_(gradient) {
    held_.at = {team.rank(), team.size(), classes};
    read(student, held_.at, held_.z);
    if constexpr (kTeacher) read(teacher, held_.at, held_.t);
  }

  BAN_FAST_MEMBER Heights<T> heights(bool in_float) const {
    Heights<T> heights = no_heights<T>();
    find_heights(held_, in_float, heights);
    return heights;
  }

  BAN_FAST_MEMBER void permute(const Permuter& permuter, int kept) {
    read_permuted(teacher_, held_.at, permuter, kept, held_.t);
  }

  template <class Use>
  BAN_FAST_MEMBER void each(Use use) const {
    use(held_);
  }
  BAN_FAST_MEMBER const GradientRow& gradient() const { return gradient_; }

 private:
  const LogitRow& teacher_;
  const GradientRow& gradient_;
  Elements<T, kEach> held_;
};

template <int V, bool kTeacher>
BAN_FAST_DEVICE Tiling<V> tiling_of(int classes, const LogitRow& student, const LogitRow& teacher,
                                    const GradientRow& gradient) {
  if constexpr (kTeacher) {
    return Tiling<V>(classes, student, teacher, gradient);
  } else {
    return Tiling<V>(classes, student, gradient);
  }
}

// Read anew each time.
template <class T, int V, bool kTeacher, class Team>
class StreamedRows {
 public:
  static constexpr bool kHeld = false;

  BAN_FAST_MEMBER StreamedRows(const LogitRow& student, const LogitRow& teacher, const GradientRow& gradient,
                               int classes, const Team& team)
      : student_(student),
        teacher_(teacher),
        gradient_(gradient),
        tiling_(tiling_of<V, kTeacher>(classes, student, teacher, gradient)),
        warps_(team) {}

  // From now on the teacher's row is permuted.
  BAN_FAST_MEMBER void permute(const Permuter& permuter, int kept) {
    permuter_ = &permuter;
    kept_ = kept;
  }

  template <class Use>
  BAN_FAST_MEMBER void each(Use use) const {
    for (int i = warps_.first; i < tiling_.count; i += warps_.step) use(tile(i));
  }
  template <class Use>
  BAN_FAST_MEMBER void each_place(Use use) const {
    for (int i = warps_.first; i < tiling_.count; i += warps_.step) use(tiling_.tile(i));
  }
  // The first tile of each warp, or with all of them the whole row.
  BAN_FAST_MEMBER Heights<T> heights(bool all, bool in_float) const {
    Heights<T> heights = no_heights<T>();
    const int end = all || tiling_.count < warps_.step ? tiling_.count : warps_.step;
    for (int i = warps_.first; i < end; i += warps_.step) find_heights(tile(i), in_float, heights);
    return heights;
  }
  BAN_FAST_MEMBER const GradientRow& gradient() const { return gradient_; }

 private:
  BAN_FAST_MEMBER Elements<T, V> tile(int i) const {
    Elements<T, V> e;
    e.at = tiling_.tile(i);
    read(student_, e.at, e.z);
    if constexpr (kTeacher) {
      if (permuter_ == nullptr) {
        read(teacher_, e.at, e.t);
      } else {
        read_permuted(teacher_, e.at, *permuter_, kept_, e.t);
      }
    }
    return e;
  }

  const LogitRow &student_, &teacher_;
  const GradientRow& gradient_;
  const Tiling<V> tiling_;
  const WarpsOf<Team> warps_;
  const Permuter* permuter_ = nullptr;
  int kept_ = 0;
};

// How the shared memory of a block holds its share of a row's tiles.
struct SharedPlan {
  int tiles_per_warp;           // slots of a warp
  int student_bytes, teacher_bytes;  // of an element; the teacher's 0 where there is none
  bool permuted;                // the teacher's row twice: as it is, and permuted
};

// Read once into the shared memory of the team's blocks. A thread's own elements lie at its own place, so only the
// permutation needs a barrier.
template <class T, int V, bool kTeacher, class Team>
class SharedRows {
 public:
  static constexpr bool kHeld = true;

  BAN_FAST_MEMBER SharedRows(const LogitRow& student, const LogitRow& teacher, const GradientRow& gradient,
                             int classes, const Team& team, const SharedPlan& plan, char* memory)
      : student_(student),
        teacher_(teacher),
        gradient_(gradient),
        tiling_(tiling_of<V, kTeacher>(classes, student, teacher, gradient)),
        warps_(team),
        z_(memory),
        t_(z_ + slots(plan) * (V * plan.student_bytes)),
        permuted_(plan.permuted ? t_ + slots(plan) * (V * plan.teacher_bytes) : t_) {
    with_student_type<T>(student_.dtype, [&](auto type) { fetch(student_, type, z_); });
    if constexpr (kTeacher) with_teacher_type(teacher_.dtype, [&](auto type) { fetch(teacher_, type, t_); });
  }

  BAN_FAST_MEMBER Heights<T> heights(bool in_float) const {
    Heights<T> heights = no_heights<T>();
    each([&](const Elements<T, V>& e) { find_heights(e, in_float, heights); });
    return heights;
  }

  // Every thread of the team has passed a barrier since it read its elements.
  BAN_FAST_MEMBER void permute(const Permuter& permuter, int kept) {
    with_teacher_type(teacher_.dtype, [&](auto type) {
      using From = decltype(type);
      for (int i = warps_.first, slot = 0; i < tiling_.count; i += warps_.step, ++slot) {
        const Positions at = tiling_.tile(i);
        const Words<V> sources = permuter.sources<V>(at, kept);
        Raw<From, V> raw;
        BAN_FAST_UNROLL
        for (int v = 0; v < V; ++v) raw.x[v] = at.has(v) ? find<From>(int(sources.at[v])) : lowest<From>();
        *place<From>(permuted_, slot, device::thread()) = raw;
      }
    });
    shown_ = permuted_;
  }

  template <class Use>
  BAN_FAST_MEMBER void each(Use use) const {
    for (int i = warps_.first, slot = 0; i < tiling_.count; i += warps_.step, ++slot) {
      Elements<T, V> e;
      e.at = tiling_.tile(i);
      with_student_type<T>(student_.dtype, [&](auto type) { show(type, z_, slot, e.z); });
      if constexpr (kTeacher) with_teacher_type(teacher_.dtype, [&](auto type) { show(type, shown_, slot, e.t); });
      use(e);
    }
  }
  BAN_FAST_MEMBER const GradientRow& gradient() const { return gradient_; }

 private:
  static BAN_FAST_MEMBER int slots(const SharedPlan& plan) { return plan.tiles_per_warp * device::threads(); }

  template <class From>
  static BAN_FAST_MEMBER Raw<From, V>* place(char* memory, int slot, int thread) {
    return reinterpret_cast<Raw<From, V>*>(memory) + (slot * device::threads() + thread);
  }

  template <class From>
  BAN_FAST_MEMBER void fetch(const LogitRow& row, From type, char* to) const {
    int slot = 0;
    BAN_FAST_UNROLL_4
    for (int i = warps_.first; i < tiling_.count; i += warps_.step) {
      *place<From>(to, slot++, device::thread()) = read<V>(row.typed(type), row.stride, tiling_.tile(i));
    }
  }

  template <class From>
  BAN_FAST_MEMBER void show(From, char* memory, int slot, T (&to)[V]) const {
    const Raw<From, V> raw = *place<From>(memory, slot, device::thread());
    BAN_FAST_UNROLL
    for (int v = 0; v < V; ++v) to[v] = T(widen(raw.x[v]));
  }

  // Class i of the teacher's row, in whichever block it is.
  template <class From>
  BAN_FAST_MEMBER From find(int i) const {
    const auto [tile, lane, v] = tiling_.place(i);
    const int block_warps = device::threads() / kWarp, slot = tile / warps_.step, warp = tile % warps_.step;
    const Raw<From, V>* raw = place<From>(t_, slot, warp % block_warps * kWarp + lane);
    return device::in_block(raw, warp / block_warps)->x[v];
  }

  const LogitRow &student_, &teacher_;
  const GradientRow& gradient_;
  const Tiling<V> tiling_;
  const WarpsOf<Team> warps_;
  char *z_, *t_, *permuted_;
  char* shown_ = t_;
};

}  // namespace ban_fast::cuda
