// The wrappers of tensor-core and copy instructions as torch ops, one each, and a small matrix product that takes them
// all: what tests/test_fragments.py tests.

#include "cuda/launch.h"
#include "pykern/copy_async.cuh"
#include "pykern/matrix.cuh"
#include "pykern/mma.cuh"
#include "pykern/swizzle.cuh"

namespace pykern {
namespace {

using Bf16 = __nv_bfloat16;

// table[lane][element] = (row, col)
template <class Layout>
__global__ void layout_kernel(float* table) {
  for (int e = 0; e < Layout::kElements; ++e) {
    float* const to = table + 2 * (lane_id() * Layout::kElements + e);
    to[0] = static_cast<float>(Layout::row(lane_id(), e));
    to[1] = static_cast<float>(Layout::col(lane_id(), e));
  }
}

// table[row][chunk] = offset in bytes
template <int kRowBytes>
__global__ void swizzle_kernel(float* table) {
  constexpr int kChunks = kRowBytes / 16;
  const int row = static_cast<int>(threadIdx.x);
  for (int chunk = 0; chunk < kChunks; ++chunk)
    table[row * kChunks + chunk] = 2.f * Swizzle<Bf16, kRowBytes / 2>::at(row, 8 * chunk);
}

// Every lane's registers come from, and go to, its own row of a tensor.
template <class T, class C>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* d) {
  FragmentA<T> a_own;
  FragmentB<T> b_own;
  FragmentC<C> c_own;
  constexpr int kRegisters = sizeof c_own / 4;
  uint32_t c_bits[kRegisters];
  for (int r = 0; r < 4; ++r) a_own.reg[r] = a[4 * lane_id() + r];
  for (int r = 0; r < 2; ++r) b_own.reg[r] = b[2 * lane_id() + r];
  for (int r = 0; r < kRegisters; ++r) c_bits[r] = c[kRegisters * lane_id() + r];
  memcpy(&c_own, c_bits, sizeof c_own);
  mma(c_own, a_own, b_own);
  memcpy(c_bits, &c_own, sizeof c_own);
  for (int r = 0; r < kRegisters; ++r) d[kRegisters * lane_id() + r] = c_bits[r];
}

template <int kCount, bool kTrans>
__global__ void ldmatrix_kernel(const uint4* matrices, uint32_t* registers) {
  PYKERN_SHARED(rows, uint4[8 * kCount]);
  if (lane_id() < 8 * kCount) rows[lane_id()] = matrices[lane_id()];
  __syncwarp();
  uint32_t reg[kCount];
  if constexpr (kTrans) ldmatrix_trans(reg, &rows[lane_id() % (8 * kCount)]);
  else ldmatrix(reg, &rows[lane_id() % (8 * kCount)]);
  for (int m = 0; m < kCount; ++m) registers[lane_id() * kCount + m] = reg[m];
}

// kElements: as on GPUs that lack the instruction.
template <int kCount, bool kTrans, bool kElements>
__global__ void stmatrix_kernel(const uint32_t* registers, uint4* matrices) {
  PYKERN_SHARED(rows, uint4[8 * kCount]);
  uint32_t reg[kCount];
  for (int m = 0; m < kCount; ++m) reg[m] = registers[lane_id() * kCount + m];
  uint4* const row = &rows[lane_id() % (8 * kCount)];
  if constexpr (kElements) store_elements<kTrans>(row, reg);
  else if constexpr (kTrans) stmatrix_trans(row, reg);
  else stmatrix(row, reg);
  __syncwarp();
  if (lane_id() < 8 * kCount) matrices[lane_id()] = rows[lane_id()];
}

// c (16 x 16) = a b by the table of matrix.cuh, from tiles that lie either way round.
template <bool kATrans, bool kBTrans>
__global__ void product_kernel(const uint4* a, const uint4* b, float* c) {
  PYKERN_SHARED(a_tile, Bf16[16][16]);
  PYKERN_SHARED(b_tile, Bf16[16][16]);
  reinterpret_cast<uint4*>(a_tile)[lane_id()] = a[lane_id()];
  reinterpret_cast<uint4*>(b_tile)[lane_id()] = b[lane_id()];
  __syncwarp();
  FragmentA<Bf16> a_own;
  FragmentB<Bf16> b_own[2];
  const Coordinate at = tall(lane_id()), across = wide(lane_id());
  if constexpr (kATrans) ldmatrix_trans(a_own.reg, &a_tile[across.row][across.col]);
  else ldmatrix(a_own.reg, &a_tile[at.row][at.col]);
  if constexpr (kBTrans) ldmatrix(b_own[0].reg, b_own[1].reg, &b_tile[across.row][across.col]);
  else ldmatrix_trans(b_own[0].reg, b_own[1].reg, &b_tile[at.row][at.col]);
  for (int j = 0; j < 2; ++j) {
    FragmentC<float> sum = {};
    mma(sum, a_own, b_own[j]);
    for (int e = 0; e < 4; ++e)
      c[16 * sum.row(lane_id(), e) + 8 * j + sum.col(lane_id(), e)] = sum.x[e];
  }
}

// The same of tf32, rounded, with one fragment of B at a time: c (16 x 8) = a (16 x 8) b', b (8 x 8) as [n][k].
__global__ void product_tf32_kernel(const float* a, const float* b, float* c) {
  PYKERN_SHARED(a_tile, uint32_t[16][8]);
  PYKERN_SHARED(b_tile, uint32_t[8][8]);
  for (int i = lane_id(); i < 128; i += kWarp) a_tile[i / 8][i % 8] = round_to_tf32(a[i]);
  for (int i = lane_id(); i < 64; i += kWarp) b_tile[i / 8][i % 8] = round_to_tf32(b[i]);
  __syncwarp();
  FragmentA<Tf32> a_own;
  FragmentB<Tf32> b_own;
  const Coordinate at = tall(lane_id()), across = wide(lane_id() % 16);
  ldmatrix(a_own.reg, &a_tile[at.row][at.col / 2]);
  ldmatrix(b_own.reg, &b_tile[across.row][across.col / 2]);
  FragmentC<float> sum = {};
  mma(sum, a_own, b_own);
  for (int e = 0; e < 4; ++e) c[8 * sum.row(lane_id(), e) + sum.col(lane_id(), e)] = sum.x[e];
}

// (a b) v with the first product's accumulators as the second's A; all 16 x 16, b and v as [k][n].
__global__ void chained_kernel(const uint4* a, const uint4* b, const uint4* v, float* c) {
  PYKERN_SHARED(tiles, Bf16[3][16][16]);
  reinterpret_cast<uint4*>(tiles[0])[lane_id()] = a[lane_id()];
  reinterpret_cast<uint4*>(tiles[1])[lane_id()] = b[lane_id()];
  reinterpret_cast<uint4*>(tiles[2])[lane_id()] = v[lane_id()];
  __syncwarp();
  FragmentA<Bf16> a_own;
  FragmentB<Bf16> b_own[2], v_own[2];
  const Coordinate at = tall(lane_id());
  ldmatrix(a_own.reg, &tiles[0][at.row][at.col]);
  ldmatrix_trans(b_own[0].reg, b_own[1].reg, &tiles[1][at.row][at.col]);
  ldmatrix_trans(v_own[0].reg, v_own[1].reg, &tiles[2][at.row][at.col]);
  FragmentC<float> inner[2] = {};
  for (int j = 0; j < 2; ++j) mma(inner[j], a_own, b_own[j]);
  const FragmentA<Bf16> p = to_a<Bf16>(inner[0], inner[1]);
  for (int j = 0; j < 2; ++j) {
    FragmentC<float> sum = {};
    mma(sum, p, v_own[j]);
    for (int e = 0; e < 4; ++e)
      c[16 * sum.row(lane_id(), e) + 8 * j + sum.col(lane_id(), e)] = sum.x[e];
  }
}

// Copies kBytes a thread, of which `filled` are read, through shared memory that held ones.
template <int kBytes>
__global__ void cp_async_kernel(const char* from, float* to, int filled) {
  constexpr int kFloats = kBytes / 4;
  PYKERN_SHARED(buffer, float4[kWarp]);
  const int t = lane_id();
  float* const own = reinterpret_cast<float*>(buffer) + t * kFloats;
  for (int i = 0; i < kFloats; ++i) own[i] = 1;
  cp_async<kBytes>(own, from + t * kBytes, filled);
  cp_async_wait_all();
  for (int i = 0; i < kFloats; ++i) to[t * kFloats + i] = own[i];
}

enum class Fault {
  none,
  missing_wait,
  wrong_swizzle,    // read otherwise than written
  swapped_rows,     // of the fragments of A
  missing_barrier,  // between the copies' arrival and the reads
  early_overwrite,  // no barrier between the reads and the next copies
  no_swizzle,       // right, but slow
  count
};

constexpr int kTile = 64;  // rows and columns of a block's C, and the depth of a step
constexpr int kGemmThreads = 128;

struct NoSwizzle {
  __device__ static constexpr int at(int row, int col) { return row * kTile + col; }
};

// A tile of a matrix with rows of `cols` elements; zeros past its edges.
template <class Tile>
__device__ __forceinline__ void load_tile(Bf16* to, const Bf16* from, int row, int rows, int col, int cols) {
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kTile / 8; i += kGemmThreads) {
    const int r = i / (kTile / 8), c = i % (kTile / 8) * 8;
    const bool inside = row + r < rows && col + c < cols;
    const Bf16* const source = inside ? from + static_cast<int64_t>(row + r) * cols + col + c : from;
    cp_async<16>(to + Tile::at(r, c), source, inside ? 16 : 0);
  }
}

// c (m x n, fp32) = a (m x k) b', b (n x k). A block makes 64 x 64, each of its four warps 32 x 32.
template <Fault kFault>
__global__ void __launch_bounds__(kGemmThreads)
    gemm_kernel(const Bf16* a, const Bf16* b, float* c, int m, int n, int k) {
  using Swizzled = Swizzle<Bf16, kTile>;
  using Written = std::conditional_t<kFault == Fault::no_swizzle, NoSwizzle, Swizzled>;
  using Read = std::conditional_t<kFault == Fault::wrong_swizzle, NoSwizzle, Written>;
  constexpr int kTileSize = kTile * kTile;
  Bf16* const shared = dynamic_shared<Bf16>();  // a and b of one step, then of the next
  const int row = static_cast<int>(blockIdx.y) * kTile, col = static_cast<int>(blockIdx.x) * kTile;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warp_row = warp / 2 * 32, warp_col = warp % 2 * 32;
  const Coordinate of_a = kFault == Fault::swapped_rows ? wide(lane_id()) : tall(lane_id()), of_b = wide(lane_id());
  const int steps = (k + kTile - 1) / kTile;

  const auto load = [&](int step) {
    Bf16* const to = shared + step % 2 * 2 * kTileSize;
    load_tile<Written>(to, a, row, m, step * kTile, k);
    load_tile<Written>(to + kTileSize, b, col, n, step * kTile, k);
  };

  FragmentC<float> sums[2][4] = {};
  load(0);
  cp_async_commit();
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) load(step + 1);
    cp_async_commit();
    if constexpr (kFault != Fault::missing_wait) cp_async_wait<1>();
    if constexpr (kFault != Fault::missing_barrier) __syncthreads();
    const Bf16* const a_tile = shared + step % 2 * 2 * kTileSize;
    const Bf16* const b_tile = a_tile + kTileSize;
#pragma unroll
    for (int depth = 0; depth < kTile; depth += 16) {
      FragmentA<Bf16> a_own[2];
      FragmentB<Bf16> b_own[4];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        ldmatrix(a_own[i].reg, a_tile + Read::at(warp_row + 16 * i + of_a.row, depth + of_a.col));
#pragma unroll
      for (int j = 0; j < 4; j += 2)
        ldmatrix(b_own[j].reg, b_own[j + 1].reg, b_tile + Read::at(warp_col + 8 * j + of_b.row, depth + of_b.col));
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) mma(sums[i][j], a_own[i], b_own[j]);
    }
    if constexpr (kFault != Fault::early_overwrite) __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = row + warp_row + 16 * i + LayoutC::row(lane_id(), e);
        const int s = col + warp_col + 8 * j + LayoutC::col(lane_id(), e);
        if (r < m && s < n) c[static_cast<int64_t>(r) * n + s] = sums[i][j].x[e];
      }
}

template <class Layout>
Tensor layout_of(const Tensor& like) {
  const Device device(like);
  Tensor table = device.empty({{kWarp, Layout::kElements, 2}}, DType::f32);
  device.launch(layout_kernel<Layout>, 1, kWarp, 0, static_cast<float*>(device.out(table, "table")));
  return table;
}

// The layout of operand 0 (A), 1 (B) or 2 (C) for elements of the dtype of `like`, where float32 stands for tf32.
Tensor layout(const Tensor& like, int64_t operand) {
  if (operand == 2) return layout_of<LayoutC>(like);
  switch (dtype_of(like, "like")) {
    case DType::f16: return operand ? layout_of<FragmentB<__half>>(like) : layout_of<FragmentA<__half>>(like);
    case DType::bf16: return operand ? layout_of<FragmentB<Bf16>>(like) : layout_of<FragmentA<Bf16>>(like);
    default: return operand ? layout_of<FragmentB<Tf32>>(like) : layout_of<FragmentA<Tf32>>(like);
  }
}

Tensor swizzle(const Tensor& like, int64_t row_bytes) {
  const Device device(like);
  Tensor table = device.empty({{16, row_bytes / 16}}, DType::f32);
  const auto kernel = row_bytes == 32 ? swizzle_kernel<32> : row_bytes == 64 ? swizzle_kernel<64> : swizzle_kernel<128>;
  device.launch(kernel, 1, 16, 0, static_cast<float*>(device.out(table, "table")));
  return table;
}

// Fragments [lane][element]; with fewer than 32 threads a warp that is not whole.
Tensor mma_op(const Tensor& a, const Tensor& b, const Tensor& c, int64_t threads) {
  const Device device(a);
  const DType dtype = dtype_of(a, "a"), sums = dtype_of(c, "c");
  Tensor d = device.empty(c.sizes(), sums);
  const auto kernel = dtype == DType::bf16 ? mma_kernel<Bf16, float>
      : dtype == DType::f32                ? mma_kernel<Tf32, float>
      : sums == DType::f32                 ? mma_kernel<__half, float>
                                           : mma_kernel<__half, __half>;
  device.launch(
      kernel, 1, static_cast<unsigned>(threads), 0, static_cast<const uint32_t*>(device.in(a, "a")),
      static_cast<const uint32_t*>(device.in(b, "b")), static_cast<const uint32_t*>(device.in(c, "c")),
      static_cast<uint32_t*>(device.out(d, "d")));
  return d;
}

template <class Kernels>
auto choose(const Kernels& kernels, int64_t count, bool trans) {
  STD_TORCH_CHECK(count == 1 || count == 2 || count == 4, "count must be 1, 2 or 4");
  return kernels[trans][count / 2];
}

// [8 count rows][8] to registers [lane][2 count elements].
Tensor ldmatrix_op(const Tensor& matrices, int64_t count, bool trans) {
  using Kernel = void (*)(const uint4*, uint32_t*);
  static const Kernel kernels[2][3] = {
      {ldmatrix_kernel<1, false>, ldmatrix_kernel<2, false>, ldmatrix_kernel<4, false>},
      {ldmatrix_kernel<1, true>, ldmatrix_kernel<2, true>, ldmatrix_kernel<4, true>}};
  const Device device(matrices);
  Tensor registers = device.empty({{kWarp, 2 * count}}, dtype_of(matrices, "matrices"));
  device.launch(
      choose(kernels, count, trans), 1, kWarp, 0, static_cast<const uint4*>(device.in(matrices, "matrices")),
      static_cast<uint32_t*>(device.out(registers, "registers")));
  return registers;
}

template <bool kElements>
auto stmatrix_for(int64_t count, bool trans) {
  using Kernel = void (*)(const uint32_t*, uint4*);
  constexpr bool kE = kElements;
  static const Kernel kernels[2][3] = {
      {stmatrix_kernel<1, false, kE>, stmatrix_kernel<2, false, kE>, stmatrix_kernel<4, false, kE>},
      {stmatrix_kernel<1, true, kE>, stmatrix_kernel<2, true, kE>, stmatrix_kernel<4, true, kE>}};
  return choose(kernels, count, trans);
}

// And back.
Tensor stmatrix_op(const Tensor& registers, int64_t count, bool trans, bool elements) {
  const Device device(registers);
  Tensor matrices = device.empty({{8 * count, 8}}, dtype_of(registers, "registers"));
  device.launch(
      elements ? stmatrix_for<true>(count, trans) : stmatrix_for<false>(count, trans), 1, kWarp, 0,
      static_cast<const uint32_t*>(device.in(registers, "registers")),
      static_cast<uint4*>(device.out(matrices, "matrices")));
  return matrices;
}

Tensor product(const Tensor& a, const Tensor& b, bool a_trans, bool b_trans) {
  const Device device(a);
  const bool tf32 = dtype_of(a, "a") == DType::f32;
  Tensor c = device.empty({{16, tf32 ? 8 : 16}}, DType::f32);
  const void* const a_in = device.in(a, "a");
  const void* const b_in = device.in(b, "b");
  float* const out = static_cast<float*>(device.out(c, "c"));
  if (tf32) {
    device.launch(
        product_tf32_kernel, 1, kWarp, 0, static_cast<const float*>(a_in), static_cast<const float*>(b_in), out);
  } else {
    const auto kernel = a_trans ? (b_trans ? product_kernel<true, true> : product_kernel<true, false>)
                                : (b_trans ? product_kernel<false, true> : product_kernel<false, false>);
    device.launch(kernel, 1, kWarp, 0, static_cast<const uint4*>(a_in), static_cast<const uint4*>(b_in), out);
  }
  return c;
}

Tensor chained(const Tensor& a, const Tensor& b, const Tensor& v) {
  const Device device(a);
  Tensor c = device.empty({{16, 16}}, DType::f32);
  device.launch(
      chained_kernel, 1, kWarp, 0, static_cast<const uint4*>(device.in(a, "a")),
      static_cast<const uint4*>(device.in(b, "b")), static_cast<const uint4*>(device.in(v, "v")),
      static_cast<float*>(device.out(c, "c")));
  return c;
}

Tensor cp_async_op(const Tensor& x, int64_t bytes, int64_t filled) {
  const Device device(x);
  Tensor y = device.empty({{kWarp * bytes / 4}}, DType::f32);
  const auto kernel = bytes == 4 ? cp_async_kernel<4> : bytes == 8 ? cp_async_kernel<8> : cp_async_kernel<16>;
  device.launch(
      kernel, 1, kWarp, 0, static_cast<const char*>(device.in(x, "x")), static_cast<float*>(device.out(y, "y")),
      static_cast<int>(filled));
  return y;
}

using Gemm = void (*)(const Bf16*, const Bf16*, float*, int, int, int);

template <size_t... kFaults>
Gemm gemm_with(int64_t fault, std::index_sequence<kFaults...>) {
  static const Gemm kernels[] = {gemm_kernel<static_cast<Fault>(kFaults)>...};
  STD_TORCH_CHECK(fault >= 0 && fault < static_cast<int64_t>(sizeof...(kFaults)), "fault is unknown");
  return kernels[fault];
}

Tensor gemm(const Tensor& a, const Tensor& b, int64_t fault) {
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(1), "a must be (m, k) and b (n, k)");
  STD_TORCH_CHECK(a.size(1) % 8 == 0 && a.size(1) > 0, "k must be a multiple of 8");
  STD_TORCH_CHECK(dtype_of(a, "a") == DType::bf16 && dtype_of(b, "b") == DType::bf16, "a and b must be bfloat16");
  const Device device(a);
  const int m = static_cast<int>(a.size(0)), n = static_cast<int>(b.size(0)), k = static_cast<int>(a.size(1));
  Tensor c = device.empty({{m, n}}, DType::f32);
  const dim3 grid((n + kTile - 1) / kTile, (m + kTile - 1) / kTile);
  device.launch(
      gemm_with(fault, std::make_index_sequence<static_cast<size_t>(Fault::count)>()), grid, kGemmThreads,
      4 * kTile * kTile * sizeof(Bf16), static_cast<const Bf16*>(device.in(a, "a")),
      static_cast<const Bf16*>(device.in(b, "b")), static_cast<float*>(device.out(c, "c")), m, n, k);
  return c;
}

}  // namespace
}  // namespace pykern

PYKERN_SCHEMAS(m) {
  m.def("layout(Tensor like, int operand) -> Tensor");
  m.def("swizzle(Tensor like, int row_bytes) -> Tensor");
  m.def("mma(Tensor a, Tensor b, Tensor c, int threads=32) -> Tensor");
  m.def("ldmatrix(Tensor matrices, int count, bool trans) -> Tensor");
  m.def("stmatrix(Tensor registers, int count, bool trans, bool elements) -> Tensor");
  m.def("product(Tensor a, Tensor b, bool a_trans, bool b_trans) -> Tensor");
  m.def("chained(Tensor a, Tensor b, Tensor v) -> Tensor");
  m.def("cp_async(Tensor x, int bytes, int filled) -> Tensor");
  m.def("gemm(Tensor a, Tensor b, int fault) -> Tensor");
}

PYKERN_KERNELS(m) {
  m.impl("layout", TORCH_BOX(&pykern::layout));
  m.impl("swizzle", TORCH_BOX(&pykern::swizzle));
  m.impl("mma", TORCH_BOX(&pykern::mma_op));
  m.impl("ldmatrix", TORCH_BOX(&pykern::ldmatrix_op));
  m.impl("stmatrix", TORCH_BOX(&pykern::stmatrix_op));
  m.impl("product", TORCH_BOX(&pykern::product));
  m.impl("chained", TORCH_BOX(&pykern::chained));
  m.impl("cp_async", TORCH_BOX(&pykern::cp_async_op));
  m.impl("gemm", TORCH_BOX(&pykern::gemm));
}
