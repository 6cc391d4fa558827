// gather_patches: reads only the kept patches of an image, and normalises, casts and stores them as rows.

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "common/kept.h"
#include "common/ops.h"
#include "common/parallel.h"
#include "cpu/isa/rows.h"
#include "cpu/kinds.h"
#include "cpu/large_pages.h"
#include "cpu/output.h"

namespace oner_fast {
namespace {

constexpr const char* kOp = "gather_patches";
constexpr int64_t kAhead = 4;        // patches from the one being read to the one being prefetched
constexpr int64_t kGrain = 1 << 15;  // pixels: less is not worth another thread
// Bytes. Few bytes are read for each one written. A result of this size may still be in the last-level cache from the
// call before, and the next product reads it, so it is better written through the cache.
constexpr int64_t kStreamedFrom = 64 << 20;

std::vector<double> per_channel(const char* name, const OptionalTensor& values, int64_t channels, double otherwise) {
  if (!values.has_value()) return std::vector<double>(static_cast<size_t>(channels), otherwise);
  CHECK_VALUE(values->dim() == 1 && values->size(0) == channels, kOp, ": ", name, " must have shape (", channels,
              ",), got ", values->sizes());
  const Tensor doubles = dense(of_type(*values, kDouble));
  const double* first = static_cast<const double*>(doubles.const_data_ptr());
  return {first, first + channels};
}

Kind pixel_kind(const Tensor& images) {
  return type_of(images) == kByte ? kU8 : kind_of(kOp, "images", type_of(images));
}

void check_sides(int64_t height, int64_t width, int64_t patch) {
  CHECK_VALUE(patch > 0 && height % patch == 0 && width % patch == 0, kOp,
              ": the sides of images must be multiples of patch_size ", patch, ", got ", height, " x ", width);
}

}  // namespace

Tensor gather_patches(const Tensor& images_in, const Tensor& kept_in, int64_t patch, const OptionalTensor& mean,
                      const OptionalTensor& std, ScalarType dtype, const OptionalTensor& cu_seqlens) {
  CHECK_VALUE(images_in.dim() == 4, kOp, ": images must have shape (B, C, H, W), got ", images_in.sizes());
  const Kind in = pixel_kind(images_in), out_kind = kind_of(kOp, "dtype", dtype);
  const Tensor images = images_in.stride(3) == 1 ? images_in : dense(images_in);
  const int64_t samples = images.size(0), channels = images.size(1), height = images.size(2), width = images.size(3);
  check_sides(height, width, patch);
  const int64_t across = width / patch, cells = (height / patch) * across;
  const Kept kept(kOp, kept_in, cu_seqlens, samples, cells);
  std::vector<double> shift = per_channel("mean", mean, channels, 0.0),
                      divisor = per_channel("std", std, channels, 1.0);
  if (in == kU8) {  // (x / 255 - mean) / std = (x - 255 mean) / (255 std)
    for (double& value : shift) value *= 255.0;
    for (double& value : divisor) value *= 255.0;
  }

  const int64_t square = patch * patch, row_width = channels * square;
  const Tensor out = with_large_pages(kept.ragged() ? empty({kept.total(), row_width}, dtype, images)
                                                    : empty({samples, kept_in.size(1), row_width}, dtype, images));
  if (out.numel() == 0) return out;

  const auto normalise = row_kernels().normalise[in][out_kind];
  const int64_t in_size = item_size(images), out_size = item_size(out), line_bytes = images.stride(2) * in_size;
  const char* from = static_cast<const char*>(images.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const Output output(kept.total() * row_width * out_size, kStreamedFrom);
  // A large result is written in the order of the patches in their images, so that images are read in memory order.
  std::optional<Inverse> ordered;
  if (output.streamed()) ordered.emplace(kept, cells);
  const auto entry = [&](int64_t place) { return ordered.has_value() ? ordered->in_order(place) : place; };
  const int64_t image_stride = images.stride(0), channel_stride = images.stride(1), line_stride = images.stride(2);
  const auto corner = [&](int64_t b, int64_t cell, int64_t c) {
    const int64_t y = cell / across * patch, x = cell % across * patch;
    return from + (b * image_stride + c * channel_stride + y * line_stride + x) * in_size;
  };
  parallel_for(0, kept.total(), std::max<int64_t>(1, kGrain / row_width), [&](int64_t first, int64_t last) {
    std::vector<double> room(output.streamed() ? static_cast<size_t>((square * out_size + 7) / 8) : 0);
    int64_t b = kept.sample_of_row(first, 0);
    for (int64_t place = first; place < last; ++place) {
      while (place >= kept.begin(b + 1)) ++b;
      const int64_t i = entry(place);
      char* row = to + i * row_width * out_size;
      for (int64_t c = 0; c < channels; ++c) {
        // The lines of a patch are far apart, so the hardware prefetches none of them.
        if (place + kAhead < kept.begin(b + 1)) {
          const char* soon = corner(b, kept[entry(place + kAhead)], c);
          for (int64_t line = 0; line < patch; ++line) __builtin_prefetch(soon + line * line_bytes);
        }
        char* part = row + c * square * out_size;
        normalise(output.streamed() ? static_cast<void*>(room.data()) : part, corner(b, kept[i], c), line_stride, patch,
                  shift[static_cast<size_t>(c)], divisor[static_cast<size_t>(c)]);
        if (output.streamed()) output.copy(part, room.data(), square * out_size, nullptr);
      }
    }
    output.finish();
  });
  return out;
}

Tensor gather_patches_backward(const Tensor& grad_in, const Tensor& kept_in, int64_t patch, const OptionalTensor& std,
                               const IntList& image_shape, ScalarType dtype, const OptionalTensor& cu_seqlens) {
  CHECK_VALUE(image_shape.size() == 4, kOp, ": image_shape must hold 4 numbers, got ", image_shape);
  const Kind grad_kind = kind_of(kOp, "the gradient", type_of(grad_in)), out_kind = kind_of(kOp, "images", dtype);
  const int64_t samples = image_shape[0], channels = image_shape[1], height = image_shape[2], width = image_shape[3];
  check_sides(height, width, patch);
  const int64_t across = width / patch, cells = (height / patch) * across;
  const Kept kept(kOp, kept_in, cu_seqlens, samples, cells);
  const int64_t square = patch * patch, row_width = channels * square;
  const Tensor grad = dense(grad_in);
  CHECK_VALUE(grad.numel() == kept.total() * row_width, kOp, ": the gradient has shape ", grad.sizes(), ", needed ",
              kept.total(), " rows of ", row_width);
  const std::vector<double> divisor = per_channel("std", std, channels, 1.0);
  const Tensor out = with_large_pages(empty(image_shape, dtype, grad));
  if (out.numel() == 0) return out;

  const RowKernels& row = row_kernels();
  const Inverse inverse(kept, cells);
  const bool is_double = grad_kind == kF64 || out_kind == kF64;
  const char* from = static_cast<const char*>(grad.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t grad_size = item_size(grad), out_size = item_size(out), wide = is_double ? 8 : 4;
  // Each thread writes every patch that it owns, kept or not.
  parallel_for(0, samples * cells, std::max<int64_t>(1, kGrain / row_width), [&](int64_t first, int64_t last) {
    std::vector<double> room(static_cast<size_t>(row_width));
    char* sums = reinterpret_cast<char*>(room.data());
    for (int64_t i = first; i < last; ++i) {
      const int64_t b = i / cells, n = i % cells, y = n / across * patch, x = n % across * patch;
      std::memset(sums, 0, static_cast<size_t>(row_width * wide));
      for (const int64_t* entry = inverse.begin(b, n); entry != inverse.end(b, n); ++entry)
        row.accumulate[grad_kind][is_double](sums, from + *entry * row_width * grad_size, row_width);
      for (int64_t c = 0; c < channels; ++c) {
        const double d = divisor[static_cast<size_t>(c)];
        char* part = sums + c * square * wide;
        if (is_double) {
          for (int64_t j = 0; j < square; ++j) reinterpret_cast<double*>(part)[j] /= d;
        } else {
          for (int64_t j = 0; j < square; ++j) reinterpret_cast<float*>(part)[j] /= static_cast<float>(d);
        }
        for (int64_t line = 0; line < patch; ++line) {
          const int64_t target = ((b * channels + c) * height + y + line) * width + x;
          row.store[out_kind][is_double](to + target * out_size, part + line * patch * wide, patch);
        }
      }
    }
  });
  return out;
}

}  // namespace oner_fast
