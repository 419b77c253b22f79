// Prints what CuTe says of tensor-core fragments, matrix copies and shared-memory swizzles, as JSON: the oracle of
// tests/test_fragments.py. CuTe is NVIDIA's own description of these instructions; nothing of pykern is used here.
//
//   mma.<name>.<A|B|C>[lane][element] = [row, col] of A (m, k), B (k, n) and C (m, n)
//   ldmatrix.<N|T><count>.address[row] = [lane, whose address names that row of 8 elements], of the matrices one below
//   the other; .register[lane][element] = [row, col] of the 16-bit element that the lane gets; stmatrix likewise
//   swizzle.<bytes>[row][chunk] = offset in bytes of a 16-byte chunk, for rows of so many bytes

#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/copy_traits_sm90.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/swizzle.hpp>

#include <cstdio>

namespace {

using namespace cute;

constexpr int kLanes = 32;
bool first = true;

void begin(const char* family, const char* name, const char* part) {
  std::printf("%s\n\"%s.%s.%s\": [", first ? "" : ",", family, name, part);
  first = false;
}

// What layout(lane, element * step) / step says, as [index % rows, index / rows], or turned round.
template <class Layout>
void table(Layout layout, int elements, int step, int rows, bool turned) {
  for (int lane = 0; lane < kLanes; ++lane) {
    std::printf("%s[", lane ? "," : "");
    for (int e = 0; e < elements; ++e) {
      const int index = int(layout(lane, e * step)) / step;
      const int fast = index % rows, slow = index / rows;
      std::printf("%s[%d,%d]", e ? "," : "", turned ? slow : fast, turned ? fast : slow);
    }
    std::printf("]");
  }
  std::printf("]");
}

template <class Atom>
void mma(const char* name) {
  using Traits = MMA_Traits<Atom>;
  constexpr int m = size<0>(typename Traits::Shape_MNK{}), n = size<1>(typename Traits::Shape_MNK{});
  static_assert(size(typename Traits::ThrID{}) == kLanes);
  begin("mma", name, "A");
  table(typename Traits::ALayout{}, size<1>(typename Traits::ALayout{}), 1, m, false);
  begin("mma", name, "B");  // CuTe counts B as (n, k)
  table(typename Traits::BLayout{}, size<1>(typename Traits::BLayout{}), 1, n, true);
  begin("mma", name, "C");
  table(typename Traits::CLayout{}, size<1>(typename Traits::CLayout{}), 1, m, false);
}

// CuTe's copies map (lane, bit) to a bit of the matrices, which lie one after the other, 8 rows of 128 bits each.
template <class Memory, class Register>
void matrix_copy(const char* family, const char* name, int count) {
  begin(family, name, "address");
  for (int row = 0; row < 8 * count; ++row) {
    int lane = 0;
    while (int(Memory{}(lane, 0)) != row * 128) ++lane;
    std::printf("%s%d", row ? "," : "", lane);
  }
  std::printf("]");
  begin(family, name, "register");
  table(Register{}, 2 * count, 16, 8, true);
}

template <class Atom>
void ldmatrix(const char* name, int count) {
  using Traits = Copy_Traits<Atom>;
  matrix_copy<typename Traits::SrcLayout, typename Traits::DstLayout>("ldmatrix", name, count);
}

template <class Atom>
void stmatrix(const char* name, int count) {
  using Traits = Copy_Traits<Atom>;
  matrix_copy<typename Traits::DstLayout, typename Traits::SrcLayout>("stmatrix", name, count);
}

template <class Pattern>
void swizzle(const char* name, int row_bytes) {
  begin("swizzle", name, "offset");
  for (int row = 0; row < 16; ++row) {
    std::printf("%s[", row ? "," : "");
    for (int chunk = 0; chunk < row_bytes / 16; ++chunk)
      std::printf("%s%d", chunk ? "," : "", int(Pattern::apply(row * row_bytes + chunk * 16)));
    std::printf("]");
  }
  std::printf("]");
}

}  // namespace

int main() {
  std::printf("{");
  mma<SM80_16x8x16_F32BF16BF16F32_TN>("bf16");
  mma<SM80_16x8x16_F32F16F16F32_TN>("f16");
  mma<SM80_16x8x16_F16F16F16F16_TN>("f16_f16");
  mma<SM80_16x8x8_F32TF32TF32F32_TN>("tf32");
  ldmatrix<SM75_U32x1_LDSM_N>("N1", 1);
  ldmatrix<SM75_U32x2_LDSM_N>("N2", 2);
  ldmatrix<SM75_U32x4_LDSM_N>("N4", 4);
  ldmatrix<SM75_U16x2_LDSM_T>("T1", 1);
  ldmatrix<SM75_U16x4_LDSM_T>("T2", 2);
  ldmatrix<SM75_U16x8_LDSM_T>("T4", 4);
  stmatrix<SM90_U32x1_STSM_N>("N1", 1);
  stmatrix<SM90_U32x2_STSM_N>("N2", 2);
  stmatrix<SM90_U32x4_STSM_N>("N4", 4);
  stmatrix<SM90_U16x2_STSM_T>("T1", 1);
  stmatrix<SM90_U16x4_STSM_T>("T2", 2);
  stmatrix<SM90_U16x8_STSM_T>("T4", 4);
  swizzle<Swizzle<1, 4, 3>>("32", 32);
  swizzle<Swizzle<2, 4, 3>>("64", 64);
  swizzle<Swizzle<3, 4, 3>>("128", 128);
  std::printf("\n}\n");
}
