// The gradients of the norms of norm.cuh. With g = dy · weight and normed = (x - mean) · rstd:
//   dx = rstd · (g - mean(g) - normed · mean(g · normed)),   dweight = Σ dy · normed,   dbias = Σ dy   over rows.
// Blocks walk over the rows and keep their share of the sums; each writes one row of partial sums, and a second kernel
// adds those up in a fixed order. A row of x and dy stays in registers while its means are taken.

#pragma once

#include "norm.cuh"

namespace pykern {

struct NormBackwardArgs {
  Rows dy;
  Rows x;
  Rows dsummed;  // data is null without one
  NormParameters parameters;
  const float* mean;  // (rows,); not read for RMSNorm
  const float* rstd;  // (rows,)
  float* projections;  // (rows, 2), where a block sees only part of a row
  void* dx;            // (rows, n), or null: not wanted
  float* dweight;      // (gridDim.x, n) partial sums, or null: not wanted
  float* dbias;        // likewise
  int64_t rows;
  int n;
  int team;
};

// What dx has along the normalised row, and of its level.
struct Projections {
  float along = 0, level = 0;
};

// Adds a pack's share to the row's sums of g · normed, g and normed, where g = grad · factor.
template <bool kCentred, int kWidth>
__device__ void add_to_sums(
    const float (&grad)[kWidth], const float (&factor)[kWidth], const float (&normed)[kWidth],
    float (&sums)[kCentred ? 3 : 1]) {
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    const float g = grad[j] * factor[j];
    sums[0] = fmaf(g, normed[j], sums[0]);
    if constexpr (kCentred) {
      sums[1] += g;
      sums[2] += normed[j];
    }
  }
}

// From those sums. The last one is not quite zero where the mean of x is large.
template <bool kCentred>
__device__ Projections project(const float (&sums)[kCentred ? 3 : 1], int n) {
  const float count = elements(n);
  Projections p;
  p.along = __fdiv_rn(sums[0], count);
  if constexpr (kCentred) {
    const float level = __fdiv_rn(sums[1], count), shift = __fdiv_rn(sums[2], count);
    p.along -= shift * level;
    p.level = level - shift * p.along;
  }
  return p;
}

template <class T, int kWidth>
__device__ void load_any_factor(const NormParameters& parameters, int column, float (&out)[kWidth]) {
  if (parameters.wide) load_factor<float>(parameters, column, out);
  else load_factor<T>(parameters, column, out);
}

constexpr int kBackwardThreads = 512;

// Where threads of norm_backward keep their share of dweight and dbias: shared memory is for rows whose sums do not fit
// into registers, but do fit there.
enum class SumsIn { registers, shared };

// With prefetch of the next row, two 16-byte packs are what registers hold beside the sums; without the sums and the
// prefetch, six.
PYKERN_ANYWHERE constexpr int backward_packs(SumsIn where, int width) {
  return where == SumsIn::shared ? 6 : width > 1 ? 2 : 8;
}

template <int kWidth, int kPacks>
struct RegisterSums {
  float sums[kPacks][kWidth] = {};

  __device__ explicit RegisterSums(float*) {}
  __device__ void add(int k, const float (&terms)[kWidth]) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sums[k][j] += terms[j];
  }
  __device__ void get(int k, float (&out)[kWidth]) const {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) out[j] = sums[k][j];
  }
};

// Numbers of each thread in shared memory, kPacks of kWidth. They stand in slots of up to 16 bytes, neighbouring
// threads' slots side by side, so that no bank is asked twice at a time.
template <int kWidth, int kPacks>
class SharedArray {
 public:
  __device__ explicit SharedArray(float* memory) : slots_(memory + threadIdx.x * kStep) {}
  static __device__ int size() { return kPacks * kWidth * blockDim.x; }

  __device__ void load(int k, float (&out)[kWidth]) const {
#pragma unroll
    for (int i = 0; i < kWidth; i += kStep) {
      float part[kStep];
      load_floats(slots_ + (k * kWidth + i) * blockDim.x, part);
#pragma unroll
      for (int j = 0; j < kStep; ++j) out[i + j] = part[j];
    }
  }
  __device__ void store(int k, const float (&values)[kWidth]) {
#pragma unroll
    for (int i = 0; i < kWidth; i += kStep) {
      float part[kStep];
#pragma unroll
      for (int j = 0; j < kStep; ++j) part[j] = values[i + j];
      store_floats(slots_ + (k * kWidth + i) * blockDim.x, part);
    }
  }

 private:
  static constexpr int kStep = kWidth == 1 ? 1 : 4;
  float* slots_;
};

template <int kWidth, int kPacks>
struct SharedSums {
  SharedArray<kWidth, kPacks> sums;

  __device__ explicit SharedSums(float* memory) : sums(memory) {
    const float zeros[kWidth] = {};
    for (int k = 0; memory && k < kPacks; ++k) sums.store(k, zeros);
  }
  __device__ void add(int k, const float (&terms)[kWidth]) {
    float values[kWidth];
    sums.load(k, values);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) values[j] += terms[j];
    sums.store(k, values);
  }
  __device__ void get(int k, float (&out)[kWidth]) const { sums.load(k, out); }
};

// A thread's part of one row of x and dy, as it came; nothing is loaded for a row that is not there.
template <class T, bool kCentred, int kWidth, int kPacks>
struct BackwardPart {
  Pack<T, kWidth> x[kPacks], dy[kPacks];
  float mean = 0, rstd = 0;

  __device__ void load(const NormBackwardArgs& a, int64_t row, const int (&columns)[kPacks]) {
    if (row >= a.rows) return;
    const T* const x_row = row_of<const T>(a.x, row);
    const T* const dy_row = row_of<const T>(a.dy, row);
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (columns[k] >= a.n) continue;
      x[k] = load_pack<kWidth>(x_row + columns[k]);
      dy[k] = load_pack<kWidth>(dy_row + columns[k]);
    }
    if constexpr (kCentred) mean = a.mean[row];
    rstd = a.rstd[row];
  }

  __device__ void read(int k, float (&normed)[kWidth], float (&grad)[kWidth]) const {
    widen(x[k], normed);
    widen(dy[k], grad);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) normed[j] = (kCentred ? normed[j] - mean : normed[j]) * rstd;
  }
};

// Writes a block's sums to its row of the partial sums; where it has several teams, added up in their order.
template <int kWidth, int kPacks, class Sums>
__device__ void store_partial(
    const Sums& sums, float* partials, int n, const int (&columns)[kPacks], const Team& team, float* memory) {
  float* const partial = partials + static_cast<int64_t>(blockIdx.x) * n;
  const int teams = blockDim.x / team.size;
  float* const to = teams > 1 ? memory + team.index * n : partial;
  if (teams > 1) __syncthreads();  // others may still use the memory
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    if (columns[k] >= n) continue;
    float values[kWidth];
    sums.get(k, values);
    store_floats(to + columns[k], values);
  }
  if (teams == 1) return;
  __syncthreads();
  for (int column = threadIdx.x; column < n; column += blockDim.x) {
    float total = 0;
    for (int t = 0; t < teams; ++t) total += memory[t * n + column];
    partial[column] = total;
  }
}

// Blocks of whole teams walk over the rows, gridDim.x blocks side by side. Where rows are too long for a team, a block
// has one team that sees the blockIdx.y-th part of each row, and is given the projections.
template <class T, bool kCentred, int kWidth, SumsIn kSumsIn>
__global__ void __launch_bounds__(kBackwardThreads) norm_backward(const NormBackwardArgs a) {
  constexpr bool kInShared = kSumsIn == SumsIn::shared;
  constexpr int kPacks = backward_packs(kSumsIn, kWidth);
  using Sums = std::conditional_t<kInShared, SharedSums<kWidth, kPacks>, RegisterSums<kWidth, kPacks>>;
  Team team(a.team);
  float* const memory = dynamic_shared<float>();
  const int teams = blockDim.x / team.size;
  const int64_t tiles = (a.rows + teams - 1) / teams;
  int columns[kPacks];
#pragma unroll
  for (int k = 0; k < kPacks; ++k)
    columns[k] = (team.thread + (static_cast<int>(blockIdx.y) * kPacks + k) * team.size) * kWidth;

  Sums dweight(a.dweight ? memory : nullptr);
  Sums dbias(a.dbias ? memory + (a.dweight ? SharedArray<kWidth, kPacks>::size() : 0) : nullptr);
  // Registers hold the sums and shared memory the weight; or it holds the sums, and the weight is read each time.
  SharedArray<kWidth, kPacks> factors(memory);
  if constexpr (!kInShared) {
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (columns[k] >= a.n) continue;
      float factor[kWidth];
      load_any_factor<T>(a.parameters, columns[k], factor);
      factors.store(k, factor);
    }
  }
  using Part = BackwardPart<T, kCentred, kWidth, kPacks>;
  Part next;
  next.load(a, static_cast<int64_t>(blockIdx.x) * teams + team.index, columns);

  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t row = tile * teams + team.index;
    const bool live = row < a.rows;
    const Part part = next;
    if constexpr (!kInShared) next.load(a, row + static_cast<int64_t>(gridDim.x) * teams, columns);

    const bool passes = a.dx && a.dsummed.data && live;
    const T* const dsummed = passes ? row_of<const T>(a.dsummed, row) : nullptr;
    Pack<T, kWidth> passed[kPacks];
    if (!kInShared && passes) {
#pragma unroll
      for (int k = 0; k < kPacks; ++k)
        if (columns[k] < a.n) passed[k] = load_pack<kWidth>(dsummed + columns[k]);
    }

    float sums[kCentred ? 3 : 1] = {};
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (!live || columns[k] >= a.n) continue;
      float normed[kWidth], grad[kWidth], share[kWidth];
      part.read(k, normed, grad);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) share[j] = grad[j] * normed[j];
      if (a.dweight) dweight.add(k, share);
      if (a.dbias) dbias.add(k, grad);
      float factor[kWidth];
      if constexpr (kInShared) load_any_factor<T>(a.parameters, columns[k], factor);
      else factors.load(k, factor);
      add_to_sums<kCentred>(grad, factor, normed, sums);
    }
    if (a.dx) {
      Projections projections;
      if (a.projections) {
        projections = {a.projections[2 * row], a.projections[2 * row + 1]};
      } else {
        sum_over_team(sums, team);
        projections = project<kCentred>(sums, a.n);
      }
      T* const dx = static_cast<T*>(a.dx) + row * a.n;
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        if (!live || columns[k] >= a.n) continue;
        float normed[kWidth], grad[kWidth], factor[kWidth], extra[kWidth] = {};
        part.read(k, normed, grad);
        if constexpr (kInShared) load_any_factor<T>(a.parameters, columns[k], factor);
        else factors.load(k, factor);
        if (passes) {
          if constexpr (kInShared) passed[k] = load_pack<kWidth>(dsummed + columns[k]);
          widen(passed[k], extra);
        }
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          const float g = grad[j] * factor[j] - projections.level;
          grad[j] = fmaf(fmaf(-normed[j], projections.along, g), part.rstd, extra[j]);
        }
        store_pack(dx + columns[k], narrow<T, kWidth>(grad));
      }
    }
    if constexpr (kInShared) next.load(a, row + static_cast<int64_t>(gridDim.x) * teams, columns);
  }

  if (a.dweight) store_partial<kWidth>(dweight, a.dweight, a.n, columns, team, memory);
  if (a.dbias) store_partial<kWidth>(dbias, a.dbias, a.n, columns, team, memory);
}

constexpr int kProjectionBatch = 2;

// The projections of rows that no block holds as a whole: a block each, which reads x and dy once.
template <class T, bool kCentred, int kWidth>
__global__ void __launch_bounds__(kBackwardThreads) norm_projections(const NormBackwardArgs a) {
  Team team(blockDim.x);
  const int64_t row = blockIdx.x;
  float sums[kCentred ? 3 : 1] = {};
  const int step = blockDim.x * kWidth;
  for (int first = threadIdx.x * kWidth; first < a.n; first += kProjectionBatch * step) {
    BackwardPart<T, kCentred, kWidth, kProjectionBatch> part;
    int columns[kProjectionBatch];
#pragma unroll
    for (int k = 0; k < kProjectionBatch; ++k) columns[k] = first + k * step;
    part.load(a, row, columns);
#pragma unroll
    for (int k = 0; k < kProjectionBatch; ++k) {
      if (columns[k] >= a.n) continue;
      float normed[kWidth], grad[kWidth], factor[kWidth];
      part.read(k, normed, grad);
      load_any_factor<T>(a.parameters, columns[k], factor);
      add_to_sums<kCentred>(grad, factor, normed, sums);
    }
  }
  sum_over_team(sums, team);
  const Projections projections = project<kCentred>(sums, a.n);
  if (threadIdx.x == 0) {
    a.projections[2 * row] = projections.along;
    a.projections[2 * row + 1] = projections.level;
  }
}

struct PartialSums {
  const float* partials;  // (programs, n)
  void* total;            // (n,)
};

// A block sums 32 columns, whole lines of the partial sums. 16 warps: there are a few hundred partial sums, and each
// thread has a handful of loads in flight.
constexpr int kReduceColumns = 32;
constexpr int kReduceGroups = 16;

// Grid: columns, and one or both of the gradients.
template <class P>
__global__ void __launch_bounds__(kReduceColumns* kReduceGroups)
    norm_reduce(const PartialSums first, const PartialSums second, int programs, int n) {
  const PartialSums which = blockIdx.y == 0 ? first : second;
  PYKERN_SHARED(sums, float[kReduceGroups][kReduceColumns]);
  const int lane = threadIdx.x % kReduceColumns, group = threadIdx.x / kReduceColumns;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kReduceColumns + lane;
  float sum = 0;
  if (column < n) {
#pragma unroll 4
    for (int p = group; p < programs; p += kReduceGroups) sum += which.partials[static_cast<int64_t>(p) * n + column];
  }
  sums[group][lane] = sum;
  __syncthreads();
  if (group > 0 || column >= n) return;
#pragma unroll
  for (int g = 1; g < kReduceGroups; ++g) sum += sums[g][lane];
  store_pack(static_cast<P*>(which.total) + column, narrow<P, 1>({sum}));
}

}  // namespace pykern
