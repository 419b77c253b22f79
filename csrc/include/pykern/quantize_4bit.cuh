// Quantising to 4 bits, code for code as the references do: so products, quotients and sums round one by one, and
// comparisons let NaN through where torch's do.
//
// Bound by memory, so a weight is read once: a thread holds eight neighbours, a team of threads finds what is greatest
// among them, and each thread stores its four bytes of codes.

#pragma once

#include "code_tables.h"
#include "weight4bit.cuh"

namespace pykern {

constexpr int kPerThread = kWordCodes;  // elements

// Zeros beyond `there`.
template <class T>
__device__ __forceinline__ void load_some(const T* from, int64_t there, float (&out)[kPerThread]) {
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) out[i] = i < there ? Element<T>::widen(from[i]) : 0.f;
}

// Magnitudes compare as integers, and NaN is above all of them: the greatest is NaN where there is one.
__device__ __forceinline__ unsigned magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

__device__ __forceinline__ unsigned greatest_of_lanes(unsigned value, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2)
    value = max(value, __shfl_xor_sync(kFullWarp, value, distance));
  return value;
}

// Blocks of NF4 and FP4.

struct QuantizeBlocksArgs {
  const void* weight;
  int64_t count;
  int blocksize;  // a power of two from 32 to kQuantizeThreads * kPerThread
  Codebook book;
  uint8_t* codes;
  float* absmax;
};

constexpr int kQuantizeThreads = 512;  // that hold the largest block
constexpr float kSmallestAbsmax = 1e-38f;  // below it there is no finite inverse

// The code whose value is nearest; halfway it is the lower value's, and NaN has the highest. Two middles come from the
// lanes that keep one each; all lanes of a warp must ask together.
class NearestCode {
 public:
  __device__ __forceinline__ explicit NearestCode(const Codebook& book)
      : own_(book.middle[min(static_cast<int>(threadIdx.x % 16), 14)]),
        first_(book.middle[7]), low_(book.middle[3]), high_(book.middle[11]), codes_(0) {
#pragma unroll
    for (int i = 0; i < 16; ++i) codes_ |= static_cast<unsigned long long>(book.code[i]) << 4 * i;
  }

  __device__ __forceinline__ unsigned of(float x) const {
    const bool upper = above(x, first_);
    int place = upper ? 11 : 3;
    place += above(x, upper ? high_ : low_) ? 2 : -2;
    place += above(x, __shfl_sync(kFullWarp, own_, place, 16)) ? 1 : -1;
    place += above(x, __shfl_sync(kFullWarp, own_, place, 16)) ? 1 : 0;
    return static_cast<unsigned>(codes_ >> 4 * place) & 15u;
  }

 private:
  static __device__ __forceinline__ bool above(float x, float middle) { return !(x <= middle); }

  float own_, first_, low_, high_;
  unsigned long long codes_;
};

// Stores the bytes of eight codes from an even element on, of which `there` are the weight's.
__device__ __forceinline__ void store_codes(uint8_t* to, unsigned word, int64_t there) {
  if (there >= kPerThread) {
    *reinterpret_cast<unsigned*>(to) = word;
  } else {
#pragma unroll
    for (int i = 0; i < kPerThread / 2; ++i)
      if (2 * i < there) to[i] = static_cast<uint8_t>(word >> 8 * i);
  }
}

// Grid: a block for each kQuantizeThreads * kPerThread elements. __grid_constant__ lets lanes index the code book where
// the arguments lie, not in a copy in local memory.
template <class T>
__global__ void __launch_bounds__(kQuantizeThreads) quantize_4bit(const __grid_constant__ QuantizeBlocksArgs a) {
  PYKERN_SHARED(greatest, unsigned[kQuantizeThreads / kWarp]);
  const int thread = static_cast<int>(threadIdx.x), team = a.blocksize / kPerThread;
  const int64_t first = (int64_t{blockIdx.x} * kQuantizeThreads + thread) * kPerThread, there = a.count - first;
  const T* const from = static_cast<const T*>(a.weight) + first;
  float values[kPerThread];
  if (there >= kPerThread) load_floats(from, values);
  else load_some(from, there, values);

  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) bits = max(bits, magnitude(values[i]));
  bits = greatest_of_lanes(bits, min(team, kWarp));
  if (team > kWarp) {
    if (thread % kWarp == 0) greatest[thread / kWarp] = bits;
    __syncthreads();
    const int warps = team / kWarp, first_warp = thread / team * warps;
    for (int w = 0; w < warps; ++w) bits = max(bits, greatest[first_warp + w]);
  }

  // A short last block has a scale that can divide, and is divided by it.
  float absmax = __uint_as_float(bits);
  const bool whole = first / a.blocksize < a.count / a.blocksize;
  const float divisor = absmax < kSmallestAbsmax ? kSmallestAbsmax : absmax;
  if (!whole) absmax = divisor;
  const float inverse = __fdiv_rn(1.f, divisor);
  const NearestCode nearest(a.book);
  unsigned word = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    float scaled = whole ? __fmul_rn(values[i], inverse) : __fdiv_rn(values[i], divisor);
    if (i >= there) scaled = 0;  // the odd count's last nibble is zero's, whatever the block
    word |= nearest.of(scaled) << code_shift(i);
  }
  if (there <= 0) return;
  if (thread % team == 0) a.absmax[first / a.blocksize] = absmax;
  store_codes(a.codes + first / 2, word, there);
}

// Groups of int4.

struct QuantizeGroupsArgs {
  const void* weight;
  int64_t count, columns, blocksize;
  int64_t groups;  // of a row
  int64_t all_groups;
  bool symmetric;
  uint8_t* codes;
  void* scales;
  DType scale_type;
  uint8_t* zero_points;
  int team;  // threads that share a group: a power of two up to a warp
};

// Stores a scale, and returns it as it is stored.
__device__ __forceinline__ float store_scale(const QuantizeGroupsArgs& a, int64_t group, float scale, bool stores) {
  const auto as = [&](auto type) {
    using S = decltype(type);
    const S stored = Element<S>::narrow(scale);
    if (stores) static_cast<S*>(a.scales)[group] = stored;
    return Element<S>::widen(stored);
  };
  if (a.scale_type == DType::f32) return as(float());
  if (a.scale_type == DType::f16) return as(__half());
  return as(__nv_bfloat16());
}

__device__ __forceinline__ float load_scale(const QuantizeGroupsArgs& a, int64_t group) {
  if (a.scale_type == DType::f32) return static_cast<const float*>(a.scales)[group];
  if (a.scale_type == DType::f16) return Element<__half>::widen(static_cast<const __half*>(a.scales)[group]);
  return Element<__nv_bfloat16>::widen(static_cast<const __nv_bfloat16*>(a.scales)[group]);
}

// The code of a value. NaN quotients count as zero, as those of groups without a finite scale.
struct LinearCode {
  float step, zero;

  __device__ __forceinline__ LinearCode(float scale, float zero) : step(scale > 0 ? scale : 1.f), zero(zero) {}

  __device__ __forceinline__ unsigned of(float x) const {
    const float steps = __fdiv_rn(x, step);
    const float q = __fadd_rn(steps == steps ? rintf(steps) : 0.f, zero);
    return static_cast<unsigned>(fminf(fmaxf(q, 0.f), 15.f));
  }
};

constexpr int kGroupsThreads = 256;

// Scales and zero points. kWhole: columns and groups are of whole eights, aligned, in fewer than 2^32 groups; then also
// the codes, which else share bytes with other groups.
template <class T, bool kWhole>
__global__ void __launch_bounds__(kGroupsThreads) quantize_int4(const QuantizeGroupsArgs a) {
  const int own = static_cast<int>(threadIdx.x) % a.team;
  int64_t group = int64_t{blockIdx.x} * (kGroupsThreads / a.team) + static_cast<int>(threadIdx.x) / a.team;
  const bool live = group < a.all_groups;  // the others take part in the reductions
  if (!live) group = 0;
  int64_t row, in_row;
  if constexpr (kWhole) {
    const unsigned number = static_cast<unsigned>(group), groups = static_cast<unsigned>(a.groups);
    row = number / groups, in_row = number % groups;
  } else {
    row = group / a.groups, in_row = group % a.groups;
  }
  const int64_t first = row * a.columns + in_row * a.blocksize;
  const int64_t size = min(a.blocksize, a.columns - in_row * a.blocksize);
  const T* const from = static_cast<const T*>(a.weight) + first;
  const auto load = [&](int64_t i, float(&values)[kPerThread]) {
    if constexpr (kWhole) load_floats(from + i, values);
    else load_some(from + i, size - i, values);
  };

  float held[kPerThread] = {};  // the first of a thread's eights: of groups of up to 256 there is no other
  float low = 0, high = 0;
  unsigned bits = 0;
  for (int64_t i = own * kPerThread; i < size; i += a.team * kPerThread) {
    float values[kPerThread];
    load(i, values);
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      low = fminf(low, values[j]), high = fmaxf(high, values[j]);
      bits = max(bits, magnitude(values[j]));
      if (i < a.team * kPerThread) held[j] = values[j];
    }
  }
  for (int distance = a.team / 2; distance > 0; distance /= 2) {
    low = fminf(low, __shfl_xor_sync(kFullWarp, low, distance));
    high = fmaxf(high, __shfl_xor_sync(kFullWarp, high, distance));
  }
  const float absmax = __uint_as_float(greatest_of_lanes(bits, a.team));
  if (!live) return;

  float scale = a.symmetric ? __fdiv_rn(absmax, 7.5f) : __fdiv_rn(__fsub_rn(high, low), 15.f);
  if (absmax != absmax) scale = absmax;
  scale = store_scale(a, group, scale, own == 0);
  LinearCode code(scale, kInt4Zero);
  if (!a.symmetric) {
    const float zero = absmax == absmax ? rintf(__fdiv_rn(-low, code.step)) : 0.f;
    code.zero = fminf(fmaxf(zero, 0.f), 15.f);
  }
  if (own == 0) a.zero_points[group] = static_cast<uint8_t>(code.zero);
  if constexpr (kWhole) {
    for (int64_t i = own * kPerThread; i < size; i += a.team * kPerThread) {
      if (i >= a.team * kPerThread) load(i, held);
      unsigned word = 0;
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) word |= code.of(held[j]) << code_shift(j);
      *reinterpret_cast<unsigned*>(a.codes + (first + i) / 2) = word;
    }
  }
}

// The codes of groups that share bytes, a byte a thread: an odd count's last nibble is 0.
template <class T>
__global__ void __launch_bounds__(kGroupsThreads) quantize_int4_codes(const QuantizeGroupsArgs a) {
  const int64_t byte = int64_t{blockIdx.x} * kGroupsThreads + threadIdx.x;
  unsigned codes = 0;
  for (int i = 0; i < 2; ++i) {
    const int64_t element = 2 * byte + i;
    if (element >= a.count) break;
    const int64_t group = element / a.columns * a.groups + element % a.columns / a.blocksize;
    const LinearCode code(load_scale(a, group), a.zero_points[group]);
    codes |= code.of(Element<T>::widen(static_cast<const T*>(a.weight)[element])) << code_shift(i);
  }
  if (2 * byte < a.count) a.codes[byte] = static_cast<uint8_t>(codes);
}

}  // namespace pykern
