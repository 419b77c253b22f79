// The norms of one row at a time. An RMSNorm is a LayerNorm that takes the mean to be zero and has no bias, so both
// are one template; `centered` says which.
//
// Forward, in passes over a row that the first one brings into cache: mean; the sum of (x - mean)²; output. The passes
// subtract the mean rounded to fp32. What the rounding took is known: it corrects the variance and shifts the output,
// so that a mean far from zero costs no accuracy.
//
// Backward, with g = dy · weight and xhat = (x - mean) · rstd:
//   dx = rstd · (g - mean(g) - xhat · mean(g · xhat)),   dweight = Σ dy · xhat,   dbias = Σ dy   over rows.
// Rows go four at a time, so that the weight gradients, which live in cache, are read and written once for four rows.

#include "../norm.h"
#include "vec.h"

namespace pykern {
namespace {

template <class T>
PYKERN_INLINE void put(T* p, Vec v, int count, bool past_caches) {
  if (past_caches) stream(p, v);
  else store(p, v, count);
}

template <class T>
PYKERN_INLINE T* row_of(const Rows& rows, int64_t row) {
  return static_cast<T*>(rows.data) + row_offset(rows, row);
}

template <class T, bool centered>
PYKERN_INLINE void forward_row(const NormForward& a, const T* x, int64_t row) {
  const int64_t n = a.n;
  double mean = 0;
  if constexpr (centered) {
    mean = sum_each(n, [&](int64_t i, int count, Vec& sum) PYKERN_LAMBDA { sum += load(x + i, count); }) / n;
    a.mean[row] = static_cast<float>(mean);
  }
  const float centre = static_cast<float>(mean);
  const double rest = __builtin_isfinite(centre) ? mean - centre : 0;
  double variance = sum_each(n, [&](int64_t i, int count, Vec& sum) PYKERN_LAMBDA {
    const Vec d = centered ? first(load(x + i, count) - centre, count) : load(x + i, count);
    sum = fma(d, d, sum);
  }) / n - rest * rest;
  if (variance < 0) variance = 0;  // equal elements, whose deviation is the rest alone
  const double exact_rstd = 1 / __builtin_sqrt(variance + a.eps);
  const float rstd = static_cast<float>(exact_rstd);
  a.rstd[row] = rstd;

  T* const y = static_cast<T*>(a.y) + row * n;
  const float offset = static_cast<float>(-rest * exact_rstd);
  if constexpr (centered) {
    each(n, [&](int64_t i, int count) PYKERN_LAMBDA {
      const Vec normed = fma(load(x + i, count) - centre, all(rstd), all(offset));
      put(y + i, fma(normed, load(a.weight + i, count), load(a.bias + i, count)), count, a.stream);
    });
  } else if (a.round_before_weight) {
    each(n, [&](int64_t i, int count) PYKERN_LAMBDA {
      put(y + i, rounded<T>(load(x + i, count) * rstd) * load(a.weight + i, count), count, a.stream);
    });
  } else {
    each(n, [&](int64_t i, int count) PYKERN_LAMBDA {
      put(y + i, load(x + i, count) * rstd * load(a.weight + i, count), count, a.stream);
    });
  }
}

template <class T, bool centered>
void forward(const NormForward& a, int64_t first_row, int64_t end_row) {
  for (int64_t row = first_row; row < end_row; ++row) {
    const T* x = row_of<const T>(a.x, row);
    if (a.residual.data) {
      const T* const residual = row_of<const T>(a.residual, row);
      T* const summed = static_cast<T*>(a.summed) + row * a.n;
      each(a.n, [&](int64_t i, int count) PYKERN_LAMBDA {
        store(summed + i, load(x + i, count) + load(residual + i, count), count);
      });
      x = summed;
    }
    forward_row<T, centered>(a, x, row);
  }
  if (a.stream) stream_end();
}

template <class T, bool centered, bool wants_dx, int R>
PYKERN_INLINE void backward_rows(const NormBackward& a, int64_t row, float* dweight, float* dbias) {
  const int64_t n = a.n;
  const T* x[R];
  const T* dy[R];
  float mean[R], rstd[R];
  for (int r = 0; r < R; ++r) {
    x[r] = row_of<const T>(a.x, row + r);
    dy[r] = row_of<const T>(a.dy, row + r);
    mean[r] = centered ? a.mean[row + r] : 0;
    rstd[r] = a.rstd[row + r];
  }
  const auto xhat = [&](int r, int64_t i, int count) PYKERN_LAMBDA {
    if constexpr (centered) return (load(x[r] + i, count) - mean[r]) * rstd[r];
    else return load(x[r] + i, count) * rstd[r];
  };

  Vec sum_g[R] = {}, sum_gx[R] = {}, sum_x[R] = {};
  each(n, [&](int64_t i, int count) PYKERN_LAMBDA {
    Vec weight_share = {}, bias_share = {};
    for (int r = 0; r < R; ++r) {
      const Vec grad = load(dy[r] + i, count);
      const Vec normed = xhat(r, i, count);
      weight_share = fma(grad, normed, weight_share);
      bias_share += grad;
      if constexpr (wants_dx) {
        const Vec g = grad * load(a.weight + i, count);
        if constexpr (centered) {
          sum_g[r] += g;
          sum_x[r] += first(normed, count);
        }
        sum_gx[r] = fma(g, normed, sum_gx[r]);
      }
    }
    if (dweight) store(dweight + i, load(dweight + i, count) + weight_share, count);
    if (dbias) store(dbias + i, load(dbias + i, count) + bias_share, count);
  });
  if constexpr (!wants_dx) return;

  for (int r = 0; r < R; ++r) {
    // The mean of xhat is zero but for the rounding of the mean of x, which is taken out again here.
    const float mean_x = sum(sum_x[r]) / n;
    const float mean_gx = sum(sum_gx[r]) / n - mean_x * (sum(sum_g[r]) / n);
    const float mean_g = sum(sum_g[r]) / n - mean_x * mean_gx;
    T* const dx = static_cast<T*>(a.dx) + (row + r) * n;
    const T* const dsummed = a.dsummed.data ? row_of<const T>(a.dsummed, row + r) : nullptr;
    each(n, [&](int64_t i, int count) PYKERN_LAMBDA {
      const Vec g = load(dy[r] + i, count) * load(a.weight + i, count);
      Vec grad = fma(xhat(r, i, count), all(-mean_gx), g - mean_g) * rstd[r];
      if (dsummed) grad += load(dsummed + i, count);
      put(dx + i, grad, count, a.stream);
    });
  }
}

template <class T, bool centered, bool wants_dx>
PYKERN_INLINE void backward_range(const NormBackward& a, int64_t row, int64_t end_row, float* dweight, float* dbias) {
  // The second pass over four rows must find x and dy in the second-level cache, of which a megabyte is common.
  if (a.n * static_cast<int64_t>(sizeof(T)) <= (1 << 20) / 8)
    for (; row + 4 <= end_row; row += 4) backward_rows<T, centered, wants_dx, 4>(a, row, dweight, dbias);
  for (; row < end_row; ++row) backward_rows<T, centered, wants_dx, 1>(a, row, dweight, dbias);
}

template <class T, bool centered>
void backward(const NormBackward& a, int64_t first_row, int64_t end_row, float* dweight, float* dbias) {
  if (a.dx) backward_range<T, centered, true>(a, first_row, end_row, dweight, dbias);
  else backward_range<T, centered, false>(a, first_row, end_row, dweight, dbias);
  if (a.stream) stream_end();
}

template <class T>
void widen_all(const void* in, float offset, float* out, int64_t n) {
  const T* const from = static_cast<const T*>(in);
  each(n, [&](int64_t i, int count) PYKERN_LAMBDA { store(out + i, load(from + i, count) + offset, count); });
}

// Adds up with the rounding error of each step carried along (Kahan): a plain sum of hundreds of chunks would lose to
// torch's. The build allows no contraction and no reassociation, so the compiler keeps it.
struct Total {
  Vec sum = {}, lost = {};

  PYKERN_INLINE void add(Vec value) {
    const Vec corrected = value - lost;
    const Vec next = sum + corrected;
    lost = (next - sum) - corrected;
    sum = next;
  }
};

template <class T>
void reduce(const float* partial, int64_t count, int64_t stride, void* out, int64_t begin, int64_t end) {
  constexpr int kWide = 8;  // columns a page apart are dear, so a visit takes several vectors
  T* const to = static_cast<T*>(out);
  int64_t i = begin;
  for (; i + kWide * kLanes <= end; i += kWide * kLanes) {
    Total totals[kWide];
    for (int64_t j = 0; j < count; ++j)
      for (int k = 0; k < kWide; ++k) totals[k].add(load(partial + j * stride + i + k * kLanes));
    for (int k = 0; k < kWide; ++k) store(to + i + k * kLanes, totals[k].sum);
  }
  each(end - i, [&](int64_t rest, int lanes) PYKERN_LAMBDA {
    Total total;
    for (int64_t j = 0; j < count; ++j) total.add(load(partial + j * stride + i + rest, lanes));
    store(to + i + rest, total.sum, lanes);
  });
}

}  // namespace
}  // namespace pykern

extern "C" const pykern::NormKernels PYKERN_TABLE(norm) = {
    {pykern::forward<float, true>, pykern::forward<pykern::f16, true>, pykern::forward<pykern::bf16, true>},
    {pykern::forward<float, false>, pykern::forward<pykern::f16, false>, pykern::forward<pykern::bf16, false>},
    {pykern::backward<float, true>, pykern::backward<pykern::f16, true>, pykern::backward<pykern::bf16, true>},
    {pykern::backward<float, false>, pykern::backward<pykern::f16, false>, pykern::backward<pykern::bf16, false>},
    {pykern::widen_all<float>, pykern::widen_all<pykern::f16>, pykern::widen_all<pykern::bf16>},
    {pykern::reduce<float>, pykern::reduce<pykern::f16>, pykern::reduce<pykern::bf16>},
};
