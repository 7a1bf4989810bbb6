// Products of small matrices with tiles, and sums of outer products over tiles; compiled once per instruction set.
#pragma once

#include "cpu/kernels/vector.h"

namespace glow_kernels::GLOW_KERNELS_ISA {

// Register blocking: how many rows and vectors (or columns) of accumulators fit into the registers.
#if defined(__AVX512F__)
constexpr int kRows = 6, kVectors = 4, kSumRows = 6, kSumColumns = 4, kOuterRows = 12, kOuterVectors = 2;
#elif defined(__AVX__)
constexpr int kRows = 6, kVectors = 2, kSumRows = 4, kSumColumns = 2, kOuterRows = 6, kOuterVectors = 2;
#else
constexpr int kRows = 4, kVectors = 2, kSumRows = 4, kSumColumns = 2, kOuterRows = 4, kOuterVectors = 2;
#endif

// A row-major matrix in the type of arithmetic.
template <typename A>
struct Rows {
  A* data;
  int64_t stride;

  Rows<const A> as_const() const { return {data, stride}; }
};

// A matrix in which only the columns of one vector are contiguous: vector v of row 0 is at offsets[v]. The next tile to
// be read begins `ahead` elements after this one; 0 if that is unknown.
template <typename A>
struct VectorRows {
  A* data;
  int64_t stride;
  const int64_t* offsets;
  int64_t ahead;

  A* at(int64_t row, int64_t column) const { return data + row * stride + offsets[column / kLanes<A>]; }
  // Whether the vector that begins at `column` directly follows the one before it in memory.
  bool follows(int64_t column) const { return at(0, column) == at(0, column - kLanes<A>) + kLanes<A>; }
  VectorRows<const A> as_const() const { return {data, stride, offsets, ahead}; }
};

// Which operand of a product is the small matrix. On the left it is given as its transpose, so that the factors of one
// step of the inner loop are contiguous, and the shift has an element per row; on the right, an element per column.
enum class Small { left, right };

// What a product is added to: the shift (null for zero), or the previous contents of the result.
enum class Start { shift, result };

// z[row + r][column + c] = start + sum over k of a[row + r][k] b[k][column + c] for `rows` rows and `vectors` vectors
// of columns.
template <int rows, int vectors, Small small, Stores stores, Start start, typename A>
inline __attribute__((always_inline)) void multiply_block(Rows<const A> a, Rows<const A> b, const A* shift, Rows<A> z,
                                                          int64_t inner, int64_t row, int64_t column) {
  constexpr bool transposed = small == Small::left;
  Vector<A> total[rows][vectors];
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < vectors; ++c) {
      const A* there = z.data + (row + r) * z.stride + column + c * kLanes<A>;
      total[r][c] = start == Start::result ? vector_at(there) : Vector<A>{};
      if (shift) total[r][c] += transposed ? Vector<A>{} + shift[row + r] : vector_at(shift + column + c * kLanes<A>);
    }
  }
  const A* factors = a.data + (transposed ? row : row * a.stride);
  const A* from = b.data + column;
  for (int64_t k = 0; k < inner; ++k) {
    Vector<A> values[vectors];
    for (int c = 0; c < vectors; ++c) values[c] = vector_at(from + c * kLanes<A>);
    // Prefetches for the next block: with a stream per row, the hardware does not.
    if (transposed) {
      for (int c = 0; c < vectors; ++c) __builtin_prefetch(from + (vectors + c) * kLanes<A>);
    }
    for (int r = 0; r < rows; ++r) {
      const A factor = factors[transposed ? r : r * a.stride];
      for (int c = 0; c < vectors; ++c) total[r][c] += factor * values[c];
    }
    factors += transposed ? a.stride : 1;
    from += b.stride;
  }
  A* to = z.data + row * z.stride + column;
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < vectors; ++c) put<stores>(to + c * kLanes<A>, total[r][c]);
    to += z.stride;
  }
}

template <int rows, int vectors, Small small, Stores stores, Start start, typename A>
inline int64_t multiply_rows(Rows<const A> a, Rows<const A> b, const A* shift, Rows<A> z, int64_t inner, int64_t row,
                             int64_t end, int64_t column) {
  for (; row + rows <= end; row += rows) {
    multiply_block<rows, vectors, small, stores, start>(a, b, shift, z, inner, row, column);
  }
  return row;
}

// The product for all `rows` rows and the columns of `vectors` vectors.
template <int block_rows, int vectors, Small small, Stores stores, Start start, typename A>
inline void multiply_columns(Rows<const A> a, Rows<const A> b, const A* shift, Rows<A> z, int64_t rows, int64_t inner,
                             int64_t column) {
  int64_t row = multiply_rows<block_rows, vectors, small, stores, start>(a, b, shift, z, inner, 0, rows, column);
  row = multiply_rows<2, vectors, small, stores, start>(a, b, shift, z, inner, row, rows, column);
  multiply_rows<1, vectors, small, stores, start>(a, b, shift, z, inner, row, rows, column);
}

// The product for all rows and `columns` columns, rounded up to whole vectors.
template <Small small, Stores stores = Stores::cached, Start start = Start::shift, typename A, int rows_at_once = kRows,
          int vectors_at_once = kVectors>
void multiply(Rows<const A> a, Rows<const A> b, const A* shift, Rows<A> z, int64_t rows, int64_t inner,
              int64_t columns) {
  int64_t column = 0;
  for (; column + (vectors_at_once - 1) * kLanes<A> < columns; column += vectors_at_once * kLanes<A>) {
    multiply_columns<rows_at_once, vectors_at_once, small, stores, start>(a, b, shift, z, rows, inner, column);
  }
  for (; column < columns; column += kLanes<A>)
    multiply_columns<rows_at_once, 1, small, stores, start>(a, b, shift, z, rows, inner, column);
}

// sums[row + r][column + c] += sum over i < count of g[row + r][i] x[column + c][i]: the columns are summed over.
template <int rows, int columns, typename A>
inline __attribute__((always_inline)) void sum_block(VectorRows<const A> g, VectorRows<const A> x, A* sums,
                                                     int64_t channels, int64_t count, int64_t row, int64_t column) {
  constexpr int kIntoL2 = 2;
  Vector<A> total[rows * columns] = {};
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    const A *left = g.at(row, i), *right = x.at(column, i);
    Vector<A> values[columns];
    for (int c = 0; c < columns; ++c) values[c] = vector_at(right + c * x.stride);
    // Prefetches each vector of the next tile once: the hardware cannot predict where that begins.
    if (row == 0) {
      for (int c = 0; c < columns; ++c) __builtin_prefetch(right + c * x.stride + x.ahead, 0, kIntoL2);
    }
    if (column == 0) {
      for (int r = 0; r < rows; ++r) __builtin_prefetch(left + r * g.stride + g.ahead, 0, kIntoL2);
    }
    for (int r = 0; r < rows; ++r) {
      const Vector<A> factor = vector_at(left + r * g.stride);
      for (int c = 0; c < columns; ++c) total[r * columns + c] += factor * values[c];
    }
  }
  A added[rows * columns];
  sum_lanes<rows * columns>(total, added);
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) sums[(row + r) * channels + column + c] += added[r * columns + c];
  }
}

template <int rows, typename A>
inline void sum_rows(VectorRows<const A> g, VectorRows<const A> x, A* sums, int64_t channels, int64_t count,
                     int64_t row) {
  int64_t column = 0;
  for (; column + kSumColumns <= channels; column += kSumColumns) {
    sum_block<rows, kSumColumns>(g, x, sums, channels, count, row, column);
  }
  for (; column < channels; ++column) sum_block<rows, 1>(g, x, sums, channels, count, row, column);
}

// sums[row][column] += sum over i < count of g[row][i] x[column][i], for channels x channels sums.
template <typename A>
void sum_over_columns(VectorRows<const A> g, VectorRows<const A> x, A* sums, int64_t channels, int64_t count) {
  int64_t row = 0;
  for (; row + kSumRows <= channels; row += kSumRows) sum_rows<kSumRows>(g, x, sums, channels, count, row);
  for (; row < channels; ++row) sum_rows<1>(g, x, sums, channels, count, row);
}

// to[i][c] = x[c][i] for `channels` and `count`, both rounded up to whole vectors.
template <typename A>
void transpose(VectorRows<const A> x, Rows<A> to, int64_t channels, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    for (int64_t c = 0; c < channels; c += kLanes<A>) {
      Vector<A> block[kLanes<A>];
      for (int64_t row = 0; row < kLanes<A>; ++row) block[row] = vector_at(x.at(c + row, i));
      transpose_block<A>(block);
      for (int64_t row = 0; row < kLanes<A>; ++row) vector_at(to.data + (i + row) * to.stride + c) = block[row];
    }
  }
}

// sums[row][column] += sum over i < count of g[row][i] x[i][column], for channels x channels sums; channels must be a
// multiple of the lanes.
template <typename A>
void sum_outer_products(VectorRows<const A> g, Rows<const A> x, A* sums, int64_t channels, int64_t count) {
  for (int64_t begin = 0, end; begin < count; begin = end) {
    end = begin + kLanes<A>;
    while (end < count && g.follows(end)) end += kLanes<A>;
    end = std::min(end, count);
    multiply<Small::right, Stores::cached, Start::result, A, kOuterRows, kOuterVectors>(
        {g.at(0, begin), g.stride}, {x.data + begin * x.stride, x.stride}, nullptr, {sums, channels}, channels,
        end - begin, channels);
  }
}

// target[lane] += total[lane] for at most `count` lanes.
template <typename A>
inline void add_lanes(const Vector<A>& total, A* target, int64_t count) {
  for (int64_t lane = 0; lane < std::min(count, kLanes<A>); ++lane) target[lane] += total[lane];
}

// sums[row + r][column + c] += sum over i < count of g[i][row + r] x[i][column + c]: the rows are summed over.
template <int rows, int vectors, typename A>
inline __attribute__((always_inline)) void sum_vectors(Rows<const A> g, Rows<const A> x, A* sums, int64_t channels,
                                                       int64_t count, int64_t row, int64_t column) {
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

template <int vectors, typename A>
inline void sum_columns(Rows<const A> g, Rows<const A> x, A* sums, int64_t channels, int64_t count, int64_t column) {
  int64_t row = 0;
  for (; row + kRows <= channels; row += kRows) sum_vectors<kRows, vectors>(g, x, sums, channels, count, row, column);
  for (; row < channels; ++row) sum_vectors<1, vectors>(g, x, sums, channels, count, row, column);
}

// sums[row][column] += sum over i < count of g[i][row] x[i][column], for channels x channels sums; rows of x are padded
// to whole vectors.
template <typename A>
void sum_over_rows(Rows<const A> g, Rows<const A> x, A* sums, int64_t channels, int64_t count) {
  int64_t column = 0;
  for (; column + (kVectors - 1) * kLanes<A> < channels; column += kVectors * kLanes<A>) {
    sum_columns<kVectors>(g, x, sums, channels, count, column);
  }
  for (; column < channels; column += kLanes<A>) sum_columns<1>(g, x, sums, channels, count, column);
}

}  // namespace glow_kernels::GLOW_KERNELS_ISA
