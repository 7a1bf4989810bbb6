// Small matrix products of actnorm_conv1x1, position by position; compiled once per instruction set.
#include "cpu/actnorm_conv1x1.h"

#include <algorithm>

#include "cpu/kernels/tile_access.h"

namespace glow_kernels::GLOW_KERNELS_ISA {
namespace {

// Size of a vector register, and how many rows by vectors of accumulators fit into the registers.
#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64;
constexpr int kRows = 6, kColumns = 4;
#elif defined(__AVX__)
constexpr int64_t kVectorBytes = 32;
constexpr int kRows = 4, kColumns = 2;
#else
constexpr int64_t kVectorBytes = 16;
constexpr int kRows = 4, kColumns = 2;
#endif

template <typename A>
struct Vector {
  typedef A type __attribute__((vector_size(kVectorBytes), may_alias));
  static constexpr int64_t lanes = kVectorBytes / sizeof(A);
};

// Calls visit(offset, tile): for every sample that positions [begin, end) touch, where its part stands in a buffer of
// kPositions columns, and the part itself.
template <typename T, typename F>
inline void for_each_sample(const Positions<T>& x, int64_t begin, int64_t end, const F& visit) {
  const Planes& p = x.planes;
  for (int64_t position = begin; position < end;) {
    const int64_t batch = position / p.positions, inside = position % p.positions;
    const int64_t count = std::min(p.positions - inside, end - position);
    T* data = x.data + batch * p.batch_stride + inside * p.position_stride;
    visit(position - begin, count, data);
    position += count;
  }
}

// buffer[c * kPositions + i] = x[c][begin + i]; the rest of each row is zero.
template <typename A, typename T>
void load_positions(const Positions<const T>& x, int64_t begin, int64_t end, A* __restrict buffer) {
  const Planes& p = x.planes;
  for_each_sample(x, begin, end, [&](int64_t offset, int64_t count, const T* data) {
    for (int64_t channel = 0; channel < p.channels; ++channel) {
      const Strided<const T> row{data + channel * p.channel_stride, 0, p.position_stride};
      copy_in(row, 1, count, buffer + channel * kPositions + offset);
    }
  });
  for (int64_t channel = 0; channel < p.channels; ++channel) {
    for (int64_t i = end - begin; i < kPositions; ++i) buffer[channel * kPositions + i] = A(0);
  }
}

// z[c][begin + i] = buffer[c * kPositions + i]
template <typename A, typename T>
void store_positions(const A* __restrict buffer, const Positions<T>& z, int64_t begin, int64_t end) {
  const Planes& p = z.planes;
  for_each_sample(z, begin, end, [&](int64_t offset, int64_t count, T* data) {
    for (int64_t channel = 0; channel < p.channels; ++channel) {
      const Strided<T> row{data + channel * p.channel_stride, 0, p.position_stride};
      store(buffer + channel * kPositions + offset, 1, count, row);
    }
  });
}

// Rows [row, row + rows) of z = M x + v for kPositions columns.
template <int rows, typename A>
inline void multiply_rows(const A* __restrict matrix, const A* shift, const A* __restrict x, A* __restrict z,
                          int64_t channels, int64_t row) {
  using V = typename Vector<A>::type;
  constexpr int64_t lanes = Vector<A>::lanes;
  for (int64_t column = 0; column < kPositions; column += kColumns * lanes) {
    V total[rows][kColumns];
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < kColumns; ++c) total[r][c] = V{} + (shift ? shift[row + r] : A(0));
    }
    for (int64_t k = 0; k < channels; ++k) {
      const V* values = reinterpret_cast<const V*>(x + k * kPositions + column);
      for (int r = 0; r < rows; ++r) {
        for (int c = 0; c < kColumns; ++c) total[r][c] += matrix[(row + r) * channels + k] * values[c];
      }
    }
    for (int r = 0; r < rows; ++r) {
      V* target = reinterpret_cast<V*>(z + (row + r) * kPositions + column);
      for (int c = 0; c < kColumns; ++c) target[c] = total[r][c];
    }
  }
}

template <typename A>
void multiply(const A* matrix, const A* shift, const A* x, A* z, int64_t channels) {
  int64_t row = 0;
  for (; row + kRows <= channels; row += kRows) multiply_rows<kRows>(matrix, shift, x, z, channels, row);
  for (; row + 2 <= channels; row += 2) multiply_rows<2>(matrix, shift, x, z, channels, row);
  for (; row < channels; ++row) multiply_rows<1>(matrix, shift, x, z, channels, row);
}

// The sum of a vector's lanes, by halves.
template <typename A, int64_t bytes>
inline A sum_lanes(const A* lanes) {
  if constexpr (bytes == sizeof(A)) {
    return *lanes;
  } else {
    typedef A Half __attribute__((vector_size(bytes / 2)));
    Half halves[2];
    std::memcpy(halves, lanes, bytes);
    const Half total = halves[0] + halves[1];
    return sum_lanes<A, bytes / 2>(reinterpret_cast<const A*>(&total));
  }
}

// outer[row + r][k + c] += sum over positions of g[row + r] x[k + c].
template <int rows, int columns, typename A>
inline void accumulate_block(const A* __restrict g, const A* __restrict x, A* __restrict outer, int64_t channels,
                             int64_t row, int64_t k) {
  using V = typename Vector<A>::type;
  V total[rows][columns] = {};
  for (int64_t position = 0; position < kPositions; position += Vector<A>::lanes) {
    V values[columns];
    for (int c = 0; c < columns; ++c) values[c] = *reinterpret_cast<const V*>(x + (k + c) * kPositions + position);
    for (int r = 0; r < rows; ++r) {
      const V factor = *reinterpret_cast<const V*>(g + (row + r) * kPositions + position);
      for (int c = 0; c < columns; ++c) total[r][c] += factor * values[c];
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) {
      outer[(row + r) * channels + k + c] += sum_lanes<A, kVectorBytes>(reinterpret_cast<const A*>(&total[r][c]));
    }
  }
}

template <int rows, typename A>
inline void accumulate_rows(const A* g, const A* x, A* outer, int64_t channels, int64_t row) {
  int64_t k = 0;
  for (; k + 2 <= channels; k += 2) accumulate_block<rows, 2>(g, x, outer, channels, row, k);
  for (; k < channels; ++k) accumulate_block<rows, 1>(g, x, outer, channels, row, k);
}

template <typename A>
void accumulate(const A* g, const A* x, A* grad_matrix, A* grad_shift, int64_t channels) {
  using V = typename Vector<A>::type;
  int64_t row = 0;
  for (; row + 4 <= channels; row += 4) accumulate_rows<4>(g, x, grad_matrix, channels, row);
  for (; row < channels; ++row) accumulate_rows<1>(g, x, grad_matrix, channels, row);
  for (row = 0; row < channels; ++row) {
    V total = {};
    for (int64_t position = 0; position < kPositions; position += Vector<A>::lanes) {
      total += *reinterpret_cast<const V*>(g + row * kPositions + position);
    }
    grad_shift[row] += sum_lanes<A, kVectorBytes>(reinterpret_cast<const A*>(&total));
  }
}

template <typename T>
void apply(Positions<const T> x, const compute_t<T>* matrix, const compute_t<T>* shift, Positions<T> z, int64_t begin,
           int64_t end) {
  using A = compute_t<T>;
  alignas(kVectorBytes) A inputs[kMaxChannels * kPositions], outputs[kMaxChannels * kPositions];
  for (int64_t start = begin; start < end; start += kPositions) {
    const int64_t stop = std::min(start + kPositions, end);
    load_positions(x, start, stop, inputs);
    multiply(matrix, shift, inputs, outputs, x.planes.channels);
    store_positions(outputs, z, start, stop);
  }
}

template <typename T>
void backward(Positions<const T> grad, Positions<const T> x, const compute_t<T>* transposed, Positions<T> grad_x,
              int64_t begin, int64_t end, compute_t<T>* grad_matrix, compute_t<T>* grad_shift) {
  using A = compute_t<T>;
  const int64_t channels = x.planes.channels;
  alignas(kVectorBytes) A g[kMaxChannels * kPositions], other[kMaxChannels * kPositions];
  for (int64_t start = begin; start < end; start += kPositions) {
    const int64_t stop = std::min(start + kPositions, end);
    load_positions(grad, start, stop, g);
    load_positions(x, start, stop, other);
    accumulate(g, other, grad_matrix, grad_shift, channels);
    if (grad_x.data == nullptr) continue;
    multiply(transposed, static_cast<const A*>(nullptr), g, other, channels);
    store_positions(other, grad_x, start, stop);
  }
}

}  // namespace

template <typename T>
LinearKernels<T> linear_kernels() {
  return {apply<T>, backward<T>};
}

template LinearKernels<float> linear_kernels();
template LinearKernels<BFloat16> linear_kernels();
template LinearKernels<Half> linear_kernels();
template LinearKernels<double> linear_kernels();

}  // namespace glow_kernels::GLOW_KERNELS_ISA
