// Memory that a thread keeps between calls: newly allocated memory the size of a matrix would cost page faults.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace glow_kernels {

template <typename A>
class KeptBuffer {
 public:
  // At least `size` elements, aligned for the vectors of every instruction set. Old contents may be lost.
  A* reserve(int64_t size) {
    if (size > size_) {
      constexpr int64_t kAlignment = 64;
      const int64_t bytes = (size * int64_t{sizeof(A)} + kAlignment - 1) / kAlignment * kAlignment;
      values_.reset(static_cast<A*>(std::aligned_alloc(kAlignment, bytes)));
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

}  // namespace glow_kernels
