#include "tensor.h"

#include <bit>
#include <cmath>
#include <cstring>

#include "../include/pykern/fragment.cuh"

namespace pykern::emulator {
namespace {

constexpr unsigned kFullWarp = 0xffffffff;
constexpr int kLanes = static_cast<int>(kWarpSize);

// What every lane brings to a meeting begins so.
struct Call {
  const char* what;
  Place caller;
};

void check_all_lanes(void* const* lanes, unsigned mask) {
  if (mask == kFullWarp) return;
  const Call& call = *static_cast<const Call*>(lanes[std::countr_zero(mask)]);
  fault(
      std::string(call.what) + " needs all 32 lanes of a warp; lane " + std::to_string(std::countr_one(mask)) +
          " has exited or is not in the block",
      call.caller);
}

// One lane's registers.
template <class C>
struct Product : Call {
  C* c;
  const uint32_t* a;
  const uint32_t* b;
};

uint16_t half_of(const uint32_t* reg, int e) { return static_cast<uint16_t>(reg[e / 2] >> 16 * (e % 2)); }

template <class T>
float element(const uint32_t* reg, int e);

template <>
float element<__half>(const uint32_t* reg, int e) {
  return __half2float(std::bit_cast<__half>(half_of(reg, e)));
}
template <>
float element<__nv_bfloat16>(const uint32_t* reg, int e) {
  return std::bit_cast<float>(static_cast<uint32_t>(half_of(reg, e)) << 16);
}
template <>
float element<Tf32>(const uint32_t* reg, int e) {
  return std::bit_cast<float>(reg[e] & ~0x1fffu);
}

float get(const float* c, int e) { return c[e]; }
float get(const uint32_t* c, int e) { return element<__half>(c, e); }
void set(float* c, int e, float value) { c[e] = value; }
void set(uint32_t* c, int e, float value) {
  const uint32_t bits = std::bit_cast<uint16_t>(__float2half_rn(value));
  c[e / 2] = e % 2 ? (c[e / 2] & 0xffff) | bits << 16 : (c[e / 2] & 0xffff0000) | bits;
}

template <class T, class C>
void multiply(void* const* lanes, unsigned mask) {
  check_all_lanes(lanes, mask);
  using A = FragmentA<T>;
  using B = FragmentB<T>;
  constexpr int kM = A::kRows, kN = B::kCols, kK = A::kCols;
  float a[kM][kK], b[kK][kN], c[kM][kN];
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto& own = *static_cast<const Product<C>*>(lanes[lane]);
    for (int e = 0; e < A::kElements; ++e) a[A::row(lane, e)][A::col(lane, e)] = element<T>(own.a, e);
    for (int e = 0; e < B::kElements; ++e) b[B::row(lane, e)][B::col(lane, e)] = element<T>(own.b, e);
    for (int e = 0; e < LayoutC::kElements; ++e) c[LayoutC::row(lane, e)][LayoutC::col(lane, e)] = get(own.c, e);
  }
  for (int m = 0; m < kM; ++m)
    for (int k = 0; k < kK; ++k)
      for (int n = 0; n < kN; ++n) c[m][n] += a[m][k] * b[k][n];
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto& own = *static_cast<const Product<C>*>(lanes[lane]);
    for (int e = 0; e < LayoutC::kElements; ++e) set(own.c, e, c[LayoutC::row(lane, e)][LayoutC::col(lane, e)]);
  }
  count_tensor_flops(2.0 * kM * kN * kK);
}

struct Row {
  uint16_t element[8];
};

struct Move : Call {
  Row row;  // the one that this lane names
  uint32_t reg[4];
};

// What the lanes' registers hold of matrix m: element `half` of lane l.
uint16_t& of_matrix(void* const* lanes, int m, int l, int half, bool transposed) {
  const int row = transposed ? 2 * (l % 4) + half : l / 4, col = transposed ? l / 4 : 2 * (l % 4) + half;
  return static_cast<Move*>(lanes[8 * m + row])->row.element[col];
}

template <int kCount, bool kTransposed>
void to_registers(void* const* lanes, unsigned mask) {
  check_all_lanes(lanes, mask);
  for (int lane = 0; lane < kLanes; ++lane)
    for (int m = 0; m < kCount; ++m)
      static_cast<Move*>(lanes[lane])->reg[m] = of_matrix(lanes, m, lane, 0, kTransposed) |
          static_cast<uint32_t>(of_matrix(lanes, m, lane, 1, kTransposed)) << 16;
}

template <int kCount, bool kTransposed>
void to_rows(void* const* lanes, unsigned mask) {
  check_all_lanes(lanes, mask);
  for (int lane = 0; lane < kLanes; ++lane)
    for (int m = 0; m < kCount; ++m)
      for (int half = 0; half < 2; ++half)
        of_matrix(lanes, m, lane, half, kTransposed) =
            static_cast<uint16_t>(static_cast<const Move*>(lanes[lane])->reg[m] >> 16 * half);
}

using Combine = void (*)(void* const*, unsigned);
// By transposed and count / 2.
constexpr Combine kToRegisters[2][3] = {
    {to_registers<1, false>, to_registers<2, false>, to_registers<4, false>},
    {to_registers<1, true>, to_registers<2, true>, to_registers<4, true>}};
constexpr Combine kToRows[2][3] = {
    {to_rows<1, false>, to_rows<2, false>, to_rows<4, false>}, {to_rows<1, true>, to_rows<2, true>, to_rows<4, true>}};

constexpr const char* kLoads[2][3] = {
    {"ldmatrix.x1", "ldmatrix.x2", "ldmatrix.x4"}, {"ldmatrix.x1.trans", "ldmatrix.x2.trans", "ldmatrix.x4.trans"}};
constexpr const char* kStores[2][3] = {
    {"stmatrix.x1", "stmatrix.x2", "stmatrix.x4"}, {"stmatrix.x1.trans", "stmatrix.x2.trans", "stmatrix.x4.trans"}};

void check_shared(const void* address, const Call& call) {
  const char* const shared = running->block->shared;
  const auto offset = static_cast<uintptr_t>(static_cast<const char*>(address) - shared);
  if (offset >= kMaxSharedBytes) fault(std::string(call.what) + " of an address outside shared memory", call.caller);
}

}  // namespace

int lane_id() { return static_cast<int>(running->lane()); }

void mma(Operand operand, float* c, const uint32_t* a, const uint32_t* b, Place caller) {
  static constexpr Combine kMultiply[] = {
      multiply<__half, float>, multiply<__nv_bfloat16, float>, multiply<Tf32, float>};
  static constexpr const char* kNames[] = {"mma of fp16", "mma of bf16", "mma of tf32"};
  const int kind = static_cast<int>(operand);
  Product<float> own = {{kNames[kind], caller}, c, a, b};
  warp_meet(kFullWarp, &own, kMultiply[kind], own.what, caller);
}

void mma_half(uint32_t* c, const uint32_t* a, const uint32_t* b, Place caller) {
  Product<uint32_t> own = {{"mma of fp16 with fp16 accumulators", caller}, c, a, b};
  warp_meet(kFullWarp, &own, multiply<__half, uint32_t>, own.what, caller);
}

// A lane reads its row when it comes: what another lane writes there without a barrier between may come too late, as on
// a GPU.
void ldmatrix(uint32_t* reg, unsigned count, bool transposed, const void* row, Place caller) {
  Move own = {{kLoads[transposed][count / 2], caller}, {}, {}};
  if (running->lane() < 8 * count) {
    check_shared(row, own);
    access(row, sizeof own.row, Access::read, __builtin_return_address(0));
    std::memcpy(&own.row, row, sizeof own.row);
  }
  warp_meet(kFullWarp, &own, kToRegisters[transposed][count / 2], own.what, caller);
  std::memcpy(reg, own.reg, count * sizeof *reg);
}

void stmatrix(const uint32_t* reg, unsigned count, bool transposed, void* row, Place caller) {
  Move own = {{kStores[transposed][count / 2], caller}, {}, {}};
  std::memcpy(own.reg, reg, count * sizeof *reg);
  warp_meet(kFullWarp, &own, kToRows[transposed][count / 2], own.what, caller);
  if (running->lane() < 8 * count) {
    check_shared(row, own);
    access(row, sizeof own.row, Access::write, __builtin_return_address(0));
    std::memcpy(row, &own.row, sizeof own.row);
  }
}

void cp_async(void* to, const void* from, int bytes, int filled) {
  async_copy(to, from, static_cast<size_t>(bytes), static_cast<size_t>(filled), __builtin_return_address(0));
}

uint32_t round_to_tf32(float x) {
  if (std::isnan(x)) return 0x7fffffff;
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return std::isinf(x) ? bits : (bits + 0x1000) & ~0x1fffu;
}

}  // namespace pykern::emulator
