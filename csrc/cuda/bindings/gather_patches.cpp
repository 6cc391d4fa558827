#include "cuda/bindings/arguments.h"
#include "cuda/bindings/ops.h"

namespace oner_fast::cuda {
namespace {

constexpr const char* kOp = "gather_patches";

OptionalTensor per_channel(const char* name, const OptionalTensor& values, int64_t channels) {
  if (!values.has_value()) return {};
  CHECK_VALUE(values->dim() == 1 && values->size(0) == channels, kOp, ": ", name, " must have shape (", channels,
              ",), got ", values->sizes());
  return dense(of_type(*values, kDouble));
}

void check_sides(int64_t height, int64_t width, int64_t patch) {
  CHECK_VALUE(patch > 0 && height % patch == 0 && width % patch == 0, kOp,
              ": the sides of images must be multiples of patch_size ", patch, ", got ", height, " x ", width);
}

}  // namespace

Tensor gather_patches(const Tensor& images_in, const Tensor& kept_in, int64_t patch, const OptionalTensor& mean_in,
                      const OptionalTensor& std_in, ScalarType dtype, const OptionalTensor& cu_seqlens) {
  CHECK_VALUE(images_in.dim() == 4, kOp, ": images must have shape (B, C, H, W), got ", images_in.sizes());
  same_device(kOp, images_in, {kept_in, mean_in, std_in, cu_seqlens});
  const Launch launch(images_in);
  const Tensor images = images_in.stride(3) == 1 ? images_in : dense(images_in);  // words of a line are read
  const int64_t samples = images.size(0), channels = images.size(1), height = images.size(2), width = images.size(3);
  check_sides(height, width, patch);
  const int64_t across = width / patch, cells = (height / patch) * across;
  const KeptTensor kept(kOp, kept_in, cu_seqlens, samples, cells);
  const OptionalTensor mean = per_channel("mean", mean_in, channels), std = per_channel("std", std_in, channels);
  const int64_t row = narrow_size(kOp, "the number of pixels of a patch", channels * patch * patch);
  const Tensor out = cu_seqlens.has_value() ? empty({kept.kept.total, row}, dtype, images)
                                            : empty({samples, kept_in.size(1), row}, dtype, images);
  GatherPatches call{};
  call.images = data(images);
  call.out = result(out);
  call.mean = static_cast<const double*>(data(mean));
  call.std = static_cast<const double*>(data(std));
  call.kept = kept.kept;
  call.sample_stride = images.stride(0);
  call.channel_stride = images.stride(1);
  call.line_stride = images.stride(2);
  call.channels = static_cast<int32_t>(channels);
  call.patch = static_cast<int32_t>(patch);
  call.across = narrow_size(kOp, "the number of patches in a line", across);
  call.image_number = number_of(kOp, "images", images.scalar_type());
  call.out_number = number_of(kOp, "dtype", dtype);
  CHECK_TYPE(call.out_number != kU8, kOp, ": dtype must be floating, got ", dtype);
  STD_CUDA_CHECK(oner_fast_gather_patches(&call, launch.stream()));
  return out;
}

Tensor gather_patches_backward(const Tensor& grad_in, const Tensor& kept_in, int64_t patch,
                               const OptionalTensor& std_in, const IntList& image_shape, ScalarType dtype,
                               const OptionalTensor& cu_seqlens) {
  CHECK_VALUE(image_shape.size() == 4, kOp, ": image_shape must hold 4 numbers, got ", image_shape.size());
  same_device(kOp, grad_in, {kept_in, std_in, cu_seqlens});
  const Launch launch(grad_in);
  const int64_t samples = image_shape[0], channels = image_shape[1], height = image_shape[2], width = image_shape[3];
  check_sides(height, width, patch);
  const int64_t across = width / patch, down = height / patch;
  const KeptTensor kept(kOp, kept_in, cu_seqlens, samples, down * across);
  const int64_t row = narrow_size(kOp, "the number of pixels of a patch", channels * patch * patch);
  const Tensor grad = dense(grad_in);
  const OptionalTensor std = per_channel("std", std_in, channels);
  CHECK_VALUE(grad.numel() == kept.kept.total * row, kOp, ": the gradient has shape ", grad.sizes(), ", needed ",
              kept.kept.total, " rows of ", row);
  const Tensor out = empty(image_shape, dtype, grad);
  const Tensor choices = empty({samples, down * across, 2}, kInt, grad);
  GatherPatchesBackward call{};
  call.grad = data(grad);
  call.to_images = result(out);
  call.std = static_cast<const double*>(data(std));
  call.choices = static_cast<Choice*>(result(choices));
  call.kept = kept.kept;
  call.channels = static_cast<int32_t>(channels);
  call.patch = static_cast<int32_t>(patch);
  call.across = narrow_size(kOp, "the number of patches in a line", across);
  call.down = narrow_size(kOp, "the number of lines of patches", down);
  call.grad_number = number_of(kOp, "the gradient", grad.scalar_type());
  call.image_number = number_of(kOp, "images", dtype);
  CHECK_TYPE(call.grad_number != kU8 && call.image_number != kU8, kOp, ": gradients are floating, got ", dtype);
  STD_CUDA_CHECK(oner_fast_gather_patches_backward(&call, launch.stream()));
  return out;
}

}  // namespace oner_fast::cuda
