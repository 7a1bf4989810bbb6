// The affine coupling on the CPU. The mathematics stands in glow_kernels/ops/affine_coupling.py, the arithmetic in
// cpu/kernels/affine_coupling.cpp.
#include "cpu/affine_coupling.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <string>
#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "cpu/planes.h"

namespace glow_kernels {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Where the raw scale and the shift of channel c stand in h: at channel `first + step * c`.
struct CouplingLayout {
  int64_t scale_first, shift_first, step;
};

CouplingLayout parse_layout(const std::string& layout, int64_t channels) {
  if (layout == "chunk_scale_shift") return {0, channels, 1};
  if (layout == "chunk_shift_scale") return {channels, 0, 1};
  if (layout == "interleaved_scale_shift") return {0, 1, 2};
  STD_TORCH_CHECK(layout == "interleaved_shift_scale", "unknown layout ", layout);
  return {1, 0, 2};
}

ScaleKind parse_kind(const std::string& kind) {
  const char* names[] = {"sigmoid", "exp", "tanh", "atan", "softsign", "clip"};
  for (int index = 0; index < 6; ++index) {
    if (kind == names[index]) return static_cast<ScaleKind>(index);
  }
  STD_TORCH_CHECK(false, "unknown kind of scale map ", kind);
}

CouplingOrder parse_order(const std::string& order) {
  if (order == "shift_scale") return CouplingOrder::shift_scale;
  if (order == "scale_shift") return CouplingOrder::scale_shift;
  STD_TORCH_CHECK(order == "unshift_scale", "unknown order ", order);
  return CouplingOrder::unshift_scale;
}

CouplingOptions parse_options(const std::string& kind, const std::vector<double>& parameters,
                              const std::string& order) {
  STD_TORCH_CHECK(parameters.size() == 6, "scale_parameters must have 6 elements, got ", parameters.size());
  return {parse_kind(kind),
          parse_order(order),
          {parameters[0], parameters[1], parameters[2], parameters[3], parameters[4], parameters[5]}};
}

void check(const Tensor& x, const Tensor& h, const std::optional<Tensor>& log_scale_gain) {
  STD_TORCH_CHECK(!log_scale_gain.has_value(), "the native backend has no log_scale_gain");
  STD_TORCH_CHECK(x.dim() >= 2 && h.dim() == x.dim() && h.size(1) == 2 * x.size(1),
                  "h must have twice the channels of x");
  for (int64_t dimension = 0; dimension < x.dim(); ++dimension) {
    STD_TORCH_CHECK(dimension == 1 || h.size(dimension) == x.size(dimension),
                    "h must have the shape of x but for dim 1");
  }
}

template <typename T, typename H>
CouplingKernels<T, H> kernels() {
#if defined(GLOW_KERNELS_HAS_AVX512)
  if (isa() == Isa::avx512) return avx512::coupling_kernels<T, H>();
#endif
#if defined(GLOW_KERNELS_HAS_AVX2)
  if (isa() == Isa::avx2) return avx2::coupling_kernels<T, H>();
#endif
  return baseline::coupling_kernels<T, H>();
}

// Calls f.operator()<T, H>() with the types of x and h.
template <typename F>
auto dispatch(const Tensor& x, const Tensor& h, const F& f) {
  const ScalarType type = x.scalar_type(), h_type = h.scalar_type();
  if (type == ScalarType::Float && h_type == ScalarType::Float) return f.template operator()<float, float>();
  if (type == ScalarType::Float && h_type == ScalarType::BFloat16) return f.template operator()<float, BFloat16>();
  if (type == ScalarType::Float && h_type == ScalarType::Half) return f.template operator()<float, Half>();
  if (type == ScalarType::BFloat16 && h_type == type) return f.template operator()<BFloat16, BFloat16>();
  if (type == ScalarType::Half && h_type == type) return f.template operator()<Half, Half>();
  STD_TORCH_CHECK(type == ScalarType::Double && h_type == type, "unsupported types of x and h");
  return f.template operator()<double, double>();
}

// log_det (B,) from the sums of the tiles, which are added in a fixed order.
Tensor reduce(const std::vector<double>& sums, int64_t batches, int64_t per_sample, const Tensor& x) {
  const bool wide = x.scalar_type() == ScalarType::Double;
  Tensor log_det = empty_vector(batches, wide ? ScalarType::Double : ScalarType::Float, x);
  void* data = log_det.mutable_data_ptr();
  for (int64_t batch = 0; batch < batches; ++batch) {
    double total = 0;
    for (int64_t tile = 0; tile < per_sample; ++tile) total += sums[batch * per_sample + tile];
    if (wide) {
      static_cast<double*>(data)[batch] = total;
    } else {
      static_cast<float*>(data)[batch] = static_cast<float>(total);
    }
  }
  return log_det;
}

template <bool is_inverse>
std::tuple<Tensor, Tensor> transform(const Tensor& x_any, const Tensor& h_any, std::optional<Tensor> log_scale_gain,
                                     std::string kind, std::vector<double> scale_parameters, std::string layout_name,
                                     std::string order) {
  check(x_any, h_any, log_scale_gain);
  const CouplingOptions options = parse_options(kind, scale_parameters, order);
  const Tensor x = with_planes(x_any), h = with_planes(h_any);
  Tensor y = empty_output(x_any);
  return dispatch(x, h, [&]<typename T, typename H>() -> std::tuple<Tensor, Tensor> {
    const Planes x_planes = planes_of(x), h_planes = planes_of(h), y_planes = planes_of(y);
    const CouplingLayout layout = parse_layout(layout_name, x_planes.channels);
    const CouplingKernels<T, H> table = kernels<T, H>();
    const auto kernel = is_inverse ? table.inverse : table.forward;
    const T* x_data = x.const_data_ptr<T>();
    const H* h_data = h.const_data_ptr<H>();
    T* y_data = y.mutable_data_ptr<T>();
    const Tiling tiling(y_planes);
    std::vector<double> sums(tiling.size());
    torch::stable::parallel_for(0, tiling.size(), kTilesPerThread, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        const Tile tile = tiling[index];
        sums[index] = kernel(tiling.at(tile, x_data, x_planes),
                             tiling.at(tile, h_data, h_planes, layout.scale_first, layout.step),
                             tiling.at(tile, h_data, h_planes, layout.shift_first, layout.step),
                             tiling.at(tile, y_data, y_planes), tile.rows, tile.columns, options);
      }
    });
    return {y, reduce(sums, x_planes.batches, tiling.per_sample(), x)};
  });
}

template <bool is_inverse>
std::tuple<Tensor, Tensor, Tensor> gradients(const Tensor& grad_any, const Tensor& grad_log_det_any,
                                             const Tensor& y_any, const Tensor& h_any,
                                             std::optional<Tensor> log_scale_gain, std::string kind,
                                             std::vector<double> scale_parameters, std::string layout_name,
                                             std::string order) {
  check(y_any, h_any, log_scale_gain);
  const CouplingOptions options = parse_options(kind, scale_parameters, order);
  const Tensor grad = with_planes(grad_any), y = with_planes(y_any), h = with_planes(h_any);
  const Tensor grad_log_det = as_contiguous(grad_log_det_any);
  Tensor grad_x = empty_output(y_any), grad_h = empty_output(h_any);
  return dispatch(y, h, [&]<typename T, typename H>() -> std::tuple<Tensor, Tensor, Tensor> {
    const Planes grad_planes = planes_of(grad), y_planes = planes_of(y), h_planes = planes_of(h);
    const Planes grad_x_planes = planes_of(grad_x), grad_h_planes = planes_of(grad_h);
    const CouplingLayout layout = parse_layout(layout_name, y_planes.channels);
    const CouplingKernels<T, H> table = kernels<T, H>();
    const auto kernel = is_inverse ? table.inverse_backward : table.backward;
    const T *grad_data = grad.const_data_ptr<T>(), *y_data = y.const_data_ptr<T>();
    const H* h_data = h.const_data_ptr<H>();
    const compute_t<T>* lambda = grad_log_det.const_data_ptr<compute_t<T>>();
    T* grad_x_data = grad_x.mutable_data_ptr<T>();
    H* grad_h_data = grad_h.mutable_data_ptr<H>();
    const Tiling tiling(grad_x_planes);
    torch::stable::parallel_for(0, tiling.size(), kTilesPerThread, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        const Tile tile = tiling[index];
        kernel(tiling.at(tile, grad_data, grad_planes), lambda[tile.batch], tiling.at(tile, y_data, y_planes),
               tiling.at(tile, h_data, h_planes, layout.scale_first, layout.step),
               tiling.at(tile, h_data, h_planes, layout.shift_first, layout.step),
               tiling.at(tile, grad_x_data, grad_x_planes),
               tiling.at(tile, grad_h_data, grad_h_planes, layout.scale_first, layout.step),
               tiling.at(tile, grad_h_data, grad_h_planes, layout.shift_first, layout.step), tile.rows, tile.columns,
               options);
      }
    });
    return {grad_x, grad_h, empty_vector(0, grad_log_det.scalar_type(), y)};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(glow_kernels, CPU, m) {
  m.impl("affine_coupling_forward_native", TORCH_BOX(&transform<false>));
  m.impl("affine_coupling_inverse_native", TORCH_BOX(&transform<true>));
  m.impl("affine_coupling_backward_native", TORCH_BOX(&gradients<false>));
  m.impl("affine_coupling_inverse_backward_native", TORCH_BOX(&gradients<true>));
}

}  // namespace glow_kernels
