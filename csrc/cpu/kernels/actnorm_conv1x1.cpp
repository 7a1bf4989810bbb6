// Small matrix products of actnorm_conv1x1, a tile of positions at a time; compiled once per instruction set.
//
// Where the positions lie next to each other (NCHW), a vector register holds positions of one channel; where the
// channels do (channels last), it holds channels of one position. Both read and write the tensors where they lie if the
// type is that of arithmetic and vectors fit; otherwise a tile goes through a buffer.
#include "cpu/actnorm_conv1x1.h"

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "cpu/kernels/tile_access.h"
#include "cpu/kernels/vector.h"

namespace glow_kernels::GLOW_KERNELS_ISA {
namespace {

// Accumulators that fit into the registers: rows by vectors.
#if defined(__AVX512F__)
constexpr int kRows = 12, kVectors = 2, kSumRows = 4, kSumColumns = 4;
#else
constexpr int kRows = 4, kVectors = 2, kSumRows = 4, kSumColumns = 2;
#endif

// A matrix in the type of arithmetic whose rows lie at a stride; columns lie next to each other.
template <typename A>
struct Rows {
  A* data;
  int64_t stride;
};

// z[row + r][column + c] = shift + sum over k of a[row + r][k] b[k][column + c] for `rows` rows and `vectors` vectors
// of columns. The shift is that of the row, or of the column if `shift_of_column`; null for zero.
template <int rows, int vectors, bool shift_of_column, typename A>
inline __attribute__((always_inline)) void multiply_block(Rows<const A> a, Rows<const A> b, const A* shift, Rows<A> z,
                                                          int64_t inner, int64_t row, int64_t column) {
  Vector<A> total[rows][vectors];
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < vectors; ++c) {
      total[r][c] = Vector<A>{};
      if (shift) {
        total[r][c] += shift_of_column ? vector_at(shift + column + c * kLanes<A>) : Vector<A>{} + shift[row + r];
      }
    }
  }
  for (int64_t k = 0; k < inner; ++k) {
    Vector<A> values[vectors];
    for (int c = 0; c < vectors; ++c) values[c] = vector_at(b.data + k * b.stride + column + c * kLanes<A>);
    for (int r = 0; r < rows; ++r) {
      const A factor = a.data[(row + r) * a.stride + k];
      for (int c = 0; c < vectors; ++c) total[r][c] += factor * values[c];
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < vectors; ++c) vector_at(z.data + (row + r) * z.stride + column + c * kLanes<A>) = total[r][c];
  }
}

template <int rows, int vectors, bool shift_of_column, typename A>
inline int64_t multiply_rows(Rows<const A> a, Rows<const A> b, const A* shift, Rows<A> z, int64_t inner, int64_t row,
                             int64_t end, int64_t column) {
  for (; row + rows <= end; row += rows) {
    multiply_block<rows, vectors, shift_of_column>(a, b, shift, z, inner, row, column);
  }
  return row;
}

// The product for all `rows` rows and the columns of `vectors` vectors.
template <int vectors, bool shift_of_column, typename A>
inline void multiply_columns(Rows<const A> a, Rows<const A> b, const A* shift, Rows<A> z, int64_t rows, int64_t inner,
                             int64_t column) {
  int64_t row = multiply_rows<kRows, vectors, shift_of_column>(a, b, shift, z, inner, 0, rows, column);
  row = multiply_rows<4, vectors, shift_of_column>(a, b, shift, z, inner, row, rows, column);
  multiply_rows<1, vectors, shift_of_column>(a, b, shift, z, inner, row, rows, column);
}

// The product for all rows and `columns` columns, rounded up to whole vectors.
template <bool shift_of_column, typename A>
void multiply(Rows<const A> a, Rows<const A> b, const A* shift, Rows<A> z, int64_t rows, int64_t inner,
              int64_t columns) {
  int64_t column = 0;
  for (; column + (kVectors - 1) * kLanes<A> < columns; column += kVectors * kLanes<A>) {
    multiply_columns<kVectors, shift_of_column>(a, b, shift, z, rows, inner, column);
  }
  for (; column < columns; column += kLanes<A>) {
    multiply_columns<1, shift_of_column>(a, b, shift, z, rows, inner, column);
  }
}

// Memory that a thread keeps between calls, since fresh memory of this size costs page faults.
template <typename A>
class Buffer {
 public:
  A* reserve(int64_t size) {
    if (size > size_) {
      values_.reset(static_cast<A*>(
          std::aligned_alloc(kVectorBytes, (size + kLanes<A>)*sizeof(A) / kVectorBytes * kVectorBytes)));
      size_ = size;
    }
    return values_.get();
  }

 private:
  struct Free {
    void operator()(A* values) const { std::free(values); }
  };
  std::unique_ptr<A, Free> values_;
  int64_t size_ = 0;
};

inline int64_t padded(int64_t channels, int64_t lanes) { return (channels + lanes - 1) / lanes * lanes; }

// A square matrix, or its transpose, and a shift, with their rows padded to whole vectors by zeros, so that products
// may read beyond the last column.
template <typename A>
class PaddedMatrix {
 public:
  PaddedMatrix(Buffer<A>& buffer, const A* matrix, bool transpose, const A* shift, int64_t channels)
      : stride_(padded(channels, kLanes<A>)), values_(buffer.reserve((channels + 1) * stride_)) {
    std::memset(values_, 0, (channels + 1) * stride_ * sizeof(A));
    for (int64_t i = 0; i < channels; ++i) {
      for (int64_t j = 0; j < channels; ++j) {
        values_[i * stride_ + j] = transpose ? matrix[j * channels + i] : matrix[i * channels + j];
      }
      if (shift) values_[channels * stride_ + i] = shift[i];
    }
    shift_ = shift ? values_ + channels * stride_ : nullptr;
  }

  Rows<const A> rows() const { return {values_, stride_}; }
  const A* shift() const { return shift_; }

 private:
  int64_t stride_;
  A* values_;
  const A* shift_;
};

// A tile of positions that is loaded from or stored to a tensor.
template <typename A>
struct TileBuffer {
  A* values;

  TileBuffer(Buffer<A>& buffer, int64_t channels) : values(buffer.reserve(padded(channels, kLanes<A>) * kPositions)) {}
};

// Calls visit(offset, count, data) for the part of every sample that positions [begin, end) touch: where it stands
// among these positions, how many there are, and its first element.
template <typename T, typename F>
inline void for_each_sample(const Positions<T>& x, int64_t begin, int64_t end, const F& visit) {
  const Planes& p = x.planes;
  for (int64_t position = begin; position < end;) {
    const int64_t batch = position / p.positions, inside = position % p.positions;
    const int64_t count = std::min(p.positions - inside, end - position);
    visit(position - begin, count, x.data + batch * p.batch_stride + inside * p.position_stride);
    position += count;
  }
}

// Tiles with a row per channel.
struct Planar {
  static constexpr bool kChannelsInside = false;

  template <typename A, typename T>
  static bool is_in_place(const Positions<T>& x, int64_t begin, int64_t end) {
    return std::is_same_v<std::remove_const_t<T>, A> && x.planes.position_stride == 1 &&
           begin % x.planes.positions + end - begin <= x.planes.positions && (end - begin) % kLanes<A> == 0;
  }

  template <typename A, typename T>
  static Rows<const A> load(const Positions<const T>& x, int64_t begin, int64_t end, TileBuffer<A>& buffer) {
    if constexpr (std::is_same_v<A, T>) {
      if (is_in_place<A>(x, begin, end)) return in_place<const A>(x, begin);
    }
    const Planes& p = x.planes;
    for_each_sample(x, begin, end, [&](int64_t offset, int64_t count, const T* data) {
      for (int64_t channel = 0; channel < p.channels; ++channel) {
        copy_row(data + channel * p.channel_stride, p.position_stride, buffer.values + channel * kPositions + offset, 1,
                 count);
      }
    });
    const int64_t whole = (end - begin + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
    for (int64_t channel = 0; channel < p.channels; ++channel) {
      for (int64_t i = end - begin; i < whole; ++i) buffer.values[channel * kPositions + i] = A(0);
    }
    return {buffer.values, kPositions};
  }

  template <typename A, typename T>
  static Rows<A> destination(const Positions<T>& z, int64_t begin, int64_t end, TileBuffer<A>& buffer) {
    if constexpr (std::is_same_v<A, T>) {
      if (is_in_place<A>(z, begin, end)) return in_place<A>(z, begin);
    }
    return {buffer.values, kPositions};
  }

  template <typename A, typename T>
  static void store(const Rows<A>& tile, const Positions<T>& z, int64_t begin, int64_t end,
                    const TileBuffer<A>& buffer) {
    if (tile.data != buffer.values) return;
    const Planes& p = z.planes;
    for_each_sample(z, begin, end, [&](int64_t offset, int64_t count, T* data) {
      for (int64_t channel = 0; channel < p.channels; ++channel) {
        copy_row(tile.data + channel * kPositions + offset, 1, data + channel * p.channel_stride, p.position_stride,
                 count);
      }
    });
  }

  // tile z = M x + v, given M as it is.
  template <typename A>
  static void multiply_tile(const PaddedMatrix<A>& matrix, Rows<const A> x, Rows<A> z, int64_t channels,
                            int64_t count) {
    multiply<false>(matrix.rows(), x, matrix.shift(), z, channels, channels, count);
  }

  // grad_matrix += g x^T, grad_shift += sum g.
  template <typename A>
  static void accumulate(Rows<const A> g, Rows<const A> x, A* grad_matrix, A* grad_shift, int64_t channels,
                         int64_t count) {
    int64_t row = 0;
    for (; row + kSumRows <= channels; row += kSumRows) sum_rows<kSumRows>(g, x, grad_matrix, channels, count, row);
    for (; row < channels; ++row) sum_rows<1>(g, x, grad_matrix, channels, count, row);
    for (row = 0; row < channels; ++row) {
      Vector<A> total = {};
      for (int64_t i = 0; i < count; i += kLanes<A>) total += vector_at(g.data + row * g.stride + i);
      grad_shift[row] += sum_lanes(reinterpret_cast<const A*>(&total));
    }
  }

 private:
  template <typename A, typename T>
  static Rows<A> in_place(const Positions<T>& x, int64_t begin) {
    const Planes& p = x.planes;
    return {x.data + begin / p.positions * p.batch_stride + begin % p.positions, p.channel_stride};
  }

  template <int rows, typename A>
  static void sum_rows(Rows<const A> g, Rows<const A> x, A* sums, int64_t channels, int64_t count, int64_t row) {
    int64_t column = 0;
    for (; column + kSumColumns <= channels; column += kSumColumns) {
      sum_block<rows, kSumColumns>(g, x, sums, channels, count, row, column);
    }
    for (; column < channels; ++column) sum_block<rows, 1>(g, x, sums, channels, count, row, column);
  }

  // sums[row + r][column + c] += sum over positions of g[row + r] x[column + c].
  template <int rows, int columns, typename A>
  static inline void sum_block(Rows<const A> g, Rows<const A> x, A* sums, int64_t channels, int64_t count, int64_t row,
                               int64_t column) {
    Vector<A> total[rows][columns] = {};
    for (int64_t i = 0; i < count; i += kLanes<A>) {
      Vector<A> values[columns];
      for (int c = 0; c < columns; ++c) values[c] = vector_at(x.data + (column + c) * x.stride + i);
      for (int r = 0; r < rows; ++r) {
        const Vector<A> factor = vector_at(g.data + (row + r) * g.stride + i);
        for (int c = 0; c < columns; ++c) total[r][c] += factor * values[c];
      }
    }
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < columns; ++c) {
        sums[(row + r) * channels + column + c] += sum_lanes(reinterpret_cast<const A*>(&total[r][c]));
      }
    }
  }
};

// Tiles with a row per position, padded to whole vectors where they are in a buffer.
struct Interleaved {
  static constexpr bool kChannelsInside = true;

  template <typename A, typename T>
  static bool is_in_place(const Positions<T>& x, int64_t begin, int64_t end) {
    const Planes& p = x.planes;
    const bool one_stride = p.batch_stride == p.positions * p.position_stride;
    return std::is_same_v<std::remove_const_t<T>, A> && p.channels % kLanes<A> == 0 &&
           (one_stride || begin % p.positions + end - begin <= p.positions);
  }

  template <typename A, typename T>
  static Rows<const A> load(const Positions<const T>& x, int64_t begin, int64_t end, TileBuffer<A>& buffer) {
    if constexpr (std::is_same_v<A, T>) {
      if (is_in_place<A>(x, begin, end)) return in_place<const A>(x, begin);
    }
    const Planes& p = x.planes;
    const int64_t stride = padded(p.channels, kLanes<A>);
    for_each_sample(x, begin, end, [&](int64_t offset, int64_t count, const T* data) {
      for (int64_t i = 0; i < count; ++i) {
        A* row = buffer.values + (offset + i) * stride;
        copy_row(data + i * p.position_stride, 1, row, 1, p.channels);
        for (int64_t channel = p.channels; channel < stride; ++channel) row[channel] = A(0);
      }
    });
    return {buffer.values, stride};
  }

  template <typename A, typename T>
  static Rows<A> destination(const Positions<T>& z, int64_t begin, int64_t end, TileBuffer<A>& buffer) {
    if constexpr (std::is_same_v<A, T>) {
      if (is_in_place<A>(z, begin, end)) return in_place<A>(z, begin);
    }
    return {buffer.values, padded(z.planes.channels, kLanes<A>)};
  }

  template <typename A, typename T>
  static void store(const Rows<A>& tile, const Positions<T>& z, int64_t begin, int64_t end,
                    const TileBuffer<A>& buffer) {
    if (tile.data != buffer.values) return;
    const Planes& p = z.planes;
    for_each_sample(z, begin, end, [&](int64_t offset, int64_t count, T* data) {
      for (int64_t i = 0; i < count; ++i) {
        copy_row(tile.data + (offset + i) * tile.stride, 1, data + i * p.position_stride, 1, p.channels);
      }
    });
  }

  // tile z = M x + v, given the transpose of M.
  template <typename A>
  static void multiply_tile(const PaddedMatrix<A>& transposed, Rows<const A> x, Rows<A> z, int64_t channels,
                            int64_t count) {
    multiply<true>(x, transposed.rows(), transposed.shift(), z, count, channels, channels);
  }

  // grad_matrix += g x^T, grad_shift += sum g.
  template <typename A>
  static void accumulate(Rows<const A> g, Rows<const A> x, A* grad_matrix, A* grad_shift, int64_t channels,
                         int64_t count) {
    int64_t column = 0;
    for (; column + (kVectors - 1) * kLanes<A> < channels; column += kVectors * kLanes<A>) {
      sum_columns<kVectors>(g, x, grad_matrix, channels, count, column);
    }
    for (; column < channels; column += kLanes<A>) sum_columns<1>(g, x, grad_matrix, channels, count, column);
    for (column = 0; column < channels; column += kLanes<A>) {
      Vector<A> total = {};
      for (int64_t i = 0; i < count; ++i) total += vector_at(g.data + i * g.stride + column);
      add_lanes<A>(total, grad_shift + column, channels - column);
    }
  }

 private:
  template <typename A, typename T>
  static Rows<A> in_place(const Positions<T>& x, int64_t begin) {
    const Planes& p = x.planes;
    return {x.data + begin / p.positions * p.batch_stride + begin % p.positions * p.position_stride, p.position_stride};
  }

  template <typename A>
  static inline void add_lanes(const Vector<A>& total, A* target, int64_t count) {
    for (int64_t lane = 0; lane < std::min(count, kLanes<A>); ++lane) target[lane] += total[lane];
  }

  template <int vectors, typename A>
  static void sum_columns(Rows<const A> g, Rows<const A> x, A* sums, int64_t channels, int64_t count, int64_t column) {
    int64_t row = 0;
    for (; row + kRows <= channels; row += kRows) sum_block<kRows, vectors>(g, x, sums, channels, count, row, column);
    for (; row < channels; ++row) sum_block<1, vectors>(g, x, sums, channels, count, row, column);
  }

  // sums[row + r][column + c] += sum over positions of g[row + r] x[column + c], for vectors of columns.
  template <int rows, int vectors, typename A>
  static inline void sum_block(Rows<const A> g, Rows<const A> x, A* sums, int64_t channels, int64_t count, int64_t row,
                               int64_t column) {
    Vector<A> total[rows][vectors] = {};
    for (int64_t i = 0; i < count; ++i) {
      Vector<A> values[vectors];
      for (int c = 0; c < vectors; ++c) values[c] = vector_at(x.data + i * x.stride + column + c * kLanes<A>);
      for (int r = 0; r < rows; ++r) {
        const A factor = g.data[i * g.stride + row + r];
        for (int c = 0; c < vectors; ++c) total[r][c] += factor * values[c];
      }
    }
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < vectors; ++c) {
        const int64_t first = column + c * kLanes<A>;
        add_lanes<A>(total[r][c], sums + (row + r) * channels + first, channels - first);
      }
    }
  }
};

// Whether a tensor that is there has its channels next to each other.
template <typename T>
bool channels_inside(const Positions<T>& x) {
  return x.data == nullptr || (x.planes.channel_stride == 1 && x.planes.channels > 1 && x.planes.position_stride != 1);
}

template <typename Layout, typename T>
void apply_as(Positions<const T> x, const compute_t<T>* matrix, const compute_t<T>* shift, Positions<T> z,
              int64_t begin, int64_t end) {
  using A = compute_t<T>;
  const int64_t channels = x.planes.channels;
  static thread_local Buffer<A> buffers[3];
  const PaddedMatrix<A> map(buffers[0], matrix, Layout::kChannelsInside, shift, channels);
  TileBuffer<A> x_buffer(buffers[1], channels), z_buffer(buffers[2], channels);
  for (int64_t start = begin; start < end; start += kPositions) {
    const int64_t stop = std::min(start + kPositions, end);
    const Rows<const A> inputs = Layout::load(x, start, stop, x_buffer);
    const Rows<A> outputs = Layout::destination(z, start, stop, z_buffer);
    Layout::multiply_tile(map, inputs, outputs, channels, stop - start);
    Layout::store(outputs, z, start, stop, z_buffer);
  }
}

template <typename T>
void apply(Positions<const T> x, const compute_t<T>* matrix, const compute_t<T>* shift, Positions<T> z, int64_t begin,
           int64_t end) {
  if (channels_inside(x) && channels_inside(z)) return apply_as<Interleaved>(x, matrix, shift, z, begin, end);
  return apply_as<Planar>(x, matrix, shift, z, begin, end);
}

template <typename Layout, typename T>
void backward_as(const LinearBackward<T>& arguments, int64_t begin, int64_t end, compute_t<T>* grad_matrix,
                 compute_t<T>* grad_shift) {
  using A = compute_t<T>;
  const int64_t channels = arguments.grad.planes.channels;
  constexpr bool inside = Layout::kChannelsInside;
  static thread_local Buffer<A> buffers[5];
  const PaddedMatrix<A> transposed(buffers[0], arguments.matrix, !inside, nullptr, channels);
  const PaddedMatrix<A> inverse(buffers[1], arguments.inverse ? arguments.inverse : arguments.matrix, inside,
                                arguments.inverse_shift, channels);
  TileBuffer<A> g_buffer(buffers[2], channels), data_buffer(buffers[3], channels), result_buffer(buffers[4], channels);
  for (int64_t start = begin; start < end; start += kPositions) {
    const int64_t stop = std::min(start + kPositions, end), count = stop - start;
    const Rows<const A> g = Layout::load(arguments.grad, start, stop, g_buffer);
    Rows<const A> x = Layout::load(arguments.data, start, stop, data_buffer);
    if (arguments.inverse) {
      const Rows<A> restored = Layout::destination(arguments.x, start, stop, result_buffer);
      Layout::multiply_tile(inverse, x, restored, channels, count);
      Layout::store(restored, arguments.x, start, stop, result_buffer);
      x = {restored.data, restored.stride};
    }
    Layout::accumulate(g, x, grad_matrix, grad_shift, channels, count);
    if (arguments.grad_x.data == nullptr) continue;
    const Rows<A> grad_x = Layout::destination(arguments.grad_x, start, stop, result_buffer);
    Layout::multiply_tile(transposed, g, grad_x, channels, count);
    Layout::store(grad_x, arguments.grad_x, start, stop, result_buffer);
  }
}

template <typename T>
void backward(const LinearBackward<T>& arguments, int64_t begin, int64_t end, compute_t<T>* grad_matrix,
              compute_t<T>* grad_shift) {
  if (channels_inside(arguments.grad) && channels_inside(arguments.data) && channels_inside(arguments.x) &&
      channels_inside(arguments.grad_x)) {
    return backward_as<Interleaved>(arguments, begin, end, grad_matrix, grad_shift);
  }
  return backward_as<Planar>(arguments, begin, end, grad_matrix, grad_shift);
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
