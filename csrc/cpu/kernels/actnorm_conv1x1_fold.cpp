// Folding ActNorm and the 1x1 convolution into one matrix, and computing the weight from its LU factors; compiled once
// per instruction set. The mathematics is described in glow_kernels/ops/actnorm_conv1x1.py.
#include "cpu/actnorm_conv1x1_fold.h"

#include <numeric>

#include "cpu/kernels/small_matrix.h"

namespace glow_kernels::GLOW_KERNELS_ISA {
namespace {

// Buffers for the matrices of a step, in double.
KeptBuffer<double>& buffer(int index) {
  static thread_local KeptBuffer<double> kept[4];
  return kept[index];
}

// exp(sign log_scale), and the sum of log_scale.
struct Scale {
  double values[kMaxChannels];
  double sum_of_logs = 0;

  template <typename A>
  Scale(int64_t n, const A* log_scale, double sign) {
    for (int64_t i = 0; i < n; ++i) {
      values[i] = std::exp(sign * log_scale[i]);
      sum_of_logs += log_scale[i];
    }
  }
};

template <typename A>
void fold(int64_t n, const StepParameters<const A>& step, const Folded<A>& result) {
  const Scale s(n, step.log_scale, 1);
  for (int64_t i = 0; i < n; ++i) {
    const A *w = step.weight + i * n, *b = step.bias;
    A* m = result.matrix + i * n;
    double shift = 0;
#pragma omp simd reduction(+ : shift)
    for (int64_t j = 0; j < n; ++j) {
      const double value = w[j] * s.values[j];
      m[j] = static_cast<A>(value);
      shift += value * b[j];
    }
    result.shift[i] = static_cast<A>(shift);
  }
}

template <typename A>
double fold_log_det(int64_t n, const StepParameters<const A>& step) {
  const double of_scales = std::accumulate(step.log_scale, step.log_scale + n, 0.0);
  if (step.weight_log_det) return of_scales + *step.weight_log_det;
  PaddedMatrix<double> weight(buffer(0), Rows<const A>{step.weight, n}, false, nullptr, n);
  return of_scales + log_abs_det(n, weight.rows());
}

template <typename A>
double fold_inverse(int64_t n, const StepParameters<const A>& step, const Folded<A>& result) {
  const Scale inverse_s(n, step.log_scale, -1);
  PaddedMatrix<double> inverse(buffer(0), Rows<const A>{step.weight, n}, false, nullptr, n);
  const Rows<double> rows = inverse.rows();
  const double log_det = invert(n, rows);
  double zero = 0;  // NaN if an element is not finite
  for (int64_t i = 0; i < n; ++i) {
    const double *row = rows.data + i * rows.stride, factor = inverse_s.values[i];
    A* m = result.matrix + i * n;
#pragma omp simd reduction(+ : zero)
    for (int64_t j = 0; j < n; ++j) {
      m[j] = static_cast<A>(row[j] * factor);
      zero += row[j] * factor * 0.0;
    }
    result.shift[i] = -step.bias[i];
  }
  if (zero != 0.0) std::fill_n(result.matrix, n * n, std::numeric_limits<A>::quiet_NaN());
  return -inverse_s.sum_of_logs - (step.weight_log_det ? *step.weight_log_det : log_det);
}

// W^-1, or its transpose, from `inverse` = M^-1 = diag(1/s) W^-1 or, if that is null, from W.
template <typename A>
PaddedMatrix<double> inverse_of(int64_t n, const A* weight, const A* inverse, const Scale& s, bool transpose) {
  PaddedMatrix<double> matrix(buffer(0), Rows<const A>{inverse ? inverse : weight, n}, transpose, nullptr, n);
  const Rows<double> rows = matrix.rows();
  if (!inverse) {
    invert(n, rows);
    return matrix;
  }
  for (int64_t i = 0; i < n; ++i) {
    double* row = rows.data + i * rows.stride;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) row[j] *= transpose ? s.values[j] : s.values[i];
  }
  return matrix;
}

template <typename A>
void fold_backward(int64_t n, const Folded<const A>& grad, double grad_log_det, const StepParameters<const A>& step,
                   const A* inverse, const StepParameters<A>& result) {
  const Scale s(n, step.log_scale, 1);
  double in_log_scale[kMaxChannels], in_bias[kMaxChannels], zero_row[kMaxChannels];
  std::fill_n(in_log_scale, n, grad_log_det);
  std::fill_n(in_bias, n, 0.0);
  // The gradient of log|det W| with respect to W, W^-T, and its factor.
  const double in_log_det = step.weight_log_det ? 0.0 : grad_log_det;
  Rows<double> of_log_det{zero_row, 0};
  if (step.weight_log_det) {
    std::fill_n(zero_row, n, 0.0);
  } else {
    of_log_det = inverse_of(n, step.weight, inverse, s, true).rows();
  }
  for (int64_t i = 0; i < n; ++i) {
    const A *w = step.weight + i * n, *in_matrix = grad.matrix + i * n, *b = step.bias;
    const double in_shift = grad.shift[i];
    const double* row = of_log_det.data + i * of_log_det.stride;
    A* in_weight = result.weight + i * n;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      // The gradient of M, with the part that comes from v = M b.
      const double total = in_matrix[j] + in_shift * b[j], scaled = s.values[j] * w[j];
      in_weight[j] = static_cast<A>(total * s.values[j] + in_log_det * row[j]);
      in_log_scale[j] += scaled * total;
      in_bias[j] += scaled * in_shift;
    }
  }
  std::copy_n(in_log_scale, n, result.log_scale);
  std::copy_n(in_bias, n, result.bias);
  if (step.weight_log_det) *result.weight_log_det = static_cast<A>(grad_log_det);
}

// With N = M^-1 and l = grad_log_det: dlog_s_i = -sum_j dN_ij N_ij - l and dW = -(N^T dN + l) W^-T, where dW has no l
// if log|det W| is given.
template <typename A>
void fold_inverse_backward(int64_t n, const Folded<const A>& grad, double grad_log_det,
                           const StepParameters<const A>& step, const A* inverse, const StepParameters<A>& result) {
  const Scale s(n, step.log_scale, 1);
  const Rows<double> matrix = inverse_of(n, step.weight, inverse, s, false).rows();
  const PaddedMatrix<double> transposed(buffer(1), matrix, true, nullptr, n);
  PaddedMatrix<double> in_matrix(buffer(2), Rows<const A>{grad.matrix, n}, false, nullptr, n);
  const Rows<double> in_rows = in_matrix.rows();
  for (int64_t i = 0; i < n; ++i) {
    double *row = matrix.data + i * matrix.stride, *in_row = in_rows.data + i * in_rows.stride, total = 0;
    const double factor = 1.0 / s.values[i];
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < n; ++j) {
      row[j] *= factor;
      total += in_row[j] * row[j];
    }
    result.log_scale[i] = static_cast<A>(-total - grad_log_det);
    result.bias[i] = -grad.shift[i];
  }
  double* values = buffer(3).reserve(n * matrix.stride);
  const Rows<double> product{values, matrix.stride};
  multiply<Small::left, Stores::cached, Start::shift, double>(
      {matrix.data, matrix.stride}, {in_rows.data, in_rows.stride}, nullptr, product, n, n, n);
  if (!step.weight_log_det) {
    for (int64_t i = 0; i < n; ++i) values[i * product.stride + i] += grad_log_det;
  }
  // Overwrites dN, which is no longer needed.
  multiply(n, {values, product.stride}, transposed.rows(), in_rows);
  for (int64_t i = 0; i < n; ++i) {
    const double* row = in_rows.data + i * in_rows.stride;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) result.weight[i * n + j] = static_cast<A>(-row[j]);
  }
  if (step.weight_log_det) *result.weight_log_det = static_cast<A>(-grad_log_det);
}

// L with its unit diagonal, and U + diag(s), or their transposes. Elements outside the triangles are cleared, since an
// optimizer with momentum may write there.
template <typename A>
struct Triangles {
  PaddedMatrix<double> lower, upper;

  Triangles(int64_t n, const LuFactors<const A>& factors, bool transpose)
      : lower(buffer(0), Rows<const A>{factors.lower, n}, transpose, nullptr, n),
        upper(buffer(1), Rows<const A>{factors.upper, n}, transpose, nullptr, n) {
    Rows<double> below = transpose ? upper.rows() : lower.rows(), above = transpose ? lower.rows() : upper.rows();
    for (int64_t i = 0; i < n; ++i) {
      std::fill(below.data + i * below.stride + i, below.data + i * below.stride + n, 0.0);
      std::fill_n(above.data + i * above.stride, i, 0.0);
      lower.rows().data[i * below.stride + i] = 1.0;
      upper.rows().data[i * above.stride + i] = factors.diagonal_sign[i] * std::exp(double{factors.log_diagonal[i]});
    }
  }
};

// to[i] += sum over k of p[i][k] from[k], or of p[k][i] from[k] if `transpose`; p is a permutation, so mostly zeros.
template <typename A, typename From>
void permute(int64_t n, const A* p, bool transpose, Rows<const From> from, Rows<double> to) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = 0; k < n; ++k) {
      const double factor = p[i * n + k];
      if (factor == 0.0) continue;
      const From* source = from.data + (transpose ? i : k) * from.stride;
      double* target = to.data + (transpose ? k : i) * to.stride;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) target[j] += factor * source[j];
    }
  }
}

// A matrix of zeros.
Rows<double> zeros(int64_t n, int index) {
  const int64_t stride = padded(n, kLanes<double>);
  double* values = buffer(index).reserve(n * stride);
  std::fill_n(values, n * stride, 0.0);
  return {values, stride};
}

template <typename A>
double lu_weight(int64_t n, const LuFactors<const A>& factors, A* weight) {
  const Triangles<A> triangles(n, factors, false);
  const Rows<double> product = zeros(n, 2), permuted = zeros(n, 3);
  multiply(n, triangles.lower.rows(), triangles.upper.rows(), product);
  permute(n, factors.permutation, false, Rows<const double>{product.data, product.stride}, permuted);
  double log_det = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) weight[i * n + j] = static_cast<A>(permuted.data[i * permuted.stride + j]);
    log_det += factors.log_diagonal[i];
  }
  return log_det;
}

template <typename A>
void lu_weight_backward(int64_t n, const A* grad_weight, double grad_log_det, const LuFactors<const A>& factors,
                        const LuFactors<A>& result) {
  const Triangles<A> transposed(n, factors, true);
  const Rows<double> permuted = zeros(n, 2), product = zeros(n, 3);
  permute(n, factors.permutation, true, Rows<const A>{grad_weight, n}, permuted);
  const Rows<const double> in_product{permuted.data, permuted.stride};
  multiply(n, in_product, transposed.upper.rows(), product);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j)
      result.lower[i * n + j] = j < i ? static_cast<A>(product.data[i * product.stride + j]) : A(0);
  }
  multiply(n, transposed.lower.rows(), in_product, product);
  const Rows<const double> upper = transposed.upper.rows();
  for (int64_t i = 0; i < n; ++i) {
    const double* row = product.data + i * product.stride;
    for (int64_t j = 0; j < n; ++j) result.upper[i * n + j] = j > i ? static_cast<A>(row[j]) : A(0);
    result.log_diagonal[i] = static_cast<A>(row[i] * upper.data[i * upper.stride + i] + grad_log_det);
  }
}

}  // namespace

template <typename A>
FoldKernels<A> fold_kernels() {
  return {fold<A>,      fold_log_det<A>,      fold_inverse<A>, fold_backward<A>, fold_inverse_backward<A>,
          lu_weight<A>, lu_weight_backward<A>};
}

template FoldKernels<float> fold_kernels();
template FoldKernels<double> fold_kernels();

}  // namespace glow_kernels::GLOW_KERNELS_ISA
